"""One model from one layout into another: a folder of diffusers, .safetensors, .ckpt.

    convert("model-folder", "model.safetensors")
    convert("model.ckpt", "model-folder", ConvertConfig(dtype="fp16"))

Nothing is loaded: byte ranges are copied, and cast chunk by chunk where another precision is asked.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from colabtools.checkpoints import description as describing
from colabtools.checkpoints.copying import Readers
from colabtools.checkpoints.folder_files import (
    copied_texts,
    fetch_tokenizers,
    made_texts,
    missing_files,
)
from colabtools.checkpoints.headers import Header, TensorEntry, one_line
from colabtools.checkpoints.keymaps.families import (
    FAMILIES,
    FamilyMap,
    family_of_file,
    family_of_folder,
)
from colabtools.checkpoints.lora import is_lora, read_lora
from colabtools.checkpoints.lora_files import convert_lora
from colabtools.checkpoints.merging import merge_loras, read_merges
from colabtools.checkpoints.output import FolderPlan, write_file, write_folder
from colabtools.checkpoints.plan import (
    Target,
    plan_folder,
    plan_rewrite,
    plan_single,
    split_parts,
)
from colabtools.checkpoints.sources import Tensors, read_folder, read_header
from colabtools.checkpoints.verify import WrittenFile, verify_file
from colabtools.drive import sha256_of, write_atomic
from colabtools.errors import CheckpointError
from colabtools.fields import check, check_choice, check_flag, split_text
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from colabtools.checkpoints.description import Description

__all__ = ["ConvertConfig", "WrittenFile", "WrittenModel", "convert", "write_single"]

_SUFFIXES = (".safetensors", ".ckpt")
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How a model is converted.

    Attributes:
        dtype: of every weight, one of "keep", "fp16", "bf16" and "fp32".
        family: "sd1", "sd2", "sdxl" or "flux"; "auto" finds out.
        parts: "all" of the model, or its "denoiser" alone.
        ema: take the average of the denoiser's weights that a training file holds beside them.
        variant: of the weight files in a folder, such as "fp16"; "auto" prefers the plain ones.
        merge: LoRA files to add to the weights, each with its strength behind a colon if that is
            not 1, such as "dog.safetensors:0.8".
        prediction_type: "epsilon" or "v" where the source does not say; "auto" believes the source.
        config_from: a folder in diffusers' layout whose configurations and tokenizers a new folder
            gets.
        fetch: get the tokenizers of a new folder from the Hub where nothing else has them.
        verify: compare and hash every byte while it is written.
        verify_only: write nothing, and compare what is there with the source.
        hash_sources: record the SHA-256 of every source file; each is read once more for it.
    """

    DTYPES: ClassVar[tuple[str, ...]] = ("keep", "fp16", "bf16", "fp32")
    PARTS: ClassVar[tuple[str, ...]] = ("all", "denoiser")
    PREDICTIONS: ClassVar[tuple[str, ...]] = ("auto", "epsilon", "v")

    dtype: str = "keep"
    family: str = "auto"
    parts: str = "all"
    ema: bool = False
    variant: str = "auto"
    merge: tuple[str, ...] = ()
    prediction_type: str = "auto"
    config_from: str = ""
    fetch: bool = True
    verify: bool = True
    verify_only: bool = False
    hash_sources: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        check_choice("dtype", self.dtype, self.DTYPES)
        check_choice("family", self.family, ("auto", *FAMILIES))
        check_choice("parts", self.parts, self.PARTS)
        check_choice("prediction_type", self.prediction_type, self.PREDICTIONS)
        for name in ("ema", "fetch", "verify", "verify_only", "hash_sources"):
            check_flag(name, getattr(self, name))
        plain = isinstance(self.variant, str) and self.variant.replace("_", "").isalnum()
        check("variant", self.variant, plain, "auto or a name such as fp16")
        object.__setattr__(self, "merge", split_text("merge", self.merge, ","))
        texts = all(isinstance(item, str) for item in self.merge)
        check("merge", self.merge, texts, "LoRA files")
        check("config_from", self.config_from, isinstance(self.config_from, str), "a folder")


