"""Low-rank adapters as files: what they hold, by the layers of a model in diffusers' layout.

A layer's weights become W + alpha / rank * up @ down. PEFT keeps alpha in the header, kohya's
scripts in a tensor for each layer; Flux's layers that are one in the single file and several in a
folder are taken apart here and put together again in `lora_files`.

Source: LoRA, arXiv 2106.09685, section 4.1; DoRA, arXiv 2402.09353, section 4.1.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools.checkpoints.headers import Header, TensorEntry, one_line, open_regular
from colabtools.checkpoints.keymaps.families import FAMILIES
from colabtools.checkpoints.lora_names import Place, parse_key, place_of
from colabtools.checkpoints.lora_split import split_layer
from colabtools.checkpoints.lora_tensors import Layer, load_tensor
from colabtools.checkpoints.sources import read_header
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from colabtools.checkpoints.lora_names import LayerKey
    from colabtools.checkpoints.sources import Tensor

__all__ = ["PEFT_METADATA", "Lora", "is_lora", "lora_from", "read_lora"]

# Source: diffusers 0.42.1, loaders/lora_base.py, LORA_ADAPTER_METADATA_KEY.
PEFT_METADATA = "lora_adapter_metadata"
_MAX_JSON_BYTES = 1024**2
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_SD1_LAYERS = 12


@dataclass(frozen=True, kw_only=True)
class Lora:
    """An adapter file.

    Attributes:
        family: of the models that it is for: "sd1", "sd2", "sdxl" or "flux".
        naming: "kohya" or "peft", as the file has it.
        layers: the adapted layers by part and module, as a folder names them.
        metadata: texts of the header.
    """

    path: Path
    family: str
    naming: str
    layers: Mapping[tuple[str, str], Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)


def is_lora(header: Header) -> bool:
    """Whether a file is a LoRA, by the names of its tensors."""
    marks = (".lora_down.", ".lora_A.", ".lora.down.", "_lora.down.", ".lora_linear_layer.down.")
    return any(mark in name for name in header.tensors for mark in marks)


def read_lora(path: Path, family: str = "auto") -> Lora:
    """Return what an adapter file holds; its matrices are read when they are used.

    Args:
        path: a .safetensors file, or a pickle that is harmless.
        family: "sd1", "sd2", "sdxl" or "flux"; "auto" finds out.

    Raises:
        CheckpointError: it is damaged, unsafe, no LoRA, or for another family of models.
    """
    return lora_from(read_header(path), family)


def lora_from(header: Header, family: str = "auto") -> Lora:
    """Return what the tensors of a header are as an adapter; see `read_lora`.

    Raises:
        CheckpointError: they are no LoRA, or one for another family of models.
    """
    path = header.path
    try:
        keys = {name: parse_key(name) for name in header.tensors}
        if not keys:
            raise CheckpointError("it holds no tensors; give a LoRA file")
        name = _family(header, keys) if family == "auto" else family
        grouped = _grouped(name, header, keys)
        alphas = _Alphas.of(header)
        layers = {}
        for place, tensors in grouped:
            layer = _layer(place, tensors, alphas)
            for one in split_layer(place, layer, header.metadata):
                at = (one.part, one.module)
                if at in layers:
                    raise CheckpointError(f"it adapts {one_line(one.module)} twice; train it again")
                layers[at] = one
    except CheckpointError as error:
        if one_line(path) in str(error):
            raise
        raise CheckpointError(f"{one_line(path)}: {error}") from error
    # In kohya's files alpha is a tensor; its prefix also stands in files that are not kohya's.
    kohya = any(name.startswith("lora_") for name in keys)
    naming = "kohya" if kohya else "peft"
    return Lora(path=path, family=name, naming=naming, layers=layers, metadata=header.metadata)


def _family(header: Header, keys: Mapping[str, LayerKey]) -> str:
    """Return the family that has every layer of the file; where several have, the likeliest."""
    fitting = {
        family: {name: place_of(family, key) for name, key in keys.items()} for family in FAMILIES
    }
    candidates = [family for family, found in fitting.items() if all(found.values())]
    if not candidates:
        closest = min(fitting.values(), key=lambda found: sum(p is None for p in found.values()))
        strange = next(name for name, place in closest.items() if place is None)
        raise CheckpointError(
            f"it adapts {one_line(strange)}, which no Stable Diffusion 1 or 2, SDXL or Flux model "
            "has; give a LoRA for one of those"
        )
    hints = (_told(header.metadata), _by_width(header, keys), _by_prefix(keys), _by_depth(keys))
    return next((hint for hint in hints if hint in candidates), sorted(candidates)[0])


def _told(metadata: Mapping[str, str]) -> str:
    """Return the family that the header names.

    Source: kohya-ss/sd-scripts 0.9, library/train_util.py and library/sai_model_spec.py.
    """
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    starts = {
        "flux": ("flux1", "flux-1"),
        "sd1": ("sd_v1", "stable-diffusion-v1"),
        "sd2": ("sd_v2", "stable-diffusion-v2"),
        "sdxl": ("sdxl", "stable-diffusion-xl"),
    }
    for text in (version, architecture):
        for family, start in starts.items():
            if text.startswith(start):
                return family
    return {"True": "sd2", "False": "sd1"}.get(metadata.get("ss_v2", ""), "")


def _by_width(header: Header, keys: Mapping[str, LayerKey]) -> str:
    """Return the family whose text encoders are as wide as what cross-attention is adapted to."""
    for name, key in keys.items():
        if key.role == "down" and key.layer.endswith(("attn2_to_k", "attn2_to_v")):
            shape = header.tensors[name].shape
            return _WIDTHS.get(shape[-1], "") if shape else ""
    return ""


def _by_prefix(keys: Mapping[str, LayerKey]) -> str:
    if any(key.part == "text_encoder_2" for key in keys.values()):
        return "sdxl"
    return "sdxl" if any(name.startswith("lora_te1_") for name in keys) else ""


def _by_depth(keys: Mapping[str, LayerKey]) -> str:
    """Return SD 2 where the only text encoder is deeper than that of SD 1."""
    depths = [key.layer.partition("encoder_layers_")[2].partition("_")[0] for key in keys.values()]
    deep = any(depth.isdigit() and int(depth) >= _SD1_LAYERS for depth in depths)
    return "sd2" if deep else "sd1"


def _grouped(
    family: str, header: Header, keys: Mapping[str, LayerKey]
) -> list[tuple[Place, dict[str, Tensor]]]:
    """Return the tensors of each layer by their role."""
    groups: dict[tuple[str | None, str], dict[str, Tensor]] = {}
    found: dict[tuple[str | None, str], Place] = {}
    for name, key in keys.items():
        place = place_of(family, key)
        if place is None:
            raise CheckpointError(
                f"it adapts {one_line(name)}, which a {family} model has not; give its own family"
            )
        at = (key.part, key.layer)
        found[at] = place
        roles = groups.setdefault(at, {})
        if key.role in roles:
            raise CheckpointError(f"it has {one_line(name)} twice; get the file anew")
        roles[key.role] = header.tensors[name]
    return [(found[at], roles) for at, roles in groups.items()]


def _layer(place: Place, tensors: Mapping[str, Tensor], alphas: _Alphas) -> Layer:
    shown = one_line(place.module)
    if "down" not in tensors or "up" not in tensors:
        raise CheckpointError(f"of the matrices for {shown} one is missing; get the file anew")
    down, up = tensors["down"], tensors["up"]
    rank = down.shape[0] if down.shape else 0
    if len(down.shape) not in (2, 4) or len(up.shape) < 2 or up.shape[1] != rank or not rank:
        raise CheckpointError(
            f"the matrices for {shown} have the shapes {down.shape} and {up.shape}, which do not "
            "fit onto each other; get the file anew"
        )
    if math.prod(up.shape[2:]) != 1:
        raise CheckpointError(f"the second matrix for {shown} has the shape {up.shape}")
    alpha = alphas.of_layer(place, rank)
    if "alpha" in tensors:
        if math.prod(tensors["alpha"].shape) != 1:
            raise CheckpointError(f"the alpha of {shown} is no single number; get the file anew")
        alpha = float(load_tensor(tensors["alpha"]).item())
    if not math.isfinite(alpha):
        raise CheckpointError(f"the alpha of {shown} is {alpha}; train it again")
    magnitude = tensors.get("magnitude")
    if magnitude is not None:
        magnitude = _column(magnitude, up.shape[0], shown)
    return Layer(place.part, place.module, down, up, alpha, magnitude)


def _column(magnitude: Tensor, length: int, shown: str) -> Tensor:
    """Return the lengths of DoRA as PEFT has them; kohya's have further dimensions of 1."""
    if math.prod(magnitude.shape) != length or magnitude.shape[:1] != (length,):
        raise CheckpointError(
            f"the DoRA lengths for {shown} have the shape {magnitude.shape} and not {length}, "
            "so they are those of inputs, which cannot be converted"
        )
    if isinstance(magnitude, TensorEntry):
        return replace(magnitude, shape=(length,))
    loaded = magnitude.load
    return replace(magnitude, shape=(length,), load=lambda: loaded().reshape(length))


