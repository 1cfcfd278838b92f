"""What will be written, complete and proven before the first byte of it is.

A plan names every tensor of the output and the byte ranges that it is made of. It exists only if
the sources hold exactly the tensors of the family, no name more and none less, in its shapes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from colabtools.checkpoints.headers import DTYPE_BYTES, TensorEntry, one_line
from colabtools.checkpoints.keymaps.families import (
    FamilyMap,
    Part,
    ema_name,
    folder_spelling,
    is_dropped,
    single_spelling,
)
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from colabtools.checkpoints.keymaps.rows import Row, Segment
    from colabtools.checkpoints.sources import Tensor, Tensors

__all__ = [
    "DTYPES",
    "Piece",
    "Target",
    "is_published",
    "plan_folder",
    "plan_plain",
    "plan_rewrite",
    "plan_single",
    "split_parts",
]

# What a user asks for, and safetensors' code for it.
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_FLOATS = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
# From this share of published shapes on, the others are faults rather than another width.
_PUBLISHED_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of a source tensor from `begin` up to `end`, counted from its own first."""

    source: Tensor
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output.

    Attributes:
        dtype: the code that safetensors has for it; each piece is cast to it.
        pieces: what follows each other in it; none for a fill, one for a transposed matrix.
        transpose: whether it is the transposed matrix of its piece.
        fill: "identity" for a matrix that no source has.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transpose: bool = False
    fill: str = ""

    @property
    def size_bytes(self) -> int:
        """Length of the tensor's bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of files, in the order of its pieces."""
        return not (self.transpose or self.fill) and all(
            isinstance(piece.source, TensorEntry) and piece.source.dtype == self.dtype
            for piece in self.pieces
        )


def plan_single(
    family: FamilyMap, parts: Mapping[str, Tensors], dtype: str = "keep", *, bare: bool = False
) -> list[Target]:
    """Return the tensors of one file that holds these parts of a folder.

    Args:
        family: of the model.
        parts: tensors by the names that the folder has for them.
        dtype: "keep", "fp16", "bf16" or "fp32".
        bare: leave the prefix of the denoiser out, as the publisher of Flux does.

    Raises:
        CheckpointError: names or shapes are not those of the family; the message has the first.
    """
    targets: list[Target] = []
    for part in family.parts:
        if part.name not in parts:
            continue
        known = _spelled(part, parts[part.name])
        rows = _rows(family, part, known)
        wanted = {segment.name for row in rows for segment in row.segments}
        _check_names(part.name, known, wanted)
        prefix = "" if bare else part.prefix
        made = [_join(part, row, known, dtype) for row in rows]
        _check_shapes(part.name, rows, made)
        targets += _in_source_order([replace(target, name=prefix + target.name) for target in made])
    return targets


def plan_folder(
    family: FamilyMap, parts: Mapping[str, Tensors], dtype: str = "keep"
) -> dict[str, list[Target]]:
    """Return the tensors of each part's file in a folder.

    Args:
        family: of the model.
        parts: tensors by the names that the single file has for them; see `split_parts`.
        dtype: "keep", "fp16", "bf16" or "fp32".

    Raises:
        CheckpointError: names or shapes are not those of the family; the message has the first.
    """
    targets = {}
    for part in family.parts:
        if part.name not in parts:
            continue
        known = parts[part.name]
        rows = _checked_rows(family, part, known)
        pieces: dict[str, list[tuple[Segment, Target]]] = defaultdict(list)
        for row in rows:
            for segment, target in _split(part, row, known, dtype) if row.name in known else ():
                pieces[segment.name].append((segment, target))
        targets[part.name] = _in_source_order(map(_merge_halves, pieces.values()))
    return targets


def plan_rewrite(
    family: FamilyMap, parts: Mapping[str, Tensors], dtype: str = "keep", *, bare: bool = False
) -> list[Target]:
    """Return the tensors of a single file that holds what another one does; see `plan_folder`.

    Raises:
        CheckpointError: names or shapes are not those of the family; the message has the first.
    """
    targets: list[Target] = []
    for part in family.parts:
        if part.name in parts:
            known = parts[part.name]
            names = {row.name for row in _checked_rows(family, part, known)}
            made = [_whole(n, tensor, dtype, tensor.shape) for n, tensor in known.items()]
            prefix = "" if bare else part.prefix
            targets += _in_source_order(
                replace(target, name=prefix + target.name)
                for target in made
                if target.name in names
            )
    return targets


def plan_plain(tensors: Tensors, dtype: str = "keep") -> list[Target]:
    """Return the tensors of a file that holds exactly these."""
    return [_whole(name, tensor, dtype, tensor.shape) for name, tensor in tensors.items()]


def is_published(part: Part, tensors: Tensors) -> bool:
    """Whether a part of a single file has the widths of the published models."""
    rows = [row for row in part.rows if row.name in tensors]
    return sum(row.admits(tensors[row.name].shape) for row in rows) > _PUBLISHED_SHARE * len(rows)


