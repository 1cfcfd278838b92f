from __future__ import annotations

import random

import numpy as np
import torch

from colabtools.dreambooth.randomness import (
    capture_rng,
    derive_seed,
    generator_for,
    kept_rng,
    restore_rng,
)


def draw_all() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_a_seed_belongs_to_its_parts_and_to_nothing_else() -> None:
    # A golden value: another would change every run that was ever interrupted.
    assert derive_seed(0, 1, 2, "instance", 3) == 4589542828692348357
    parts = [(0, 1), (1, 0), ("0", 1), (0, "1"), (0, 1, 0), ("01",)]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_of_neighbours_have_nothing_in_common() -> None:
    draws = torch.stack([torch.randn(4096, generator=generator_for(0, i)) for i in range(20)])
    correlation = torch.corrcoef(draws).fill_diagonal_(0).abs().max()
    # 4096 numbers: a standard error of 1/64.
    assert correlation < 5 / 64


def test_a_restored_state_draws_the_same_again() -> None:
    state = capture_rng()
    first = draw_all()
    assert draw_all() != first
    restore_rng(state)
    assert draw_all() == first


def test_what_a_block_draws_leaves_no_trace() -> None:
    state = capture_rng()
    expected = draw_all()
    restore_rng(state)
    with kept_rng():
        draw_all()
        torch.manual_seed(3)
    assert draw_all() == expected
