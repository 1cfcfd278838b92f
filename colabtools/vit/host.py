"""What this machine computes fastest in: measured, because its name does not tell."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colabtools.devices import half_dtype
from colabtools.vit.quantized import can_quantize, quantize

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DTYPES", "Choice", "choose_dtype"]

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,  # of all but the products of weights
}
_PROBE_ROWS = 512
_ROUNDS = 5
# How much faster than fp32, or than bf16, a dtype must be to make up for what it rounds off.
_LEAST_GAIN = {"bf16": 1.15, "int8": 1.3}
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}


@dataclass(frozen=True)
class Choice:
    """A dtype, and a line that says why."""

    dtype: str
    reason: str


def choose_dtype(device: torch.device, width: int, inner: int) -> Choice:
    """Return the dtype to infer in.

    On a GPU the compute capability decides. On a CPU a product of each kind is timed, a fifth of a
    second in all: bf16 is several times faster than fp32 on processors with units for it and
    several times slower on those without, and nothing in the processor's name says which.

    Args:
        device: where.
        width: of the model's tokens.
        inner: width of its MLPs.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return Choice(_NAMES[half_dtype(device)], f"compute capability of {name}")
    if device.type != "cpu":
        return Choice("fp32", f"nothing is known of {device.type}")
    seconds = _probe(width, inner, torch.get_num_threads())
    rates = {name: 2e-9 * _PROBE_ROWS * width * inner / each for name, each in seconds.items()}
    chosen = "fp32"
    for name, gain in _LEAST_GAIN.items():
        if name in rates and rates[name] >= gain * rates[chosen]:
            chosen = name
    measured = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return Choice(chosen, f"measured on this processor, GFLOP/s: {measured}")


@functools.cache
def _probe(width: int, inner: int, threads: int) -> dict[str, float]:
    """Return the median seconds of one product (rows, width) x (width, inner) in each dtype."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, _PROBE_ROWS, width, generator=generator)
    layer = torch.nn.Linear(width, inner)
    kinds: dict[str, Callable[[], object]] = {"fp32": lambda: layer(rows)}
    half, half_rows = torch.nn.Linear(width, inner).bfloat16(), rows.bfloat16()
    kinds["bf16"] = lambda: half(half_rows)
    if can_quantize():
        small = quantize(layer)
        kinds["int8"] = lambda: small(rows)
    with torch.inference_mode():
        return {name: _seconds(call) for name, call in kinds.items()}


def _seconds(call: Callable[[], object]) -> float:
    call()
    taken = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
