"""The tables of names: what the libraries have today, and what published files have."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from colabtools.checkpoints.keymaps.families import (
    FAMILIES,
    Part,
    family_of_file,
    folder_spelling,
    is_dropped,
    single_spelling,
)
from colabtools.checkpoints.keymaps.rows import load_rows
from colabtools.errors import CheckpointError

# Counted in v1-5-pruned-emaonly, v2-1_512-ema-pruned without its layer 23 and logit_scale,
# sd_xl_base_1.0 without logit_scale and sigmas, flux1-dev and ae.
COUNTS = {
    "clip_l": 196,
    "openclip_bigg": 389,
    "openclip_h": 281,
    "t5_xxl": 219,
    "transformer_flux": 780,
    "unet_sd1": 686,
    "unet_sd2": 686,
    "unet_sdxl": 1680,
    "vae_16": 244,
    "vae_4": 248,
}
# Read from the published files.
KNOWN = {
    "flux": {
        "model.diffusion_model.double_blocks.18.txt_attn.qkv.weight",
        "model.diffusion_model.final_layer.adaLN_modulation.1.bias",
        "model.diffusion_model.guidance_in.out_layer.weight",
        "model.diffusion_model.single_blocks.37.linear1.bias",
        "model.diffusion_model.single_blocks.0.norm.query_norm.scale",
        "vae.decoder.mid.attn_1.proj_out.weight",
        "text_encoders.t5xxl.transformer.encoder.block.23.layer.1.DenseReluDense.wi_1.weight",
    },
    "sd1": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.8.2.conv.bias",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.encoder.norm_out.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias",
    },
    "sd2": {
        "cond_stage_model.model.positional_embedding",
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight",
        "cond_stage_model.model.transformer.resblocks.0.ln_1.bias",
        "cond_stage_model.model.ln_final.weight",
    },
    "sdxl": {
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.weight",
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
    },
}
# Each is one step beside a name that exists.
UNKNOWN = {
    "sd1": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.bias",
        "model.diffusion_model.input_blocks.10.0.skip_connection.weight",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "first_stage_model.decoder.up.0.upsample.conv.weight",
        "first_stage_model.encoder.down.3.downsample.conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.12.mlp.fc2.bias",
    },
    "sd2": {"cond_stage_model.model.transformer.resblocks.23.ln_1.bias"},
    "sdxl": {"model.diffusion_model.input_blocks.9.0.op.weight"},
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "make_keymaps.py"
    spec = importlib.util.spec_from_file_location("make_keymaps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(family: str) -> set[str]:
    return {part.prefix + row.name for part in FAMILIES[family].parts for row in part.rows}


@pytest.mark.parametrize("table", COUNTS)
def test_a_table_is_what_the_installed_libraries_give(script: ModuleType, table: str) -> None:
    """It fails when diffusers or transformers rename, add or drop a tensor."""
    config, rows_of, _ = script.TABLES[table]
    found = script.network(config)
    found.pop("encoder.embed_tokens.weight", None)
    meant = {
        name: (
            tuple(tuple(map(int, size.split("|"))) for size in shape),
            [segment.partition(":")[0] for segment in segments],
        )
        for name, (shape, segments) in rows_of(found).items()
    }
    listed = {
        row.name: (row.shape, [s.name for s in row.segments] or [f"={row.fill}"])
        for row in load_rows(table)
    }
    assert listed == meant
    assert len(listed) == COUNTS[table]


def test_the_comparison_of_tables_can_fail(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (script.FOLDER / "maps" / "vae_16.tsv").read_text()
    assert script._rows(text) == script._rows("# other versions\n" + text)
    assert script._rows(text) != script._rows(text.replace("to_q", "to_query"))


@pytest.mark.parametrize("table", COUNTS)
def test_every_tensor_of_a_folder_is_in_one_row_and_once(table: str) -> None:
    rows = load_rows(table)
    assert len({row.name for row in rows}) == len(rows)
    assert [row.name for row in rows] == sorted(row.name for row in rows)
    places = Counter((s.name, s.half) for row in rows for s in row.segments)
    assert set(places.values()) == {1}
    halves = Counter(name for name, half in places if half is not None)
    assert set(halves.values()) <= {2}


@pytest.mark.parametrize("family", KNOWN)
def test_names_of_published_files_are_listed_and_their_neighbours_not(family: str) -> None:
    assert names(family) >= KNOWN[family]
    assert not names(family) & UNKNOWN.get(family, set())
    assert not any(map(is_dropped, names(family)))


@pytest.mark.parametrize(
    "name",
    [
        "alphas_cumprod",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_bias",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "denoiser.sigmas",
        "embeddings.position_ids",
        "model_ema.decay",
        "model_ema.diffusion_modelout2weight",
        "sqrt_one_minus_alphas_cumprod",
        "v_pred",
    ],
)
def test_what_no_model_needs_is_left_out(name: str) -> None:
    assert is_dropped(name)


def test_other_spellings_become_those_of_the_tables() -> None:
    clip, vae = Part("text_encoder", "clip_l", "", ""), Part("vae", "vae_4", "", "")
    final = "text_model.final_layer_norm.bias"
    assert folder_spelling(clip, "final_layer_norm.bias") == final
    assert folder_spelling(clip, final) == final
    assert single_spelling(clip, "final_layer_norm.bias") == final
    at = "decoder.mid_block.attentions.0"
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
        assert folder_spelling(vae, f"{at}.{old}.bias") == f"{at}.{new}.bias"
    assert folder_spelling(vae, f"{at}.proj_attn.bias") == f"{at}.to_out.0.bias"


def test_the_refiner_and_strangers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="refiner of SDXL"):
        family_of_file({"conditioner.embedders.0.model.ln_final.bias": (1280,)})
    with pytest.raises(CheckpointError, match="no model of a family"):
        family_of_file({"lora_unet_down.weight": (4, 4)})
