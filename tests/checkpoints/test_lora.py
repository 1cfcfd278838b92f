"""Adapters of every family, there and back, and what diffusers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from colabtools.checkpoints.convert import ConvertConfig, convert

from .conftest import ModelOf, file_content

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
DENOISER = {
    "sd1": (ATTENTION, 2, 3),
    "sd2": ([*ATTENTION, "ff.net.2"], 3, 3),
    "sdxl": ([*ATTENTION, "proj_in"], 2, 1),
    "flux-dev": ([*ATTENTION, "proj_mlp", "proj_out", "add_q_proj", "ff.net.2"], 2, 4),
    "flux-schnell": (ATTENTION, 4, 4),
}
TEXT_PARTS = {"sd1": ("text_encoder",), "sd2": ("text_encoder",),
              "sdxl": ("text_encoder", "text_encoder_2"), "flux-dev": ("text_encoder",),
              "flux-schnell": ()}  # fmt: skip


def denoiser_of(kind: str) -> str:
    return "transformer" if kind.startswith("flux") else "unet"


def adapted(kind: str, folder: Path) -> tuple[Any, Path]:
    """A pipeline with random adapters in place, and the file that diffusers saves of them."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    layers, settings = {}, {}
    targets, rank, alpha = DENOISER[kind]
    parts = {denoiser_of(kind): LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)}
    for part in TEXT_PARTS[kind]:
        parts[part] = LoraConfig(r=2, lora_alpha=2, target_modules=TEXT)
    for part, config in parts.items():
        network = getattr(pipeline, part)
        inject_adapter_in_model(config, network)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(network)
        settings[f"{part}_lora_adapter_metadata"] = config.to_dict()
    out = folder.parent / f"{folder.name}-lora"
    type(pipeline).save_lora_weights(out, **layers, **settings)
    return pipeline, out / "pytorch_lora_weights.safetensors"


def spelled(content: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".text_model.", "."): row for name, row in content.items()}


@pytest.fixture(scope="module")
def adapters(model: ModelOf) -> Any:
    made: dict[str, tuple[Any, Path]] = {}

    def of(kind: str) -> tuple[Any, Path]:
        if kind not in made:
            made[kind] = adapted(kind, model(kind))
        return made[kind]

    return of


@pytest.mark.parametrize("kind", DENOISER)
def test_an_adapter_goes_to_the_web_uis_and_comes_back_to_the_bit(
    adapters: Any, tmp_path: Path, kind: str
) -> None:
    _, saved = adapters(kind)
    there = convert(saved, tmp_path / "kohya.safetensors")
    names = set(file_content(there.path))
    prefixes = {name.split("_", 2)[1] for name in names}
    text = {"sd1": {"te"}, "sd2": {"te"}, "sdxl": {"te1", "te2"}, "flux-dev": {"te1"}}
    assert prefixes == {"unet", *text.get(kind, set())}
    assert {name.rsplit(".", 1)[1] for name in names} == {"weight", "alpha"}
    modules = {name.split(".", 1)[0] for name in names}
    for module in modules:
        assert {
            f"{module}.{end}" for end in ("alpha", "lora_down.weight", "lora_up.weight")
        } <= names
    again = convert(there.path, tmp_path / "peft.safetensors")
    # transformers wrote `text_model.` before 5.6 and does not since; ours is the older spelling.
    assert spelled(file_content(again.path)) == spelled(file_content(saved))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_diffusers_loads_our_kohya_file_and_computes_the_same(
    adapters: Any, model: ModelOf, tmp_path: Path, kind: str
) -> None:
    pipeline, saved = adapters(kind)
    there = convert(saved, tmp_path / "kohya.safetensors").path
    plain = diffusers.DiffusionPipeline.from_pretrained(model(kind))
    plain.load_lora_weights(tmp_path, weight_name=there.name)
    plain.fuse_lora()
    for part in (denoiser_of(kind), *TEXT_PARTS[kind]):
        own = getattr(pipeline, part)
        with torch.no_grad():
            for name, layer in own.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    twin = plain_layer(getattr(plain, part), name)
                    meant = layer.base_layer.weight + layer.get_delta_weight("default")
                    assert torch.allclose(twin, meant, atol=1e-5), (part, name)


def plain_layer(network: Any, name: str) -> torch.Tensor:
    layer = network.get_submodule(name)
    weight: torch.Tensor = getattr(layer, "base_layer", layer).weight
    return weight


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", DENOISER)
def test_a_merged_folder_is_what_peft_computes(
    adapters: Any, model: ModelOf, tmp_path: Path, kind: str, strength: float
) -> None:
    pipeline, saved = adapters(kind)
    single = convert(
        model(kind), tmp_path / "m.safetensors", ConvertConfig(merge=(f"{saved}:{strength}",))
    )
    folder = tmp_path / "folder"
    convert(single.path, folder, ConvertConfig(config_from=str(model(kind)), fetch=False))
    for part in (denoiser_of(kind), *TEXT_PARTS[kind]):
        (file,) = (folder / part).glob("*.safetensors")
        found = {n.removeprefix("text_model."): t for n, t in load_file(file).items()}
        changed = 0
        for name, layer in getattr(pipeline, part).named_modules():
            if hasattr(layer, "get_delta_weight"):
                with torch.no_grad():
                    delta = strength * layer.get_delta_weight("default")
                    meant = layer.base_layer.weight + delta
                key = f"{name.removeprefix('text_model.')}.weight"
                if key in found:
                    assert torch.allclose(found[key], meant, atol=1e-6), (part, name)
                    changed += 1
        assert changed > 3
