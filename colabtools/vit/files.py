"""A model's files: from a folder, the package itself or the Hub, read without running any of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools import micro
from colabtools.checkpoints.pickles import ensure_safe
from colabtools.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["ModelFiles", "find_model", "read_weights"]

_CONFIG = "config.json"
_PROCESSOR = "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CHUNK_BYTES = 8 * 1024**2


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model that was found.

    Attributes:
        name: as it was asked for.
        folder: where its files are.
        config: the values of config.json.
        processor: the values of preprocessor_config.json, {} where there is none.
        weights: files of tensors, one or several shards.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    weights: tuple[Path, ...]

    def fingerprint(self) -> str:
        """Return the SHA-256 over all weights, as 64 hex digits; 1.2 GB takes about a second."""
        digest = hashlib.sha256()
        for path in self.weights:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


def find_model(name: str, *, allow_pickle: bool = False, revision: str = "") -> ModelFiles:
    """Return the files of a model.

    Args:
        name: "micro", a folder in transformers' layout, or a repository of the Hub.
        allow_pickle: take pytorch_model.bin where there is no safetensors file; it is scanned
            first and loaded without running code.
        revision: a branch, tag or commit of the Hub's repository.

    Raises:
        ModelError: there is no such model, or it is not whole.
    """
    folder = _folder_of(name, allow_pickle, revision)
    config = _read_json(folder / _CONFIG)
    if config is None:
        raise ModelError(f"{folder} has no {_CONFIG}; give a folder in transformers' layout")
    processor = _read_json(folder / _PROCESSOR)
    if processor is None:
        processor = config.get("pretrained_cfg", {})
    return ModelFiles(
        name=name,
        folder=folder,
        config=config,
        processor=processor,
        weights=_weight_files(folder, allow_pickle),
    )


def read_weights(files: ModelFiles) -> dict[str, torch.Tensor]:
    """Return all tensors on the CPU, by the names and in the dtypes of the files.

    Raises:
        ModelError: a file is damaged.
        CheckpointError: a pickle asks for anything but tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in files.weights:
        try:
            if path.suffix == ".safetensors":
                found |= load_file(path)
                continue
            ensure_safe(path)
            found |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except CheckpointError:
            raise
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"cannot load {path} ({_brief(error)}); fetch it again") from error
    return found


def _folder_of(name: str, allow_pickle: bool, revision: str) -> Path:
    if name == "micro":
        return micro.vit_path()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no model {name!r}; give micro, a folder in transformers' layout or a repository of "
            "the Hub such as google/vit-large-patch16-384"
        )
    return _download(name, allow_pickle, revision)


def _download(name: str, allow_pickle: bool, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        found = snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
        return Path(found)

    try:
        folder = fetch("*.json", "*.safetensors")
        if allow_pickle and not any(folder.glob("*.safetensors")):
            fetch("pytorch_model*.bin")
    # The library's own errors are among these.
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name} cannot be had from the Hub ({_brief(error)}); check the name and the "
            "connection, or give a folder"
        ) from error
    return folder


def _weight_files(folder: Path, allow_pickle: bool) -> tuple[Path, ...]:
    for name in _WEIGHTS[: 2 if allow_pickle else 1]:
        if (folder / name).is_file():
            return (folder / name,)
        index = _read_json(folder / f"{name}.index.json")
        if index is not None:
            shards = sorted({folder / Path(str(n)).name for n in index["weight_map"].values()})
            if lost := [shard.name for shard in shards if not shard.is_file()]:
                raise ModelError(f"{folder} lacks {lost[0]}, which its index names; fetch it again")
            return tuple(shards)
    if not allow_pickle and any(folder.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{folder} has pytorch_model.bin and no model.safetensors; allow_pickle=True reads it, "
            "scanned and without running code"
        )
    raise ModelError(f"{folder} has no {_WEIGHTS[0]}; give a folder in transformers' layout")


def _read_json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path} ({_brief(error)}); fetch it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object; fetch it again")
    return found


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
