"""An adapter from one naming into the other: PEFT's and diffusers', or that of the web UIs.

    convert_lora("pytorch_lora_weights.safetensors", "my_subject.safetensors")

The numbers stay what they are, bit for bit, and alpha is never multiplied in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools.checkpoints.headers import one_line
from colabtools.checkpoints.keymaps.families import FAMILIES
from colabtools.checkpoints.lora import PEFT_METADATA, Lora, read_lora
from colabtools.checkpoints.lora_names import Place, has_single_names, kohya_name, places
from colabtools.checkpoints.lora_split import (
    FUSED_RANKS,
    Fused,
    fuse_layers,
    fused_ranks,
    is_swapped,
)
from colabtools.checkpoints.lora_tensors import Layer, live
from colabtools.checkpoints.output import write_file
from colabtools.checkpoints.plan import DTYPES, Piece, Target
from colabtools.errors import CheckpointError
from colabtools.fields import check_choice
from colabtools.report import get_logger

if TYPE_CHECKING:
    import torch

    from colabtools.checkpoints.sources import Tensor
    from colabtools.checkpoints.verify import WrittenFile

__all__ = ["NAMINGS", "convert_lora", "kohya_targets", "peft_targets", "write_lora"]

NAMINGS = ("kohya", "peft")
_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
# What kohya's scripts write and the web UIs sort adapters by.
# Source: kohya-ss/sd-scripts 0.9, library/train_util.py and library/sai_model_spec.py;
# extensions-builtin/Lora/network.py of AUTOMATIC1111/stable-diffusion-webui 1.10.1.
_VERSIONS = {
    "flux": ("flux1", "flux-1-dev"),
    "sd1": ("sd_v1", "stable-diffusion-v1"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def convert_lora(
    src: str | Path, dst: str | Path, *, naming: str = "auto", dtype: str = "keep"
) -> WrittenFile:
    """Return what was written: the adapter under other names, verified.

    Args:
        src: a LoRA file by PEFT, diffusers or kohya's scripts.
        dst: ends in .safetensors.
        naming: "kohya" for web UIs and ComfyUI, "peft" for diffusers; "auto" is what `src` is not.
        dtype: of the matrices: "keep", "fp16", "bf16" or "fp32".

    Raises:
        CheckpointError: the source is damaged, unsafe, no LoRA or for another family of models; the
            destination is as it was before.
        WorkspaceError: the storage failed; the same.
    """
    check_choice("naming", naming, ("auto", *NAMINGS))
    check_choice("dtype", dtype, ("keep", *DTYPES))
    lora = read_lora(Path(src).expanduser().absolute())
    chosen = naming if naming != "auto" else "peft" if lora.naming == "kohya" else "kohya"
    return write_lora(Path(dst).expanduser().absolute(), lora, naming=chosen, dtype=dtype)


def write_lora(path: Path, lora: Lora, *, naming: str, dtype: str = "keep") -> WrittenFile:
    """Return what was written: one verified file; see `convert_lora`.

    Raises:
        CheckpointError: it cannot be said by these names, or the file reads back changed.
        WorkspaceError: the storage failed.
    """
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{one_line(path)} would be no .safetensors file; end its name so")
    writer = kohya_targets if naming == "kohya" else peft_targets
    targets, metadata = writer(lora, dtype)
    written = write_file(path, targets, metadata)
    get_logger(__name__).info(
        "wrote and verified %s, %d layers by the names of %s",
        path,
        len(lora.layers),
        "web UIs" if naming == "kohya" else "diffusers",
    )
    return written


def peft_targets(lora: Lora, dtype: str = "keep") -> tuple[list[Target], dict[str, str]]:
    """Return the tensors of a file for diffusers, and the texts of its header."""
    targets = []
    for layer in lora.layers.values():
        name = f"{layer.part}.{layer.module}"
        targets.append(_target(f"{name}.lora_A.weight", (layer.down,), dtype))
        targets.append(_target(f"{name}.lora_B.weight", (layer.up,), dtype))
        if layer.magnitude is not None:
            targets.append(_target(f"{name}.lora_magnitude_vector", (layer.magnitude,), dtype))
    metadata = {**_kept(lora), "format": "pt", PEFT_METADATA: json.dumps(_settings(lora))}
    return targets, metadata


def _settings(lora: Lora) -> dict[str, Any]:
    """Return the fields of PEFT's LoraConfig, each with its part before it.

    Source: diffusers 0.42.1, loaders/lora_base.py, and peft 0.19, tuners/lora/config.py.
    """
    settings: dict[str, Any] = {}
    for part in dict.fromkeys(part for part, _ in lora.layers):
        layers = [layer for layer in lora.layers.values() if layer.part == part]
        rank, _ = Counter(layer.rank for layer in layers).most_common(1)[0]
        alpha, _ = Counter(layer.alpha for layer in layers).most_common(1)[0]
        # transformers has no `text_model.` since 5.6, and PEFT takes the ends of names.
        names = {layer.module.removeprefix("text_model."): layer for layer in layers}
        fields = {
            "alpha_pattern": {f"^{n}": x.alpha for n, x in names.items() if x.alpha != alpha},
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "r": rank,
            "rank_pattern": {f"^{n}": x.rank for n, x in names.items() if x.rank != rank},
            "target_modules": _ends(names),
            "use_dora": any(layer.magnitude is not None for layer in layers),
        }
        settings |= {f"{part}.{name}": value for name, value in fields.items()}
    return settings


def _ends(names: Mapping[str, Layer]) -> list[str] | str:
    """Return names that PEFT finds exactly these layers by.

    A name without dots is also the end of others, such as proj_out; an expression is not.
    """
    if all("." in name for name in names):
        return sorted(names)
    return "|".join(name.replace(".", r"\.") for name in sorted(names))


@dataclass(frozen=True)
class _Row:
    """A layer as kohya's scripts name it."""

    name: str
    place: Place
    layers: Mapping[str, Layer]


