"""The networks that judge pictures: DINO for a subject, CLIP for a subject and a prompt."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from colabtools import images
from colabtools.devices import torch_device
from colabtools.errors import ModelError
from colabtools.report import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["ClipEncoder", "DinoEncoder"]

_BATCH_SIZE = 16

_SMALL_FILES = ("*.json", "*.txt")
_WEIGHTS = "model.safetensors"
# Read as tensors only, so it cannot run code; the published DINO may have no other.
_OLD_WEIGHTS = "pytorch_model.bin"


@dataclass(frozen=True)
class DinoEncoder:
    """A vision transformer whose class token tells one subject from another of its kind."""

    name: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str) -> DinoEncoder:
        """Return the encoder of a Hub repository or a local folder.

        Raises:
            ModelError: it cannot be had, or lacks weights.
        """
        model, processor = _load(_fetch(name, "dino_model"), name, "dino_model")
        return cls(name, model, processor)

    @property
    def as_published(self) -> bool:
        """Whether this has the build of the paper's, ViT-S/16; only such numbers compare."""
        wanted = {
            "model_type": "vit",
            "hidden_size": 384,
            "num_hidden_layers": 12,
            "patch_size": 16,
        }
        return all(getattr(self.model.config, key, None) == wanted[key] for key in wanted)

    def embed_pictures(self, paths: Sequence[Path], *, desc: str) -> torch.Tensor:
        """Return the class token's output for each picture, (N, D) float32.

        Raises:
            ImageError: a picture cannot be decoded.
            ModelError: the output is not finite.
        """

        def embed(pixel_values: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W) -> (B, D)
            model = self.model.to(pixel_values.device)
            hidden: torch.Tensor = model(pixel_values=pixel_values).last_hidden_state
            return hidden[:, 0]

        return _finite(self.name, _embed_pictures(embed, self.processor, paths, desc))


@dataclass(frozen=True)
class ClipEncoder:
    """A pair of encoders that put a picture and its description in one place."""

    name: str
    model: Any
    processor: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str) -> ClipEncoder:
        """Return the encoder of a Hub repository or a local folder.

        Raises:
            ModelError: it cannot be had, lacks weights, or is no CLIP.
        """
        from transformers import AutoTokenizer

        folder = _fetch(name, "clip_model")
        model, processor = _load(folder, name, "clip_model")
        if not hasattr(model, "get_text_features"):
            raise ModelError(
                f"clip_model {name!r} is a {type(model).__name__} without a text encoder; "
                "give a CLIP such as openai/clip-vit-base-patch32"
            )
        with _explained(name, "clip_model"), _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder)
        words, known = model.config.text_config.vocab_size, len(tokenizer)
        # Where its files are missing, transformers makes a tokenizer that knows nothing.
        if not words // 2 < known <= words:
            raise ModelError(
                f"clip_model {name!r} has a tokenizer of {known} tokens for a model of {words}; "
                "download it again or give another"
            )
        return cls(name, model, processor, tokenizer)

    @property
    def as_published(self) -> bool:
        """Whether this has the build of ViT-B/32, which published numbers come from."""
        vision = getattr(self.model.config, "vision_config", None)
        wanted = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32}
        return all(getattr(vision, key, None) == wanted[key] for key in wanted)

    def embed_pictures(self, paths: Sequence[Path], *, desc: str) -> torch.Tensor:
        """Return the place of each picture, (N, D) float32.

        Raises:
            ImageError: a picture cannot be decoded.
            ModelError: the output is not finite.
        """

        def embed(pixel_values: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W) -> (B, D)
            model = self.model.to(pixel_values.device)
            places: torch.Tensor = model.get_image_features(pixel_values=pixel_values).pooler_output
            return places

        return _finite(self.name, _embed_pictures(embed, self.processor, paths, desc))

    @torch.inference_mode()
    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the place of each prompt, (N, D) float32; what CLIP cannot read is cut off.

        Raises:
            ModelError: the output is not finite.
        """
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        device = torch_device()
        places = self.model.to(device).get_text_features(**tokens.to(device)).pooler_output
        return _finite(self.name, places.float().cpu())


def _fetch(name: str, field: str) -> Path:
    """Return the local folder of that name, else that of the Hub repository's files.

    One call for all files: without a network the Hub's libraries repeat each for half a minute.
    """
    from huggingface_hub import snapshot_download

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    with _explained(name, field):
        folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, _WEIGHTS]))
        if not (folder / _WEIGHTS).is_file():
            folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, _OLD_WEIGHTS]))
    return folder


def _load(folder: Path, name: str, field: str) -> tuple[Any, Any]:
    """Return a model in fp32, in evaluation mode, and its picture processor.

    It moves to the device when it first judges: until then another model draws there.
    """
    from transformers import AutoImageProcessor, AutoModel

    with _explained(name, field), _quiet_transformers():
        # Pillow resizes alike everywhere; torchvision, where it is installed, resizes otherwise.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        model, report = AutoModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    # What a file lacks is drawn at random. Only the pooler, which nothing here reads, may lack.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        keys = ", ".join([*missing, *map(str, report["mismatched_keys"])][:3])
        raise ModelError(
            f"{field} {name!r} lacks weights of its own architecture ({keys}); "
            "download it again or give another"
        )
    return model.eval(), processor


@contextmanager
def _explained(name: str, field: str) -> Iterator[None]:
    """Raise whatever goes wrong while loading as one error that names the model."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"{field} {name!r} cannot be loaded ({reason}); check the name and the connection, "
            "or give a local folder with its files"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep back the bar over tensors and the notes on unused parts; downloads still show theirs."""
    from transformers.utils import logging as transformers_logging

    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        log.setLevel(level)


@torch.inference_mode()
def _embed_pictures(
    embed: Callable[[torch.Tensor], torch.Tensor], processor: Any, paths: Sequence[Path], desc: str
) -> torch.Tensor:
    device = torch_device()
    batches = [paths[at : at + _BATCH_SIZE] for at in range(0, len(paths), _BATCH_SIZE)]
    rows = []
    with progress(total=len(paths), desc=desc, unit="pictures") as bar:
        for batch in batches:
            pictures = [images.load_upright(path) for path in batch]
            # Processors that squash and processors that crop see the same part of a wide picture.
            squares = [images.square(picture, min(picture.size)) for picture in pictures]
            inputs = processor(images=squares, return_tensors="pt")
            rows.append(embed(inputs["pixel_values"].to(device)).float().cpu())
            bar.update(len(batch))
    return torch.cat(rows)


def _finite(name: str, embeddings: torch.Tensor) -> torch.Tensor:
    if not bool(embeddings.isfinite().all()):
        raise ModelError(f"{name!r} gives numbers that are not finite; download it again")
    return embeddings
