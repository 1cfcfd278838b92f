"""Layers of Flux that are one in the single file and several in a folder, taken apart and joined.

The matrices of q, k and v become one pair: the first ones lie below each other, the second ones
along the diagonal of a matrix of zeros. So the rank is the sum, and so is alpha.

Source: networks/convert_flux_lora.py of kohya-ss/sd-scripts 0.9.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from colabtools.checkpoints.headers import one_line
from colabtools.checkpoints.lora_tensors import Layer, live, load_tensor, rows_of
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from colabtools.checkpoints.keymaps.rows import Row
    from colabtools.checkpoints.lora_names import Place
    from colabtools.checkpoints.sources import Tensor

__all__ = ["FUSED_RANKS", "Fused", "fuse_layers", "fused_ranks", "is_swapped", "split_layer"]

# Where we write how wide each layer is in one that holds several, if they are not all the same.
FUSED_RANKS = "colabtools.fused_ranks"


@dataclass(frozen=True)
class Fused:
    """Several layers as one.

    Attributes:
        downs: the first matrices, from top to bottom.
        ranks: of each layer that the row has, 0 for one that is not adapted.
    """

    downs: tuple[Tensor, ...]
    up: Tensor
    alpha: float
    magnitude: tuple[Tensor, ...]
    ranks: tuple[int, ...]


def is_swapped(row: Row) -> bool:
    """Whether the single file has the two halves of one layer in turned order."""
    return len(row.segments) == 2 and row.segments[0].half is not None


def _modules(row: Row) -> list[str]:
    return [segment.name.removesuffix(".weight") for segment in row.segments]


def split_layer(place: Place, layer: Layer, metadata: Mapping[str, str]) -> list[Layer]:
    """Return the layers of a folder that an adapted layer of either layout is.

    Raises:
        CheckpointError: its matrices cannot be divided among them.
    """
    row = place.row
    if place.segment is not None or len(row.segments) == 1:
        return [layer]
    if is_swapped(row):
        magnitude = layer.magnitude and _halves_turned(layer.magnitude)
        return [replace(layer, up=_halves_turned(layer.up), magnitude=magnitude)]
    bounds = _bounds([segment.weight for segment in row.segments], layer.up.shape[0], row)
    ranks = _recorded(row, layer.rank, metadata) or _even(layer, bounds)
    if ranks is None:
        return [
            replace(
                layer,
                module=module,
                up=rows_of(layer.up, begin, end),
                magnitude=layer.magnitude and rows_of(layer.magnitude, begin, end),
            )
            for module, (begin, end) in zip(_modules(row), bounds, strict=True)
        ]
    return _divided(row, layer, bounds, ranks)


def _divided(
    row: Row, layer: Layer, bounds: Sequence[tuple[int, int]], ranks: Sequence[int]
) -> list[Layer]:
    found = []
    ends = itertools.accumulate(ranks)
    for module, (begin, end), rank, last in zip(_modules(row), bounds, ranks, ends, strict=True):
        if rank:
            found.append(
                Layer(
                    layer.part,
                    module,
                    rows_of(layer.down, last - rank, last),
                    _block(layer.up, (begin, end), (last - rank, last)),
                    layer.alpha * rank / layer.rank,
                    layer.magnitude and rows_of(layer.magnitude, begin, end),
                )
            )
    return found


def _bounds(weights: Sequence[int], length: int, row: Row) -> list[tuple[int, int]]:
    """Return from which row up to which one each layer is."""
    total = sum(weights)
    if length % total:
        raise CheckpointError(
            f"the matrices for {one_line(row.name)} have {length} rows, which cannot be divided "
            f"among {len(weights)} layers; get the file anew"
        )
    ends = [length // total * sum(weights[: at + 1]) for at in range(len(weights))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _recorded(row: Row, rank: int, metadata: Mapping[str, str]) -> list[int] | None:
    """Return the rank of each layer where the header says so."""
    text = metadata.get(FUSED_RANKS)
    if text is None:
        return None
    try:
        ranks = json.loads(text).get(row.name)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"its {FUSED_RANKS} cannot be read; get the file anew") from error
    if ranks is None:
        return None
    fits = isinstance(ranks, list) and all(type(item) is int and item >= 0 for item in ranks)
    if not fits or len(ranks) != len(row.segments) or sum(ranks) != rank:
        raise CheckpointError(f"its {FUSED_RANKS} do not fit {one_line(row.name)}")
    return list(ranks)


def _even(layer: Layer, bounds: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return equal ranks if the second matrix is zero off the diagonal, else None."""
    count = len(bounds)
    if layer.rank % count:
        return None
    rank = layer.rank // count
    up = load_tensor(layer.up).reshape(layer.up.shape[:2])
    for at, (begin, end) in enumerate(bounds):
        rows = up[begin:end]
        if rows[:, : at * rank].any() or rows[:, (at + 1) * rank :].any():
            return None
    return [rank] * count


