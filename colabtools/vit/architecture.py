"""What a ViT consists of, and what its tensors are called in each library's files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from colabtools.errors import ModelError

__all__ = ["ACTIVATIONS", "Architecture", "canonical_names"]

_T = TypeVar("_T")

# By transformers' names. The first is x * Phi(x), the second its approximation by tanh.
# Source: transformers 5.23, activations.py, ACT2FN.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a plain ViT: patches, a class token, pre-norm blocks, a final LayerNorm, a head.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), section 3.1.

    Attributes:
        img_size: height and width in pixels.
        patch_size: height and width in pixels.
        in_chans: channels of a picture.
        embed_dim: width D of a token.
        depth: number of blocks.
        num_heads: of attention; each has D / num_heads numbers.
        mlp_dim: inner width of a block's MLP.
        eps: of the LayerNorms.
        activation: "gelu" or "gelu_tanh".
        num_classes: outputs of the head, 0 without one.
    """

    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    eps: float
    activation: str
    num_classes: int

    @property
    def tokens(self) -> int:
        """T, the class token and one for each patch."""
        (height, width), (tall, wide) = self.img_size, self.patch_size
        return 1 + (height // tall) * (width // wide)

    @property
    def flops(self) -> int:
        """Floating-point operations for one picture, a multiply-add counted as two.

        Source: the shapes of the matrix products; norms, softmax and GELU are left out.
        """
        width, tokens = self.embed_dim, self.tokens
        linear = tokens * (4 * width**2 + 2 * width * self.mlp_dim)
        attention = 2 * tokens**2 * width
        patches = (tokens - 1) * self.in_chans * self.patch_size[0] * self.patch_size[1] * width
        return 2 * (self.depth * (linear + attention) + patches + width * self.num_classes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by its canonical name."""
        width, inner = self.embed_dim, self.mlp_dim
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, width),
            "pos_embed": (1, self.tokens, width),
            "patch_embed.weight": (width, self.in_chans, *self.patch_size),
            "patch_embed.bias": (width,),
        }
        block = {
            **{f"{norm}.{end}": (width,) for norm in ("norm1", "norm2") for end in _ENDS},
            "qkv.weight": (3 * width, width),
            "qkv.bias": (3 * width,),
            "proj.weight": (width, width),
            "proj.bias": (width,),
            "fc1.weight": (inner, width),
            "fc1.bias": (inner,),
            "fc2.weight": (width, inner),
            "fc2.bias": (width,),
        }
        for number in range(self.depth):
            shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
        shapes |= {f"norm.{end}": (width,) for end in _ENDS}
        if self.num_classes:
            head = {"head.weight": (self.num_classes, width), "head.bias": (self.num_classes,)}
            shapes |= head
        return shapes

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_classes: int) -> Architecture:
        """Return what a transformers config.json of model_type "vit" describes.

        Args:
            config: its values.
            num_classes: rows of the head's weights, which a config.json may leave out.

        Raises:
            ModelError: a value is missing, or of a kind that is not a plain ViT.
        """
        activation = config.get("hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            raise ModelError(f"the model's hidden_act is {activation!r}; known: {[*ACTIVATIONS]}")
        try:
            return cls(
                img_size=_pair(config.get("image_size", 224)),
                patch_size=_pair(config.get("patch_size", 16)),
                in_chans=config.get("num_channels", 3),
                embed_dim=config["hidden_size"],
                depth=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                mlp_dim=config["intermediate_size"],
                eps=config.get("layer_norm_eps", 1e-12),
                activation=ACTIVATIONS[activation],
                num_classes=num_classes,
            )
        except KeyError as error:
            raise ModelError(f"the model's config.json has no {error}") from error

    @classmethod
    def from_timm(
        cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> Architecture:
        """Return what the tensors of a timm ViT say; its config.json has only a name.

        Every ViT of timm has heads of 64 numbers and a LayerNorm epsilon of 1e-6.
        Source: timm 1.0, models/vision_transformer.py, the entry points of vit_*_patch*.

        Raises:
            ModelError: a tensor is missing, or it is no plain ViT.
        """
        name = str(config.get("architecture", ""))
        if not re.fullmatch(r"vit_(tiny|small|base|large|huge)_patch\d+_\d+(\..*)?", name):
            raise ModelError(f"{name!r} of timm is not a plain ViT that is known here")
        try:
            width, channels, tall, wide = shapes["patch_embed.proj.weight"]
            settings = config.get("pretrained_cfg", config)
            return cls(
                img_size=tuple(settings["input_size"][1:]),
                patch_size=(tall, wide),
                in_chans=channels,
                embed_dim=width,
                depth=1 + max(int(name.split(".")[1]) for name in shapes if "blocks." in name),
                num_heads=width // 64,
                mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
                eps=1e-6,
                activation="gelu",
                num_classes=shapes.get("head.weight", (0,))[0],
            )
        except (KeyError, ValueError) as error:
            raise ModelError(f"the files of {name} have no {error}") from error


_ENDS = ("weight", "bias")
# Of a tensor's name in files to ours; q, k and v are joined after.
# Source: files written by transformers before and since 5.0, and by timm 1.0.
_TOP = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection": "patch_embed",
    r"layernorm": "norm",
    r"classifier": "head",
    r"cls_token": "cls_token",
    r"pos_embed": "pos_embed",
    r"patch_embed\.proj": "patch_embed",
    r"norm": "norm",
    r"head": "head",
}
_IN_BLOCK = {
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"attention\.attention\.query": "q",
    r"attention\.attention\.key": "k",
    r"attention\.attention\.value": "v",
    r"attention\.output\.dense": "proj",
    r"intermediate\.dense": "fc1",
    r"output\.dense": "fc2",
    r"attention\.q_proj": "q",
    r"attention\.k_proj": "k",
    r"attention\.v_proj": "v",
    r"attention\.o_proj": "proj",
    r"norm1": "norm1",
    r"norm2": "norm2",
    r"attn\.qkv": "qkv",
    r"attn\.proj": "proj",
    r"mlp\.fc1": "fc1",
    r"mlp\.fc2": "fc2",
}
_BLOCK = re.compile(r"(?:encoder\.layer|layers|blocks)\.(\d+)\.(.+)")
# Trained for another task, and of no use to a classifier.
_UNUSED = re.compile(r"pooler\..*|embeddings\.mask_token|.*\.position_ids")


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def canonical_names(
    names: Iterable[str], weights: Mapping[str, _T], join: Callable[[list[_T]], _T]
) -> dict[str, _T]:
    """Return tensors by canonical name, in whichever of the three spellings they came.

    Args:
        names: of the file.
        weights: tensors by these names.
        join: joins tensors along their first axis.

    Raises:
        ModelError: a tensor belongs to no part of a ViT.
    """
    found: dict[str, _T] = {}
    odd = []
    for name in names:
        ours = _canonical(name)
        if ours is None:
            odd.append(name)
        elif ours:
            found[ours] = weights[name]
    if odd:
        raise ModelError(
            f"{len(odd)} tensors are no part of a plain ViT, such as {', '.join(odd[:3])}; "
            "the file is of another model"
        )
    for name in [name for name in found if name.endswith((".q.weight", ".q.bias"))]:
        start, end = name.rsplit(".q.", 1)
        parts = [found.pop(f"{start}.{part}.{end}", None) for part in "qkv"]
        present = [part for part in parts if part is not None]
        if len(present) < 3:
            raise ModelError(f"{name} has no key or value beside it; the file is not whole")
        found[f"{start}.qkv.{end}"] = join(present)
    return found


def _canonical(name: str) -> str | None:
    """Return our name of a tensor, "" for one that is not used, None for one that is unknown."""
    bare = re.sub(r"^vit\.", "", name)
    if _UNUSED.fullmatch(bare):
        return ""
    block = _BLOCK.fullmatch(bare)
    rest = block[2] if block else bare
    for pattern, role in (_IN_BLOCK if block else _TOP).items():
        match = re.fullmatch(pattern + r"(?:\.(weight|bias))?", rest)
        if match:
            ours = role + (f".{match[1]}" if match[1] else "")
            return f"blocks.{block[1]}.{ours}" if block else ours
    return None
