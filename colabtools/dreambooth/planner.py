"""How a stage of training fits on the card: what it needs, the fastest way, and the way down.

Lengths are bytes. One example is what the micro-batch counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product

from colabtools.errors import ConfigError
from colabtools.fields import check_choice, check_whole

__all__ = [
    "VRAM_MARGIN",
    "MemoryNeed",
    "MemoryPlan",
    "next_rung",
    "plan_memory",
    "predict_bytes",
]

# Kept free of what the card has: as much as predictions were seen to be too low.
VRAM_MARGIN = 0.07

# The two unknowns of the model in `predict_bytes`, fitted to eight measured runs of SD 1.5 on a T4
# (9.9 to 17.7 GB): every one is met within 7.5 %. The factor is for what the allocator rounds up
# and what kernels and the backward pass hold for a moment; the constant is the CUDA context and
# cuDNN's workspaces. Source: ShivamShrirao/diffusers@b2983e7, examples/dreambooth/README.md.
_ACTIVATION_FACTOR = 2.3
_OVERHEAD_BYTES = 1_500_000_000

# Relative time of a forward and backward pass: that much for any pass plus one for each example in
# it, times the factors. Source: the speeds of the same table (1.14 and 0.82 it/s at batch 1 and 2,
# 0.93 and 0.66 with checkpointing). Offloading sends every activation over the bus and back; its
# factor is an estimate, of which only matters that it is the highest.
_PASS_COST = 1.5
_CHECKPOINTING_COST = 1.24
_OFFLOADING_COST = 2.0

_FP32_BYTES = 4
_HALF_BYTES = 2
# 4 bits, and one fp32 scale for each 64 weights. Source: arXiv 2305.14314, section 3.
_NF4_BYTES = 0.5 + 4 / 64
# Rank 16 on the attention of SD 1.5's UNet is 0.4 % of its weights.
_LORA_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """What one stage of training holds on the card.

    Attributes:
        trainable_params: weights that learn, kept in fp32.
        frozen_params: all other weights on the card while this stage runs.
        frozen_bytes_per_param: of those; 4 for fp32, 2 for half precision, 0.5625 for NF4.
        activation_bytes: what the backward pass of one example keeps; see
            `activations.measure_activations`.
        checkpointed_activation_bytes: the same with gradient checkpointing.
        optimizer_bytes: state of each optimizer that may be chosen, by its name; adamw8bit only
            where it is installed.
        other_bytes: anything else on the card, such as an average of the weights.
        half_precision: the forward pass runs under autocast, with half-precision copies of the
            weights that learn; the activations must be counted the same way.
        gradient_checkpointing: on, off, or auto (whichever the plan finds better).
    """

    trainable_params: int
    frozen_params: int = 0
    frozen_bytes_per_param: float = _HALF_BYTES
    activation_bytes: int
    checkpointed_activation_bytes: int
    optimizer_bytes: Mapping[str, int]
    other_bytes: int = 0
    half_precision: bool = True
    gradient_checkpointing: str = "auto"

    def __post_init__(self) -> None:
        """Check that the numbers can be those of a network."""
        check_choice("gradient_checkpointing", self.gradient_checkpointing, ("auto", "on", "off"))
        for name in ("trainable_params", "frozen_params", "other_bytes", "activation_bytes"):
            check_whole(name, getattr(self, name), 0)
        # More with checkpointing than without would turn the ladder upside down.
        check_whole(
            "checkpointed_activation_bytes",
            self.checkpointed_activation_bytes,
            0,
            self.activation_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a stage runs; none of it changes which examples an update learns from.

    Attributes:
        micro_batch: examples in one forward and backward pass.
        accumulation: passes per update; the last may have fewer examples.
        gradient_checkpointing: compute activations again rather than keep them.
        optimizer: name, never "auto".
        offload_activations: keep saved activations in main memory.
        predicted_bytes: peak on the card.
        reasons: why, in sentences without an end; the last rung of the ladder is the last of them.
    """

    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool
    optimizer: str
    offload_activations: bool = False
    predicted_bytes: int = 0
    reasons: tuple[str, ...] = ()


