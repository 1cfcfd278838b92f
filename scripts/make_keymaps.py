"""Write the key maps: what each tensor of a diffusers folder is called in the single-file layouts.

    python scripts/make_keymaps.py [--check]

Names and shapes of the folders come from the classes of the installed diffusers and transformers,
built without memory from the configurations that are shipped beside the tables. The single-file
names come from the rules below. The tables are data that is read and reviewed; `--check` compares
them with what would be written and changes nothing.

Source of the rules: CompVis/stable-diffusion, Stability-AI/stablediffusion, Stability-AI/
generative-models and black-forest-labs/flux: the module trees that their configurations build.
OpenCLIP: mlfoundations/open_clip, transformer.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1] / "colabtools" / "checkpoints" / "keymaps"
Rules = tuple[tuple[str, "str | Callable[[re.Match[str]], str]"], ...]
Names = dict[str, tuple[int, ...]]
# A row: shape by dimension, and the segments along the first of them.
Row = tuple[list[str], list[str]]


def network(config: str) -> Names:
    """Return names and shapes of what a configuration builds."""
    import diffusers
    import transformers

    settings = json.loads((FOLDER / "configs" / config / "config.json").read_text())
    with torch.device("meta"):
        if "_class_name" in settings:
            built = getattr(diffusers, settings["_class_name"]).from_config(settings)
        else:
            kind = getattr(transformers, settings["architectures"][0])
            built = kind(kind.config_class.from_dict(settings))
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def block(folder: str, offset: int, place: str, per_level: int = 3) -> Callable[[Any], str]:
    """Number blocks through: level * 3 + index within the level + offset."""

    def rename(match: re.Match[str]) -> str:
        level, *index = (int(group) for group in match.groups())
        return f"{folder}.{per_level * level + sum(index) + offset}.{place}."

    return rename


def unet_rules(names: Names) -> Rules:
    def upsampler(match: re.Match[str]) -> str:
        # It follows the attention, where its level has one.
        attention = any(name.startswith(f"up_blocks.{match[1]}.attentions.") for name in names)
        return f"output_blocks.{3 * int(match[1]) + 2}.{1 + attention}.conv."

    return (
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^down_blocks\.(\d)\.attentions\.(\d)\.", block("input_blocks", 1, "1")),
        (r"^down_blocks\.(\d)\.downsamplers\.0\.conv\.", block("input_blocks", 3, "0.op")),
        (r"^down_blocks\.(\d)\.resnets\.(\d)\.", block("input_blocks", 1, "0")),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^up_blocks\.(\d)\.attentions\.(\d)\.", block("output_blocks", 0, "1")),
        (r"^up_blocks\.(\d)\.resnets\.(\d)\.", block("output_blocks", 0, "0")),
        (r"^up_blocks\.(\d)\.upsamplers\.0\.conv\.", upsampler),
    )


UNET_RESNETS: Rules = (
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
)
VAE: Rules = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.down_blocks\.(\d)\.resnets\.(\d)\.", r".down.\1.block.\2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}."),
    (r"\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f".up.{3 - int(m[1])}.block.{m[2]}."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f".up.{3 - int(m[1])}.upsample."),
)
OPENCLIP: Rules = (
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.(weight|bias)$", r".attn.in_proj_\1"),
    (r"^text_projection\.weight$", "text_projection"),
)
FLUX: Rules = (
    (r"^context_embedder\.", "txt_in."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"^time_text_embed\.text_embedder\.", "vector_in."),
    (r"^time_text_embed\.timestep_embedder\.", "time_in."),
    (r"^x_embedder\.", "img_in."),
    (r"\.linear_1\.", ".in_layer."),
    (r"\.linear_2\.", ".out_layer."),
    (r"^single_transformer_blocks\.(\d+)\.", r"single_blocks.\1."),
    (r"^transformer_blocks\.(\d+)\.", r"double_blocks.\1."),
    (r"(^single.*)\.attn\.to_[qkv]\.", r"\1.linear1."),
    (r"(^single.*)\.proj_mlp\.", r"\1.linear1."),
    (r"(^single.*)\.proj_out\.", r"\1.linear2."),
    (r"(^single.*)\.norm\.linear\.", r"\1.modulation.lin."),
    (r"(^single.*)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"(^single.*)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"\.attn\.to_[qkv]\.", ".img_attn.qkv."),
    (r"\.attn\.add_[qkv]_proj\.", ".txt_attn.qkv."),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.norm1\.linear\.", ".img_mod.lin."),
    (r"\.norm1_context\.linear\.", ".txt_mod.lin."),
    (r"\.ff\.net\.0\.proj\.", ".img_mlp.0."),
    (r"\.ff\.net\.2\.", ".img_mlp.2."),
    (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.0."),
    (r"\.ff_context\.net\.2\.", ".txt_mlp.2."),
)
# In which order the segments of a fused tensor follow.
ORDER = re.compile(r"(?:to|add|self_attn\.)_?([qkv])(?:_proj)?\.|(proj_mlp)\.")


def rewrite(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unet_name(name: str, rules: Rules) -> str:
    renamed = rewrite(name, rules)
    # Attention blocks name their own norms norm1 and norm2: only resnets are rewritten inside.
    return rewrite(renamed, UNET_RESNETS) if ".resnets." in name else renamed


def unet(names: Names, extra: tuple[str, ...] = ("8", "9")) -> dict[str, Row]:
    """Inpainting and instruct-pix2pix models see more channels; all else is the same."""
    rules = unet_rules(names)
    rows = plain(names, lambda name: unet_name(name, rules))
    rows["input_blocks.0.0.weight"][0][1] = "|".join(("4", *extra))
    return rows


def vae(names: Names) -> dict[str, Row]:
    rows = plain(names, lambda name: rewrite(f".{name}", VAE).removeprefix("."))
    for name, (shape, segments) in rows.items():
        if ".mid.attn_1." in name and len(shape) == 2:
            shape += ["1", "1"]
            segments[0] += ":squeeze"
    return rows


def clip(names: Names) -> dict[str, Row]:
    return plain(spelled(names), lambda name: name)


def openclip(names: Names) -> dict[str, Row]:
    names = spelled(names)
    rows = plain(names, lambda name: rewrite(name, OPENCLIP))
    width = names["text_model.final_layer_norm.weight"][0]
    if "text_projection" in rows:
        rows["text_projection"][1][0] += ":transpose"
    else:
        # Nothing reads it in SD 2, and older readers demand it.
        rows["text_projection"] = ([str(width)] * 2, ["=identity"])
    return rows


def spelled(names: Names) -> Names:
    """Spell names as transformers did before 5.6, which every version reads."""
    tops = ("text_model.", "text_projection.")
    return {n if n.startswith(tops) else f"text_model.{n}": shape for n, shape in names.items()}


def flux(names: Names) -> dict[str, Row]:
    rows = plain(names, lambda name: rewrite(name, FLUX))
    rows["img_in.weight"][0][1] = "64|128|384"
    for kind in ("weight", "bias"):
        source = f"norm_out.linear.{kind}"
        # Scale and shift against shift and scale.
        rows[f"final_layer.adaLN_modulation.1.{kind}"][1][:] = [
            f"{source}:half1",
            f"{source}:half0",
        ]
    for name, (_, segments) in rows.items():
        if ".linear1." in name:
            segments[-1] += ":x4"
    return rows


def plain(names: Names, rename: Callable[[str], str]) -> dict[str, Row]:
    """Return the rows of names that are renamed, and joined where several get one name."""
    rows: dict[str, Row] = {}
    for name, shape in sorted(names.items(), key=lambda item: _order(item[0])):
        target = rename(name)
        if target in rows:
            rows[target][1].append(name)
            rows[target][0][0] = str(int(rows[target][0][0]) + shape[0])
        else:
            rows[target] = ([str(size) for size in shape], [name])
    return rows


def _order(name: str) -> tuple[int, str]:
    match = ORDER.search(name)
    return ("qkv".index(match[1]) if match and match[1] else 3), name


TABLES: dict[str, tuple[str, Callable[[Names], dict[str, Row]], str]] = {
    "clip_l": ("sd1/text_encoder", clip, "CLIP ViT-L/14 as in SD 1, SDXL and Flux"),
    "openclip_bigg": ("sdxl/text_encoder_2", openclip, "OpenCLIP ViT-bigG/14 as in SDXL"),
    "openclip_h": ("sd2/text_encoder", openclip, "OpenCLIP ViT-H/14 as in SD 2, 23 of 24 layers"),
    "t5_xxl": ("flux/text_encoder_2", lambda names: plain(names, str), "encoder of T5 v1.1 XXL"),
    "transformer_flux": ("flux/transformer", flux, "FLUX.1"),
    "unet_sd1": ("sd1/unet", unet, "SD 1"),
    "unet_sd2": ("sd2/unet", unet, "SD 2"),
    "unet_sdxl": ("sdxl/unet", unet, "SDXL base"),
    "vae_16": ("flux/vae", vae, "the VAE of Flux, 16 latent channels"),
    "vae_4": ("sd1/vae", vae, "the VAE of SD 1, SD 2 and SDXL, 4 latent channels"),
}


def table(name: str) -> str:
    """Return the text of a table."""
    import diffusers
    import transformers

    config, rows_of, about = TABLES[name]
    names = network(config)
    names.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    lines = [
        f"# {about}. Source: configs/{config}/config.json in {versions};",
        "# rules of scripts/make_keymaps.py. Columns: name in one file, shape there, and the",
        "# tensors of the folder that follow each other along its first dimension.",
    ]
    for single, (shape, segments) in sorted(rows_of(names).items()):
        lines.append("\t".join((single, ",".join(shape), " ".join(segments))))
    return "\n".join(lines) + "\n"


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    other = 0
    for name in TABLES:
        path, text = FOLDER / "maps" / f"{name}.tsv", table(name)
        if not check:
            path.write_text(text, encoding="utf-8")
        elif _rows(path.read_text(encoding="utf-8")) != _rows(text):
            other += 1
            print(f"{path.name} differs from what the installed libraries give")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
