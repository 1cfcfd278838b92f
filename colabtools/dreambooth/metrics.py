"""Fidelity of pictures as numbers, from embeddings alone.

Source of the metrics: Ruiz et al., arXiv 2208.12242, sections 4.1 (DINO, CLIP-I, CLIP-T) and 4.3
(PRES, DIV).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "PAPER",
    "ClassDrift",
    "Embedded",
    "PromptScores",
    "Scores",
    "class_drift",
    "cosines",
    "mean_pairwise",
    "mean_self_pairwise",
    "nested_mean",
    "score_prompts",
    "summarize",
]

# DINO, CLIP-I and CLIP-T over 30 subjects, 25 prompts and 4 pictures each.
# Source: arXiv 2208.12242, table 1.
PAPER: dict[str, tuple[float, float, float | None]] = {
    "real photos": (0.774, 0.885, None),
    "DreamBooth, Stable Diffusion": (0.668, 0.803, 0.305),
}


@dataclass(frozen=True)
class Embedded:
    """Where N pictures lie: `dino` (N, D) and `clip` (N, E), float32."""

    dino: torch.Tensor
    clip: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """What each picture of a prompt scores."""

    prompt: str
    dino: tuple[float, ...]
    clip_i: tuple[float, ...]
    clip_t: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Subject fidelity (`dino`, `clip_i`), prompt fidelity (`clip_t`), all larger is better.

    `real_dino` and `real_clip_i` are what the photos score among themselves, None for one photo.
    """

    dino: float
    clip_i: float
    clip_t: float
    real_dino: float | None
    real_clip_i: float | None


@dataclass(frozen=True, kw_only=True)
class ClassDrift:
    """What training did to pictures of the class, drawn from the same noise before and after.

    Attributes:
        prompt: the class prompt.
        likeness_before: DINO of the base model's class pictures and the photos.
        likeness_after: the same after training, the paper's PRES; where it has risen, the whole
            class has moved towards the subject.
        diversity_before: mean DINO distance (1 - cosine) between two of the base model's class
            pictures. The paper's DIV measures by LPIPS, so numbers do not compare with it.
        diversity_after: the same after training.
        clip_i: CLIP-I of the class pictures after training and before.
        clip_i_before: CLIP-I of the base model's class pictures among themselves.
    """

    prompt: str
    likeness_before: float
    likeness_after: float
    diversity_before: float
    diversity_after: float
    clip_i: float
    clip_i_before: float


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every row of `a` (N, D) with every row of `b` (M, D), (N, M) float64."""
    a, b = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (a, b))
    return a @ b.T


def mean_pairwise(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the mean cosine over all pairs of a row of `a` (N, D) and one of `b` (M, D)."""
    return float(cosines(a, b).mean())


def mean_self_pairwise(a: torch.Tensor) -> float | None:
    """Return the mean cosine over all pairs of two rows of `a` (N, D), no row with itself.

    Of photos' embeddings: what no generated picture can be asked to pass. None for one row.
    """
    if len(a) < 2:
        return None
    others = ~torch.eye(len(a), dtype=torch.bool)
    return float(cosines(a, a)[others].mean())


def nested_mean(values: Mapping[str, Mapping[str, Sequence[float]]]) -> float:
    """Return the mean over subjects of the mean over prompts of the mean over pictures.

    A subject or a prompt with more pictures than others weighs no more than they do.

    Args:
        values: subject to prompt to the value of each picture; none of them empty.
    """
    return fmean(fmean(fmean(v) for v in prompts.values()) for prompts in values.values())


def score_prompts(
    prompts: Sequence[str], pictures: Embedded, photos: Embedded, texts: torch.Tensor
) -> tuple[PromptScores, ...]:
    """Return the scores of each prompt's pictures.

    Args:
        prompts: P of them.
        pictures: first those of the first prompt, as many for each.
        photos: the subject's.
        texts: (P, E), where CLIP puts what each prompt asks for.
    """
    count = len(prompts)
    dino = cosines(pictures.dino, photos.dino).mean(1).view(count, -1).tolist()
    clip_i = cosines(pictures.clip, photos.clip).mean(1).view(count, -1).tolist()
    by_text = cosines(pictures.clip, texts).view(count, -1, count)  # (P, pictures of each, P)
    clip_t = by_text.diagonal(dim1=0, dim2=2).T.tolist()
    return tuple(
        PromptScores(
            prompt=prompt, dino=tuple(dino[i]), clip_i=tuple(clip_i[i]), clip_t=tuple(clip_t[i])
        )
        for i, prompt in enumerate(prompts)
    )


def summarize(subject: str, rows: Sequence[PromptScores], photos: Embedded) -> Scores:
    """Return the scores of a subject over all its prompts, beside those of its photos."""

    def mean(metric: str) -> float:
        return nested_mean({subject: {row.prompt: getattr(row, metric) for row in rows}})

    return Scores(
        dino=mean("dino"),
        clip_i=mean("clip_i"),
        clip_t=mean("clip_t"),
        real_dino=mean_self_pairwise(photos.dino),
        real_clip_i=mean_self_pairwise(photos.clip),
    )


def class_drift(prompt: str, before: Embedded, after: Embedded, photos: Embedded) -> ClassDrift:
    """Return what became of the class, from two and more pictures before training and after."""
    within = [mean_self_pairwise(e) or 0.0 for e in (before.dino, after.dino, before.clip)]
    return ClassDrift(
        prompt=prompt,
        likeness_before=mean_pairwise(before.dino, photos.dino),
        likeness_after=mean_pairwise(after.dino, photos.dino),
        diversity_before=1 - within[0],
        diversity_after=1 - within[1],
        clip_i=mean_pairwise(after.clip, before.clip),
        clip_i_before=within[2],
    )
