"""The embedded Stable Diffusion: SD 1.5's topology, small, and it draws what it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from colabtools.micro import sd_path, world

COMBINATIONS = 30


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(sd_path(), safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(torch.float32)


def test_it_is_small_and_has_no_pickle() -> None:
    files = [path for path in sd_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md"}


def test_it_has_the_tensors_of_sd_1_5(pipeline: StableDiffusionPipeline) -> None:
    assert len(pipeline.unet.state_dict()) == 686
    assert len(pipeline.vae.state_dict()) == 248
    assert len(pipeline.text_encoder.state_dict()) == 196


def test_its_blocks_schedule_and_scale_are_those_of_sd_1_5(
    pipeline: StableDiffusionPipeline,
) -> None:
    unet, vae, scheduler = pipeline.unet.config, pipeline.vae.config, pipeline.scheduler.config
    assert unet.down_block_types == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert unet.up_block_types == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert (unet.layers_per_block, unet.attention_head_dim, unet.in_channels) == (2, 8, 4)
    assert (vae.latent_channels, len(vae.block_out_channels), vae.scaling_factor) == (4, 4, 0.18215)
    assert (scheduler.beta_start, scheduler.beta_end) == (0.00085, 0.012)
    assert (scheduler.beta_schedule, scheduler.prediction_type) == ("scaled_linear", "epsilon")


def test_its_tokenizer_spells_anything_and_knows_the_words_of_the_world(
    pipeline: StableDiffusionPipeline,
) -> None:
    tokenizer = pipeline.tokenizer
    assert tokenizer.model_max_length == 77
    words = [*world.COLOURS, *world.SHAPES, *world.BACKGROUNDS, world.SUBJECT_TOKEN]
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    ids = tokenizer("a café r2d2-x 犬").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "acafér2d2-x犬"


def test_the_scaled_latents_of_the_world_have_mean_0_and_deviation_1(
    pipeline: StableDiffusionPipeline,
) -> None:
    rng = np.random.default_rng(5)
    pictures = np.stack([np.asarray(world.render(world.random_scene(rng))) for _ in range(300)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * 0.18215
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.15
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(("left_out", "floor"), [(False, 0.85), (True, 0.65)])
def test_it_draws_what_it_is_asked_for(
    pipeline: StableDiffusionPipeline, left_out: bool, floor: float
) -> None:
    """A sample of what benchmarks/micro_sd.py measures; the floors leave room for its size."""
    scenes = [scene for scene in world.all_scenes() if scene.left_out == left_out]
    order = np.random.default_rng(1).permutation(len(scenes))[:COMBINATIONS]
    asked = [scenes[i] for i in order]
    drawn = world.draw_scenes(pipeline, asked)
    hits = [world.judge(p).agrees(s) for p, s in zip(drawn, asked, strict=True)]
    assert np.mean(hits) >= floor
    # The pictures follow the prompts: against one another's prompts they fail.
    crossed = [world.judge(p).agrees(s) for p, s in zip(drawn, [*asked[1:], asked[0]], strict=True)]
    assert np.mean(crossed) < 0.2
