"""What a weight file or a folder is, from the names and shapes of its tensors alone.

    inspect("model.safetensors").table()

Sources of the names that tell kinds and families apart: comfy/model_detection.py and
comfy/supported_models.py of ComfyUI; modules/sd_models_config.py of AUTOMATIC1111's web UI 1.10.1;
diffusers 0.42, loaders/single_file_utils.py; the tables of this package.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from colabtools.checkpoints.headers import (
    Header,
    TensorEntry,
    one_line,
    open_regular,
    read_safetensors_header,
)
from colabtools.checkpoints.keymaps.families import family_of_file, family_of_folder
from colabtools.checkpoints.sources import read_folder, read_header
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Inspection", "inspect"]

_Shapes = dict[str, tuple[int, ...]]

# A kind is known by a name that only it has. The first that fits is taken, so that an adapter that
# rides on another kind's names stands before it.
_KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (
            "lora",
            r"lora_(?:unet|te\d?|transformer)_|.*\.lora(?:_(?:A|B|down|up))?\.|.*\.lora_[AB]\b",
        ),
        ("ip-adapter", r"ip_adapter\.|image_proj\."),
        (
            "controlnet",
            r"(?:control_model\.)?(?:input_hint_block|zero_convs|controlnet_cond_embedding)\."
            r"|controlnet_blocks\.|lllite_|lora_controlnet",
        ),
        ("embedding", r"emb_params$|string_to_param\.|clip_[lg]$|<[^>]+>$"),
        ("checkpoint", r"model\.diffusion_model\.|double_blocks\.0\.|conditioner\.embedders\."),
        ("denoiser", r"down_blocks\.\d+\.|single_transformer_blocks\.|input_blocks\.0\."),
        ("vae", r"(?:first_stage_model\.|vae\.)?decoder\.conv_in\."),
        ("text-encoder", r"(?:text_model\.)?encoder\.layers\.0\.|encoder\.block\.0\."),
    )
)
_EMA = re.compile(r"model_ema\.(?!decay$|num_updates$)")
_VARIANTS = {8: "instruct-pix2pix", 9: "inpainting"}
_FLUX_VARIANTS = {128: "control", 384: "fill"}
_TURBO = re.compile(r"(?i)turbo|lightning|\blcm\b|hyper")
# SD 2 that predicts v has wide biases here; the bound is ComfyUI's (supported_models.py, SD20).
_SD2_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_DEVIATION = 0.09
_BYTES_OF_BIAS = 64 * 1024
_MAX_YAML_BYTES = 1024**2
_NOTE = re.compile(
    r"modelspec\.(?!thumbnail|hash)|ss_(?:base_model|network|output_name|sd_model_name)"
)
_MAX_NOTES = 12


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of a weight file or a folder.

    Attributes:
        path: the file or folder.
        kind: "checkpoint", "denoiser", "vae", "text-encoder", "lora", "embedding", "controlnet",
            "ip-adapter" or "unknown".
        family: "sd1", "sd2", "sdxl", "sdxl-refiner", "flux" or "unknown".
        variant: such as "base", "inpainting", "instruct-pix2pix", "turbo", "dev" or "schnell".
        layout: "single" file or "diffusers" folder.
        prediction_type: "epsilon", "v_prediction", "flow" or "unknown".
        prediction_source: where that is known from; a guess is called so.
        tensors: how many there are.
        parameters: how many numbers they hold.
        dtypes: how many numbers there are of each type.
        ema: whether averages of the weights lie beside them.
        size_bytes: of all weights together, as they lie there.
        truncated_bytes: how many bytes are missing at the end.
        notes: what the header says of the model.
    """

    path: Path
    kind: str
    family: str
    variant: str
    layout: str
    prediction_type: str
    prediction_source: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    ema: bool
    size_bytes: int
    truncated_bytes: int = 0
    notes: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return all of it as a JSON text."""
        return json.dumps({**asdict(self), "path": str(self.path)}, indent=2)

    def table(self) -> str:
        """Return all of it as lines for people."""
        dtypes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in self.dtypes.items())
        missing = f"yes, {self.truncated_bytes} bytes are missing" if self.truncated_bytes else "no"
        rows = {
            "file": one_line(self.path),
            "kind": self.kind,
            "family": self.family,
            "variant": self.variant,
            "layout": self.layout,
            "prediction": f"{self.prediction_type} ({self.prediction_source})",
            "parameters": f"{self.parameters / 1e6:.1f} M in {self.tensors} tensors",
            "dtype": dtypes or "none",
            "size": f"{self.size_bytes / 1e6:.1f} MB",
            "EMA": "yes" if self.ema else "no",
            "cut off": missing,
            **{one_line(name): one_line(text) for name, text in self.notes.items()},
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Return what a weight file, or a folder in diffusers' layout, is; reads its headers alone.

    A .safetensors file that lacks its end is described, not refused.

    Raises:
        CheckpointError: it is damaged, of another kind, or a pickle that could run something.
    """
    place = Path(path)
    try:
        folder = place.is_dir()
    except (OSError, ValueError):
        folder = False
    return _inspect_folder(place) if folder else _inspect_file(place)


