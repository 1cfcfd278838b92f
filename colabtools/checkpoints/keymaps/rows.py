"""The tables under `maps/`: each row is one tensor of the single file and what it is made of."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Row", "Segment", "load_rows"]

_MAPS = Path(__file__).parent / "maps"


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a single-file tensor along its first dimension, and the folder's tensor there.

    Attributes:
        name: of the tensor in the folder.
        weight: how much of the first dimension it takes, as against the row's other segments.
        half: 0 or 1 where it is only the first or the second half of the folder's tensor.
        squeeze: whether the folder's tensor lacks the trailing dimensions of 1.
        transpose: whether the folder's matrix is the transposed one.
    """

    name: str
    weight: int = 1
    half: int | None = None
    squeeze: bool = False
    transpose: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of the single file.

    Attributes:
        name: without the prefix of its part.
        shape: for each dimension the sizes that published models have.
        segments: what follows each other along the first dimension; empty for a fill.
        fill: "identity" for a matrix that is made on the way in and dropped on the way back.
    """

    name: str
    shape: tuple[tuple[int, ...], ...]
    segments: tuple[Segment, ...]
    fill: str = ""

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether a published model has this tensor in this shape."""
        return len(shape) == len(self.shape) and all(
            size in known for size, known in zip(shape, self.shape, strict=True)
        )


@functools.cache
def load_rows(table: str) -> tuple[Row, ...]:
    """Return the rows of a table, sorted by name; `table` is a file name without its ending."""
    text = (_MAPS / f"{table}.tsv").read_text(encoding="utf-8")
    return tuple(_row(line) for line in text.splitlines() if not line.startswith("#"))


def _row(line: str) -> Row:
    name, sizes, made_of = line.split("\t")
    shape = tuple(tuple(map(int, size.split("|"))) for size in sizes.split(","))
    if made_of.startswith("="):
        return Row(name, shape, (), made_of[1:])
    return Row(name, shape, tuple(map(_segment, made_of.split(" "))))


def _segment(text: str) -> Segment:
    name, _, mark = text.partition(":")
    return Segment(
        name,
        weight=int(mark[1:]) if mark.startswith("x") else 1,
        half=int(mark[-1]) if mark.startswith("half") else None,
        squeeze=mark == "squeeze",
        transpose=mark == "transpose",
    )
