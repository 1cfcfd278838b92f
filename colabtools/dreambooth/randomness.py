"""Chance that can be repeated: each example's own draws, and the state of all generators.

Every draw of the training comes from a generator that is seeded by what it is for (stage, update,
place in the batch) and not by what was drawn before. So an example is the same whether it is
trained alone or in a batch, by one process or by several, at once or after an interruption.
"""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["capture_rng", "derive_seed", "generator_for", "kept_rng", "restore_rng"]


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that belongs to these parts, the same on every machine."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def capture_rng() -> dict[str, Any]:
    """Return the state of Python's, NumPy's, torch's and every GPU's generator."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global one is what others draw from
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put all generators back into a captured state.

    GPUs that are not there any more, or were not there then, are left as they are.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for index, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, index)


@contextmanager
def kept_rng() -> Iterator[None]:
    """Let the block draw what it wants, and put all generators back after it."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)
