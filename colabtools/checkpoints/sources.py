"""Where the tensors of a conversion come from: byte ranges of files, or memory.

A folder in diffusers' layout, a single file and the networks of a training run all become tables of
tensors by name; what is done with them afterwards is the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from colabtools.checkpoints.headers import (
    DTYPE_BYTES,
    Header,
    TensorEntry,
    one_line,
    open_regular,
    read_safetensors_header,
)
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

__all__ = [
    "LiveTensor",
    "Tensor",
    "Tensors",
    "live_tensors",
    "read_folder",
    "read_header",
    "read_part",
]

# Which of several files of a part is taken: safetensors before pickles, all precision before less.
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_MAX_JSON_BYTES = 16 * 1024**2
_DTYPE_CODES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
}


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor that is in memory, or made when its turn comes.

    Attributes:
        dtype: the code that safetensors has for it.
        load: returns the tensor; it may be on any device.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor] = field(compare=False)

    @property
    def size_bytes(self) -> int:
        """Length of the tensor's bytes."""
        size = DTYPE_BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


Tensor: TypeAlias = TensorEntry | LiveTensor
Tensors: TypeAlias = "Mapping[str, Tensor]"


def live_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state dict, none of them copied.

    Raises:
        CheckpointError: a weight file has no name for a tensor's dtype.
    """
    return {name: _live(name, tensor) for name, tensor in state.items()}


def _live(name: str, tensor: torch.Tensor) -> LiveTensor:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _DTYPE_CODES:
        raise CheckpointError(f"tensor {one_line(name)} is {kind}, which no weight file can hold")
    return LiveTensor(name, _DTYPE_CODES[kind], tuple(tensor.shape), lambda: tensor)


def read_header(path: Path) -> Header:
    """Return what a weight file holds: .safetensors, or a pickle that was found harmless.

    Raises:
        CheckpointError: the file cannot be read, or is damaged, unsafe or of another kind.
    """
    if path.suffix.lower() == ".safetensors":
        return read_safetensors_header(path)
    open_regular(path).close()
    from colabtools.checkpoints.pickles import read_torch_header

    return read_torch_header(path)


def read_folder(folder: Path, variant: str = "") -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each part of a folder in diffusers' layout that has weights.

    Args:
        folder: it holds a sub-folder for each part.
        variant: of the weight files, such as "fp16"; empty prefers the plain ones.

    Raises:
        CheckpointError: no part has weights, or files are damaged, unsafe or contradict each other.
    """
    parts = {}
    try:
        places = sorted(place for place in folder.iterdir() if place.is_dir())
    except OSError as error:
        raise CheckpointError(f"cannot read {one_line(folder)}: {error.strerror}") from error
    for place in places:
        if place.name in ("safety_checker", "image_encoder", "feature_extractor"):
            continue
        if (tensors := read_part(place, variant)) is not None:
            parts[place.name] = tensors
    if not parts:
        raise CheckpointError(
            f"{one_line(folder)} holds no weights of a model in diffusers' layout; "
            "give the folder with model_index.json in it"
        )
    return parts


def read_part(place: Path, variant: str = "") -> dict[str, Tensor] | None:
    """Return the tensors of one part, from one file or several; None if it has no weights.

    Raises:
        CheckpointError: files are missing, damaged, unsafe or contradict each other.
    """
    for kind in ("safetensors", "bin"):
        for spelled in _variants(place, kind, variant):
            for stem in _WEIGHT_STEMS:
                mark = f".{spelled}" if spelled else ""
                index = place / f"{stem}.{kind}.index{mark}.json"
                if index.is_file():
                    return _read_shards(place, index)
                whole = place / f"{stem}{mark}.{kind}"
                if whole.is_file() or whole.is_symlink():
                    return dict(read_header(whole).tensors)
    return None


def _variants(place: Path, kind: str, variant: str) -> Sequence[str]:
    """Return the variants to look for in turn: the asked one, or the plain files, then others."""
    if variant:
        return [variant]
    stems = "|".join(_WEIGHT_STEMS)
    whole = re.compile(rf"(?:{stems})\.([A-Za-z0-9_]+)\.{kind}")
    index = re.compile(rf"(?:{stems})\.{kind}\.index\.([A-Za-z0-9_]+)\.json")
    found = {
        match[1]
        for path in place.iterdir()
        if (match := whole.fullmatch(path.name) or index.fullmatch(path.name))
    }
    # Weights without their average are for training on, and so not what the model draws with.
    return ["", *sorted(found - {"non_ema"})]


def _read_shards(place: Path, index: Path) -> dict[str, Tensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{one_line(index)} has no weight_map; download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if shard != Path(shard).name or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{one_line(index)} names the file {one_line(shard)}, which is in another folder"
            )
        if not (place / shard).is_file():
            raise CheckpointError(
                f"{one_line(place / shard)} is missing, which {index.name} names; download it again"
            )
        for name, entry in read_header(place / shard).tensors.items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{one_line(place / shard)} holds {one_line(name)}, which {index.name} has "
                    f"in {one_line(weight_map.get(name, 'no file'))}; download the folder again"
                )
            tensors[name] = entry
    if lost := sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(
            f"{one_line(place / str(weight_map[lost[0]]))} lacks {one_line(lost[0])}, which "
            f"{index.name} promises; download it again"
        )
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            found = json.loads(file.read(_MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{one_line(path)} is no readable JSON; download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{one_line(path)} holds no table; download it again")
    return found