def split_parts(
    family: FamilyMap, tensors: Tensors, *, ema: bool = False, extra: Iterable[str] = ()
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a single file by part, by their names without prefix.

    Args:
        family: of the model.
        tensors: all of the file.
        ema: take the average of the denoiser's weights in place of the last ones.
        extra: names that are left out beside those that no model needs.

    Raises:
        CheckpointError: the file has a tensor that no part has, or no average.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    left_out = set(extra)
    for name, tensor in tensors.items():
        if is_dropped(name) or name in left_out:
            continue
        part = next((part for part in family.parts if name.startswith(part.prefix)), None)
        if part is None and _is_bare(family, name):
            part, inside = family.denoiser, name
        elif part is None:
            raise CheckpointError(
                f"the file has {one_line(name)}, which {family.name} has not; get the model anew"
            )
        else:
            inside = single_spelling(part, name.removeprefix(part.prefix))
        if inside in parts.setdefault(part.name, {}):
            raise CheckpointError(f"the file has {part.name} tensor {one_line(inside)} twice")
        parts[part.name][inside] = tensor
    if ema:
        _take_average(family, tensors, parts)
    return parts


def _is_bare(family: FamilyMap, name: str) -> bool:
    """Whether it is the name of a Flux transformer's tensor as its publisher has it."""
    return family.name == "flux" and any(row.name == name for row in family.denoiser.rows)


def _take_average(family: FamilyMap, tensors: Tensors, parts: dict[str, dict[str, Tensor]]) -> None:
    part = family.denoiser
    names = {name: ema_name(part, name) for name in parts.get(part.name, {})}
    if lost := [average for average in names.values() if average not in tensors]:
        raise CheckpointError(
            f"the file has no average of its weights: {one_line(lost[0])} and {len(lost) - 1} more "
            "are missing; convert it without ema"
        )
    parts[part.name] = {name: tensors[average] for name, average in names.items()}


def _spelled(part: Part, tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors of a folder by their names in the tables."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_dropped(name):
            continue
        known = folder_spelling(part, name)
        if known in found:
            raise CheckpointError(
                f"{part.name} has one tensor under two names, {one_line(found[known].name)} and "
                f"{one_line(name)}; save the model again"
            )
        found[known] = tensor
    return found


def _rows(family: FamilyMap, part: Part, known: Tensors) -> list[Row]:
    """Return the rows of a part; of those that may be absent all or none.

    `known` are the tensors of either layout.
    """
    optional = {row.name for row in part.rows if row.name.startswith(family.optional)}
    names = {n for row in part.rows if row.name in optional for n in _names(row)}
    if part is family.denoiser and names.isdisjoint(known):
        return [row for row in part.rows if row.name not in optional]
    return list(part.rows)


def _names(row: Row) -> list[str]:
    return [row.name, *(segment.name for segment in row.segments)]


def _checked_rows(family: FamilyMap, part: Part, known: Tensors) -> list[Row]:
    """Return the rows of a part of a single file that has exactly those."""
    rows = _rows(family, part, known)
    fills = {row.name for row in rows if row.fill}
    _check_names(
        part.name,
        {n: t for n, t in known.items() if n not in fills},
        {r.name for r in rows} - fills,
    )
    there = [row for row in rows if row.name in known]
    made = [_whole(row.name, known[row.name], "keep", known[row.name].shape) for row in there]
    _check_shapes(part.name, there, made)
    return [row for row in there if not row.fill]


def _check_names(part: str, known: Tensors, wanted: set[str]) -> None:
    if extra := sorted(known.keys() - wanted):
        raise CheckpointError(
            f"{part} has {_listing(known[name].name for name in extra)}, which a model of this "
            "family has not; give a complete model without additions"
        )
    if missing := sorted(wanted - known.keys()):
        raise CheckpointError(
            f"{part} lacks {_listing(missing)}, which a model of this family has; "
            "download or save it again"
        )


def _listing(names: Iterable[str]) -> str:
    first, *others = names
    return f"{one_line(first)} and {len(others)} more" if others else one_line(first)


def _check_shapes(part: str, rows: list[Row], made: list[Target]) -> None:
    """Refuse a tensor of another shape than published models have.

    A narrower model, as tests and experiments use, is held to the number of dimensions.
    """
    wrong = [
        (row, target)
        for row, target in zip(rows, made, strict=True)
        if not row.fill and not row.admits(target.shape)
    ]
    if len(wrong) > _PUBLISHED_SHARE * len(rows):
        wrong = [(row, made) for row, made in wrong if len(row.shape) != len(made.shape)]
    if wrong:
        row, target = wrong[0]
        source = target.pieces[0].source.name
        sizes = "x".join("|".join(map(str, known)) for known in row.shape)
        raise CheckpointError(
            f"{part} tensor {one_line(source)} makes {row.name} of shape "
            f"{'x'.join(map(str, target.shape))} instead of {sizes}; give an unchanged model"
        )


def _join(part: Part, row: Row, known: Tensors, dtype: str) -> Target:
    """Return the single file's tensor of a row."""
    if row.fill:
        return _fill(part, row, known, dtype)
    sources = [known[segment.name] for segment in row.segments]
    first, segment = sources[0], row.segments[0]
    if segment.transpose:
        return replace(_whole(row.name, first, dtype, first.shape[::-1]), transpose=True)
    if segment.squeeze:
        shape = first.shape if len(first.shape) == 4 else (*first.shape, 1, 1)
        return _whole(row.name, first, dtype, shape)
    pieces = tuple(map(_piece, sources, row.segments))
    if segment.half is not None:
        return Target(row.name, _cast(first, dtype), first.shape, pieces)
    _check_joined(part, row, sources)
    if not first.shape or len(sources) == 1:
        return Target(row.name, _cast(first, dtype), first.shape, pieces)
    length = sum(source.shape[0] for source in sources)
    return Target(row.name, _cast(first, dtype), (length, *first.shape[1:]), pieces)


def _check_joined(part: Part, row: Row, sources: list[Tensor]) -> None:
    """Refuse tensors that do not fit onto each other."""
    first = sources[0]
    unit = first.shape[0] if first.shape else 1
    for source, segment in zip(sources, row.segments, strict=True):
        length = source.shape[0] if source.shape else 1
        fits = length == unit * segment.weight and source.shape[1:] == first.shape[1:]
        if not fits or source.dtype != first.dtype:
            raise CheckpointError(
                f"{part.name} tensor {one_line(source.name)} is {source.dtype} of shape "
                f"{source.shape} and does not fit onto {one_line(first.name)}, {first.dtype} of "
                f"shape {first.shape}; give an unchanged model"
            )


def _piece(source: Tensor, segment: Segment) -> Piece:
    half = source.size_bytes // 2
    if segment.half is None:
        return Piece(source, 0, source.size_bytes)
    return Piece(source, half * segment.half, half * (segment.half + 1))


def _fill(part: Part, row: Row, known: Tensors, dtype: str) -> Target:
    """Return a square matrix as wide as the part, which none of its tensors is made of."""
    del part
    norm = known["text_model.final_layer_norm.weight"]
    width = norm.shape[0]
    return Target(row.name, _cast(norm, dtype), (width, width), (), fill=row.fill)


def _split(part: Part, row: Row, known: Tensors, dtype: str) -> Iterator[tuple[Segment, Target]]:
    """Return the folder's tensors of a row; of a tensor in two halves, each half by itself."""
    source = known[row.name]
    segments = row.segments
    if segments[0].transpose:
        whole = _whole(segments[0].name, source, dtype, source.shape[::-1])
        yield segments[0], replace(whole, transpose=True)
        return
    if segments[0].squeeze:
        yield segments[0], _whole(segments[0].name, source, dtype, source.shape[:2])
        return
    total = sum(segment.weight for segment in segments)
    length = source.shape[0] if source.shape else 1
    if length % total:
        raise CheckpointError(
            f"{part.name} tensor {one_line(source.name)} of shape {source.shape} cannot be split "
            f"into {total} equal parts; give an unchanged model"
        )
    begin = 0
    for segment in segments:
        end = begin + source.size_bytes // total * segment.weight
        size = length // total * segment.weight
        shape = (size, *source.shape[1:]) if source.shape else ()
        pieces = (Piece(source, begin, end),)
        yield segment, Target(segment.name, _cast(source, dtype), shape, pieces)
        begin = end


def _merge_halves(found: list[tuple[Segment, Target]]) -> Target:
    """Return the folder's tensor, put together where a row has it in two halves."""
    ordered = [target for _, target in sorted(found, key=lambda item: item[0].half or 0)]
    first = ordered[0]
    if len(ordered) == 1:
        return first
    length = sum(target.shape[0] for target in ordered)
    pieces = tuple(piece for target in ordered for piece in target.pieces)
    return replace(first, shape=(length, *first.shape[1:]), pieces=pieces)


def _whole(name: str, source: Tensor, dtype: str, shape: tuple[int, ...]) -> Target:
    return Target(name, _cast(source, dtype), shape, (Piece(source, 0, source.size_bytes),))


def _cast(source: Tensor, dtype: str) -> str:
    """Return the dtype that a tensor gets; whole numbers stay what they are."""
    return source.dtype if dtype == "keep" or source.dtype not in _FLOATS else DTYPES[dtype]


def _in_source_order(targets: Iterable[Target]) -> list[Target]:
    """Return the targets as their sources lie, so that they are copied in few long runs."""

    def place(target: Target) -> tuple[str, int]:
        source = target.pieces[0].source if target.pieces else None
        if isinstance(source, TensorEntry):
            return str(source.path), source.begin + target.pieces[0].begin
        return "", 0

    return sorted(targets, key=place)
