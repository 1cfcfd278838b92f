"""Adapters added to the weights of a model, one tensor at a time while it is being converted."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colabtools.checkpoints.headers import one_line
from colabtools.checkpoints.keymaps.families import folder_spelling
from colabtools.checkpoints.lora import read_lora
from colabtools.checkpoints.lora_names import places
from colabtools.checkpoints.lora_tensors import Layer, live, load_tensor
from colabtools.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from colabtools.checkpoints.keymaps.families import FamilyMap, Part
    from colabtools.checkpoints.lora import Lora
    from colabtools.checkpoints.sources import Tensor, Tensors

__all__ = ["merge_loras", "parse_merge", "read_merges"]

_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})


@dataclass(frozen=True)
class _Change:
    """What one adapted layer does to a tensor.

    Attributes:
        begin: where the rows are that it changes, as a share of all rows.
        end: the same.
        half: the half of the layer that these rows are, or None for all of it.
        transposed: whether the tensor is the layer's transposed matrix.
    """

    layer: Layer
    scale: float
    begin: float = 0.0
    end: float = 1.0
    half: int | None = None
    transposed: bool = False


def parse_merge(text: str) -> tuple[Path, float]:
    """Return the file and the strength that `FILE` or `FILE:STRENGTH` names.

    Raises:
        ConfigError: there is no file, or the strength is no finite number.
    """
    name, colon, number = text.rpartition(":")
    path, scale = Path(text), 1.0
    if colon and name and not Path(text).expanduser().exists():
        try:
            path, scale = Path(name), float(number)
        except ValueError:
            path = Path(text)
    if not text.strip() or not math.isfinite(scale):
        raise ConfigError(f"merge is {text!r}; give a LoRA file, or file:strength such as x:0.8")
    return path.expanduser().absolute(), scale


def read_merges(texts: Sequence[str], family: str) -> list[tuple[Lora, float]]:
    """Return the adapters to merge into a model of a family, each with its strength.

    Raises:
        CheckpointError: a file is damaged, unsafe, no LoRA, or for another family.
        ConfigError: a text names no file.
    """
    return [(read_lora(path, family), scale) for path, scale in map(parse_merge, texts)]


def merge_loras(
    family: FamilyMap,
    parts: Mapping[str, Tensors],
    loras: Sequence[tuple[Lora, float]],
    *,
    single: bool,
) -> dict[str, Tensors]:
    """Return the parts of a model with adapters added, each tensor computed when it is written.

    Args:
        family: of the model.
        parts: its tensors, by the names of a folder or of a single file without prefixes.
        loras: the adapters, each with its strength; 1 is as it was trained.
        single: whether the names are those of a single file.

    Raises:
        CheckpointError: an adapter is for a layer that the model lacks, or has another shape.
    """
    changes: dict[tuple[str, str], list[_Change]] = defaultdict(list)
    for lora, scale in loras:
        for (part_name, module), layer in lora.layers.items():
            part = family.part(part_name)
            if part is None or part_name not in parts:
                raise CheckpointError(
                    f"{one_line(lora.path)} adapts the {part_name}, which is not converted; "
                    "convert all parts of a whole model"
                )
            names = _names(part, parts[part_name])
            found = _in_single(family, layer, scale) if single else _in_folder(layer, scale)
            for name, change in found:
                if name not in names:
                    raise CheckpointError(
                        f"{one_line(lora.path)} adapts {one_line(module)}, which the model lacks; "
                        "give a LoRA for this model"
                    )
                changes[part_name, names[name]].append(change)
    return _changed(parts, changes)


def _names(part: Part, tensors: Tensors) -> dict[str, str]:
    """Return what the model calls each tensor, by its name in the tables."""
    return {folder_spelling(part, name): name for name in tensors}


def _in_folder(layer: Layer, scale: float) -> list[tuple[str, _Change]]:
    return [(f"{layer.module}.weight", _Change(layer, scale))]


def _in_single(family: FamilyMap, layer: Layer, scale: float) -> list[tuple[str, _Change]]:
    """Return the tensor of a single file that a layer is in, and where."""
    row = places(family.name)[layer.part][layer.module.replace(".", "_")].row
    if row.segments[0].transpose:
        return [(row.name, _Change(layer, scale, transposed=True))]
    total = sum(segment.weight for segment in row.segments)
    found, begin = [], 0
    for segment in row.segments:
        end = begin + segment.weight
        if segment.name == f"{layer.module}.weight":
            change = _Change(layer, scale, begin / total, end / total, segment.half)
            found.append((row.name, change))
        begin = end
    return found


def _changed(
    parts: Mapping[str, Tensors], changes: Mapping[tuple[str, str], list[_Change]]
) -> dict[str, Tensors]:
    merged: dict[str, dict[str, Tensor]] = {name: dict(each) for name, each in parts.items()}
    for (part, name), each in changes.items():
        base = merged[part][name]
        if base.dtype not in _FLOATS:
            raise CheckpointError(
                f"{one_line(name)} is {base.dtype}, which nothing can be added to; "
                "give the model in fp16, bf16 or fp32"
            )
        for change in each:
            _check_shape(base, change)
        merged[part][name] = _merged(base, tuple(each))
    return dict(merged)


def _check_shape(base: Tensor, change: _Change) -> None:
    layer = change.layer
    height = layer.up.shape[0] if change.half is None else layer.up.shape[0] // 2
    inputs = math.prod(layer.down.shape[1:])
    rows = round(base.shape[0] * change.end) - round(base.shape[0] * change.begin)
    meant = (rows, math.prod(base.shape[1:]))
    found = (inputs, height) if change.transposed else (height, inputs)
    if meant != found:
        raise CheckpointError(
            f"the LoRA's matrices for {one_line(layer.module)} make a matrix of {found}, and the "
            f"model's has {meant}; give a LoRA for this model"
        )


def _merged(base: Tensor, changes: Sequence[_Change]) -> Tensor:
    def load() -> torch.Tensor:
        weight = load_tensor(base).float().clone()
        for change in changes:
            matrix = weight.reshape(weight.shape[0], -1)
            rows = slice(round(len(matrix) * change.begin), round(len(matrix) * change.end))
            matrix[rows] = _adapted(matrix[rows], change)
        return weight

    return live(base.name, base.dtype, base.shape, load)


def _adapted(matrix: torch.Tensor, change: _Change) -> torch.Tensor:
    """Return a matrix with what an adapter adds to it; (out, in) float32, transposed if so said.

    The product has the rank as its inner dimension, which no library divides among threads: so it
    is the same bits when it is computed once more to compare.
    """
    layer = change.layer
    up = load_tensor(layer.up).float().reshape(layer.up.shape[0], layer.rank)
    if change.half is not None:
        up = up.chunk(2)[change.half]
    delta = up @ load_tensor(layer.down).float().reshape(layer.rank, -1)
    delta *= layer.scale
    own = matrix.T if change.transposed else matrix
    if layer.magnitude is None:
        return (own + change.scale * delta).T if change.transposed else own + change.scale * delta
    lengths = load_tensor(layer.magnitude).float()
    if change.half is not None:
        lengths = lengths.chunk(2)[change.half]
    turned = own + delta
    turned *= (lengths / turned.norm(dim=1)).unsqueeze(1)
    result = own + change.scale * (turned - own)
    return result.T if change.transposed else result
