"""The networks that learn in a stage: made ready, taken out as tensors, put back."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from colabtools.devices import half_dtype
from colabtools.dreambooth import lora
from colabtools.dreambooth.activations import switch_checkpointing
from colabtools.dreambooth.models import load_pipeline, to_trainable_fp32
from colabtools.dreambooth.optimizers import can_use_8bit
from colabtools.dreambooth.randomness import derive_seed
from colabtools.errors import CheckpointError, ConfigError
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from colabtools.dreambooth.families import Models
    from colabtools.dreambooth.plan import TrainPlan
    from colabtools.dreambooth.planner import MemoryPlan
    from colabtools.dreambooth.stages import Stage

__all__ = [
    "Networks",
    "adapter_settings",
    "compute_dtype",
    "ensure_adapter",
    "file_stem",
    "load_weights",
    "use_attention",
]

_PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def file_stem(part: str, method: str) -> str:
    """Return what a network's trained tensors are called in a checkpoint."""
    return part if method == "full" else f"{part}_lora"


def compute_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of the forward pass; None is fp32.

    Raises:
        ConfigError: bf16 is asked for on a card that only emulates it.
    """
    natural = half_dtype(device)
    if precision == "auto":
        return natural
    wanted = _PRECISIONS[precision]
    if wanted is torch.bfloat16 and device.type == "cuda" and natural is not torch.bfloat16:
        raise ConfigError(
            "precision is 'bf16', which cards below compute capability 8.0 only emulate; "
            "use auto or fp16"
        )
    if wanted is torch.float16 and device.type == "cpu":
        raise ConfigError("precision is 'fp16', which is for GPUs; use auto, fp32 or bf16")
    return wanted


def adapter_settings(plan: TrainPlan) -> lora.AdapterConfig:
    """Return the shape of the adapters of a run."""
    return lora.AdapterConfig(
        rank=plan.config.lora_rank,
        alpha=plan.lora_alpha,
        dropout=plan.config.lora_dropout,
        use_dora=plan.method == "dora",
    )


def ensure_adapter(module: torch.nn.Module, part: str, plan: TrainPlan) -> None:
    """Give a network its adapter unless it has one."""
    if not hasattr(module, "peft_config"):
        seed = derive_seed(plan.config.seed, "adapter", part)
        lora.add_adapter(module, part, adapter_settings(plan), seed=seed)


class Networks:
    """The networks of a stage, those that learn with fp32 weights and gradients."""

    def __init__(self, stage: Stage, plan: TrainPlan, models: Models) -> None:
        self.stage = stage
        self.plan = plan
        self._models = models
        self.compute_dtype = compute_dtype(plan.config.precision, models.device)
        self.parts = {part: models.part(part) for part in stage.rates}
        for part, module in self.parts.items():
            self._make_trainable(part, module)
        self._named = [
            (f"{part}.{name}", parameter)
            for part, module in self.parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        self._checkpoints_gradients = False
        self._ema = self._make_ema() if plan.config.ema else None

    def _make_trainable(self, part: str, module: torch.nn.Module) -> None:
        if self.plan.method == "full":
            to_trainable_fp32(module)
        else:
            ensure_adapter(module, part, self.plan)
        module.train()
        if self._models.device.type == "cuda" and part == "unet":
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _make_ema(self) -> Any:
        from diffusers.training_utils import EMAModel

        return EMAModel(self.parameters(), decay=self.plan.config.ema_decay)

    @property
    def can_use_8bit(self) -> bool:
        """Whether an 8-bit optimizer could take over."""
        return can_use_8bit(self._models.device)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._models.device

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the weights that learn, always in the same order."""
        return [parameter for _, parameter in self._named]

    def named_weights(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the weights that learn with `<network>.<name>`."""
        return list(self._named)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group of weights for each network, with its peak learning rate."""
        return [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": rate}
            for module, rate in zip(self.parts.values(), self.stage.rates.values(), strict=True)
        ]

    def set_rates(self, optimizer: torch.optim.Optimizer, factor: float) -> list[float]:
        """Give each group its peak rate times the factor, and return them."""
        for group, peak in zip(optimizer.param_groups, self.stage.rates.values(), strict=True):
            group["lr"] = peak * factor
        return [group["lr"] for group in optimizer.param_groups]

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Compute activations twice instead of keeping them, in all that gradients flow through."""
        if enabled == self._checkpoints_gradients:
            return
        self._checkpoints_gradients = enabled
        modules = {**self.parts, self._models.family.denoiser: self._models.denoiser}
        for module in modules.values():
            switch_checkpointing(module, on=enabled)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        dtype = self.compute_dtype
        return torch.autocast(self._models.device.type, dtype=dtype, enabled=dtype is not None)

    def saved_activations(self, memory: MemoryPlan) -> AbstractContextManager[Any]:
        """Return the context that keeps activations in the host's memory, if that is the plan."""
        if not memory.offload_activations:
            return nullcontext()
        modules = [*self.parts.values(), self._models.denoiser]
        # Weights are saved for the backward pass too; they are on the card anyway.
        weights = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}

        def pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
            if tensor.untyped_storage().data_ptr() in weights:
                return tensor.device, tensor
            return tensor.device, tensor.cpu()

        def unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
            device, tensor = packed
            return tensor.to(device, non_blocking=True)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def update_ema(self) -> None:
        """Move the average towards the weights."""
        if self._ema is not None:
            self._ema.step(self.parameters())

    def ema_state(self) -> dict[str, Any] | None:
        """Return the average's counters, and the weights that it is the average of.

        The average itself is what `weights` returns, because it is the result.
        """
        if self._ema is None:
            return None
        counters = {k: v for k, v in self._ema.state_dict().items() if k != "shadow_params"}
        return {**counters, "learning": [p.detach() for p in self.parameters()]}

    def load_ema_state(self, state: dict[str, Any] | None) -> None:
        """Take the weights that are in place as the average, and put the learning ones there.

        Raises:
            KeyError: a part of the state is missing.
            ValueError: there is one where none is kept, or the other way round.
        """
        if (state is None) != (self._ema is None):
            raise ValueError("one of the two runs keeps an average of the weights, the other not")
        if self._ema is None or state is None:
            return
        average = [p.detach().clone() for p in self.parameters()]
        counters = {name: value for name, value in state.items() if name != "learning"}
        self._ema.load_state_dict({**counters, "shadow_params": average})
        self._ema.decay = self.plan.config.ema_decay
        self._ema.to(self._models.device)
        with torch.no_grad():
            for parameter, learning in zip(self.parameters(), state["learning"], strict=True):
                parameter.copy_(learning)

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the result so far, by file stem and name: the average where one is kept."""
        average: dict[int, torch.Tensor] = {}
        if self._ema is not None:
            # Adapters are saved by other names than they are trained by; memory tells them apart.
            pairs = zip(self.parameters(), self._ema.shadow_params, strict=True)
            average = {parameter.data_ptr(): shadow for parameter, shadow in pairs}
        return {
            file_stem(part, self.plan.method): {
                name: average.get(tensor.data_ptr(), tensor)
                for name, tensor in self._tensors(module).items()
            }
            for part, module in self.parts.items()
        }

    def _tensors(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        if self.plan.method == "full":
            return {name: tensor.detach() for name, tensor in module.state_dict().items()}
        return lora.adapter_state(module)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Let the networks be used in between as they would be at the end of the stage.

        Without dropout and gradients, and with the average of the weights where one is kept; all is
        put back as it was, to the bit.
        """
        modes = {part: module.training for part, module in self.parts.items()}
        for module in self.parts.values():
            module.eval()
        if self._ema is not None:
            self._ema.store(self.parameters())
            self._ema.copy_to(self.parameters())
        try:
            with torch.no_grad():
                yield
        finally:
            if self._ema is not None:
                self._ema.restore(self.parameters())
            for part, module in self.parts.items():
                module.train(modes[part])

    def reset(self, part: str) -> None:
        """Put the base model's weights back into a network that was trained whole."""
        fresh = getattr(load_pipeline(self._models.base), part)
        self.parts[part].load_state_dict(fresh.state_dict())

    def finish(self) -> None:
        """Put the average in place of the weights, and freeze the networks."""
        if self._ema is not None:
            self._ema.copy_to(self.parameters())
        self.checkpoint_gradients(False)
        for module in self.parts.values():
            module.requires_grad_(False).eval()


def use_attention(models: Models, kind: str) -> None:
    """Let the denoiser compute attention with xformers, where it is asked for and can be.

    Torch's own kernels, which are the default, do the same where it cannot.
    """
    if kind != "xformers":
        return
    try:
        models.denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, AttributeError, NotImplementedError) as error:
        get_logger(__name__).warning(
            "attention is torch's own instead of xformers' (%s)", str(error).partition("\n")[0]
        )


def load_weights(models: Models, saved: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Put saved tensors of full networks or of adapters that are there already in place.

    Raises:
        CheckpointError: they are not this network's.
    """
    for stem, tensors in saved.items():
        if stem.endswith("_lora"):
            lora.load_adapter_state(models.part(stem.removesuffix("_lora")), dict(tensors))
            continue
        try:
            models.part(stem).load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise CheckpointError(
                f"the saved {stem} does not fit the base model ({str(error).splitlines()[0]}); "
                "use the base model it was trained from"
            ) from error
