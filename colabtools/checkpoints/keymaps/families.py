"""The families of base models: their parts, where each begins in one file, and other spellings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colabtools.checkpoints.keymaps.rows import load_rows
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from colabtools.checkpoints.keymaps.rows import Row

__all__ = [
    "FAMILIES",
    "FamilyMap",
    "Part",
    "ema_name",
    "family_of_file",
    "family_of_folder",
    "folder_spelling",
    "is_dropped",
    "single_spelling",
]


@dataclass(frozen=True)
class Part:
    """A network of a model.

    Attributes:
        name: of its sub-folder.
        table: the table under `maps/` that names its tensors.
        prefix: what its names begin with in one file.
        stem: of the weight file in its sub-folder.
    """

    name: str
    table: str
    prefix: str
    stem: str

    @property
    def rows(self) -> tuple[Row, ...]:
        """The tensors that it has in one file."""
        return load_rows(self.table)


@dataclass(frozen=True)
class FamilyMap:
    """A family of base models.

    Attributes:
        name: "sd1", "sd2", "sdxl" or "flux".
        parts: in the order in which they are written; the denoiser is the first.
        optional: beginnings of names in one file that some models of the family lack.
    """

    name: str
    parts: tuple[Part, ...]
    optional: tuple[str, ...] = ()

    @property
    def denoiser(self) -> Part:
        """The UNet or transformer."""
        return self.parts[0]

    def part(self, name: str) -> Part | None:
        """Return a part by the name of its sub-folder, or None."""
        return next((part for part in self.parts if part.name == name), None)


_MODEL, _DIFFUSION = "model", "diffusion_pytorch_model"
_UNET = "model.diffusion_model."
_VAE4 = Part("vae", "vae_4", "first_stage_model.", _DIFFUSION)

# Sources of the prefixes. SD 1 and 2: the attributes of ldm.models.diffusion.ddpm.LatentDiffusion.
# SDXL: those of sgm.models.diffusion.DiffusionEngine. Flux: comfy/supported_models.py of ComfyUI,
# for files that hold more than the transformer; the publisher's own holds that alone.
FAMILIES: Mapping[str, FamilyMap] = {
    family.name: family
    for family in (
        FamilyMap(
            "flux",
            (
                Part("transformer", "transformer_flux", _UNET, _DIFFUSION),
                Part("vae", "vae_16", "vae.", _DIFFUSION),
                Part("text_encoder", "clip_l", "text_encoders.clip_l.transformer.", _MODEL),
                Part("text_encoder_2", "t5_xxl", "text_encoders.t5xxl.transformer.", _MODEL),
            ),
            optional=("guidance_in.",),  # FLUX.1-schnell is told no guidance
        ),
        FamilyMap(
            "sd1",
            (
                Part("unet", "unet_sd1", _UNET, _DIFFUSION),
                _VAE4,
                Part("text_encoder", "clip_l", "cond_stage_model.transformer.", _MODEL),
            ),
        ),
        FamilyMap(
            "sd2",
            (
                Part("unet", "unet_sd2", _UNET, _DIFFUSION),
                _VAE4,
                Part("text_encoder", "openclip_h", "cond_stage_model.model.", _MODEL),
            ),
        ),
        FamilyMap(
            "sdxl",
            (
                Part("unet", "unet_sdxl", _UNET, _DIFFUSION),
                _VAE4,
                Part("text_encoder", "clip_l", "conditioner.embedders.0.transformer.", _MODEL),
                Part("text_encoder_2", "openclip_bigg", "conditioner.embedders.1.model.", _MODEL),
            ),
        ),
    )
}

# What single files carry beside their networks and no reader needs: counters, buffers that are
# computed anew, marks (written anew where they apply), and the layer of SD 2's text encoder that
# is never run.
_DROPPED = re.compile(
    r"(?:.*\.)?position_ids"
    r"|(?:alphas|betas|sqrt|log|posterior)(?:_\w+)?|lvlb_weights|logvar|scale_factor"
    r"|denoiser\.sigmas|global_step|epoch|v_pred|ztsnr|edm_\w+|edm_vpred\.sigma_(?:min|max)"
    r"|model_ema\..+|first_stage_model\.loss\..+|first_stage_model_ema\..+"
    r"|(?:.*\.)?logit_scale"
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..+|cond_stage_model\.model\.attn_mask"
    r"|conditioner\.embedders\.1\.model\.attn_mask"
    r"|(?:cond_stage_model|conditioner\.embedders\.0)\.(?:transformer\.)?text_projection(?:\.weight)?"
    r"|text_encoders\.clip_l\.transformer\.text_projection\.weight"
    r"|(?:.*\.)?encoder\.embed_tokens\.weight",
    re.DOTALL,
)
_VAE_ATTENTION = {"key": "to_k", "proj_attn": "to_out.0", "query": "to_q", "value": "to_v"}
_OLD_ATTENTION = re.compile(r"(\.mid_block\.attentions\.0\.)(key|proj_attn|query|value)\.")
_CLIP_TOPS = ("embeddings.", "encoder.", "final_layer_norm.")


def is_dropped(name: str) -> bool:
    """Whether a tensor of a folder or a single file is left out, because nothing needs it."""
    return _DROPPED.fullmatch(name) is not None


def folder_spelling(part: Part, name: str) -> str:
    """Return a folder's name of a tensor as the tables spell it.

    transformers saves the text encoder with `text_model.` before 5.6 and without it since, and the
    attention of diffusers' VAE has had other names before 0.12.
    """
    if part.table.startswith(("clip", "openclip")) and name.startswith(_CLIP_TOPS):
        return f"text_model.{name}"
    if part.name == "vae":
        return _OLD_ATTENTION.sub(lambda m: f"{m[1]}{_VAE_ATTENTION[m[2]]}.", name)
    return name


def single_spelling(part: Part, name: str) -> str:
    """Return a single file's name of a tensor, without the prefix, as the tables spell it.

    Converters that do not know of transformers 5.6 write CLIP without `text_model.`.
    """
    if part.table == "clip_l" and name.startswith(_CLIP_TOPS):
        return f"text_model.{name}"
    return name


def ema_name(part: Part, name: str) -> str:
    """Return the name of the average of a denoiser's tensor, itself named without prefix.

    Source: CompVis/stable-diffusion, ldm/modules/ema.py, LitEma: names lose their dots.
    """
    inside = f"{part.prefix.removeprefix('model.')}{name}"
    return f"model_ema.{inside.replace('.', '')}"


def family_of_folder(parts: Mapping[str, Collection[str]]) -> str:
    """Return the family of a folder from the names of the tensors of each part.

    Raises:
        CheckpointError: it is none that can be converted.
    """
    if "transformer" in parts:
        if any(name.startswith("single_transformer_blocks.") for name in parts["transformer"]):
            return "flux"
    elif "unet" in parts:
        if any(name.startswith("add_embedding.") for name in parts["unet"]):
            return "sdxl"
        layers = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.layer_norm1\.weight")
        found = map(layers.fullmatch, parts.get("text_encoder", ()))
        depth = sum(match is not None for match in found)
        if depth in (0, 12, 23):
            return "sd2" if depth == 23 else "sd1"
    raise CheckpointError(
        "the folder is of no family that can be converted; give a Stable Diffusion 1 or 2, "
        "an SDXL or a Flux model in diffusers' layout"
    )


def family_of_file(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the family of a single file from the names and shapes of its tensors.

    Raises:
        CheckpointError: it is none that can be converted.
    """
    if _has(shapes, f"{_UNET}double_blocks.0.") or _has(shapes, "double_blocks.0."):
        return "flux"
    if _has(shapes, "conditioner.embedders.0.model."):
        raise CheckpointError(
            "the file is the refiner of SDXL, which cannot be converted; give a base model"
        )
    if _has(shapes, "conditioner.embedders.1.") or _has(shapes, f"{_UNET}label_emb."):
        return "sdxl"
    if _has(shapes, "cond_stage_model.model."):
        return "sd2"
    query = f"{_UNET}input_blocks.1.1.proj_in.weight"
    if query in shapes:
        # SD 2 has a linear layer where SD 1 has a convolution.
        return "sd1" if len(shapes[query]) == 4 else "sd2"
    raise CheckpointError(
        "the file is no model of a family that can be converted; give a whole Stable Diffusion 1 "
        "or 2, SDXL or Flux model"
    )


def _has(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)
