"""The matrices of an adapter's layers, as bytes that lie in files or numbers made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from colabtools.checkpoints.headers import DTYPE_BYTES, TensorEntry, one_line, open_regular
from colabtools.checkpoints.sources import LiveTensor
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from colabtools.checkpoints.sources import Tensor

__all__ = ["Layer", "live", "load_tensor", "rows_of"]

_TORCH = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "I8": "int8",
    "U8": "uint8",
}


@dataclass(frozen=True)
class Layer:
    """What an adapter does to one layer.

    Attributes:
        part: of the model, as a folder names it.
        module: the layer in that part.
        down: (rank, in) or, of a convolution, (rank, in, height, width).
        up: (out, rank), a convolution's with two more dimensions of 1.
        alpha: their product is scaled by alpha / rank.
        magnitude: of DoRA, (out,).
    """

    part: str
    module: str
    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Inner width of the pair of matrices."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product of the matrices is multiplied by."""
        return self.alpha / self.rank


def load_tensor(tensor: Tensor) -> torch.Tensor:
    """Return the numbers of a tensor, read from its file if they are not in memory.

    Raises:
        CheckpointError: the file cannot be read or has changed.
    """
    if isinstance(tensor, LiveTensor):
        return tensor.load()
    import torch

    if tensor.dtype not in _TORCH:
        raise CheckpointError(f"{one_line(tensor.name)} is {tensor.dtype}; get it in fp16 or fp32")
    with open_regular(tensor.path) as file:
        try:
            file.seek(tensor.begin)
            data = bytearray(file.read(tensor.size_bytes))
        except OSError as error:
            raise CheckpointError(f"cannot read {one_line(tensor.path)}: {error}") from error
    if len(data) != tensor.size_bytes:
        raise CheckpointError(f"{one_line(tensor.path)} is cut off; download it again")
    dtype = getattr(torch, _TORCH[tensor.dtype])
    if not data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)


def live(
    name: str, dtype: str, shape: tuple[int, ...], load: Callable[[], torch.Tensor]
) -> LiveTensor:
    """Return a tensor that is made when its turn comes, in this dtype and shape."""

    def made() -> torch.Tensor:
        import torch

        return load().to(getattr(torch, _TORCH[dtype])).reshape(shape)

    return LiveTensor(name, dtype, shape, made)


def rows_of(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Return the rows of a tensor from `begin` up to `end`; of a file they stay bytes of it."""
    shape = (end - begin, *tensor.shape[1:])
    if isinstance(tensor, TensorEntry):
        size = math.prod(tensor.shape[1:]) * DTYPE_BYTES[tensor.dtype]
        first = tensor.begin + begin * size
        return replace(tensor, shape=shape, begin=first, end=first + (end - begin) * size)
    return live(tensor.name, tensor.dtype, shape, lambda: load_tensor(tensor)[begin:end])
