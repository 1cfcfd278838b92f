"""Which device torch computes on, and in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colabtools import env

if TYPE_CHECKING:
    import torch

__all__ = ["half_dtype", "torch_device"]


def torch_device() -> torch.device:
    """Return the GPU if torch sees one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to compute in: bf16 or fp16 by compute capability, None (fp32) on the CPU.

    torch claims bf16 on cards that only emulate it, so the capability decides.
    """
    import torch

    if device.type != "cuda":
        return None
    gpu = env.gpu()
    return torch.bfloat16 if gpu is not None and gpu.supports_bf16 else torch.float16