def _inspect_file(path: Path) -> Inspection:
    if path.suffix.lower() == ".safetensors":
        header = read_safetensors_header(path, allow_truncated=True)
    else:
        header = read_header(path)
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    kind = _kind(shapes)
    family = _family(kind, shapes)
    prediction, source = _prediction(kind, family, header)
    return Inspection(
        path=path,
        kind=kind,
        family=family,
        variant=_variant(kind, family, shapes, [path.stem, *header.metadata.values()]),
        layout="single",
        prediction_type=prediction,
        prediction_source=source,
        **_counts(header.tensors.values()),  # type: ignore[arg-type]
        ema=any(_EMA.match(name) for name in shapes),
        size_bytes=header.size_bytes,
        truncated_bytes=header.truncated_bytes,
        notes=_notes(path, header.metadata),
    )


def _inspect_folder(path: Path) -> Inspection:
    parts = read_folder(path)
    entries = [
        entry
        for part in parts.values()
        for entry in part.values()
        if isinstance(entry, TensorEntry)
    ]
    try:
        family = family_of_folder(parts)
    except CheckpointError:
        family = "unknown"
    denoiser = parts.get("unet", parts.get("transformer", {}))
    shapes = {name: tensor.shape for name, tensor in denoiser.items()}
    config = _scheduler(path)
    told = str(config.get("prediction_type", "epsilon"))
    flow = family == "flux"
    return Inspection(
        path=path,
        kind="checkpoint",
        family=family,
        variant=_variant("checkpoint", family, shapes, [path.name]),
        layout="diffusers",
        prediction_type="flow" if flow else told if config else "unknown",
        prediction_source="family" if flow else "scheduler_config.json" if config else "not said",
        **_counts(entries),  # type: ignore[arg-type]
        ema=False,
        size_bytes=sum(each.stat().st_size for each in {entry.path for entry in entries}),
    )


def _scheduler(path: Path) -> dict[str, object]:
    place = path / "scheduler" / "scheduler_config.json"
    try:
        found = json.loads(_text(place) or "{}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{one_line(place)} is no readable JSON; download it again"
        ) from error
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    """Return a small text file, or an empty text where there is none."""
    if not os.path.lexists(path):
        return ""
    with open_regular(path) as file:
        return file.read(_MAX_YAML_BYTES).decode("utf-8", "replace")


def _counts(entries: Iterable[TensorEntry]) -> dict[str, object]:
    dtypes: Counter[str] = Counter()
    tensors = 0
    for entry in entries:
        tensors += 1
        dtypes[entry.dtype] += math.prod(entry.shape)
    ordered = dict(sorted(dtypes.items(), key=lambda item: -item[1]))
    return {"tensors": tensors, "parameters": sum(dtypes.values()), "dtypes": ordered}


def _kind(names: Iterable[str]) -> str:
    known = list(names)
    for kind, pattern in _KINDS:
        if any(pattern.match(name) for name in known):
            return kind
    return "unknown"


def _family(kind: str, shapes: _Shapes) -> str:
    if any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        return "sdxl-refiner"
    if kind == "checkpoint":
        try:
            return family_of_file(shapes)
        except CheckpointError:
            return "unknown"
    return _family_of_addition(kind, shapes)


