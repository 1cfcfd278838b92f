from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise, product

import pytest

from colabtools.dreambooth.planner import (
    VRAM_MARGIN,
    MemoryNeed,
    MemoryPlan,
    next_rung,
    plan_memory,
    predict_bytes,
)
from colabtools.errors import ConfigError

GB = 10**9


def make_need(trainable: int, kept: float, checkpointed: float, **others) -> MemoryNeed:
    return MemoryNeed(
        trainable_params=trainable,
        activation_bytes=int(kept),
        checkpointed_activation_bytes=int(checkpointed),
        optimizer_bytes={"adamw": 8 * trainable, "adamw8bit": int(2 * trainable * (1 + 4 / 256))},
        **others,
    )


# Counted by test_activations.py: SD 1.5 at 512, SDXL at 1024, Flux at 512 pixels.
SD15 = make_need(859_520_964, 1.245e9, 0.184e9)
SD15_FP32 = make_need(859_520_964, 1.871e9, 0.309e9, half_precision=False)
SDXL = make_need(2_567_463_684, 8.684e9, 0.661e9)
SDXL_LORA = make_need(23_224_320, 7.71e9, 0.556e9, frozen_params=2_567_463_684)
FLUX_LORA = make_need(18_677_760, 9.88e9, 0.55e9, frozen_params=11_901_408_320)
FLUX_NF4 = replace(FLUX_LORA, frozen_bytes_per_param=0.5625)
TOY = make_need(1_000_000, 60e6, 10e6)

CARDS = {"T4": 15 * GB, "L4": 22_500_000_000, "A100": 40 * GB, "H100": 80 * GB}


def make_plan(
    micro_batch: int = 1,
    accumulation: int = 1,
    checkpointing: bool = False,
    optimizer: str = "adamw8bit",
    offload: bool = False,
) -> MemoryPlan:
    return MemoryPlan(
        micro_batch=micro_batch,
        accumulation=accumulation,
        gradient_checkpointing=checkpointing,
        optimizer=optimizer,
        offload_activations=offload,
    )


# Source: ShivamShrirao/diffusers@b2983e7, examples/dreambooth/README.md, its whole table and the
# 17.7 GB of its text. The two fp32 rows had no part in fitting the model.
@pytest.mark.parametrize(
    ("need", "plan", "published_gb"),
    [
        (SD15, make_plan(1, 1, True), 9.92),
        (SD15, make_plan(2, 1, True), 10.4),
        (SD15, make_plan(1, 1, False), 11.17),
        (SD15, make_plan(1, 2, True), 11.56),
        (SD15, make_plan(2, 1, False), 13.67),
        (SD15, make_plan(1, 2, False), 13.7),
        (SD15, make_plan(1, 1, True, "adamw"), 15.79),
        (SD15, make_plan(1, 1, False, "adamw"), 17.7),
        (SD15_FP32, make_plan(1, 1, True), 10.08),
        (SD15_FP32, make_plan(1, 1, False), 11.17),
    ],
)
def test_predictions_meet_what_was_measured_on_a_t4(
    need: MemoryNeed, plan: MemoryPlan, published_gb: float
) -> None:
    assert predict_bytes(need, plan) / GB == pytest.approx(published_gb, rel=0.08)


# Source: sd-scripts docs/train_SDXL-en.md; HF blog flux-qlora, 2025-06.
@pytest.mark.parametrize(("need", "published_gb"), [(SDXL_LORA, 8), (FLUX_LORA, 26), (FLUX_NF4, 9)])
def test_predictions_hold_for_models_that_were_not_fitted(
    need: MemoryNeed, published_gb: float
) -> None:
    assert predict_bytes(need, make_plan(1, 1, True)) / GB == pytest.approx(published_gb, rel=0.1)