def predict_bytes(need: MemoryNeed, plan: MemoryPlan) -> int:
    """Return the predicted peak on the card.

    It is at the end of the forward pass, where the activations and autocast's half-precision copies
    of the weights are all there, or at the end of the backward pass, where the gradients are.
    Gradients that wait for further passes are there at both ends.
    """
    gradients = _FP32_BYTES * need.trainable_params
    copies = _HALF_BYTES * need.trainable_params if need.half_precision else 0
    waiting = gradients if plan.accumulation > 1 else 0
    # Offloading moves what is saved; what the factor adds to it stays on the card.
    factor = _ACTIVATION_FACTOR - (1 if plan.offload_activations else 0)
    saved = need.activation_bytes
    if plan.gradient_checkpointing:
        saved = need.checkpointed_activation_bytes
    forward = waiting + copies + factor * plan.micro_batch * saved
    backward = gradients + factor * plan.micro_batch * need.checkpointed_activation_bytes
    return int(_resident_bytes(need, plan.optimizer) + max(forward, backward))


def _resident_bytes(need: MemoryNeed, optimizer: str) -> float:
    weights = _FP32_BYTES * need.trainable_params + need.frozen_bytes_per_param * need.frozen_params
    return weights + need.optimizer_bytes[optimizer] + need.other_bytes + _OVERHEAD_BYTES


def plan_memory(
    need: MemoryNeed,
    vram_bytes: int | None,
    *,
    batch_size: int,
    accumulation: int,
    optimizer: str = "auto",
) -> MemoryPlan:
    """Return the fastest plan that is predicted to fit, for the effective batch that is asked for.

    Time decides, as measured on a T4. The 8-bit optimizer costs none, so it comes before anything
    slower, but after plain AdamW where both are as fast, since that is exact. Gradient
    checkpointing costs a quarter of the time. A pass costs as much as 1.5 examples in it, so a
    small batch is rather checkpointed whole than split, and a large one the other way round.
    Offloading is for what does not fit otherwise.

    Args:
        need: what the stage holds.
        vram_bytes: free memory of the card, of which `VRAM_MARGIN` is left alone; None on a CPU,
            where everything is as asked.
        batch_size: examples per pass as asked for, never exceeded.
        accumulation: passes per update as asked for.
        optimizer: a name in `need.optimizer_bytes`, or "auto" for adamw or adamw8bit.

    Raises:
        ConfigError: it cannot fit; the message says by how much, and what would.
    """
    check_whole("batch_size", batch_size, 1)
    check_whole("gradient_accumulation_steps", accumulation, 1)
    names = _optimizer_names(need, optimizer)
    asked = MemoryPlan(
        micro_batch=batch_size,
        accumulation=accumulation,
        gradient_checkpointing=need.gradient_checkpointing == "on",
        optimizer=names[0],
    )
    if vram_bytes is None:
        return replace(asked, predicted_bytes=predict_bytes(need, asked), reasons=_NO_CARD)
    budget = int(vram_bytes * (1 - VRAM_MARGIN))
    fitting = [p for p in _candidates(need, asked, names) if p.predicted_bytes <= budget]
    if not fitting:
        raise ConfigError(_impossible(need, asked, names, budget))
    # The order of the candidates decides between equals: AdamW comes first.
    best = min(fitting, key=_cost)
    return replace(best, reasons=_explain(need, asked, best, vram_bytes))


_NO_CARD = ("everything as asked: there is no card whose memory could end",)


def _optimizer_names(need: MemoryNeed, optimizer: str) -> tuple[str, ...]:
    known = tuple(need.optimizer_bytes)
    wanted = ("adamw", "adamw8bit") if optimizer == "auto" else (optimizer,)
    names = tuple(name for name in wanted if name in known)
    if not names:
        raise ConfigError(
            f"optimizer is {optimizer!r}; its memory is not known, give one of {', '.join(known)}"
        )
    return names


def _candidates(
    need: MemoryNeed, asked: MemoryPlan, names: tuple[str, ...]
) -> Iterator[MemoryPlan]:
    """Every way to run at the effective batch that is asked for, those of the first name first."""
    effective = asked.micro_batch * asked.accumulation
    # Every activation through the host's memory is more than a free runtime has, so only those that
    # checkpointing leaves go there, unless it is off.
    ways = {
        "auto": ((False, False), (True, False), (True, True)),
        "on": ((True, False), (True, True)),
        "off": ((False, False), (False, True)),
    }[need.gradient_checkpointing]
    for name, micro_batch, (checkpoint, offload) in product(
        names, _halvings(asked.micro_batch), ways
    ):
        plan = MemoryPlan(
            micro_batch=micro_batch,
            accumulation=_passes(effective, micro_batch),
            gradient_checkpointing=checkpoint,
            optimizer=name,
            offload_activations=offload,
        )
        yield replace(plan, predicted_bytes=predict_bytes(need, plan))


