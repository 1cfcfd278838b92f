"""The optimizers to choose from, what they cost, and how their state comes back bit for bit."""

from __future__ import annotations

import functools
import importlib
import io
import math
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from colabtools.errors import CheckpointError, ConfigError, MissingDependencyError
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "OPTIMIZERS",
    "OptimizerInfo",
    "can_use_8bit",
    "check_optimizer",
    "load_optimizer_state",
    "make_optimizer",
    "reference_lr",
    "resolve_optimizer",
    "state_bytes",
]

_FP32_BYTES = 4

# Source: bitsandbytes 0.50.2, bitsandbytes/optim/optimizer.py, Optimizer2State.init_state: two
# uint8 states with one fp32 maximum per block of 256 for tensors from 4096 elements on, two fp32
# states below; the two quantization maps of 256 fp32 values are shared by all tensors.
_8BIT_LEAST_ELEMENTS = 4096
_8BIT_BLOCK = 256
_8BIT_MAPS_BYTES = 2 * 256 * _FP32_BYTES

# How the arithmetic is done is the business of the machine at hand, not of the one that saved.
_IMPLEMENTATION = ("capturable", "differentiable", "foreach", "fused")


@dataclass(frozen=True, kw_only=True)
class OptimizerInfo:
    """What is known about an optimizer.

    Attributes:
        module: where its class is.
        cls: name of the class.
        package: what pip installs.
        lr_factor: its learning rate over AdamW's for the same job; None where it finds its own and
            is given 1.0.
        state_bytes_per_param: with all of Stable Diffusion 1.5's UNet in fp32, for a first
            estimate; `state_bytes` is exact for any network.
        settings: arguments that differ from the library's defaults.
        state_names: what it may keep of each parameter, one row for each form of state.
    """

    module: str
    cls: str
    package: str
    lr_factor: float | None = 1.0
    state_bytes_per_param: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    state_names: tuple[frozenset[str], ...]


def _names(*forms: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(form.split()) for form in forms)