def _block(up: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    shape = (rows[1] - rows[0], columns[1] - columns[0], *up.shape[2:])

    def load() -> torch.Tensor:
        return load_tensor(up)[rows[0] : rows[1], columns[0] : columns[1]]

    return live(up.name, up.dtype, shape, load)


def _halves_turned(tensor: Tensor) -> Tensor:
    half = tensor.shape[0] // 2
    return live(
        tensor.name, tensor.dtype, tensor.shape, lambda: load_tensor(tensor).roll(half, dims=0)
    )


def fuse_layers(row: Row, layers: Mapping[str, Layer]) -> Fused:
    """Return the adapted layers of a row of the single file as one.

    Args:
        row: made of several layers, or of two turned halves of one.
        layers: by their names in a folder; one that is missing is not adapted.

    Raises:
        CheckpointError: their matrices do not fit together.
    """
    if is_swapped(row):
        layer = next(iter(layers.values()))
        magnitude = (_halves_turned(layer.magnitude),) if layer.magnitude else ()
        up = _halves_turned(layer.up)
        return Fused((layer.down,), up, layer.alpha, magnitude, (layer.rank,))
    names, weights = _modules(row), [segment.weight for segment in row.segments]
    there = [(layers[n], w) for n, w in zip(names, weights, strict=True) if n in layers]
    units = {layer.up.shape[0] / weight for layer, weight in there}
    widths = {layer.down.shape[1:] for layer, _ in there}
    if len(units) != 1 or len(widths) != 1 or not (unit := units.pop()).is_integer():
        raise CheckpointError(
            f"the matrices for {one_line(names[0])} and its neighbours do not fit onto each other; "
            "get the file anew"
        )
    magnitudes = [layer.magnitude for layer, _ in there if layer.magnitude is not None]
    if magnitudes and len(magnitudes) != len(names):
        raise CheckpointError(
            f"DoRA adapts only some of {one_line(row.name)}, which cannot be said in one file for "
            "web UIs; train all of its layers, or without use_dora"
        )
    heights = [int(unit) * weight for weight in weights]
    ups = [layers.get(name) for name in names]
    ranks = tuple(layer.rank if layer else 0 for layer in ups)
    scales = {layer.scale for layer, _ in there}
    alpha = sum(layer.alpha for layer, _ in there) if len(scales) == 1 else None
    up = _diagonal(row.name, ups, heights, scaled=alpha is None)
    downs = tuple(layer.down for layer, _ in there)
    whole = float(sum(ranks)) if alpha is None else alpha
    return Fused(downs, up, whole, tuple(magnitudes), ranks)


def _diagonal(
    name: str, layers: Sequence[Layer | None], heights: Sequence[int], *, scaled: bool
) -> Tensor:
    """Return the second matrices along a diagonal, multiplied by their scale if they differ."""
    there = [layer for layer in layers if layer is not None]
    dtypes = {layer.up.dtype for layer in there}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    shape = (sum(heights), sum(layer.rank for layer in there))

    def load() -> torch.Tensor:
        import torch

        whole = torch.zeros(shape)
        row = column = 0
        for layer, height in zip(layers, heights, strict=True):
            if layer is not None:
                block = load_tensor(layer.up).float() * (layer.scale if scaled else 1.0)
                whole[row : row + height, column : column + layer.rank] = block
                column += layer.rank
            row += height
        return whole

    return live(name, dtype, shape, load)


def fused_ranks(ranks: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the field of a header that says how rows are to be divided, if it is needed."""
    uneven = {name: list(each) for name, each in ranks.items() if len(set(each)) > 1}
    return {FUSED_RANKS: json.dumps(uneven, sort_keys=True)} if uneven else {}
