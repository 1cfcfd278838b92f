"""One file with the whole model, as the web UIs read it."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colabtools.checkpoints import keymaps
from colabtools.drive import atomic_path, sha256_of
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import torch

__all__ = ["WrittenFile", "assemble_sd1", "save_ckpt", "save_safetensors"]

# Each tensor of a .ckpt begins at a multiple of this, as torch's own do, so that it can be mapped.
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A file that was written, reopened and found equal to what was meant."""

    path: Path
    size_bytes: int
    tensor_count: int
    sha256: str


def assemble_sd1(
    *,
    unet: Mapping[str, torch.Tensor],
    vae: Mapping[str, torch.Tensor],
    text_encoder: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return the 1,130 tensors of a single-file Stable Diffusion 1.x, on the CPU, in `dtype`.

    Raises:
        CheckpointError: a part lacks a tensor of SD 1.x or has another one, or a value does not fit
            into `dtype`; the message names the tensor.
    """
    parts: dict[str, tuple[Mapping[str, torch.Tensor], Callable[[str], str]]] = {
        "text_encoder": (text_encoder, keymaps.text_encoder_name),
        "unet": (unet, keymaps.unet_name),
        "vae": (vae, keymaps.vae_name),
    }
    assembled: dict[str, torch.Tensor] = {}
    for part, (tensors, rename) in parts.items():
        # Old text encoders carry a buffer that only counts from 0 to 76.
        names = {name: rename(name) for name in tensors if not name.endswith("position_ids")}
        _check_names(part, names)
        for name, target in names.items():
            tensor = _as_conv(part, target, tensors[name])
            assembled[target] = _cast(f"{part} tensor {name}", tensor, dtype)
    return assembled


def _check_names(part: str, names: Mapping[str, str]) -> None:
    """Refuse a part whose tensors are not exactly those of SD 1.x."""
    expected = keymaps.sd1_names(part)
    advice = "only Stable Diffusion 1.x models can be written as one file"
    if extra := sorted(name for name, target in names.items() if target not in expected):
        raise CheckpointError(
            f"{part} has {_listing(extra)}, which Stable Diffusion 1.x has not; {advice}"
        )
    if missing := sorted(expected - set(names.values())):
        raise CheckpointError(
            f"{part} lacks {_listing(missing)}, which Stable Diffusion 1.x has; {advice}"
        )
    if len(names) > len(expected):
        targets = list(names.values())
        twice = sorted(name for name, target in names.items() if targets.count(target) > 1)
        raise CheckpointError(f"{part} has one tensor under two names, {_listing(twice)}; {advice}")


def _listing(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _as_conv(part: str, target: str, tensor: torch.Tensor) -> torch.Tensor:
    """Give the VAE's attention weights the shape of a 1x1 convolution, (C, C, 1, 1)."""
    if part == "vae" and ".mid.attn_1." in target and tensor.ndim == 2:
        return tensor[:, :, None, None]
    return tensor


def _cast(what: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if not bool(cast.isfinite().all()):
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{what} has values that are not finite in {kind}; export in fp32 or train again"
        )
    return cast


def save_safetensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """Write a .safetensors file; it takes its name once it was reopened and found the same.

    Raises:
        CheckpointError: a tensor reads back changed.
        WorkspaceError: the storage failed.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    def verify(partial: Path) -> None:
        with safe_open(partial, framework="pt") as file:  # type: ignore[no-untyped-call,unused-ignore]
            _compare(file.keys(), file.get_tensor, tensors, path)

    with atomic_path(path, verify=verify) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(dict(tensors), partial, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(partial)) from error
        # The library's own temporary file is closed to everyone else.
        with suppress(OSError):
            partial.chmod(mode)
    return _written(path, len(tensors))


def save_ckpt(tensors: Mapping[str, torch.Tensor], path: Path) -> WrittenFile:
    """Write a .ckpt file that the web UIs' safe unpicklers admit; checked as `save_safetensors`.

    Written here because torch's own writer adds entries to the archive that they refuse.

    Raises:
        CheckpointError: a tensor reads back changed.
        WorkspaceError: the storage failed.
    """
    import torch

    def verify(partial: Path) -> None:
        loaded = torch.load(partial, map_location="cpu", weights_only=True, mmap=True)
        state_dict = loaded["state_dict"]
        _compare(state_dict, state_dict.__getitem__, tensors, path)

    with atomic_path(path, verify=verify) as partial:
        try:
            _write_archive(tensors, partial)
        except OSError as error:
            # A write that fails knows its file by number only.
            error.filename = error.filename or str(partial)
            raise
    return _written(path, len(tensors))


def _write_archive(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_entry(archive, "archive/data.pkl", memoryview(_pickle(tensors)))
        for index, tensor in enumerate(tensors.values()):
            _write_entry(archive, f"archive/data/{index}", _bytes_of(tensor).numpy().data)
        # Source: caffe2/serialize/versions.h of torch, kMinProducedFileFormatVersion.
        _write_entry(archive, "archive/version", memoryview(b"3\n"))


class _Placeholder:
    """Stands in the pickle for a tensor, whose bytes are the archive's entry `data/<index>`."""

    def __init__(self, index: int, tensor: torch.Tensor) -> None:
        self.index = index
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the call that rebuilds the tensor from its storage."""
        from torch._utils import _rebuild_tensor_v2

        size = tuple(self.tensor.shape)
        stride = tuple(self.tensor.contiguous().stride())
        return _rebuild_tensor_v2, (_Storage(self), 0, size, stride, False, OrderedDict())


class _Storage:
    """Stands in the pickle for a tensor's storage."""

    def __init__(self, of: _Placeholder) -> None:
        self.of = of


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        """Return the reference to a storage. Source: torch 2.13, serialization.py, `_save`."""
        if not isinstance(value, _Storage):
            return None
        import torch

        kinds = {
            torch.bfloat16: torch.BFloat16Storage,
            torch.float16: torch.HalfStorage,
            torch.float32: torch.FloatStorage,
        }
        tensor = value.of.tensor
        return "storage", kinds[tensor.dtype], str(value.of.index), "cpu", tensor.numel()


def _pickle(tensors: Mapping[str, torch.Tensor]) -> bytes:
    state = {
        name: _Placeholder(index, tensor) for index, (name, tensor) in enumerate(tensors.items())
    }
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({"state_dict": state})
    return buffer.getvalue()


def _write_entry(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """Add an entry, uncompressed, its header padded so that the data begins aligned."""
    entry = zipfile.ZipInfo(name)
    # Source: APPNOTE.TXT 6.3.10, 4.3.7: 30 bytes and the name; 20 is the ZIP64 field of `open`.
    header = 30 + len(name) + 20
    padding = -(archive.fp.tell() + header + 4) % _ALIGNMENT_BYTES  # type: ignore[union-attr]
    # Source: caffe2/serialize/inline_container.cc of torch, which pads in a field called FB.
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as file:
        file.write(data)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, (size in bytes,) uint8."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _compare(
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    meant: Mapping[str, torch.Tensor],
    path: Path,
) -> None:
    if set(names) != meant.keys():
        raise CheckpointError(
            f"{path.name} reads back with other tensor names; check the disk, then export again"
        )
    for name, tensor in meant.items():
        found = read(name)
        same = found.dtype == tensor.dtype and found.shape == tensor.shape
        if not same or not _bytes_of(found).equal(_bytes_of(tensor)):
            raise CheckpointError(
                f"{name} reads back changed from {path.name}; check the disk, then export again"
            )


def _written(path: Path, tensor_count: int) -> WrittenFile:
    size_bytes = path.stat().st_size
    return WrittenFile(
        path=path, size_bytes=size_bytes, tensor_count=tensor_count, sha256=sha256_of(path)
    )
