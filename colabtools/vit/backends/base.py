"""What every backend offers, so that nothing else needs to know which one it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LOGITS", "Ask", "Backend"]


@dataclass(frozen=True)
class Ask:
    """What is wanted of a batch.

    Attributes:
        layers: numbers of blocks passed through, ascending, 0 before the first; () for logits.
        pooling: of features, "cls" or "mean" (of the patches).
        norm: of features, whether the final LayerNorm is applied.
    """

    layers: tuple[int, ...] = ()
    pooling: str = "cls"
    norm: bool = True


LOGITS = Ask()


class Backend(Protocol):
    """A network on its device.

    Attributes:
        name: "torch", "onnx", "openvino", "jax" or "tensorflow".
        device: such as "cpu" or "cuda".
        dtype: of the arithmetic, "fp32", "bf16", "fp16" or "int8".
    """

    name: str
    device: str
    dtype: str

    def start(self, pixels: NDArray[np.uint8], ask: Ask) -> Callable[[], NDArray[np.float32]]:
        """Begin with a batch of pixels (B, H, W, C), and return what waits for the result.

        The result is (B, K) for logits and (B, D times layers) for features. On a GPU the call
        returns before the work is done; the pixels must stay as they are until then.

        Raises:
            MemoryError: the batch is too large for the device.
        """
