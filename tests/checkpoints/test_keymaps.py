"""The 1,130 names, held against diffusers' own loader, which knows the opposite direction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from colabtools import micro
from colabtools.checkpoints import keymaps
from colabtools.checkpoints.single_file import assemble_sd1, save_ckpt, save_safetensors
from colabtools.errors import CheckpointError

from .conftest import Parts

Tensors = dict[str, Mapping[str, torch.Tensor]]

# Read from the file v1-5-pruned-emaonly.safetensors of stable-diffusion-v1-5.
KNOWN_NAMES = {
    "model.diffusion_model.time_embed.2.bias",
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.input_blocks.3.0.op.weight",
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
    "model.diffusion_model.input_blocks.11.0.emb_layers.1.bias",
    "model.diffusion_model.middle_block.1.proj_in.weight",
    "model.diffusion_model.middle_block.2.out_layers.3.weight",
    "model.diffusion_model.output_blocks.2.1.conv.weight",
    "model.diffusion_model.output_blocks.5.2.conv.weight",
    "model.diffusion_model.output_blocks.8.2.conv.bias",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm3.bias",
    "model.diffusion_model.out.2.weight",
    "first_stage_model.decoder.conv_in.weight",
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
    "first_stage_model.decoder.up.3.upsample.conv.weight",
    "first_stage_model.encoder.down.2.downsample.conv.weight",
    "first_stage_model.encoder.mid.attn_1.q.weight",
    "first_stage_model.encoder.mid.block_2.norm2.weight",
    "first_stage_model.encoder.norm_out.weight",
    "first_stage_model.post_quant_conv.weight",
    "first_stage_model.quant_conv.bias",
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.out_proj.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight",
}
UNKNOWN_NAMES = {
    # Each is one step beside a name that exists.
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.bias",
    "model.diffusion_model.input_blocks.10.0.skip_connection.weight",
    "model.diffusion_model.output_blocks.2.2.conv.weight",
    "model.diffusion_model.output_blocks.2.1.proj_in.weight",
    "first_stage_model.decoder.up.0.upsample.conv.weight",
    "first_stage_model.decoder.up.2.block.0.nin_shortcut.weight",
    "first_stage_model.encoder.down.3.downsample.conv.weight",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "cond_stage_model.transformer.text_model.encoder.layers.12.mlp.fc2.bias",
}
RENAMES = {
    "text_encoder": keymaps.text_encoder_name,
    "unet": keymaps.unet_name,
    "vae": keymaps.vae_name,
}


def assemble(tensors: Tensors, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return assemble_sd1(**tensors, dtype=dtype)


def write_config(parts: Parts, folder: Path) -> Path:
    """The configuration, without weights, that from_single_file builds the networks from."""
    shutil.copytree(
        micro.sd_path(), folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    for name in parts._fields:
        (folder / name).mkdir(exist_ok=True)
        config = dict(getattr(parts, name).config.to_dict()) if name == "text_encoder" else None
        text = json.dumps(config) if config else getattr(parts, name).to_json_string()
        (folder / name / "config.json").write_text(text)
    return folder


def test_the_list_of_names_has_the_numbers_of_the_real_file() -> None:
    counts = {part: len(keymaps.sd1_names(part)) for part in keymaps.PARTS}
    assert counts == {"text_encoder": 196, "unet": 686, "vae": 248}
    assert len(frozenset.union(*map(keymaps.sd1_names, keymaps.PARTS))) == 1130


@pytest.mark.parametrize("part", sorted(keymaps.PARTS))
def test_every_name_of_a_part_begins_where_the_part_does(part: str) -> None:
    assert all(name.startswith(keymaps.PARTS[part]) for name in keymaps.sd1_names(part))


def test_names_known_from_the_real_file_are_in_the_list_and_their_neighbours_not() -> None:
    listed = frozenset.union(*map(keymaps.sd1_names, keymaps.PARTS))
    assert listed >= KNOWN_NAMES
    assert not listed & UNKNOWN_NAMES


@pytest.mark.parametrize("part", sorted(keymaps.PARTS))
def test_the_rules_turn_diffusers_names_into_exactly_the_list(parts: Parts, part: str) -> None:
    names = list(parts.tensors()[part])
    renamed = [RENAMES[part](name) for name in names]
    assert len(set(renamed)) == len(names)
    assert set(renamed) == keymaps.sd1_names(part)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own argument names change
@pytest.mark.parametrize(
    ("suffix", "save"), [(".safetensors", save_safetensors), (".ckpt", save_ckpt)]
)
def test_diffusers_reads_every_tensor_back_to_the_bit(
    parts: Parts, tmp_path: Path, suffix: str, save: Callable[..., object]
) -> None:
    save(assemble(parts.tensors()), tmp_path / f"model{suffix}")
    loaded = StableDiffusionPipeline.from_single_file(
        str(tmp_path / f"model{suffix}"),
        config=str(write_config(parts, tmp_path / "config")),
        local_files_only=True,
        safety_checker=None,
        torch_dtype=torch.float32,
    )
    count = 0
    for part, tensors in parts.tensors().items():
        found = getattr(loaded, part).state_dict()
        assert found.keys() == tensors.keys()
        assert [name for name in tensors if not found[name].equal(tensors[name])] == []
        count += len(found)
    assert count == 1130


def test_the_check_against_diffusers_can_fail(parts: Parts, tmp_path: Path) -> None:
    """Two tensors of one shape change places, as under a wrong rule."""
    tensors = assemble(parts.tensors())
    q, k = (f"first_stage_model.encoder.mid.attn_1.{name}.weight" for name in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]
    save_safetensors(tensors, tmp_path / "model.safetensors")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_single_file(
        str(tmp_path / "model.safetensors"),
        config=str(write_config(parts, tmp_path / "config")),
        subfolder="vae",
        local_files_only=True,
    )
    meant, found = parts.tensors()["vae"], vae.state_dict()
    wrong = [name for name in meant if not found[name].equal(meant[name])]
    at = "encoder.mid_block.attentions.0.to_"
    assert wrong == [f"{at}q.weight", f"{at}k.weight"]


def test_the_vae_attention_becomes_a_convolution(parts: Parts) -> None:
    tensors = assemble(parts.tensors())
    weight = tensors["first_stage_model.decoder.mid.attn_1.proj_out.weight"]
    assert weight.shape == (16, 16, 1, 1)
    assert tensors["first_stage_model.decoder.mid.attn_1.proj_out.bias"].shape == (16,)
    assert tensors["first_stage_model.decoder.mid.attn_1.norm.weight"].shape == (16,)


def respell(
    tensors: Mapping[str, torch.Tensor], *pairs: tuple[str, str]
) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new) if "attentions" in name else name
        renamed[name] = tensor
    return renamed


def test_the_older_names_of_the_vae_attention_give_the_same_file(parts: Parts) -> None:
    tensors = parts.tensors()
    older = respell(
        tensors["vae"],
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    )
    assert len(older.keys() - tensors["vae"].keys()) == 16
    check_same(assemble({**tensors, "vae": older}), assemble(tensors))


def test_the_vae_attention_saved_as_a_convolution_stays_one(parts: Parts) -> None:
    tensors = parts.tensors()
    vae = {
        name: tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor
        for name, tensor in tensors["vae"].items()
    }
    check_same(assemble({**tensors, "vae": vae}), assemble(tensors))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_both_spellings_of_the_text_encoder_give_the_same_file(parts: Parts, prefix: str) -> None:
    tensors = parts.tensors()
    bare = {name.removeprefix("text_model."): t for name, t in tensors["text_encoder"].items()}
    spelled = {f"{prefix}{name}": tensor for name, tensor in bare.items()}
    spelled[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    check_same(assemble({**tensors, "text_encoder": spelled}), assemble(tensors))


def check_same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in right)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "up_blocks.1.attentions.2.transformer_blocks.0.norm1.weight"),
        ("vae", "decoder.up_blocks.0.upsamplers.0.conv.bias"),
        ("text_encoder", "encoder.layers.11.mlp.fc2.bias"),
    ],
)
def test_a_missing_tensor_is_named(parts: Parts, part: str, name: str) -> None:
    tensors = parts.tensors()
    short = {key: tensor for key, tensor in tensors[part].items() if not key.endswith(name)}
    assert len(short) == len(tensors[part]) - 1
    with pytest.raises(CheckpointError) as why:
        assemble({**tensors, part: short})
    assert str(why.value).startswith(f"{part} lacks {RENAMES[part](name)}, which Stable Diffusion")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "add_embedding.linear_1.weight"),
        ("unet", "down_blocks.3.attentions.0.norm.weight"),
        ("vae", "encoder.down_blocks.3.downsamplers.0.conv.weight"),
        ("text_encoder", "encoder.layers.12.mlp.fc1.weight"),
        ("text_encoder", "text_projection.weight"),
    ],
)
def test_a_tensor_too_many_is_named(parts: Parts, part: str, name: str) -> None:
    tensors = parts.tensors()
    with pytest.raises(CheckpointError) as why:
        assemble({**tensors, part: {**tensors[part], name: torch.zeros(1)}})
    assert str(why.value).startswith(f"{part} has {name}, which Stable Diffusion 1.x has not")


def test_one_tensor_in_the_place_of_another_is_named_though_the_number_is_right(
    parts: Parts,
) -> None:
    tensors = parts.tensors()
    unet = dict(tensors["unet"])
    unet["conv_inn.weight"] = unet.pop("conv_in.weight")
    with pytest.raises(CheckpointError, match=r"unet has conv_inn\.weight"):
        assemble({**tensors, "unet": unet})


def test_a_tensor_under_both_its_spellings_is_refused(parts: Parts) -> None:
    tensors = parts.tensors()
    at = "encoder.mid_block.attentions.0"
    vae = {**tensors["vae"], f"{at}.query.weight": tensors["vae"][f"{at}.to_q.weight"]}
    with pytest.raises(CheckpointError, match=rf"under two names, {at}\.query\.weight and 1 more"):
        assemble({**tensors, "vae": vae})


@pytest.mark.parametrize("value", [70000.0, float("inf"), float("nan")])
def test_a_value_that_half_precision_cannot_hold_is_named(parts: Parts, value: float) -> None:
    tensors = parts.tensors()
    name = "up_blocks.3.resnets.0.conv1.weight"
    weight = tensors["unet"][name].clone()
    weight[0, 0, 0, 0] = value
    broken = {**tensors, "unet": {**tensors["unet"], name: weight}}
    with pytest.raises(CheckpointError) as why:
        assemble(broken, torch.float16)
    assert str(why.value).startswith(
        f"unet tensor {name} has values that are not finite in float16"
    )
    if value == 70000.0:
        assert assemble(broken)[RENAMES["unet"](name)].max() == value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_tensor_gets_the_dtype(parts: Parts, dtype: torch.dtype) -> None:
    assert {tensor.dtype for tensor in assemble(parts.tensors(), dtype).values()} == {dtype}
