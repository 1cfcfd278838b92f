"""Low-rank adapters on a frozen network: added, saved, loaded and merged through PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from colabtools.errors import CheckpointError, ConfigError
from colabtools.fields import check_flag, check_number, check_whole

__all__ = [
    "TARGET_MODULES",
    "AdapterConfig",
    "adapter_config",
    "adapter_parameters",
    "adapter_state",
    "add_adapter",
    "load_adapter_state",
    "merge_adapter",
]

# Which layers of each part are adapted: all attention, and in Flux the feed-forward layers that
# follow it in the blocks of two streams.
# Source: train_dreambooth_lora.py, train_dreambooth_lora_sdxl.py and train_dreambooth_lora_flux.py
# of diffusers' examples/dreambooth.
_CLIP_ATTENTION = ("k_proj", "out_proj", "q_proj", "v_proj")
TARGET_MODULES: dict[str, tuple[str, ...]] = {
    "text_encoder": _CLIP_ATTENTION,
    "text_encoder_2": _CLIP_ATTENTION,
    "transformer": (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    "unet": ("to_k", "to_out.0", "to_q", "to_v"),
}

_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The shape of an adapter; `asdict` of it is what a manifest keeps.

    Attributes:
        rank: inner width of each pair of matrices.
        alpha: their product is scaled by alpha / rank; None is the rank, a scale of 1.
        dropout: share of their inputs that is dropped in training.
        use_dora: learn the length of each weight column apart (DoRA, arXiv 2402.09353).
        target_modules: ends of the names of the adapted layers; empty for the part's own list.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    use_dora: bool = False
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field; a manifest's list becomes a tuple."""
        check_whole("rank", self.rank, 1, 4096)
        if self.alpha is not None:
            check_number("alpha", self.alpha)
        check_number("dropout", self.dropout, least=0.0, most=0.99)
        check_flag("use_dora", self.use_dora)
        object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Return the record that `asdict` took apart.

        Raises:
            CheckpointError: the values are not those of an adapter.
        """
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the adapter's settings {dict(values)!r} cannot be used ({error}); "
                "it was written by another version or is damaged, train again"
            ) from error


def add_adapter(
    module: nn.Module, part_name: str, config: AdapterConfig, *, seed: int = 0
) -> list[nn.Parameter]:
    """Add an adapter to a network in place and return its weights, fp32 and trainable.

    The network's own weights are frozen. A new adapter changes nothing yet: one of its matrices is
    zero.

    Args:
        module: the network.
        part_name: its name in the pipeline, "unet", "text_encoder", ...
        config: the adapter's shape.
        seed: of the matrix that is not zero; the same seed gives the same adapter.

    Raises:
        ConfigError: no layer of the network has the names that should be adapted.
    """
    targets = config.target_modules or TARGET_MODULES.get(part_name, ())
    settings = LoraConfig(
        r=config.rank,
        # PEFT's type says int; it only divides by the rank.
        lora_alpha=config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_dora=config.use_dora,
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )
    module.requires_grad_(False)
    try:
        # PEFT draws on the CPU; a GPU's generator is left alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(settings, module, _ADAPTER)
    except ValueError as error:
        raise ConfigError(
            f"target_modules is {targets!r}; give names of layers that the {part_name} has"
        ) from error
    parameters = adapter_parameters(module)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the adapter, in the order of the network's layers."""
    return [parameter for name, parameter in module.named_parameters() if "lora_" in name]


def adapter_config(module: nn.Module) -> dict[str, Any]:
    """Return the adapter's shape for a manifest, its layers named; `AdapterConfig.from_dict` reads.

    Raises:
        CheckpointError: the network has no adapter.
    """
    settings = _settings(module)
    config = AdapterConfig(
        rank=settings.r,
        alpha=float(settings.lora_alpha),
        dropout=settings.lora_dropout,
        use_dora=settings.use_dora,
        target_modules=tuple(sorted(settings.target_modules or ())),
    )
    return {**asdict(config), "target_modules": list(config.target_modules)}


def adapter_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's weights by PEFT's names, without the network's own.

    Raises:
        CheckpointError: the network has no adapter.
    """
    _settings(module)
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        module, adapter_name=_ADAPTER, save_embedding_layers=False
    )
    return {name: tensor.detach() for name, tensor in state.items()}


def load_adapter_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put saved weights into the network's adapter.

    Raises:
        CheckpointError: names or shapes are not exactly those of the adapter; both lists are given.
    """
    own = adapter_state(module)
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    other = sorted(
        name for name in own.keys() & state.keys() if own[name].shape != state[name].shape
    )
    if missing or extra or other:
        raise CheckpointError(
            f"the adapter's weights do not fit: missing {_some(missing)}; extra {_some(extra)}; "
            f"of another shape {_some(other)}; use the base model and rank that it was trained with"
        )
    set_peft_model_state_dict(module, dict(state), adapter_name=_ADAPTER)


def merge_adapter(module: nn.Module) -> None:
    """Add the adapter to the network's own weights and remove it; the names are plain afterwards.

    Raises:
        CheckpointError: there is no adapter, or merged weights would not be finite; the network is
            of no use then.
    """
    _settings(module)
    layers = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)
    ]
    for name, layer in layers:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise CheckpointError(
                f"the adapter of {name} is not finite; use an earlier checkpoint"
            ) from error
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    del module.peft_config


def _settings(module: nn.Module) -> LoraConfig:
    settings: dict[str, LoraConfig] = getattr(module, "peft_config", {})
    if _ADAPTER not in settings:
        raise CheckpointError(
            f"the {type(module).__name__} has no adapter; add one with add_adapter first"
        )
    return settings[_ADAPTER]


def _some(names: list[str]) -> str:
    """Return the first few names on one line."""
    shown = ", ".join(names[:4]) or "nothing"
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