def _halvings(batch: int) -> Iterator[int]:
    """The batch, its half rounded up, and so on down to 1."""
    while batch > 1:
        yield batch
        batch = (batch + 1) // 2
    yield 1


def _passes(examples: int, micro_batch: int) -> int:
    return -(-examples // micro_batch)


def _cost(plan: MemoryPlan) -> float:
    """Time of an update, in units of what one more example in a pass takes."""
    cost = plan.accumulation * (_PASS_COST + plan.micro_batch)
    if plan.gradient_checkpointing:
        cost *= _CHECKPOINTING_COST
    if plan.offload_activations:
        cost *= _OFFLOADING_COST
    return cost


def _explain(
    need: MemoryNeed, asked: MemoryPlan, plan: MemoryPlan, vram_bytes: int
) -> tuple[str, ...]:
    reasons = [f"{_size(plan.predicted_bytes)} predicted, {_size(vram_bytes)} free on the card"]
    if plan.optimizer != asked.optimizer:
        saved = need.optimizer_bytes[asked.optimizer] - need.optimizer_bytes[plan.optimizer]
        reasons.append(f"{plan.optimizer}: its state is {_size(saved)} less, at the same speed")
    if plan.micro_batch < asked.micro_batch:
        whole = replace(plan, micro_batch=asked.micro_batch, accumulation=asked.accumulation)
        reasons.append(
            f"{_describe_batch(plan)}: it would be {_size(predict_bytes(need, whole))} with "
            f"{asked.micro_batch}"
        )
    if need.gradient_checkpointing != "auto":
        reasons.append(f"gradient checkpointing {need.gradient_checkpointing}: as asked")
    elif plan.gradient_checkpointing:
        without = predict_bytes(need, replace(plan, gradient_checkpointing=False))
        reasons.append(f"gradient checkpointing: it would be {_size(without)} without")
    else:
        reasons.append("no gradient checkpointing: it fits without, and that is faster")
    if plan.offload_activations:
        without = predict_bytes(need, replace(plan, offload_activations=False))
        reasons.append(f"activations in main memory: it would be {_size(without)} without")
    return tuple(reasons)


def _describe_batch(plan: MemoryPlan) -> str:
    times = "once" if plan.accumulation == 1 else f"{plan.accumulation} times"
    return f"micro-batch {plan.micro_batch}, {times} per update"


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"


def _impossible(need: MemoryNeed, asked: MemoryPlan, names: tuple[str, ...], budget: int) -> str:
    least = _least(need, asked, names)
    means = [f"micro-batch {least.micro_batch}", least.optimizer]
    if least.gradient_checkpointing:
        means.append("gradient checkpointing")
    if least.offload_activations:
        means.append("activations in main memory")
    remedies = [
        " and ".join(changes)
        for changes, changed in _changed_jobs(need)
        if _least(changed, asked, names).predicted_bytes <= budget
    ]
    # The simplest come first, and those that take more changes have no place beside them.
    simplest = [text for text in remedies if text.count(" and ") == remedies[0].count(" and ")]
    advice = f"it would fit with {' or with '.join(simplest)}" if simplest else "use a larger card"
    return (
        f"this training needs {_size(least.predicted_bytes)} on the card even with "
        f"{', '.join(means)}; {_size(budget)} can be used, "
        f"{_size(least.predicted_bytes - budget)} are missing; {advice}"
    )


def _least(need: MemoryNeed, asked: MemoryPlan, names: tuple[str, ...]) -> MemoryPlan:
    return min(_candidates(need, asked, names), key=lambda plan: plan.predicted_bytes)


def _changed_jobs(need: MemoryNeed) -> Iterator[tuple[tuple[str, ...], MemoryNeed]]:
    """Each set of changes to the job that might make it fit, with what is then needed."""
    changes: dict[str, Callable[[MemoryNeed], MemoryNeed]] = {"half the resolution": _at_half_side}
    if need.gradient_checkpointing == "off":
        changes["gradient_checkpointing on"] = lambda n: replace(n, gradient_checkpointing="on")
    if need.trainable_params > need.frozen_params:
        changes["method lora"] = _as_lora
    if need.frozen_bytes_per_param > _NF4_BYTES:
        # Last, because only frozen weights can be quantized: LoRA must come before it.
        changes["the frozen weights in NF4"] = lambda n: replace(
            n, frozen_bytes_per_param=_NF4_BYTES
        )
    for count in range(1, len(changes) + 1):
        for names in combinations(changes, count):
            changed = need
            for name in names:
                changed = changes[name](changed)
            yield names, changed


def _at_half_side(need: MemoryNeed) -> MemoryNeed:
    return replace(
        need,
        activation_bytes=need.activation_bytes // 4,
        checkpointed_activation_bytes=need.checkpointed_activation_bytes // 4,
    )


def _as_lora(need: MemoryNeed) -> MemoryNeed:
    state = {name: int(size * _LORA_SHARE) for name, size in need.optimizer_bytes.items()}
    held = need.frozen_bytes_per_param * need.frozen_params + _HALF_BYTES * need.trainable_params
    frozen = need.frozen_params + need.trainable_params
    return replace(
        need,
        trainable_params=int(need.trainable_params * _LORA_SHARE),
        frozen_params=frozen,
        frozen_bytes_per_param=held / frozen,
        optimizer_bytes=state,
    )


def next_rung(
    plan: MemoryPlan,
    *,
    batch_size: int,
    optimizer_started: bool,
    can_8bit: bool,
    need: MemoryNeed | None = None,
) -> MemoryPlan | None:
    """Return what to try after the card ran out of memory, or None at the end of the ladder.

    The rungs in order: the micro-batch halved until it is 1, gradient checkpointing, the 8-bit
    optimizer, activations in main memory. Each lowers one of four things and raises none, so no
    plan comes twice. Gradient checkpointing comes even where it was asked to be off: it changes no
    result, and without it the run would end.

    Where `need` is given, a rung that is predicted to save nothing waits for those that do. With
    all weights learning that is often so for the micro-batch: gradients that wait for a second pass
    take more than half the activations give back (13.67 GB at batch 2, 13.70 GB at batch 1 twice;
    10.40 and 11.56 GB with checkpointing, in the table that this model is fitted to).

    Args:
        plan: what was too large.
        batch_size: examples of one update.
        optimizer_started: it has a state that another optimizer could not read.
        can_8bit: adamw8bit is installed and works on this card.
        need: what the stage holds; without it `predicted_bytes` stays as it is.
    """
    check_whole("batch_size", batch_size, 1)
    can_8bit = can_8bit and (need is None or "adamw8bit" in need.optimizer_bytes)
    switch = can_8bit and not optimizer_started and plan.optimizer == "adamw"
    rungs = list(_rungs(plan, batch_size, switch=switch))
    if need is not None:
        rungs = [replace(rung, predicted_bytes=predict_bytes(need, rung)) for rung in rungs]
        now = predict_bytes(need, plan)
        # Predictions were wrong already, so one that sees no way down does not end the ladder.
        rungs = [rung for rung in rungs if rung.predicted_bytes < now] or rungs
    return rungs[0] if rungs else None


def _rungs(plan: MemoryPlan, batch_size: int, *, switch: bool) -> Iterator[MemoryPlan]:
    if plan.micro_batch > 1:
        micro_batch = (plan.micro_batch + 1) // 2
        passes = _passes(batch_size, micro_batch)
        lower = replace(plan, micro_batch=micro_batch, accumulation=passes)
        yield _because(lower, _describe_batch(lower))
    if not plan.gradient_checkpointing:
        yield _because(replace(plan, gradient_checkpointing=True), "gradient checkpointing")
    if switch:
        yield _because(replace(plan, optimizer="adamw8bit"), "the 8-bit optimizer")
    if not plan.offload_activations:
        yield _because(replace(plan, offload_activations=True), "activations in main memory")


def _because(plan: MemoryPlan, reason: str) -> MemoryPlan:
    return replace(plan, reasons=(*plan.reasons, reason))
