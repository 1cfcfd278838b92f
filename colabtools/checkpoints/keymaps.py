"""Names of the tensors of Stable Diffusion 1.x, from diffusers' layout to the single-file layout.

Two descriptions that check each other: rules that rename what diffusers has, and the list of names
that the single file must end up with.

Source: CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml and the module trees of
its ldm package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

__all__ = ["PARTS", "sd1_names", "text_encoder_name", "unet_name", "vae_name"]

_Rule: TypeAlias = tuple[str, str | Callable[[re.Match[str]], str]]


def _block(folder: str, offset: int, place: str) -> Callable[[re.Match[str]], str]:
    """Number blocks through: level * 3 + index within the level + offset."""

    def rename(match: re.Match[str]) -> str:
        level, *index = (int(group) for group in match.groups())
        return f"{folder}.{3 * level + sum(index) + offset}.{place}."

    return rename


def _upsampler(match: re.Match[str]) -> str:
    # The first up block has no attention, so its upsampler stands one place further forward.
    return f"output_blocks.{3 * int(match[1]) + 2}.{1 if match[1] == '0' else 2}.conv."


_UNET_BLOCKS: tuple[_Rule, ...] = (
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^down_blocks\.(\d)\.attentions\.(\d)\.", _block("input_blocks", 1, "1")),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv\.", _block("input_blocks", 3, "0.op")),
    (r"^down_blocks\.(\d)\.resnets\.(\d)\.", _block("input_blocks", 1, "0")),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^up_blocks\.(\d)\.attentions\.(\d)\.", _block("output_blocks", 0, "1")),
    (r"^up_blocks\.(\d)\.resnets\.(\d)\.", _block("output_blocks", 0, "0")),
    (r"^up_blocks\.(\d)\.upsamplers\.0\.conv\.", _upsampler),
)
_UNET_RESNETS: tuple[_Rule, ...] = (
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
)
_VAE: tuple[_Rule, ...] = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.down_blocks\.(\d)\.resnets\.(\d)\.", r".down.\1.block.\2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.(?:key|to_k)\.", ".mid.attn_1.k."),
    (r"\.mid_block\.attentions\.0\.(?:proj_attn|to_out\.0)\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.(?:query|to_q)\.", ".mid.attn_1.q."),
    (r"\.mid_block\.attentions\.0\.(?:to_v|value)\.", ".mid.attn_1.v."),
    (r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}."),
    (r"\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f".up.{3 - int(m[1])}.block.{m[2]}."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f".up.{3 - int(m[1])}.upsample."),
)

# Where each part of the model begins in the single file.
PARTS = {
    "text_encoder": "cond_stage_model.transformer.text_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}


def _rewrite(name: str, rules: tuple[_Rule, ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unet_name(name: str) -> str:
    """Return the single-file name of a tensor of diffusers' UNet."""
    renamed = _rewrite(name, _UNET_BLOCKS)
    # Attention blocks name their own norms norm1 and norm2: only resnets are rewritten inside.
    inside = _rewrite(renamed, _UNET_RESNETS) if ".resnets." in name else renamed
    return PARTS["unet"] + inside


def vae_name(name: str) -> str:
    """Return the single-file name of a tensor of diffusers' AutoencoderKL."""
    return PARTS["vae"] + _rewrite(f".{name}", _VAE).removeprefix(".")


def text_encoder_name(name: str) -> str:
    """Return the single-file name of a tensor of the CLIP text encoder.

    transformers saves them with `text_model.` before 5.6 and without it since.
    """
    return PARTS["text_encoder"] + name.removeprefix("text_model.")


def sd1_names(part: str) -> frozenset[str]:
    """Return the single-file names that a part of Stable Diffusion 1.x has.

    686 of the unet, 248 of the vae, 196 of the text_encoder.
    """
    modules = {"text_encoder": _text_modules, "unet": _unet_modules, "vae": _vae_modules}[part]()
    names = set()
    for module in modules:
        # Embeddings and the three inputs of an attention have no bias in this model.
        bare = module.endswith(("_embedding", ".to_k", ".to_q", ".to_v"))
        names |= {f"{PARTS[part]}{module}.{kind}" for kind in ("weight", "bias")[: 2 - bare]}
    return frozenset(names)


def _unet_modules() -> Iterator[str]:
    yield from ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2")
    yield from _unet_resnet("middle_block.0", skip=False)
    yield from _unet_attention("middle_block.1")
    yield from _unet_resnet("middle_block.2", skip=False)
    for block in (1, 2, 4, 5, 7, 8, 10, 11):
        # Where a level begins that is wider than the one before.
        yield from _unet_resnet(f"input_blocks.{block}.0", skip=block in (4, 7))
    yield from (f"input_blocks.{block}.0.op" for block in (3, 6, 9))
    for block in range(12):
        yield from _unet_resnet(f"output_blocks.{block}.0", skip=True)
    yield from ("output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv")
    for block in (1, 2, 4, 5, 7, 8):
        yield from _unet_attention(f"input_blocks.{block}.1")
    for block in range(3, 12):
        yield from _unet_attention(f"output_blocks.{block}.1")


def _unet_resnet(at: str, *, skip: bool) -> Iterator[str]:
    layers = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    yield from (f"{at}.{layer}" for layer in layers)
    if skip:
        yield f"{at}.skip_connection"


def _unet_attention(at: str) -> Iterator[str]:
    yield from (f"{at}.{layer}" for layer in ("norm", "proj_in", "proj_out"))
    inner: tuple[str, ...] = ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")
    heads = ("to_k", "to_out.0", "to_q", "to_v")
    inner += tuple(f"{attention}.{head}" for attention in ("attn1", "attn2") for head in heads)
    yield from (f"{at}.transformer_blocks.0.{layer}" for layer in inner)


def _vae_modules() -> Iterator[str]:
    yield from ("quant_conv", "post_quant_conv")
    for side in ("encoder", "decoder"):
        yield from (f"{side}.{layer}" for layer in ("conv_in", "conv_out", "norm_out"))
        layers = ("norm", "q", "k", "v", "proj_out")
        yield from (f"{side}.mid.attn_1.{layer}" for layer in layers)
        yield from _vae_resnet(f"{side}.mid.block_1", skip=False)
        yield from _vae_resnet(f"{side}.mid.block_2", skip=False)
    for level in range(4):
        for block in range(2):
            skip = block == 0 and level in (1, 2)
            yield from _vae_resnet(f"encoder.down.{level}.block.{block}", skip=skip)
        for block in range(3):
            skip = block == 0 and level in (0, 1)
            yield from _vae_resnet(f"decoder.up.{level}.block.{block}", skip=skip)
    yield from (f"encoder.down.{level}.downsample.conv" for level in (0, 1, 2))
    yield from (f"decoder.up.{level}.upsample.conv" for level in (1, 2, 3))


def _vae_resnet(at: str, *, skip: bool) -> Iterator[str]:
    yield from (f"{at}.{layer}" for layer in ("norm1", "conv1", "norm2", "conv2"))
    if skip:
        yield f"{at}.nin_shortcut"


def _text_modules() -> Iterator[str]:
    yield from ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm")
    layers: tuple[str, ...] = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
    layers += tuple(f"self_attn.{head}_proj" for head in ("k", "out", "q", "v"))
    for index in range(12):
        yield from (f"encoder.layers.{index}.{layer}" for layer in layers)
