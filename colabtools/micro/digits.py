"""The handwritten digits that the embedded ViT is trained and graded on, in one fixed split.

scikit-learn ships 1,797 pictures of 8 x 8 pixels. They are divided once, every class in its share,
with a fixed seed:

| split      | pictures | for                                      |
|------------|----------|------------------------------------------|
| train      | 1,257    | fitting weights                          |
| validation | 180      | choosing a recipe, fitting a temperature |
| test       | 360      | the figure that is reported, and no more |

The same 13 people wrote all three parts, so a test figure says nothing about a hand that is new to
the model.

Source: scikit-learn `datasets/descr/digits.rst`, a copy of the test part of UCI "Optical
Recognition of Handwritten Digits".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from colabtools.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SPLIT_SIZES", "Digits", "load_digits", "split_indices"]

SPLIT_SIZES = {"train": 1257, "validation": 180, "test": 360}
_SEED = 0
_INK_LEVELS = 16  # Source: digits.rst, "integer pixels in the range 0..16"


@dataclass(frozen=True, kw_only=True)
class Digits:
    """One part of the digits.

    Attributes:
        images: (N, 8, 8, 3) uint8, white ink on black, the three channels equal.
        labels: (N,) int64 in 0..9.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def load_digits(split: str) -> Digits:
    """Return the pictures and labels of one split: "train", "validation" or "test".

    Raises:
        ConfigError: There is no split of that name.
        MissingDependencyError: scikit-learn is not installed.
    """
    indices = split_indices(split)
    bundle = _bundle()
    ink = bundle.images[indices]
    grey = np.rint(ink * (255 / _INK_LEVELS)).astype(np.uint8)
    return Digits(
        images=np.repeat(grey[..., np.newaxis], 3, axis=-1),
        labels=bundle.target[indices].astype(np.int64),
    )


def split_indices(split: str) -> NDArray[np.int64]:
    """Return the rows of scikit-learn's set that form one split: (N,) int64, ascending.

    Raises:
        ConfigError: There is no split of that name.
        MissingDependencyError: scikit-learn is not installed.
    """
    if split not in SPLIT_SIZES:
        raise ConfigError(
            f"no split named {split!r} in the digits; use one of {', '.join(SPLIT_SIZES)}"
        )
    labels = _bundle().target
    rest, test = _divide(np.arange(len(labels)), labels, SPLIT_SIZES["test"])
    train, validation = _divide(rest, labels, SPLIT_SIZES["validation"])
    return {"train": train, "validation": validation, "test": test}[split]


def _divide(
    indices: NDArray[np.int64], labels: NDArray[np.int64], held_out: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (kept, held out), both ascending, with every class in its share."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(
        indices, test_size=held_out, stratify=labels[indices], random_state=_SEED
    )
    kept, held = (np.sort(part).astype(np.int64) for part in parts)
    return kept, held


def _bundle() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn, which is missing; run: pip install scikit-learn"
        ) from error
    return datasets.load_digits()