OPTIMIZERS: dict[str, OptimizerInfo] = {
    # transformers', because torch's own can only scale its step by the size of the weights: with
    # these settings the learning rate means what it means to AdamW. It factors the last two sides
    # of a tensor, so a 3x3 convolution keeps 6 of 9 numbers and a 1x1 one 2 for each weight; SDXL,
    # with fewer of both, needs 0.4 bytes per parameter.
    # Source: Shazeer & Stern 2018, arXiv 1804.04235.
    "adafactor": OptimizerInfo(
        module="transformers.optimization",
        cls="Adafactor",
        package="transformers",
        state_bytes_per_param=2.13,
        settings={"relative_step": False, "scale_parameter": False},
        state_names=_names("step RMS exp_avg_sq_row exp_avg_sq_col", "step RMS exp_avg_sq"),
    ),
    "adamw": OptimizerInfo(
        module="torch.optim",
        cls="AdamW",
        package="torch",
        state_bytes_per_param=8,
        state_names=_names("step exp_avg exp_avg_sq"),
    ),
    "adamw8bit": OptimizerInfo(
        module="bitsandbytes.optim",
        cls="AdamW8bit",
        package="bitsandbytes",
        state_bytes_per_param=2.034,
        state_names=_names(
            "step __bnb_optimizer_quant_state__",
            "step state1 state2",
            "step state1 state2 qmap1 qmap2 absmax1 absmax2",
        ),
    ),
    # Source: Chen et al. 2023, arXiv 2302.06675, section 5: learning rate 3 to 10 times smaller.
    "lion": OptimizerInfo(
        module="lion_pytorch",
        cls="Lion",
        package="lion-pytorch",
        lr_factor=0.2,
        state_bytes_per_param=4,
        state_names=_names("exp_avg"),
    ),
    # Source: Mishchenko & Defazio 2023, arXiv 2306.06101; both settings are its authors' advice for
    # diffusion models (README of prodigyopt 1.1).
    "prodigy": OptimizerInfo(
        module="prodigyopt",
        cls="Prodigy",
        package="prodigyopt",
        lr_factor=None,
        state_bytes_per_param=16,
        settings={"safeguard_warmup": True, "use_bias_correction": True},
        state_names=_names("step s p0 exp_avg exp_avg_sq"),
    ),
}


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that cannot be made here; for a look before the first training step.

    "adamw8bit" always passes: without its library AdamW takes its place.

    Raises:
        ConfigError: there is no optimizer of that name.
        MissingDependencyError: its library is not installed.
    """
    info = _find(name)
    if name != "adamw8bit":
        _load_class(info)


def resolve_optimizer(name: str, device: torch.device) -> str:
    """Return the name of the optimizer that will really run on the device.

    It differs for "adamw8bit" where that cannot run; the reason is logged once.

    Raises:
        ConfigError: there is no optimizer of that name.
    """
    _find(name)
    if name != "adamw8bit":
        return name
    if reason := _obstacle_to_8bit(device):
        _announce_fallback(reason)
        return "adamw"
    return name


def can_use_8bit(device: torch.device) -> bool:
    """Return whether "adamw8bit" would run on the device, without a word about it."""
    return not _obstacle_to_8bit(device)


def reference_lr(name: str, adamw_lr: float) -> float:
    """Return the learning rate to begin with, where `adamw_lr` is known to be good for AdamW.

    Raises:
        ConfigError: there is no optimizer of that name.
    """
    factor = _find(name).lr_factor
    return 1.0 if factor is None else adamw_lr * factor


def make_optimizer(
    name: str,
    parameter_groups: Sequence[Mapping[str, Any]],
    *,
    weight_decay: float = 1e-2,
    device: torch.device,
) -> torch.optim.Optimizer:
    """Return the optimizer, or AdamW in place of an 8-bit one that cannot run on the device.

    Args:
        name: one of `OPTIMIZERS`.
        parameter_groups: each with "params" and its learning rate "lr".
        weight_decay: decoupled, taken off the weights as a share of the learning rate.
        device: where the parameters are.

    Raises:
        ConfigError: there is no optimizer of that name, or the learning rates cannot be used.
        MissingDependencyError: its library is not installed.
    """
    name = resolve_optimizer(name, device)
    info = OPTIMIZERS[name]
    groups = [{**group, "params": list(group["params"])} for group in parameter_groups]
    rates = [group["lr"] for group in groups]
    if name == "prodigy" and len(set(rates)) > 1:
        raise ConfigError(
            f"the learning rates for prodigy are {', '.join(f'{rate:g}' for rate in rates)}; "
            "it finds one step size for all networks, give each of them 1.0"
        )
    settings = dict(info.settings)
    if name == "adamw":
        # One kernel for all tensors: on a CPU too, a sixth of the time.
        settings["fused"] = True
    if name == "adamw8bit":
        _make_contiguous(groups)
    # Prodigy prints where results go.
    with redirect_stdout(io.StringIO()):
        made: torch.optim.Optimizer = _load_class(info)(
            groups, lr=rates[0], weight_decay=weight_decay, **settings
        )
    return made


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Bring an optimizer to exactly the saved state, so that it goes on as if never interrupted.

    `Optimizer.load_state_dict` alone is not exact: it rounds a state to the type of its parameter,
    keeps the saved tensors and later writes to them, forgets the memory layout, which fused kernels
    insist on, and takes over the kernels of the machine that saved.

    Args:
        optimizer: made for the same parameters in the same order.
        state: what `state_dict` gave, on any device; it is left as it is.

    Raises:
        CheckpointError: the state is of another optimizer or of other parameters.
    """
    _check_state_names(optimizer, state)
    groups = [dict(group) for group in state["param_groups"]]
    for group, fresh in zip(groups, optimizer.param_groups, strict=False):
        group.update({name: fresh[name] for name in _IMPLEMENTATION if name in fresh})
    small = {
        number: {name: _copy(value) for name, value in kept.items() if not _is_placed(name, value)}
        for number, kept in state["state"].items()
    }
    try:
        optimizer.load_state_dict({"state": small, "param_groups": groups})
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the saved state of {type(optimizer).__name__} does not fit these networks ({error}); "
            "resume with the settings it was saved with, or set resume to never"
        ) from error
    numbers = [number for group in groups for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, saved in state["state"].get(number, {}).items():
            if _is_placed(name, saved):
                optimizer.state[parameter][name] = _place(saved, parameter)


def state_bytes(name: str, shapes: Iterable[tuple[int, ...]]) -> int:
    """Return the bytes of the state that an optimizer keeps for fp32 parameters of these shapes.

    Prodigy needs a quarter less for a parameter that begins as zeros; that is not foreseen here.

    Raises:
        ConfigError: there is no optimizer of that name.
    """
    _find(name)
    per_tensor: dict[str, Callable[[tuple[int, ...]], int]] = {
        "adafactor": _adafactor_bytes,
        # With a step count of its own for each tensor.
        "adamw": lambda shape: (2 * math.prod(shape) + 1) * _FP32_BYTES,
        "adamw8bit": _8bit_bytes,
        "lion": lambda shape: math.prod(shape) * _FP32_BYTES,
        "prodigy": lambda shape: 4 * math.prod(shape) * _FP32_BYTES,
    }
    shapes = list(shapes)
    total = sum(per_tensor[name](shape) for shape in shapes)
    quantized = any(math.prod(shape) >= _8BIT_LEAST_ELEMENTS for shape in shapes)
    return total + (_8BIT_MAPS_BYTES if name == "adamw8bit" and quantized else 0)


def _adafactor_bytes(shape: tuple[int, ...]) -> int:
    factored = len(shape) >= 2
    row, column = math.prod(shape[:-1]), math.prod(shape[:-2] + shape[-1:])
    # One more for the root mean square of the parameter.
    return ((row + column if factored else math.prod(shape)) + 1) * _FP32_BYTES


def _8bit_bytes(shape: tuple[int, ...]) -> int:
    elements = math.prod(shape)
    if elements < _8BIT_LEAST_ELEMENTS:
        return 2 * elements * _FP32_BYTES
    return 2 * elements + 2 * math.ceil(elements / _8BIT_BLOCK) * _FP32_BYTES


def _find(name: str) -> OptimizerInfo:
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer is {name!r}; give one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def _load_class(info: OptimizerInfo) -> Any:
    try:
        return getattr(importlib.import_module(info.module), info.cls)
    # A library for another CUDA fails to import in any of these ways.
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"{info.cls} needs {info.package}, which cannot be imported ({error}); "
            f"install it with: pip install {info.package}"
        ) from error