# need, card, batch size -> micro-batch, passes, gradient checkpointing, optimizer
PICKS = [
    (SD15, "T4", 1, (1, 1, False, "adamw8bit")),
    (SD15, "T4", 4, (4, 1, True, "adamw8bit")),
    (SD15, "L4", 1, (1, 1, False, "adamw")),
    (SD15, "L4", 4, (4, 1, False, "adamw8bit")),
    (SD15, "A100", 8, (8, 1, False, "adamw")),
    (SDXL_LORA, "T4", 1, (1, 1, True, "adamw")),
    (SDXL_LORA, "T4", 8, (4, 2, True, "adamw")),
    (SDXL_LORA, "L4", 1, (1, 1, True, "adamw")),
    (SDXL_LORA, "A100", 1, (1, 1, False, "adamw")),
    (SDXL, "A100", 1, (1, 1, True, "adamw8bit")),
    (SDXL, "H100", 1, (1, 1, False, "adamw")),
    (FLUX_NF4, "T4", 1, (1, 1, True, "adamw")),
    (FLUX_NF4, "L4", 4, (4, 1, True, "adamw")),
    (FLUX_NF4, "A100", 1, (1, 1, False, "adamw")),
    (FLUX_LORA, "A100", 1, (1, 1, True, "adamw")),
    (FLUX_LORA, "H100", 1, (1, 1, False, "adamw")),
]


@pytest.mark.parametrize(("need", "card", "batch_size", "expected"), PICKS)
def test_the_plan_of_known_jobs_on_known_cards(
    need: MemoryNeed, card: str, batch_size: int, expected: tuple
) -> None:
    plan = plan_memory(need, CARDS[card], batch_size=batch_size, accumulation=1)
    chosen = (
        plan.micro_batch,
        plan.accumulation,
        plan.gradient_checkpointing,
        plan.optimizer,
    )
    assert chosen == expected
    assert not plan.offload_activations
    assert plan.predicted_bytes == predict_bytes(need, plan)
    assert plan.predicted_bytes <= CARDS[card] * (1 - VRAM_MARGIN)


def test_the_reasons_say_what_the_alternative_would_take() -> None:
    plan = plan_memory(SD15, CARDS["T4"], batch_size=4, accumulation=1)
    assert plan.reasons == (
        "11.8 GB predicted, 15.0 GB free on the card",
        "adamw8bit: its state is 5.1 GB less, at the same speed",
        "gradient checkpointing: it would be 19.9 GB without",
    )
    split = plan_memory(SDXL_LORA, CARDS["T4"], batch_size=8, accumulation=1)
    assert "micro-batch 4, 2 times per update: it would be 17.2 GB with 8" in split.reasons
    roomy = plan_memory(SD15, CARDS["A100"], batch_size=1, accumulation=1)
    assert roomy.reasons[-1].startswith("no gradient checkpointing: it fits without")


def test_offloading_is_for_what_does_not_fit_otherwise() -> None:
    without = predict_bytes(SD15, make_plan(1, 1, True))
    vram = int((without - 10_000_000) / (1 - VRAM_MARGIN))
    plan = plan_memory(SD15, vram, batch_size=1, accumulation=1)
    assert plan.offload_activations
    assert plan.gradient_checkpointing
    assert plan.reasons[-1] == "activations in main memory: it would be 10.5 GB without"


@pytest.mark.parametrize(("batch_size", "accumulation"), [*product((1, 3, 5, 8), (1, 3))])
def test_the_effective_batch_is_kept_on_every_card(batch_size: int, accumulation: int) -> None:
    examples = batch_size * accumulation
    for vram in range(14 * GB, 40 * GB, GB):
        plan = plan_memory(SD15, vram, batch_size=batch_size, accumulation=accumulation)
        assert plan.micro_batch <= batch_size
        # The passes are just enough: one fewer would lose examples.
        assert plan.micro_batch * (plan.accumulation - 1) < examples
        assert plan.micro_batch * plan.accumulation >= examples