@dataclass(frozen=True, kw_only=True)
class WrittenModel:
    """A model that was written or compared, and found whole.

    Attributes:
        path: the file or folder.
        family: "sd1", "sd2", "sdxl" or "flux".
        files: its weight files, one for a single file.
        missing: what its folder lacks, such as a tokenizer.
    """

    path: Path
    family: str
    files: tuple[WrittenFile, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """A model to convert: `parts` by the names of its layout, `folder` or `header` for the rest."""

    path: Path
    family: FamilyMap
    parts: Mapping[str, Tensors]
    description: Description
    header: Header | None = None


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: ConvertConfig | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> WrittenModel:
    """Return what was written: a verified file or folder in the place of `dst`.

    Args:
        src: a folder in diffusers' layout, or a file with a whole model.
        dst: ends in .safetensors or .ckpt for one file; any other name is a folder.
        config: the settings.
        metadata: texts for the header, beside those that say what the model is.

    Raises:
        CheckpointError: the source is no complete model, damaged or unsafe, a number does not fit,
            or the output reads back changed; the destination is as it was before.
        WorkspaceError: the storage failed, or another conversion is writing `dst`; the same.
    """
    settings = config or ConvertConfig()
    source_path, target_path = _path(src), _path(dst)
    header = None if source_path.is_dir() else read_header(source_path)
    if header is not None and is_lora(header):
        return _adapter(source_path, target_path, settings)
    source = _read(source_path, header, settings)
    if target_path.suffix.lower() in _SUFFIXES:
        targets = _single_targets(source, settings)
        if settings.verify_only:
            return _verified(target_path, source, {target_path: targets})
        fields = {**_sources(source, hashed=settings.hash_sources), **(metadata or {})}
        return write_single(
            target_path, targets, source.description, fields, verify=settings.verify
        )
    if source.header is None:
        raise CheckpointError(
            f"{one_line(target_path)} would be a folder, and {one_line(source_path)} is one; "
            "give a name that ends in .safetensors or .ckpt"
        )
    return _to_folder(source, target_path, settings)


def write_single(
    path: Path,
    targets: list[Target],
    description: Description,
    metadata: Mapping[str, str],
    *,
    verify: bool = True,
) -> WrittenModel:
    """Return what was written: one verified file with all that says what kind of model it is.

    Args:
        path: ends in .safetensors or .ckpt.
        targets: its tensors.
        description: of the model.
        metadata: texts for the header, beside those that follow from the description.
        verify: compare and hash every byte while it is written.

    Raises:
        CheckpointError: a number does not fit, or the file reads back changed.
        WorkspaceError: the storage failed, or another conversion is writing it.
    """
    fields = {**describing.metadata_of(description, path.stem), **metadata}
    complete = [*targets, *describing.marks(description)]
    with _yaml_beside(path, description):
        file = write_file(path, complete, fields, verify=verify)
    what = "wrote and verified" if verify else "wrote"
    get_logger(__name__).info("%s %s, %.1f MB", what, file.path, file.size_bytes / 1e6)
    return WrittenModel(path=file.path, family=description.family, files=(file,))


@contextmanager
def _yaml_beside(path: Path, description: Description) -> Iterator[None]:
    """Keep what web UIs read beside a single file in step with the file."""
    yaml, meant = path.with_suffix(".yaml"), describing.sd2_yaml()
    former = yaml.read_bytes() if yaml.is_file() else None
    needed = description.family == "sd2" and description.marked
    if needed and former not in (None, meant):
        get_logger(__name__).warning("%s is there already and is left as it is", yaml)
    elif needed and former is None:
        write_atomic(yaml, meant)
    try:
        yield
    except BaseException:
        if needed and former is None:
            yaml.unlink(missing_ok=True)
        raise
    if not needed and former == meant:
        # It would make readers misread the model that now stands beside it.
        yaml.unlink(missing_ok=True)


def _path(given: str | os.PathLike[str]) -> Path:
    text = os.fspath(given)
    if not text.strip() or "\0" in text:
        raise CheckpointError(f"no file or folder in {text!r}; give a path")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise CheckpointError(f"no home folder for {text!r}; give the full path") from error


def _adapter(src: Path, dst: Path, settings: ConvertConfig) -> WrittenModel:
    """Convert an adapter, which has names of its own, between diffusers and the web UIs."""
    if settings != ConvertConfig(dtype=settings.dtype):
        raise CheckpointError(
            f"{one_line(src)} is a LoRA, of which only the dtype can be chosen; "
            "leave the other settings out, or name it in merge"
        )
    file = convert_lora(src, dst, dtype=settings.dtype)
    return WrittenModel(path=file.path, family=read_lora(src).family, files=(file,))


def _read(path: Path, header: Header | None, settings: ConvertConfig) -> _Source:
    """Return the model that is at a path.

    Raises:
        CheckpointError: it is no complete model of a family that can be converted.
    """
    variant = "" if settings.variant == "auto" else settings.variant
    try:
        if header is None:
            parts: Mapping[str, Tensors] = read_folder(path, variant)
            family = FAMILIES[_family(settings) or family_of_folder(parts)]
            description = describing.describe_folder(path, family, parts)
        else:
            shapes = {name: entry.shape for name, entry in header.tensors.items()}
            family = FAMILIES[_family(settings) or family_of_file(shapes)]
            parts = split_parts(family, header.tensors, ema=settings.ema)
            description = describing.describe_file(header, family, parts)
    except CheckpointError as error:
        if one_line(path) in str(error):
            raise
        raise CheckpointError(f"{one_line(path)}: {error}") from error
    if header is None and settings.ema:
        raise CheckpointError(f"{one_line(path)} is a folder, which holds no average; omit ema")
    if settings.prediction_type != "auto" and family.name != "flux":
        told = _PREDICTIONS[settings.prediction_type]
        description = replace(description, prediction_type=told)
    chosen: Mapping[str, Tensors] = _chosen(path, family, parts, settings)
    if settings.merge:
        loras = read_merges(settings.merge, family.name)
        chosen = merge_loras(family, chosen, loras, single=header is not None)
    return _Source(path, family, chosen, description, header)


def _family(settings: ConvertConfig) -> str:
    return "" if settings.family == "auto" else settings.family


def _chosen(
    path: Path, family: FamilyMap, parts: Mapping[str, Tensors], settings: ConvertConfig
) -> dict[str, Tensors]:
    """Return the parts that are asked for, and all of those."""
    names = [part.name for part in family.parts]
    wanted = names if settings.parts == "all" else names[:1]
    if missing := [name for name in wanted if name not in parts]:
        advice = "" if family.denoiser.name in missing else ", or set parts to denoiser"
        raise CheckpointError(
            f"{one_line(path)} lacks its {' and '.join(missing)}; give a whole model{advice}"
        )
    if unknown := sorted(parts.keys() - set(names)):
        raise CheckpointError(
            f"{one_line(path)} has {unknown[0]}, which a {family.name} model has not; "
            "give a model without additions"
        )
    return {name: parts[name] for name in wanted}


def _single_targets(source: _Source, settings: ConvertConfig) -> list[Target]:
    # The publisher of Flux has the names of a transformer that stands alone without a prefix.
    bare = source.family.name == "flux" and settings.parts == "denoiser"
    planner = plan_single if source.header is None else plan_rewrite
    return planner(source.family, source.parts, settings.dtype, bare=bare)


def _to_folder(source: _Source, folder: Path, settings: ConvertConfig) -> WrittenModel:
    family = source.family
    planned = plan_folder(family, source.parts, settings.dtype)
    stems = {part.name: part.stem for part in family.parts}
    files = {f"{name}/{stems[name]}.safetensors": targets for name, targets in planned.items()}
    if settings.verify_only:
        return _verified(folder, source, {folder / name: each for name, each in files.items()})
    texts, missing = _texts(source, settings)
    written = write_folder(
        folder, FolderPlan(files, texts), {"format": "pt"}, verify=settings.verify
    )
    size_mb = sum(file.size_bytes for file in written) / 1e6
    what = "wrote and verified" if settings.verify else "wrote"
    get_logger(__name__).info("%s %s, %.1f MB", what, folder, size_mb)
    if missing:
        get_logger(__name__).warning(
            "%s has no %s, which weights do not hold and the Hub did not give; copy them from "
            "another model of the family, or convert with config_from",
            folder,
            " and ".join(missing),
        )
    return WrittenModel(
        path=folder, family=family.name, files=tuple(written), missing=tuple(missing)
    )


def _texts(source: _Source, settings: ConvertConfig) -> tuple[dict[str, bytes], list[str]]:
    """Return the small files of a new folder, and the names of those that are not to be had."""
    if settings.config_from:
        texts = copied_texts(_path(settings.config_from), source.parts)
    else:
        texts = made_texts(source.family, source.description, source.parts)
    missing = missing_files(texts)
    if missing and settings.fetch:
        texts |= fetch_tokenizers(source.family.name, missing)
        missing = missing_files(texts)
    return texts, missing


def _verified(path: Path, source: _Source, files: Mapping[Path, list[Target]]) -> WrittenModel:
    """Return what is there, found equal to what a conversion would write now."""
    found = []
    with Readers() as readers:
        for file, targets in files.items():
            marks = describing.marks(source.description) if file.suffix in _SUFFIXES else []
            found.append(verify_file(file, [*targets, *(marks if file == path else ())], readers))
    get_logger(__name__).info("verified %s, nothing was written", path)
    return WrittenModel(path=path, family=source.family.name, files=tuple(found))


def _sources(source: _Source, *, hashed: bool) -> dict[str, str]:
    """Return the SHA-256 of the source files for the header, where they are known or asked for."""
    paths = {
        tensor.path: None
        for tensors in source.parts.values()
        for tensor in tensors.values()
        if isinstance(tensor, TensorEntry)
    }
    digests = {}
    for path in sorted(paths):
        digest = sha256_of(path) if hashed else _digest_in_cache(path)
        if digest:
            inside = path.is_relative_to(source.path)
            digests[path.relative_to(source.path).as_posix() if inside else path.name] = digest
    return {"source_sha256": json.dumps(digests, sort_keys=True)} if digests else {}


def _digest_in_cache(path: Path) -> str:
    """Return the digest that the Hub's cache names a file by, or an empty text.

    Source: huggingface_hub 1.x, "Understand caching": blobs of large files are named by SHA-256.
    """
    name = path.resolve().name if path.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else ""
