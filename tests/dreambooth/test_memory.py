from __future__ import annotations

from pathlib import Path

import pytest
import torch

from colabtools import drive
from colabtools.dreambooth.cache import LatentCache, crop_sets
from colabtools.dreambooth.captions import CaptionRules
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.data import TrainingData
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.families import Models, scale_latents
from colabtools.dreambooth.memory import choose_quantization, count_stage, plan_stage_memory
from colabtools.dreambooth.models import load_models
from colabtools.dreambooth.networks import Networks
from colabtools.dreambooth.plan import TrainPlan, plan_training
from colabtools.dreambooth.stages import plan_stages
from colabtools.dreambooth.train_config import TrainConfig

from .tiny import make_tiny

CPU = torch.device("cpu")


def make_data(models: Models, folder: Path) -> TrainingData:
    prepared = prepare(drive.open_local(folder), "s", PrepareConfig(images="demo"))
    pictures = crop_sets([example.path for example in prepared.examples[:1]])
    cache = LatentCache.encode(models.vae, pictures, scale=scale_latents)
    rules = CaptionRules()
    return TrainingData(
        instances=cache, captions=("a",), classes=None, class_prompt="", rules=rules,
        offset_noise=0.0,
    )  # fmt: skip


def make_networks(plan: TrainPlan, models: Models, number: int) -> Networks:
    family = models.family
    stages = plan_stages(
        plan, denoiser=family.denoiser, text_encoders=family.trainable_text_encoders
    )
    return Networks(stages[number], plan, models)


@pytest.mark.parametrize(
    "kind",
    ["sd1", *(pytest.param(kind, marks=pytest.mark.heavy) for kind in ("sdxl", "flux-dev"))],
)
def test_both_stages_of_any_base_are_counted_without_computing(kind: str, tmp_path: Path) -> None:
    folder = make_tiny(kind, tmp_path / kind)
    config = TrainConfig(
        base_model=str(folder), text_encoder_steps=1, unet_steps=1, method="lora", lora_rank=2
    )
    plan = plan_training(config)
    models = load_models(plan.base, CPU)
    data = make_data(models, tmp_path / "w")
    for number in (0, 1):
        networks = make_networks(plan, models, number)
        need = count_stage(networks, models, data)
        assert need.trainable_params == sum(p.numel() for p in networks.parameters())
        assert need.activation_bytes >= need.checkpointed_activation_bytes > 0
        assert set(need.optimizer_bytes) == {"adamw"}
        # Nothing of the real networks was moved or switched.
        assert all(p.device == CPU for p in models.denoiser.parameters())
        networks.finish()


def test_without_a_card_everything_is_as_asked(tmp_path: Path) -> None:
    plan = plan_training(
        TrainConfig(batch_size=3, gradient_accumulation_steps=2, gradient_checkpointing="on")
    )
    models = load_models(plan.base, CPU)
    networks = make_networks(plan, models, 1)
    memory = plan_stage_memory(networks, make_data(models, tmp_path), None, saved_optimizer=None)
    assert (memory.micro_batch, memory.accumulation) == (3, 2)
    assert memory.gradient_checkpointing
    assert memory.optimizer == "adamw"


def test_only_flux_is_packed_and_only_where_a_card_is_small() -> None:
    plan = plan_training(TrainConfig(base_model="flux-dev", unet_steps=1))
    assert choose_quantization(plan, CPU) is None
    asked = plan_training(TrainConfig(base_model="flux-dev", unet_steps=1, quantize="nf4"))
    assert choose_quantization(asked, CPU) == "nf4"
    micro = plan_training(TrainConfig(quantize="none"))
    assert choose_quantization(micro, torch.device("cuda")) is None
