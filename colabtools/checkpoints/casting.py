"""Numbers of another precision, chunk by chunk, and none that silently became infinite.

numpy does it, unless torch is loaded already: importing that takes longer than most conversions.
Both round to the nearest number, ties to even.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from colabtools.checkpoints.headers import DTYPE_BYTES, one_line
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np

__all__ = ["cast_bytes", "identity_bytes", "transposed_bytes"]

_NUMPY = {"F16": "float16", "F32": "float32", "F64": "float64"}
_TORCH = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_CHUNK_ITEMS = 2**18
# Whole numbers of so many bytes, as `memoryview` calls them.
_WORDS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_ONES = {"BF16": b"\x80\x3f", "F16": b"\x00\x3c", "F32": b"\x00\x00\x80\x3f"}


def cast_bytes(data: memoryview, source: str, target: str, name: str) -> memoryview:
    """Return numbers of one dtype as those of another, dtypes by their codes in safetensors.

    Raises:
        CheckpointError: a number is not finite in the new dtype; the message has the tensor's name.
    """
    if "torch" in sys.modules or source not in (*_NUMPY, "BF16"):
        cast, finite = _cast_by_torch(data, source, target)
    else:
        cast, finite = _cast_by_numpy(data, source, target)
    if not finite:
        kind = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}.get(target, target)
        raise CheckpointError(
            f"{one_line(name)} has values that are not finite in {kind}; "
            "use bf16 or fp32, or a model that is whole"
        )
    return cast


def _cast_by_torch(data: memoryview, source: str, target: str) -> tuple[memoryview, bool]:
    import torch

    tensor = torch.frombuffer(data, dtype=getattr(torch, _TORCH[source]))
    cast = tensor.to(getattr(torch, _TORCH[target]))
    view: memoryview = cast.view(torch.uint8).numpy().data
    return view, bool(cast.isfinite().all())


def _cast_by_numpy(data: memoryview, source: str, target: str) -> tuple[memoryview, bool]:
    import numpy as np

    if source == "BF16":
        bits = np.frombuffer(data, np.uint16).astype(np.uint32) << np.uint32(16)
        values: np.ndarray[Any, Any] = bits.view(np.float32)
    else:
        values = np.frombuffer(data, _NUMPY[source])
    if target == "BF16":
        rounded, finite = _round_to_bfloat16(values.astype(np.float32, copy=False))
        return rounded.view(np.uint8).data, finite
    with np.errstate(over="ignore"):
        cast = values.astype(_NUMPY[target])
    return cast.view(np.uint8).data, bool(np.isfinite(cast).all())


def _round_to_bfloat16(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], bool]:
    """Return the upper halves of float32 numbers, rounded to the nearest, ties to even."""
    import numpy as np

    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    finite = np.isfinite(values).all() and ((rounded & 0x7F80) != 0x7F80).all()
    return rounded, bool(finite)


def transposed_bytes(data: memoryview, dtype: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
    """Return the bytes of the transposed matrix in chunks; `shape` is what it has before."""
    rows, columns = shape
    items = data.cast(_WORDS[DTYPE_BYTES[dtype]])
    together = max(1, _CHUNK_ITEMS // max(rows, 1))
    for first in range(0, columns, together):
        block = range(first, min(first + together, columns))
        yield memoryview(b"".join(items[column::columns].tobytes() for column in block))


def identity_bytes(width: int, dtype: str) -> memoryview:
    """Return the bytes of the matrix that changes nothing, `width` by `width`."""
    size = DTYPE_BYTES[dtype]
    matrix = bytearray(width * width * size)
    for at in range(0, len(matrix), (width + 1) * size):
        matrix[at : at + size] = _ONES[dtype]
    return memoryview(matrix)
