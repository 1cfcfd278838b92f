"""Which layer of a model a tensor of an adapter file belongs to, whoever named it.

Trainers name the same matrices in their own ways: PEFT and diffusers by the modules of a folder
(`unet.mid_block.attentions.0.proj_in.lora_A.weight`), kohya's scripts and the web UIs with
underscores (`lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`), for SDXL and Flux by the
modules of the single file. All of those are looked up in the tables of the model families.

Source: networks/lora.py and networks/lora_flux.py of kohya-ss/sd-scripts 0.9, prefixes of kohya;
comfy/lora.py of ComfyUI and loaders/lora_conversion_utils.py of diffusers 0.42.1, what is read.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colabtools.checkpoints.headers import one_line
from colabtools.checkpoints.keymaps.families import FAMILIES
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from colabtools.checkpoints.keymaps.families import FamilyMap, Part
    from colabtools.checkpoints.keymaps.rows import Row, Segment

__all__ = [
    "LayerKey",
    "Place",
    "has_single_names",
    "kohya_name",
    "parse_key",
    "place_of",
    "places",
]

# The part that a name begins with, "" for the denoiser of whatever family it is.
_PREFIXES = {
    "base_model.model.": None,
    "diffusion_model.": "",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lora_transformer_": "",
    "lora_unet_": "",
    "model.diffusion_model.": "",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.t5xxl.transformer.": "text_encoder_2",
    "transformer.": "",
    "unet.": "",
}
_ROLES = re.compile(
    r"(?P<down>\.lora_A(?:\.\w+)?\.weight|(?:\.lora_down|[._]lora\.down|"
    r"\.lora_linear_layer\.down)\.weight)"
    r"|(?P<up>\.lora_B(?:\.\w+)?\.weight|(?:\.lora_up|[._]lora\.up|"
    r"\.lora_linear_layer\.up)\.weight)"
    r"|(?P<alpha>\.alpha)"
    r"|(?P<magnitude>\.dora_scale|\.lora_magnitude_vector(?:\.\w+)*)"
)
# Adapters that are no product of two matrices, or not that alone.
_OTHER_KINDS = {
    r"\.(?:hada_[wt]\d(?:_[ab])?)$": "LoHa",
    r"\.(?:lokr_[wt]\d(?:_[ab])?)$": "LoKr",
    r"\.(?:oft_\w+|oft_R\.\w+)$": "OFT",
    r"\.(?:diff|diff_b|set_weight)$": "a difference of whole weights",
    r"\.(?:lora_mid\.weight)$": "LoCon in three matrices",
    r"\.lora_(?:B|up)(?:\.\w+)?\.bias$": "LoRA with biases",
}
# What earlier versions of diffusers called the layers of an attention.
_ALIASES = (
    ("to_out_0", "to_out"),
    ("k_proj", "to_k"),
    ("out_proj", "to_out"),
    ("q_proj", "to_q"),
    ("v_proj", "to_v"),
)
_KOHYA = {
    "flux": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
    "sd1": {"text_encoder": "lora_te"},
    "sd2": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
# Of these kohya trains the layers of the single file.
_SINGLE_LAYERS = ("flux", "sdxl")


@dataclass(frozen=True)
class LayerKey:
    """What the name of a tensor in an adapter file says.

    Attributes:
        part: of the model; "" is the denoiser, None is not said.
        layer: the module's name with underscores for dots.
        role: "down", "up", "alpha" or "magnitude".
    """

    part: str | None
    layer: str
    role: str


@dataclass(frozen=True)
class Place:
    """A layer that can be adapted.

    Attributes:
        row: the tensor of the single file that it is, or is a part of.
        segment: the tensor of a folder that it is; None is all that the row is made of.
    """

    part: str
    row: Row
    segment: Segment | None

    @property
    def module(self) -> str:
        """The layer's name in a folder; of several layers in one, the first one's."""
        segment = self.segment or self.row.segments[0]
        return segment.name.removesuffix(".weight")


def parse_key(name: str) -> LayerKey:
    """Return what a tensor's name says.

    Raises:
        CheckpointError: it is none of a LoRA.
    """
    for pattern, kind in _OTHER_KINDS.items():
        if re.search(pattern, name):
            raise CheckpointError(
                f"tensor {one_line(name)} is of the kind {kind}, which cannot be converted; "
                "get the adapter as a LoRA"
            )
    start = max((prefix for prefix in _PREFIXES if name.startswith(prefix)), key=len, default="")
    inside = name.removeprefix(start)
    match = next((m for m in _ROLES.finditer(inside) if m.end() == len(inside)), None)
    if match is None or match.lastgroup is None or not match.start():
        raise CheckpointError(f"tensor {one_line(name)} is none of a LoRA; give a LoRA file")
    layer = inside[: match.start()].replace(".processor", "").replace(".", "_")
    part = _PREFIXES[start] if start else None
    return LayerKey(part, layer, match.lastgroup)


@functools.cache
def places(family: str) -> Mapping[str, Mapping[str, Place]]:
    """Return, for each part of a family, its layers by every name they have, with underscores."""
    return {part.name: _places(part) for part in FAMILIES[family].parts if part.name != "vae"}


def _places(part: Part) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for row in part.rows:
        for segment in row.segments:
            if segment.name.endswith(".weight") and len(row.shape) > 1:
                place = Place(part.name, row, segment)
                found.setdefault(_underscored(place.module), place)
    for name, place in list(found.items()):
        for ending, alias in _ALIASES:
            if name.endswith(f"_{ending}"):
                found.setdefault(f"{name.removesuffix(ending)}{alias}", place)
        if name.startswith("text_model_"):
            found.setdefault(name.removeprefix("text_model_"), place)
    for row in part.rows:
        if row.name.endswith(".weight") and len(row.shape) > 1 and row.segments:
            only = row.segments[0] if len(row.segments) == 1 else None
            name = _underscored(row.name.removesuffix(".weight"))
            found.setdefault(name, Place(part.name, row, only))
    return found


def _underscored(name: str) -> str:
    return name.replace(".", "_")


def place_of(family: str, key: LayerKey) -> Place | None:
    """Return the layer that a key names in a model of a family, or None if that has none such."""
    by_part = places(family)
    denoiser = FAMILIES[family].denoiser.name
    wanted = by_part if key.part is None else [key.part or denoiser]
    named = (by_part[part].get(key.layer) for part in wanted if part in by_part)
    return next((place for place in named if place is not None), None)


def has_single_names(family: str) -> bool:
    """Whether kohya's names for a family's denoiser are those of the single file."""
    return family in _SINGLE_LAYERS


def kohya_name(family: FamilyMap, place: Place) -> str:
    """Return what kohya's scripts and the web UIs call a layer, without a matrix's own ending."""
    if place.part != family.denoiser.name:
        return f"{_KOHYA[family.name][place.part]}_{_underscored(place.module)}"
    single = place.row.name.removesuffix(".weight")
    return f"lora_unet_{_underscored(single if has_single_names(family.name) else place.module)}"