def kohya_targets(lora: Lora, dtype: str = "keep") -> tuple[list[Target], dict[str, str]]:
    """Return the tensors of a file for web UIs, and the texts of its header.

    Raises:
        CheckpointError: the layers of a row of Flux do not fit together.
    """
    targets: list[Target] = []
    ranks: dict[str, tuple[int, ...]] = {}
    for row in _kohya_rows(lora):
        fused = _fused(lora.family, row)
        ranks[row.place.row.name] = fused.ranks
        targets.append(_target(f"{row.name}.lora_down.weight", fused.downs, dtype))
        targets.append(_target(f"{row.name}.lora_up.weight", (fused.up,), dtype))
        if fused.magnitude:
            targets.append(_columns(f"{row.name}.dora_scale", fused.magnitude, dtype))
        alpha = live(f"{row.name}.alpha", "F32", (), _number(fused.alpha))
        targets.append(_target(alpha.name, (alpha,), "keep"))
    return targets, {**_kept(lora), **_kohya_metadata(lora), **fused_ranks(ranks)}


def _kohya_rows(lora: Lora) -> Iterator[_Row]:
    family = FAMILIES[lora.family]
    grouped: dict[str, tuple[Place, dict[str, Layer]]] = {}
    for (part, module), layer in lora.layers.items():
        place = places(lora.family)[part][module.replace(".", "_")]
        name = kohya_name(family, place)
        grouped.setdefault(name, (place, {}))[1][module] = layer
    for name, (place, layers) in grouped.items():
        yield _Row(name, place, layers)


def _fused(family: str, row: _Row) -> Fused:
    """Return the matrices of a row, which most often is one layer as it is."""
    single = has_single_names(family) and row.place.part == FAMILIES[family].denoiser.name
    if single and (len(row.place.row.segments) > 1 or is_swapped(row.place.row)):
        return fuse_layers(row.place.row, row.layers)
    (layer,) = row.layers.values()
    magnitude = () if layer.magnitude is None else (layer.magnitude,)
    return Fused((layer.down,), layer.up, layer.alpha, magnitude, (layer.rank,))


def _number(value: float) -> Any:
    def load() -> torch.Tensor:
        import torch

        return torch.tensor(value)

    return load


def _target(name: str, sources: tuple[Tensor, ...], dtype: str) -> Target:
    """Return a tensor that is made of others, below each other."""
    first = sources[0]
    dtypes = {source.dtype for source in sources}
    own = first.dtype if len(dtypes) == 1 else "F32"
    cast = own if dtype == "keep" or own not in _FLOATS else DTYPES[dtype]
    pieces = tuple(Piece(source, 0, source.size_bytes) for source in sources)
    shape = first.shape
    if len(sources) > 1:
        shape = (sum(source.shape[0] for source in sources), *first.shape[1:])
    return Target(name, cast, shape, pieces)


def _columns(name: str, sources: tuple[Tensor, ...], dtype: str) -> Target:
    """Return the lengths of DoRA as kohya's scripts have them, one for each row of a matrix."""
    whole = _target(name, sources, dtype)
    return Target(name, whole.dtype, (*whole.shape, 1), whole.pieces)


def _kept(lora: Lora) -> dict[str, str]:
    """Return what the header said that is true of the new file as well."""
    gone = {PEFT_METADATA, FUSED_RANKS, "format", "sshs_model_hash", "sshs_legacy_hash"}
    return {name: text for name, text in lora.metadata.items() if name not in gone}


def _kohya_metadata(lora: Lora) -> dict[str, str]:
    version, architecture = _VERSIONS[lora.family]
    layers = list(lora.layers.values())
    rank, _ = Counter(layer.rank for layer in layers).most_common(1)[0]
    alpha, _ = Counter(layer.alpha for layer in layers).most_common(1)[0]
    fields = {
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.sai_model_spec": "1.0.0",
        "ss_base_model_version": version,
        "ss_network_alpha": str(alpha),
        "ss_network_dim": str(rank),
        "ss_network_module": "networks.lora_flux" if lora.family == "flux" else "networks.lora",
        "ss_v2": str(lora.family == "sd2"),
    }
    return {name: lora.metadata.get(name, text) for name, text in fields.items()}
