"""What the backward pass of a network keeps, counted without computing anything."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from colabtools.dreambooth.planner import MemoryNeed
from colabtools.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["copy_to_meta", "measure_activations", "measure_need", "switch_checkpointing"]


def measure_need(
    build: Callable[[], torch.nn.Module],
    call: Callable[[torch.nn.Module], torch.Tensor],
    *,
    optimizer_bytes: Mapping[str, int],
    frozen_bytes_per_param: float = 2,
    half_precision: bool = True,
) -> MemoryNeed:
    """Return what a stage holds, by counting its networks on the meta device.

    Args:
        build: see `measure_activations`; a network is trained as far as it requires gradients.
        call: see `measure_activations`, for one example.
        optimizer_bytes: see `MemoryNeed`.
        frozen_bytes_per_param: of the weights that do not learn, as they are on the card.
        half_precision: whether the pass runs under autocast.

    Raises:
        ModelError: see `measure_activations`.
    """
    module = build()
    kept, checkpointed = (
        measure_activations(
            lambda: module, call, gradient_checkpointing=on, half_precision=half_precision
        )
        for on in (False, True)
    )
    parameters = list(module.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return MemoryNeed(
        trainable_params=trainable,
        frozen_params=sum(p.numel() for p in parameters) - trainable,
        frozen_bytes_per_param=frozen_bytes_per_param,
        activation_bytes=kept,
        # A network of a few layers may keep more with checkpointing than without.
        checkpointed_activation_bytes=min(kept, checkpointed),
        optimizer_bytes=optimizer_bytes,
        half_precision=half_precision,
    )


def copy_to_meta(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a loaded network on the meta device, made without copying its weights.

    What requires gradients in the original does so in the copy.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def measure_activations(
    build: Callable[[], torch.nn.Module],
    call: Callable[[torch.nn.Module], torch.Tensor],
    *,
    gradient_checkpointing: bool,
    half_precision: bool = True,
) -> int:
    """Return the bytes that a forward pass keeps for the backward pass.

    Nothing is computed: the network is on the meta device, where tensors have shapes and no
    contents. Weights and their half-precision copies are not counted; attention counts as the
    memory-efficient kernels do it, which keep no scores.

    Args:
        build: makes the network, or a `ModuleDict` of those that gradients flow through, on the
            meta device, for instance by `from_config` of diffusers or by `copy_to_meta`.
        call: the forward pass, on inputs on the meta device.
        gradient_checkpointing: whether the networks recompute their blocks.
        half_precision: whether the pass runs under autocast.

    Raises:
        ModelError: nothing in it learns, or it has no gradient checkpointing.
    """
    module = build().train()
    switch_checkpointing(module, on=gradient_checkpointing)
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Holding on to the storage keeps its id from being used again.
        storage = tensor.untyped_storage()
        saved[id(storage)] = storage
        return tensor

    autocast = _MetaAutocast(enabled=half_precision)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        output = call(module)
    if not output.requires_grad:
        raise ModelError(
            f"no weight of {type(module).__name__} takes part in its output with gradients; "
            "set requires_grad on those that learn"
        )
    weights = chain(module.parameters(), module.buffers(), autocast.copies.values())
    not_counted = {id(tensor.untyped_storage()) for tensor in weights}
    return sum(storage.nbytes() for key, storage in saved.items() if key not in not_counted)


def switch_checkpointing(module: torch.nn.Module, *, on: bool) -> None:
    """Switch gradient checkpointing of a network, or of all networks in a container.

    Raises:
        ModelError: it has none.
    """
    found = [switch for part in module.modules() if (switch := _find_switch(part, on=on))]
    for switch in found:
        switch()
    if on and not found:
        raise ModelError(
            f"{type(module).__name__} has no gradient checkpointing; set gradient_checkpointing off"
        )


def _find_switch(part: torch.nn.Module, *, on: bool) -> Callable[[], None] | None:
    """The method of a network's own library; transformers has renamed its method."""
    names = (
        "disable_gradient_checkpointing",
        "activation_checkpointing_disable",
        "gradient_checkpointing_disable",
    )
    if on:
        names = (
            "enable_gradient_checkpointing",
            "activation_checkpointing_enable",
            "gradient_checkpointing_enable",
        )
    return next((getattr(part, name) for name in names if hasattr(part, name)), None)


# Operations that autocast runs in half precision or in fp32 and that the networks here use.
# Source: torch 2.13, ATen/autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP and AT_FORALL_FP32.
_IN_HALF = frozenset(
    {
        "__matmul__",
        "addmm",
        "baddbmm",
        "bmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "einsum",
        "linear",
        "matmul",
        "mm",
        "scaled_dot_product_attention",
    }
)
_IN_FP32 = frozenset(
    {
        "exp",
        "group_norm",
        "layer_norm",
        "log",
        "mse_loss",
        "pow",
        "rms_norm",
        "rsqrt",
        "softmax",
    }
)


class _MetaAutocast(TorchFunctionMode):
    """Autocast for the meta device, which torch's own leaves alone; attention without scores."""

    def __init__(self, *, enabled: bool) -> None:
        super().__init__()
        self._enabled = enabled
        # Of each weight one copy for the whole pass, as autocast's cache has.
        self.copies: dict[torch.nn.Parameter, torch.Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Cast the arguments where autocast would, and do the operation."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._enabled and (name in _IN_HALF or name in _IN_FP32):
            dtype = torch.float16 if name in _IN_HALF else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {key: self._cast(value, dtype) for key, value in kwargs.items()}
        if name == "scaled_dot_product_attention":
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if value.dtype == dtype:
            return value
        if not isinstance(value, torch.nn.Parameter):
            return value.to(dtype)
        if value not in self.copies:
            self.copies[value] = value.to(dtype)
        return self.copies[value]


def _fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    output: torch.Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output


class _FusedAttention(torch.autograd.Function):
    """The shapes of memory-efficient attention: no scores, one logarithm per query."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        batch, heads, tokens, _ = query.shape
        # The kernels write tokens before heads, so merging the heads afterwards copies nothing.
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        logsumexp = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output
