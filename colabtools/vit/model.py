"""One small object for any ViT on any backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from colabtools.errors import ConfigError, MissingDependencyError, ModelError
from colabtools.fields import check, check_choice
from colabtools.images import Encoded
from colabtools.report import get_logger
from colabtools.vit.architecture import Architecture, canonical_names
from colabtools.vit.backends.base import LOGITS, Ask
from colabtools.vit.config import ModelConfig
from colabtools.vit.embeddings import EmbeddingSpace
from colabtools.vit.files import ModelFiles, find_model, read_weights
from colabtools.vit.preprocessing import Preprocessing

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from colabtools.vit.backends.base import Backend
    from colabtools.vit.network import Vit

    Picture: TypeAlias = str | Path | Encoded | Image.Image | NDArray[np.uint8]

__all__ = ["Label", "Model", "load", "open_model", "softmax", "unit"]

_BATCH = 32


@dataclass(frozen=True)
class Label:
    """A class and its probability.

    Attributes:
        index: of the class in the head.
        name: of the class.
        probability: in [0, 1], softmax over all classes.
    """

    index: int
    name: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """A ViT that is loaded.

    Attributes:
        files: where it comes from.
        sizes: its architecture.
        preprocessing: how a picture becomes what it takes.
        labels: name of each class, () without a head.
        backend: what carries it.
        why: how the dtype was chosen.
    """

    files: ModelFiles
    sizes: Architecture
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    backend: Backend
    why: str

    def predict(
        self, pictures: Picture | Sequence[Picture], *, top_k: int = 5
    ) -> list[list[Label]]:
        """Return the likeliest classes of each picture, the first the likeliest.

        Args:
            pictures: one or several: paths, `Encoded`, PIL pictures or arrays (H, W, 3) uint8.
            top_k: how many; no more than there are classes.

        Raises:
            ImageError: a picture cannot be decoded.
            ModelError: the model has no classification head.
        """
        found = softmax(self._run(pictures, LOGITS))
        return [self.top(row, top_k) for row in found]

    def top(self, probabilities: NDArray[np.float32], top_k: int) -> list[Label]:
        """Return the likeliest classes of one row of probabilities (K,)."""
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        return [Label(int(i), self.labels[i], float(probabilities[i])) for i in order]

    def logits(self, pictures: Picture | Sequence[Picture]) -> NDArray[np.float32]:
        """Return logits (N, K) float32.

        Raises:
            ImageError: a picture cannot be decoded.
            ModelError: the model has no classification head.
        """
        return self._run(pictures, LOGITS)

    def embed(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        layers: Sequence[int] = (-1,),
        pooling: str = "cls",
        norm: bool = True,
        normalize: bool = True,
    ) -> NDArray[np.float32]:
        """Return vectors (N, D times layers) float32.

        Args:
            pictures: as for `predict`.
            layers: after how many blocks; 0 is before the first, -1 after the last.
            pooling: "cls", the class token, or "mean", of the patches. The pooler that files of
                transformers may hold is never used: in a classifier it was never trained.
            norm: apply the model's final LayerNorm, as its head would see the tokens. Without, the
                vector is the raw sum of all blocks, in which a few numbers outweigh all others.
            normalize: bring each vector to length 1.

        Raises:
            ImageError: a picture cannot be decoded.
            ConfigError: there is no such layer or pooling.
        """
        ask = self.ask(layers, pooling, norm)
        return unit(self._run(pictures, ask)) if normalize else self._run(pictures, ask)

    def ask(self, layers: Sequence[int], pooling: str, norm: bool) -> Ask:
        """Return what a backend is asked for.

        Raises:
            ConfigError: there is no such layer or pooling.
        """
        check_choice("pooling", pooling, ("cls", "mean"))
        depth = self.sizes.depth
        for layer in layers:
            valid = isinstance(layer, int) and -depth - 1 <= layer <= depth
            check("layers", layer, valid, f"numbers of blocks in 0 to {depth}, or -1 for the last")
        check("layers", tuple(layers), len(layers) > 0, "at least one layer")
        real = {layer if layer >= 0 else depth + 1 + layer for layer in layers}
        return Ask(layers=tuple(sorted(real)), pooling=pooling, norm=norm)

    def space(self, ask: Ask, *, normalized: bool) -> EmbeddingSpace:
        """Return the space in which vectors of this model lie."""
        return EmbeddingSpace(
            model=self.files.name,
            fingerprint=self.files.fingerprint(),
            layers=ask.layers,
            norm=ask.norm,
            pooling=ask.pooling,
            normalized=normalized,
            dim=self.width(ask),
            preprocessing=self.preprocessing.to_json(),
        )

    def width(self, ask: Ask) -> int:
        """Return how many numbers an answer has: D times layers, or K."""
        return len(ask.layers) * self.sizes.embed_dim if ask.layers else self.sizes.num_classes

    def require_head(self) -> None:
        """Refuse a model that cannot classify.

        Raises:
            ModelError: it has no classification head.
        """
        if not self.labels:
            raise ModelError(
                f"{self.files.name} has no classification head; use it for embeddings, or give a "
                "model that was trained to classify, such as google/vit-large-patch16-384"
            )

    def _run(self, pictures: Picture | Sequence[Picture], ask: Ask) -> NDArray[np.float32]:
        if not ask.layers:
            self.require_head()
        items: list[Any] = [pictures]
        if isinstance(pictures, Sequence) and not isinstance(pictures, (str, Encoded)):
            items = list(pictures)
        found = [np.empty((0, self.width(ask)), np.float32)]
        for start in range(0, len(items), _BATCH):
            pixels = [self._pixels(item) for item in items[start : start + _BATCH]]
            found.append(self.backend.start(np.stack(pixels), ask)())
        return np.concatenate(found)

    def _pixels(self, picture: Picture) -> NDArray[np.uint8]:
        if isinstance(picture, (str, Path)):
            return self.preprocessing.read(Path(picture).expanduser())
        if isinstance(picture, Encoded):
            return self.preprocessing.read(picture)
        if isinstance(picture, np.ndarray):
            from PIL import Image

            picture = Image.fromarray(picture)
        return self.preprocessing.fit_picture(picture)


def load(
    model: str = "micro",
    backend: str = "torch",
    dtype: str = "auto",
    device: str = "auto",
    compile: str = "auto",  # noqa: A002 - the field's name
) -> Model:
    """Return a ViT, ready to classify and embed; see `ModelConfig` for the settings.

    Raises:
        ConfigError: a setting has a value that cannot work.
        ModelError: there is no such model, it is not whole, or it is no plain ViT.
        MissingDependencyError: the backend is not installed.
    """
    return open_model(
        ModelConfig(model=model, backend=backend, dtype=dtype, device=device, compile=compile)
    )


def open_model(config: ModelConfig) -> Model:
    """Return the ViT that the settings describe.

    Raises:
        ConfigError: a setting cannot work on this machine.
        ModelError: there is no such model, it is not whole, or it is no plain ViT.
        MissingDependencyError: the backend is not installed.
    """
    import torch

    from colabtools.vit.network import build

    files = find_model(config.model, allow_pickle=config.allow_pickle, revision=config.revision)
    weights = read_weights(files)
    sizes = _architecture(files, weights)
    preprocessing = _preprocessing(files, sizes, config)
    tensors = canonical_names(weights, weights, torch.cat)
    network = build(sizes, tensors, torch.from_numpy(preprocessing.table))
    carrier, why = _carry(network, config)
    get_logger(__name__).info(
        "%s: %s on %s in %s (%s)", config.model, carrier.name, carrier.device, carrier.dtype, why
    )
    return Model(
        files=files,
        sizes=sizes,
        preprocessing=preprocessing,
        labels=_labels(files, sizes),
        backend=carrier,
        why=why,
    )


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities of logits, over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors (N, D) brought to length 1."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    result: NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return result


def _architecture(files: ModelFiles, weights: dict[str, torch.Tensor]) -> Architecture:
    config = files.config
    if "architecture" in config and "model_type" not in config:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        return Architecture.from_timm(config, shapes)
    if config.get("model_type") != "vit":
        raise ModelError(
            f"{files.name} is a {config.get('model_type')!r}, not a ViT; give a model whose "
            "config.json says model_type vit, or a plain ViT of timm"
        )
    head = weights.get("classifier.weight")
    return Architecture.from_config(config, 0 if head is None else len(head))


def _labels(files: ModelFiles, sizes: Architecture) -> tuple[str, ...]:
    """Return the name of each class; the number where a model names none."""
    names = files.config.get("id2label") or {}
    given = files.config.get("label_names")
    if given and len(given) == sizes.num_classes:
        return tuple(map(str, given))
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(sizes.num_classes))


def _preprocessing(files: ModelFiles, sizes: Architecture, config: ModelConfig) -> Preprocessing:
    found = Preprocessing.from_config(files.processor, sizes.img_size, sizes.in_chans)
    found = replace(found, decoding=config.decoding)
    if (found.height, found.width) != sizes.img_size:
        raise ModelError(
            f"{files.name} takes {sizes.img_size} pixels and its preprocessing makes "
            f"{(found.height, found.width)}; its files are not of one model"
        )
    if config.fit in ("auto", found.fit):
        return found
    return replace(found, fit=config.fit, side_before_cut=0)


def _carry(network: Vit, config: ModelConfig) -> tuple[Backend, str]:
    """Return the network on its backend, and why in that dtype."""
    if config.backend != "torch":
        raise MissingDependencyError(f"backend {config.backend} is not there")
    import torch

    from colabtools.devices import torch_device
    from colabtools.vit.backends.torch_backend import TorchBackend
    from colabtools.vit.host import Choice, choose_dtype

    device = torch_device() if config.device == "auto" else torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda'; torch sees no card here, give auto or cpu")
    choice = Choice(config.dtype, "as asked for")
    if config.dtype == "auto":
        choice = choose_dtype(device, network.sizes.embed_dim, network.sizes.mlp_dim)
    carrier = TorchBackend(network, device, choice.dtype)
    if config.compile == "yes":
        carrier.compile()
    return carrier, choice.reason
