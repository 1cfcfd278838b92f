"""A ViT on torch: any CPU or GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from colabtools.errors import ConfigError
from colabtools.vit.host import DTYPES
from colabtools.vit.quantized import can_quantize, quantize_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from colabtools.vit.backends.base import Ask
    from colabtools.vit.network import Vit

__all__ = ["TorchBackend"]


class TorchBackend:
    """A network of torch on its device; see `Backend`."""

    name = "torch"

    def __init__(self, network: Vit, device: torch.device, dtype: str) -> None:
        """Move a network in fp32 to the device and the dtype.

        Raises:
            ConfigError: the device cannot compute in the dtype.
        """
        self.device = device.type
        self.dtype = dtype
        if dtype == "int8":
            if self.device != "cpu" or not can_quantize():
                raise ConfigError("dtype is 'int8'; that needs an x86 processor and device cpu")
            quantize_blocks(network.blocks)
        elif dtype == "fp16" and self.device == "cpu":
            raise ConfigError("dtype is 'fp16'; processors are slow in it, give bf16, fp32 or int8")
        self.network = network.to(device, DTYPES[dtype])
        self._logits: Callable[[torch.Tensor], torch.Tensor] = self.network

    def compile(self) -> None:
        """Let torch compile what gives logits; the next batch of each size takes a minute."""
        self._logits = torch.compile(self.network, dynamic=False)

    def start(self, pixels: NDArray[np.uint8], ask: Ask) -> Callable[[], NDArray[np.float32]]:
        """Begin with a batch of pixels (B, H, W, C), and return what waits for the result.

        Raises:
            MemoryError: the batch is too large for the device.
        """
        try:
            with torch.inference_mode():
                batch = torch.from_numpy(pixels)
                if self.device == "cuda":
                    batch = batch.to(self.device, non_blocking=True)
                values = self.network.pixel_values(batch)
                if ask.layers:
                    found = self.network.features(values, ask.layers, ask.pooling, ask.norm)
                else:
                    found = self._logits(values)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error

        def wait() -> NDArray[np.float32]:
            result: NDArray[np.float32] = found.cpu().numpy()
            return result

        return wait
