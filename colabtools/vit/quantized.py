"""Products of weights in 8 bits on a CPU: each output's weights by their own scale.

Activations are scaled by their range, anew for each picture. What is not a product of weights stays
in fp32: attention, norms, GELU, and the head, whose share of the time is nothing.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

__all__ = ["QuantizedLinear", "can_quantize", "quantize", "quantize_blocks"]

_LARGEST = 127


class QuantizedLinear(nn.Module):
    """A linear layer whose product is of whole numbers.

    Takes and gives fp32, (B, T, in) to (B, T, out).
    """

    def __init__(self, layer: nn.Linear) -> None:
        """Quantize the weights of a layer in fp32."""
        super().__init__()
        weight = layer.weight.detach()
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            # Tensors of bytes will go from torch one day; `can_quantize` then says no.
            warnings.simplefilter("ignore")
            whole = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(whole, layer.bias)
        # Without the processor's dot product of bytes two products are summed in 16 bits, which
        # activations of 8 bits overflow; they get 7.
        self._reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output in fp32."""
        # One picture at a time: the scale of the activations is that of all that is given, and a
        # picture's result must not depend on those beside it.
        each = [
            torch.ops.quantized.linear_dynamic(picture, self._packed, self._reduce_range)
            for picture in x.unbind()
        ]
        return torch.stack(each)


def can_quantize() -> bool:
    """Whether torch has products of bytes for this processor."""
    known = torch.backends.quantized.engine in ("x86", "fbgemm", "onednn")
    return known and hasattr(torch, "quantize_per_channel")


def quantize(layer: nn.Linear) -> QuantizedLinear:
    """Return the layer with its weights in 8 bits."""
    return QuantizedLinear(layer)


def quantize_blocks(blocks: nn.Module) -> None:
    """Replace each linear layer inside by its form in 8 bits."""
    for parent in list(blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, quantize(child))