@dataclass(frozen=True)
class _Alphas:
    """What a header, or the configuration beside a file, says of alpha where no tensor does."""

    settings: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, header: Header) -> _Alphas:
        text = header.metadata.get(PEFT_METADATA, "")
        if text:
            return cls(_by_part(_json(text, "its header")))
        beside = header.path.with_name("adapter_config.json")
        if header.path.stem == "adapter_model" and beside.is_file():
            with open_regular(beside) as file:
                found = file.read(_MAX_JSON_BYTES).decode("utf-8", "replace")
            return cls({"": _json(found, one_line(beside))})
        return cls({})

    def of_layer(self, place: Place, rank: int) -> float:
        settings = self.settings.get(place.part, self.settings.get("", {}))
        names = (place.module, place.module.removeprefix("text_model."))
        patterns = settings.get("alpha_pattern")
        patterns = patterns if isinstance(patterns, dict) else {}
        alpha = settings.get("lora_alpha", rank)
        for pattern, value in patterns.items():
            plain = str(pattern).removeprefix("^")
            if any(name == plain or name.endswith(f".{plain}") for name in names):
                alpha = value
                break
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise CheckpointError(f"its alpha for {one_line(place.module)} is {one_line(alpha)}")
        # Source: rsLoRA, arXiv 2312.03732: alpha / sqrt(rank) instead of alpha / rank.
        return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") is True else 1.0)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} has settings that are no JSON; get the file anew"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} has settings that are no table; get the file anew")
    return found


def _by_part(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of each part; a file of one network has them without its name."""
    parts = {part.name for family in FAMILIES.values() for part in family.parts}
    found: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        part, _, inside = name.partition(".")
        if inside and part in parts:
            found.setdefault(part, {})[inside] = value
        else:
            found.setdefault("", {})[name] = value
    return found
