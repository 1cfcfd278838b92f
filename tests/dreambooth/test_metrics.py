from __future__ import annotations

import math

import pytest
import torch

from colabtools.dreambooth import metrics
from colabtools.dreambooth.metrics import Embedded, PromptScores

APPROX = {"abs": 1e-6}


def _random(rows: int, seed: int, width: int = 8) -> torch.Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed))


def test_one_direction_scores_one_and_right_angles_nothing() -> None:
    same = torch.tensor([[3.0, 4.0]]).repeat(3, 1)
    assert metrics.mean_pairwise(same, 7 * same) == pytest.approx(1, **APPROX)
    assert metrics.mean_pairwise(same, -same) == pytest.approx(-1, **APPROX)
    axes = torch.eye(4)
    assert metrics.mean_pairwise(axes[:2], axes[2:]) == pytest.approx(0, **APPROX)


def test_no_row_is_compared_with_itself() -> None:
    assert metrics.mean_self_pairwise(torch.eye(3)) == pytest.approx(0, **APPROX)
    assert metrics.mean_pairwise(torch.eye(3), torch.eye(3)) == pytest.approx(1 / 3, **APPROX)
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert metrics.mean_self_pairwise(twins) == pytest.approx(2 / 6, **APPROX)


def test_one_row_has_nothing_to_be_compared_with() -> None:
    assert metrics.mean_self_pairwise(torch.ones(1, 4)) is None


def test_a_mean_is_over_pairs_and_not_the_cosine_of_means() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    diagonal = torch.tensor([[1.0, 1.0]])
    assert metrics.mean_pairwise(rows, diagonal) == pytest.approx(math.sqrt(0.5), **APPROX)
    assert metrics.mean_pairwise(rows, rows) == pytest.approx(0.5, **APPROX)


def test_neither_order_nor_length_of_the_rows_counts() -> None:
    a, b = _random(9, 0), _random(5, 1)
    expected = metrics.mean_pairwise(a, b)
    shuffled = a[torch.randperm(9, generator=torch.Generator().manual_seed(2))]
    assert metrics.mean_pairwise(shuffled, b.flip(0)) == pytest.approx(expected, abs=1e-12)
    longer = a * torch.arange(1, 10)[:, None]
    assert metrics.mean_pairwise(longer, b) == pytest.approx(expected, abs=1e-7)


def test_subjects_weigh_the_same_and_so_do_their_prompts() -> None:
    values = {
        "dog": {"snow": [1.0, 1.0, 1.0, 1.0], "beach": [0.0]},
        "cat": {"snow": [0.1, 0.3]},
    }
    assert metrics.nested_mean(values) == pytest.approx((0.5 + 0.2) / 2)


def test_every_picture_is_held_against_all_photos_and_its_own_prompt() -> None:
    axes = torch.eye(4)
    pictures = Embedded(dino=axes[[0, 1, 2, 3]], clip=axes[[0, 0, 1, 2]])
    photos = Embedded(dino=axes[[0, 0, 0, 1]], clip=axes[[0, 1]])
    first, second = metrics.score_prompts(["a", "b"], pictures, photos, axes[[0, 1]])
    assert (first.prompt, second.prompt) == ("a", "b")
    assert first.dino + second.dino == pytest.approx((0.75, 0.25, 0, 0))
    assert first.clip_i + second.clip_i == pytest.approx((0.5, 0.5, 0.5, 0))
    assert first.clip_t + second.clip_t == pytest.approx((1, 1, 1, 0))


def test_the_summary_is_over_prompts_beside_what_the_photos_score() -> None:
    rows = [
        PromptScores(prompt="a", dino=(1.0, 0.0), clip_i=(0.2, 0.2), clip_t=(0.3, 0.5)),
        PromptScores(prompt="b", dino=(0.0, 0.0), clip_i=(0.6, 0.6), clip_t=(0.0, 0.0)),
    ]
    photos = Embedded(dino=torch.ones(2, 3), clip=torch.eye(2))
    scores = metrics.summarize("dog", rows, photos)
    assert (scores.dino, scores.clip_i, scores.clip_t) == pytest.approx((0.25, 0.4, 0.2))
    assert (scores.real_dino, scores.real_clip_i) == pytest.approx((1, 0), **APPROX)
    single = metrics.summarize("dog", rows, Embedded(torch.ones(1, 3), torch.ones(1, 2)))
    assert (single.real_dino, single.real_clip_i) == (None, None)


def test_a_class_that_became_the_subject_is_seen() -> None:
    axes = torch.eye(4)
    photos = Embedded(dino=axes[[0, 0]], clip=axes[[0, 0]])
    before = Embedded(dino=axes[[1, 2]], clip=axes[[1, 2]])
    kept = metrics.class_drift("a dog", before, before, photos)
    assert (kept.likeness_before, kept.likeness_after) == pytest.approx((0, 0), **APPROX)
    assert (kept.diversity_before, kept.diversity_after) == pytest.approx((1, 1), **APPROX)
    assert (kept.clip_i, kept.clip_i_before) == pytest.approx((0.5, 0), **APPROX)
    lost = metrics.class_drift("a dog", before, photos, photos)
    assert (lost.likeness_before, lost.likeness_after) == pytest.approx((0, 1), **APPROX)
    assert (lost.diversity_before, lost.diversity_after) == pytest.approx((1, 0), **APPROX)
    assert lost.clip_i == pytest.approx(0, **APPROX)