def _family_of_addition(kind: str, shapes: _Shapes) -> str:
    """Return the family that an adapter or a part belongs to, from names and widths."""
    flux = re.compile(r".*(?:double_blocks|single_blocks|transformer_blocks\.\d+\.ff_context)")
    if any(flux.match(name) or "single_transformer_blocks" in name for name in shapes):
        return "flux"
    if kind == "vae":
        wide = next((s for n, s in shapes.items() if n.endswith("decoder.conv_in.weight")), ())
        return "flux" if len(wide) == 4 and wide[1] == 16 else "unknown"
    if kind == "embedding" and {"clip_l", "clip_g"} <= shapes.keys():
        return "sdxl"
    if any(re.match(r"lora_te2_|text_encoder_2\.", name) for name in shapes):
        return "sdxl"
    # What a layer of cross-attention reads is as wide as the family's text encoders.
    widths = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    read = re.compile(r".*attn2[._]to_k(?:_lora)?(?:\.lora)?[._](?:down|lora_A|lora_down|weight)")
    for name, shape in shapes.items():
        if (read.match(name) or "to_k_ip.weight" in name) and len(shape) >= 2:
            return widths.get(shape[1], "unknown")
    if kind == "embedding":
        last = {shape[-1] for shape in shapes.values() if len(shape) == 2}
        return widths.get(last.pop(), "unknown") if len(last) == 1 else "unknown"
    return "unknown"


def _variant(kind: str, family: str, shapes: _Shapes, texts: Iterable[str]) -> str:
    if family == "sdxl-refiner":
        return "refiner"
    if kind not in ("checkpoint", "denoiser"):
        return "none"
    ends = ("input_blocks.0.0.weight", "conv_in.weight", "img_in.weight", "x_embedder.weight")
    first = next(
        (
            s
            for n, s in shapes.items()
            if len(s) > 1 and n.removeprefix("model.diffusion_model.") in ends
        ),
        (0, 0),
    )
    if family == "flux":
        guided = any("guidance_in." in name or "guidance_embedder" in name for name in shapes)
        return _FLUX_VARIANTS.get(first[1], "dev" if guided else "schnell")
    if first[1] in _VARIANTS:
        return _VARIANTS[first[1]]
    # Few-step models differ in their numbers alone: only what they are called tells.
    return "turbo" if any(map(_TURBO.search, texts)) else "base"


def _prediction(kind: str, family: str, header: Header) -> tuple[str, str]:
    """Return what a model predicts, and where that is known from."""
    if kind not in ("checkpoint", "denoiser"):
        return "unknown", "not a denoiser"
    if family == "flux":
        return "flow", "family"
    if "v_pred" in header.tensors:
        return "v_prediction", "tensor v_pred"
    told = header.metadata.get("modelspec.prediction_type", "")
    if told:
        return {"v": "v_prediction"}.get(told, told), "modelspec metadata"
    beside = header.path.with_suffix(".yaml")
    if text := _text(beside):
        v_prediction = 'parameterization: "v"' in text
        return ("v_prediction" if v_prediction else "epsilon"), one_line(beside.name)
    if family == "sd2":
        return _guess(header)
    return "epsilon", "family's default"


def _guess(header: Header) -> tuple[str, str]:
    """Return what an SD 2 model predicts, guessed from how widely one small tensor spreads."""
    entry = header.tensors.get(_SD2_BIAS)
    codes = {"F16": "e", "F32": "f"}
    if entry is None or entry.dtype not in codes or not 0 < entry.size_bytes <= _BYTES_OF_BIAS:
        return "unknown", "SD 2 does not say"
    with open_regular(header.path) as file:
        data = os.pread(file.fileno(), entry.size_bytes, entry.begin)
    if len(data) != entry.size_bytes:
        return "unknown", "SD 2 does not say"
    numbers = [number for (number,) in struct.iter_unpack(f"<{codes[entry.dtype]}", data)]
    mean = math.fsum(numbers) / len(numbers)
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in numbers) / len(numbers))
    wide = deviation > _SD2_DEVIATION
    return ("v_prediction" if wide else "epsilon"), "guess from the spread of a bias"


def _notes(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the few texts of a header that say what a model is; of pickles, all."""
    plain = path.suffix.lower() != ".safetensors"
    found = {name: text for name, text in metadata.items() if plain or _NOTE.match(name)}
    return dict(list(found.items())[:_MAX_NOTES])
