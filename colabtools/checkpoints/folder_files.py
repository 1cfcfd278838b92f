"""The small files of a folder in diffusers' layout: configurations and tokenizers.

Configurations are shipped, one for each family, and fitted to the model. Tokenizers cannot be made
from weights: they come from a folder that has them, or from the Hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools.checkpoints.headers import one_line
from colabtools.checkpoints.plan import is_published
from colabtools.errors import CheckpointError
from colabtools.registry import BASES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from colabtools.checkpoints.description import Description
    from colabtools.checkpoints.keymaps.families import FamilyMap
    from colabtools.checkpoints.sources import Tensors

__all__ = ["copied_texts", "fetch_tokenizers", "made_texts", "missing_files"]

_CONFIGS = Path(__file__).parent / "keymaps" / "configs"
_MAX_SMALL_BYTES = 32 * 1024**2
_SMALL_SUFFIXES = (".json", ".txt", ".model")
_INDEX = "model_index.json"

# The pipelines of models that see a picture beside the noise, by family and channels.
_PIPELINES = {
    ("flux", 384): "FluxFillPipeline",
    ("flux", 128): "FluxControlPipeline",
    ("sd1", 8): "StableDiffusionInstructPix2PixPipeline",
    ("sd1", 9): "StableDiffusionInpaintPipeline",
    ("sd2", 9): "StableDiffusionInpaintPipeline",
    ("sdxl", 8): "StableDiffusionXLInstructPix2PixPipeline",
    ("sdxl", 9): "StableDiffusionXLInpaintPipeline",
}


def copied_texts(folder: Path, parts: Mapping[str, Tensors]) -> dict[str, bytes]:
    """Return the small files of a folder that go with these parts, by their paths in it.

    Raises:
        CheckpointError: it has no configuration of a part, or a file cannot be read.
    """
    found = {}
    try:
        for path in sorted([*folder.glob("*.json"), *folder.glob("*/*")]):
            small = path.suffix in _SMALL_SUFFIXES and not path.name.endswith(".index.json")
            whole = path.is_file() and path.stat().st_size <= _MAX_SMALL_BYTES
            beside = path.parent == folder and path.name != _INDEX
            if small and whole and not beside and ".index." not in path.name:
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {one_line(folder)}: {error.strerror}") from error
    for part in parts:
        if f"{part}/config.json" not in found:
            raise CheckpointError(
                f"{one_line(folder)} has no {part}/config.json; "
                "give config_from a whole folder in diffusers' layout"
            )
    return found


def made_texts(
    family: FamilyMap, description: Description, parts: Mapping[str, Tensors]
) -> dict[str, bytes]:
    """Return the configurations of a published model, by their paths in the folder.

    Raises:
        CheckpointError: the model is narrower or wider than the published ones.
    """
    for part in family.parts:
        if part.name in parts and not is_published(part, parts[part.name]):
            raise CheckpointError(
                f"the {part.name} has other widths than the published models of {family.name}; "
                "give config_from a folder in diffusers' layout that has its configuration"
            )
    names = [f"{part}/config.json" for part in parts]
    if len(parts) == len(family.parts):
        names += ["scheduler/scheduler_config.json", _INDEX]
    made = {}
    for name in names:
        config = json.loads((_CONFIGS / family.name / name).read_text(encoding="utf-8"))
        config.update(_changes(name, config, family, description))
        made[name] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return made


def _changes(
    name: str, config: Mapping[str, Any], family: FamilyMap, description: Description
) -> dict[str, Any]:
    """Return what one model's configuration has otherwise than the shipped one."""
    if name == f"{family.denoiser.name}/config.json":
        return _denoiser_changes(config, description)
    if name == _INDEX:
        pipeline = _PIPELINES.get((family.name, description.channels))
        return {"_class_name": pipeline} if pipeline else {}
    if name != "scheduler/scheduler_config.json":
        return {}
    if family.name == "flux":
        return {} if description.guided else {"shift": 1.0, "use_dynamic_shifting": False}
    zero = {"rescale_betas_zero_snr": True} if description.zero_terminal_snr else {}
    return {"prediction_type": description.prediction_type, **zero}


def _denoiser_changes(config: Mapping[str, Any], description: Description) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if description.channels not in (0, config["in_channels"]):
        changes["in_channels"] = description.channels
    if description.family == "flux":
        changes["guidance_embeds"] = description.guided
        if changes.get("in_channels"):
            # What it paints beside the noise is no part of what it says.
            changes["out_channels"] = config["in_channels"]
    if description.family == "sd2" and description.marked:
        # 768 pixels; attention overflows in fp16 there.
        changes.update(sample_size=96, upcast_attention=True)
    return changes


def missing_files(texts: Mapping[str, bytes]) -> list[str]:
    """Return the folders that the index names and that have no file yet: tokenizers."""
    index = json.loads(texts[_INDEX]) if _INDEX in texts else {}
    there = {name.partition("/")[0] for name in texts}
    return sorted(name for name in index if name.startswith("tokenizer") and name not in there)


def fetch_tokenizers(family: str, names: list[str]) -> dict[str, bytes]:
    """Return the files of these folders from a repository of the family; none if offline."""
    base = next(base for base in BASES.values() if base.family == family and base.name != "micro")
    try:
        from huggingface_hub import snapshot_download

        patterns = [f"{name}/*" for name in names]
        folder = Path(snapshot_download(base.source, allow_patterns=patterns, etag_timeout=5))
        files = [path for name in names for path in sorted((folder / name).iterdir())]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    # Whatever the library or the network has against it: the weights are what was asked for.
    except (ImportError, OSError, ValueError, RuntimeError):
        return {}
