"""Random models with the topology of the real ones, and what their files hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from colabtools.checkpoints.headers import encode_safetensors_header
from colabtools.checkpoints.sources import Tensor, read_folder, read_header
from colabtools.report import set_quiet

from ..dreambooth.tiny import make_tiny

Row = tuple[str, tuple[int, ...], bytes]
Content = dict[str, Row]
ModelOf = Callable[[str], Path]


@pytest.fixture(autouse=True)
def no_progress() -> Iterator[None]:
    set_quiet(True)
    yield
    set_quiet(False)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """The folder of a kind of model; it is shared, so copy it before changing it."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("models")

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_tiny(kind, root / kind)
        return made[kind]

    return of


@pytest.fixture
def sd1(model: ModelOf, tmp_path: Path) -> Path:
    """A folder of one's own."""
    return Path(shutil.copytree(model("sd1"), tmp_path / "sd1"))


def content(tensors: Mapping[str, Tensor]) -> Content:
    """What tensors of files are: dtype, shape and bytes."""
    rows = {}
    for name, entry in tensors.items():
        with entry.path.open("rb") as file:  # type: ignore[union-attr]
            file.seek(entry.begin)  # type: ignore[union-attr]
            rows[name] = (entry.dtype, entry.shape, file.read(entry.size_bytes))
    return rows


def folder_content(folder: Path) -> dict[str, Content]:
    """What a folder holds, CLIP spelled as in older files."""
    parts = {part: content(tensors) for part, tensors in read_folder(folder).items()}
    tops = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    for part, rows in parts.items():
        if part.startswith("text_encoder"):
            parts[part] = {
                f"text_model.{name}" if name.startswith(tops) else name: row
                for name, row in rows.items()
            }
    return parts


def file_content(path: Path) -> Content:
    return content(read_header(path).tensors)


def write_rows(path: Path, rows: Mapping[str, Row]) -> Path:
    """Write a .safetensors file by hand."""
    head = encode_safetensors_header(
        [(name, dtype, shape) for name, (dtype, shape, _) in rows.items()], {"format": "pt"}
    )
    path.write_bytes(head + b"".join(data for _, _, data in rows.values()))
    return path
