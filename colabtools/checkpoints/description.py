"""What a model is beyond the names of its tensors, and how files say so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools.checkpoints.casting import cast_bytes
from colabtools.checkpoints.headers import Header, TensorEntry, one_line, open_regular
from colabtools.errors import CheckpointError
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from colabtools.checkpoints.keymaps.families import FamilyMap
    from colabtools.checkpoints.plan import Target
    from colabtools.checkpoints.sources import Tensors

__all__ = [
    "Description",
    "describe_file",
    "describe_folder",
    "marks",
    "metadata_of",
    "sd2_yaml",
]

_MAX_TEXT_BYTES = 1024**2
_CONFIGS = Path(__file__).parent / "keymaps" / "configs"

# Source: Stability-AI/ModelSpec, the fields of version 1.0.0 and its list of architectures.
_ARCHITECTURES = {
    "flux": ("flux-1-dev", "https://github.com/black-forest-labs/flux", 1024),
    "sd1": ("stable-diffusion-v1", "https://github.com/CompVis/stable-diffusion", 512),
    "sd2": ("stable-diffusion-v2-512", "https://github.com/Stability-AI/stablediffusion", 512),
    "sdxl": (
        "stable-diffusion-xl-v1-base",
        "https://github.com/Stability-AI/generative-models",
        1024,
    ),
}
_INPAINTING_CHANNELS = 9
_V_SPREAD = 0.09


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a model is.

    Attributes:
        family: "sd1", "sd2", "sdxl" or "flux".
        prediction_type: what its denoiser says: "epsilon", "v_prediction" or "flow".
        zero_terminal_snr: whether its schedule ends in noise alone.
        channels: of its denoiser's input; 0 if unknown.
        guided: whether a Flux model is told the guidance, as dev is and schnell is not.
    """

    family: str
    prediction_type: str
    zero_terminal_snr: bool = False
    channels: int = 0
    guided: bool = True

    @property
    def marked(self) -> bool:
        """Whether readers must be told that it predicts v."""
        return self.prediction_type == "v_prediction"


def describe_folder(folder: Path, family: FamilyMap, parts: Mapping[str, Tensors]) -> Description:
    """Return what a folder in diffusers' layout says of its model.

    Raises:
        CheckpointError: its scheduler's configuration cannot be read.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config: dict[str, Any] = {}
    if path.is_file():
        try:
            config = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{one_line(path)} is no readable JSON; download it again"
            ) from error
    prediction = str(config.get("prediction_type", "epsilon"))
    return Description(
        family=family.name,
        prediction_type="flow" if family.name == "flux" else prediction,
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        channels=_channels(parts.get(family.denoiser.name, {}), _first_layers(family)[0]),
        guided=any("guidance_embedder" in name for name in parts.get("transformer", ())),
    )


def describe_file(header: Header, family: FamilyMap, parts: Mapping[str, Tensors]) -> Description:
    """Return what a single file, or the .yaml beside it, says of its model."""
    names = header.tensors.keys()
    denoiser = parts.get(family.denoiser.name, {})
    prediction = _prediction_of(header, family, denoiser)
    return Description(
        family=family.name,
        prediction_type="flow" if family.name == "flux" else prediction,
        zero_terminal_snr="ztsnr" in names,
        channels=_channels(denoiser, _first_layers(family)[1]),
        guided=any(name.startswith("guidance_in.") for name in denoiser),
    )


def _prediction_of(header: Header, family: FamilyMap, denoiser: Tensors) -> str:
    told = header.metadata.get("modelspec.prediction_type", "")
    beside = _text_beside(header.path)
    if "v_pred" in header.tensors or told in ("v", "v_prediction"):
        return "v_prediction"
    if 'parameterization: "v"' in beside:
        return "v_prediction"
    if family.name == "sd2" and not told and not beside and _looks_like_v(denoiser):
        get_logger(__name__).warning(
            "%s does not say what it predicts; its weights look like those of v-prediction, "
            "set prediction_type if they are not",
            header.path,
        )
        return "v_prediction"
    return "epsilon"


def _looks_like_v(denoiser: Tensors) -> bool:
    """Guess from how far the numbers of one bias are spread, which is all that differs.

    Source: ComfyUI, comfy/supported_models.py, SD20.model_type.
    """
    import numpy as np

    entry = denoiser.get("output_blocks.11.1.transformer_blocks.0.norm1.bias")
    if not isinstance(entry, TensorEntry) or entry.dtype not in ("BF16", "F16", "F32"):
        return False
    with open_regular(entry.path) as file:
        file.seek(entry.begin)
        data = memoryview(bytearray(file.read(entry.size_bytes)))
    single = data if entry.dtype == "F32" else cast_bytes(data, entry.dtype, "F32", entry.name)
    return bool(np.frombuffer(single, np.float32).std() > _V_SPREAD)


def _first_layers(family: FamilyMap) -> tuple[str, str]:
    """Return what shows how many channels a denoiser sees, in a folder and in one file."""
    if family.name == "flux":
        return "x_embedder.weight", "img_in.weight"
    return "conv_in.weight", "input_blocks.0.0.weight"


def _channels(tensors: Tensors, name: str) -> int:
    shape = tensors[name].shape if name in tensors else ()
    return shape[1] if len(shape) > 1 else 0


def _text_beside(path: Path) -> str:
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return ""
    with open_regular(beside) as file:
        return file.read(_MAX_TEXT_BYTES).decode("utf-8", "replace")


def marks(description: Description) -> list[Target]:
    """Return the empty tensors that tell readers of SDXL what it predicts.

    Source: ComfyUI, comfy/supported_models.py, SDXL.model_type; AUTOMATIC1111 pull request 16567.
    """
    from colabtools.checkpoints.plan import Target

    if description.family != "sdxl" or not description.marked:
        return []
    names = ["v_pred", "ztsnr"][: 1 + description.zero_terminal_snr]
    return [Target(name, "F32", (0,), ()) for name in names]


def metadata_of(description: Description, title: str) -> dict[str, str]:
    """Return the fields of a .safetensors header that say what a model is."""
    architecture, implementation, side = _ARCHITECTURES[description.family]
    if description.family == "sd2" and description.marked:
        architecture, side = "stable-diffusion-v2-768-v", 768
    if description.family == "flux" and not description.guided:
        architecture = "flux-1-schnell"
    if description.channels == _INPAINTING_CHANNELS:
        architecture += "-inpainting"
    fields = {
        "format": "pt",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
    }
    if description.family != "flux":
        fields["modelspec.prediction_type"] = "v" if description.marked else "epsilon"
    return fields


def sd2_yaml() -> bytes:
    """Return the configuration without which web UIs take SD 2 for what predicts noise."""
    return (_CONFIGS / "sd2" / "v-inference.yaml").read_bytes()