def test_more_memory_never_makes_a_slower_plan() -> None:
    def rank(plan: MemoryPlan) -> float:
        cost = plan.accumulation * (1.5 + plan.micro_batch)
        factor = 1.24 if plan.gradient_checkpointing else 1.0
        return cost * factor * (2 if plan.offload_activations else 1)

    plans = [
        plan_memory(SD15, v, batch_size=8, accumulation=1) for v in range(14 * GB, 60 * GB, GB)
    ]
    costs = [rank(plan) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 2


def test_predictions_grow_with_the_batch_and_shrink_with_each_saving() -> None:
    for need, optimizer in product((SD15, SDXL_LORA, FLUX_NF4, TOY), ("adamw", "adamw8bit")):
        sizes = [predict_bytes(need, make_plan(n, 1, False, optimizer)) for n in (1, 2, 4, 8)]
        assert sizes == sorted(set(sizes))
        for micro, passes in product((1, 4), (1, 2)):
            plain = make_plan(micro, passes, False, optimizer)
            checkpointed = replace(plain, gradient_checkpointing=True)
            assert predict_bytes(need, checkpointed) < predict_bytes(need, plain)
            offloaded = replace(checkpointed, offload_activations=True)
            assert predict_bytes(need, offloaded) < predict_bytes(need, checkpointed)
            waiting = replace(plain, accumulation=passes + 1)
            assert predict_bytes(need, waiting) >= predict_bytes(need, plain)
        assert predict_bytes(need, make_plan()) < predict_bytes(need, make_plan(optimizer="adamw"))


def test_a_cpu_runs_everything_as_asked() -> None:
    plan = plan_memory(SDXL, None, batch_size=7, accumulation=3)
    assert (plan.micro_batch, plan.accumulation, plan.optimizer) == (7, 3, "adamw")
    assert not plan.gradient_checkpointing
    assert not plan.offload_activations
    asked = replace(SDXL, gradient_checkpointing="on")
    assert plan_memory(asked, None, batch_size=1, accumulation=1).gradient_checkpointing


def test_gradient_checkpointing_that_is_asked_for_is_not_planned_away() -> None:
    on = replace(SD15, gradient_checkpointing="on")
    off = replace(SD15, gradient_checkpointing="off")
    assert plan_memory(on, CARDS["H100"], batch_size=1, accumulation=1).gradient_checkpointing
    plan = plan_memory(off, CARDS["T4"], batch_size=8, accumulation=1)
    assert (plan.gradient_checkpointing, plan.micro_batch) == (False, 1)
    assert plan.offload_activations
    off = replace(SDXL_LORA, gradient_checkpointing="off")
    with pytest.raises(ConfigError, match="half the resolution or with gradient_checkpointing on"):
        plan_memory(off, CARDS["T4"], batch_size=1, accumulation=1)


def test_an_optimizer_that_is_asked_for_is_kept() -> None:
    plan = plan_memory(SD15, CARDS["L4"], batch_size=4, accumulation=1, optimizer="adamw")
    assert (plan.optimizer, plan.gradient_checkpointing) == ("adamw", True)
    only = replace(SD15, optimizer_bytes={"adamw": 8 * SD15.trainable_params})
    assert plan_memory(only, CARDS["L4"], batch_size=4, accumulation=1).optimizer == "adamw"
    with pytest.raises(ConfigError, match="'lion'; its memory is not known, give one of adamw"):
        plan_memory(SD15, CARDS["L4"], batch_size=4, accumulation=1, optimizer="lion")


@pytest.mark.parametrize(
    ("need", "vram", "missing", "advice"),
    [
        (FLUX_LORA, 15 * GB, "12.3 GB are missing", "the frozen weights in NF4"),
        (SDXL, 15 * GB, "14.2 GB are missing", "method lora"),
        (replace(FLUX_NF4, activation_bytes=30 * GB, checkpointed_activation_bytes=9 * GB), 15 * GB,
         "6.1 GB are missing", "half the resolution"),
        (make_need(11_901_408_320, 9e9, 0.55e9), 15 * GB, "107.7 GB are missing",
         "method lora and the frozen weights in NF4"),
        (FLUX_LORA, 4 * GB, "22.5 GB are missing", None),
    ],
)  # fmt: skip
def test_an_impossible_job_says_what_is_missing_and_what_would_fit(
    need: MemoryNeed, vram: int, missing: str, advice: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_memory(need, vram, batch_size=1, accumulation=1)
    message = str(caught.value)
    assert missing in message
    assert message.endswith(f"it would fit with {advice}" if advice else "use a larger card")
    assert "\n" not in message


def climb_down(plan: MemoryPlan, examples: int, **known) -> list[MemoryPlan]:
    """All rungs from a plan on; an endless ladder would fail here."""
    rungs = [plan]
    while (lower := next_rung(rungs[-1], batch_size=examples, **known)) is not None:
        rungs.append(lower)
        assert len(rungs) < 50
    return rungs


def test_the_ladder_has_its_rungs_in_order() -> None:
    rungs = climb_down(make_plan(5, 2, False, "adamw"), 10, optimizer_started=False, can_8bit=True)
    shape = [
        (
            r.micro_batch,
            r.accumulation,
            r.gradient_checkpointing,
            r.optimizer,
            r.offload_activations,
        )
        for r in rungs
    ]
    assert shape == [
        (5, 2, False, "adamw", False),
        (3, 4, False, "adamw", False),
        (2, 5, False, "adamw", False),
        (1, 10, False, "adamw", False),
        (1, 10, True, "adamw", False),
        (1, 10, True, "adamw8bit", False),
        (1, 10, True, "adamw8bit", True),
    ]
    assert rungs[-1].reasons == (
        "micro-batch 3, 4 times per update",
        "micro-batch 2, 5 times per update",
        "micro-batch 1, 10 times per update",
        "gradient checkpointing",
        "the 8-bit optimizer",
        "activations in main memory",
    )


@pytest.mark.parametrize("need", [None, SD15, SDXL_LORA, TOY])
@pytest.mark.parametrize(("started", "can_8bit"), [*product((False, True), repeat=2)])
@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_every_ladder_ends_and_never_comes_back(
    need: MemoryNeed | None, started: bool, can_8bit: bool, optimizer: str
) -> None:
    if need is not None:
        need = replace(need, optimizer_bytes={**need.optimizer_bytes, "prodigy": GB})
    for micro, passes in product((1, 2, 3, 8), (1, 3)):
        rungs = climb_down(
            make_plan(micro, passes, False, optimizer),
            micro * passes,
            optimizer_started=started,
            can_8bit=can_8bit,
            need=need,
        )
        assert len(set(rungs)) == len(rungs)
        last = rungs[-1]
        assert (last.micro_batch, last.accumulation) == (1, micro * passes)
        assert last.gradient_checkpointing
        assert last.offload_activations
        switched = optimizer == "adamw" and can_8bit and not started
        assert last.optimizer == ("adamw8bit" if switched else optimizer)
        for before, after in pairwise(rungs):
            assert after.micro_batch * after.accumulation >= micro * passes
            assert after.micro_batch <= before.micro_batch
            assert after.gradient_checkpointing >= before.gradient_checkpointing
            assert after.offload_activations >= before.offload_activations


def test_a_rung_that_saves_nothing_waits() -> None:
    """Gradients that wait for a second pass are as large as what half a batch gives back."""
    known = {"batch_size": 2, "optimizer_started": True, "can_8bit": False}
    plan = make_plan(2, 1, False)
    assert predict_bytes(SD15, make_plan(1, 2, False)) > predict_bytes(SD15, plan)
    lower = next_rung(plan, **known, need=SD15)
    assert lower is not None
    assert (lower.micro_batch, lower.gradient_checkpointing) == (2, True)
    assert lower.predicted_bytes == predict_bytes(SD15, lower)
    lora = next_rung(plan, **known, need=SDXL_LORA)
    assert lora is not None
    assert (lora.micro_batch, lora.gradient_checkpointing) == (1, False)


def test_the_ladder_switches_to_no_optimizer_that_is_not_installed() -> None:
    plan = make_plan(1, 1, True, "adamw")
    only = replace(SD15, optimizer_bytes={"adamw": 8 * SD15.trainable_params})
    lower = next_rung(plan, batch_size=1, optimizer_started=False, can_8bit=True, need=only)
    assert lower is not None
    assert (lower.optimizer, lower.offload_activations) == ("adamw", True)


def test_a_plan_survives_json() -> None:
    plan = plan_memory(SD15, CARDS["T4"], batch_size=4, accumulation=1)
    text = json.loads(json.dumps(asdict(plan)))
    assert MemoryPlan(**{**text, "reasons": tuple(text["reasons"])}) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_bytes": -1}, "activation_bytes is -1"),
        ({"checkpointed_activation_bytes": 2 * GB}, "checkpointed_activation_bytes is 2000000000"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing is 'yes'"),
    ],
)
def test_a_need_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SD15, **changes)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "name"),
    [(0, 1, "batch_size"), (1, 0, "gradient_accumulation_steps")],
)
def test_a_batch_of_nothing_is_refused(batch_size: int, accumulation: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        plan_memory(SD15, None, batch_size=batch_size, accumulation=accumulation)