def _make_contiguous(groups: Iterable[Mapping[str, Any]]) -> None:
    """Give up other memory layouts before the first update does.

    bitsandbytes makes a state in the layout of its parameter, then makes the parameter contiguous
    and pairs the two by address: saved and loaded, the numbers would come back in another order.

    Source: bitsandbytes 0.50.2, bitsandbytes/optim/optimizer.py, Optimizer2State.update_step.
    """
    for group in groups:
        for parameter in group["params"]:
            parameter.data = parameter.data.contiguous()


def _obstacle_to_8bit(device: torch.device) -> str:
    """Return why 8-bit AdamW cannot run, or an empty text."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU and this runs on {device.type}"
    try:
        _load_class(OPTIMIZERS["adamw8bit"])
    except MissingDependencyError as error:
        return str(error)
    return ""


@functools.cache
def _announce_fallback(reason: str) -> None:
    get_logger(__name__).warning("AdamW with fp32 states is used in place of adamw8bit: %s", reason)


def _check_state_names(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    known = {info.cls: info.state_names for info in OPTIMIZERS.values()}
    forms = known.get(type(optimizer).__name__)
    for kept in state["state"].values():
        if forms is not None and frozenset(kept) not in forms:
            raise CheckpointError(
                f"the saved optimizer state holds {', '.join(sorted(kept))}, which is not what "
                f"{type(optimizer).__name__} keeps; resume with the optimizer that it was saved "
                "with, or set resume to never"
            )


def _is_placed(name: str, value: object) -> bool:
    """Return whether we put this value in place; where a step count lives, the library decides."""
    return isinstance(value, torch.Tensor) and name != "step"


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _place(saved: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy beside its parameter, in the type it was saved in.

    Its memory layout is that of the parameter where both have one shape.
    """
    if saved.shape != parameter.shape:
        return saved.detach().to(parameter.device, copy=True)
    placed = torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False)
    return placed.copy_(saved)
