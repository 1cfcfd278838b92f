"""A folder of embeddings: vectors, what each belongs to, and the space in which they lie.

    manifest.json        the space, the parts and their digests; written last
    part-00000.npy       (n, D) float16 or float32, one row for each picture that could be read
    part-00000.parquet   one row for each item, in order: path, status, error, row, own columns

`status` is "ok" or "error"; `error` says why. `row` is the row in the part's own .npy, null where
there is none. Further columns come from the table that named the items.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools.errors import DatasetError
from colabtools.storage import sha256_of, write_atomic

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = [
    "MANIFEST",
    "EmbeddingSet",
    "EmbeddingSpace",
    "Part",
    "open_embeddings",
    "write_manifest",
]

MANIFEST = "manifest.json"
_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpace:
    """What two vectors must have in common before a distance between them means anything.

    Attributes:
        model: as it was named; for people, two names may be of the same weights.
        fingerprint: SHA-256 over the weights, as hex digits.
        layers: number of blocks passed through, of each vector that was joined; 0 is the embedding
            of the patches, the depth of the model the end.
        norm: whether the model's final LayerNorm was applied.
        pooling: "cls" (the class token) or "mean" (of the patches).
        normalized: whether each vector has length 1.
        dim: length of a vector, the model's width times the number of layers.
        preprocessing: the specification of the pixels.
    """

    model: str
    fingerprint: str
    layers: tuple[int, ...]
    norm: bool
    pooling: str
    normalized: bool
    dim: int
    preprocessing: dict[str, Any] = field(hash=False)

    def differences(self, other: EmbeddingSpace) -> list[str]:
        """Return in what the spaces differ, each as "name: this value, not that"; [] if equal."""
        found = []
        for name in (each.name for each in fields(self) if each.name != "model"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                found.append(f"{name}: {_short(mine)}, not {_short(its)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EmbeddingSpace:
        """Return the space that `to_json` wrote.

        Raises:
            DatasetError: a field is missing or unknown.
        """
        names = {each.name for each in fields(cls)}
        if values.keys() != names:
            odd = ", ".join(sorted(values.keys() ^ names))
            raise DatasetError(
                f"embeddings with other fields than this version's: {odd}; embed anew"
            )
        return cls(**values | {"layers": tuple(values["layers"])})


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the set.

    Attributes:
        name: of its two files, without suffix.
        items: rows of the table.
        rows: rows of the matrix.
        sha256: of the matrix file and of the table file.
    """

    name: str
    items: int
    rows: int
    sha256: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class EmbeddingSet:
    """An opened folder of embeddings; nothing is loaded before it is asked for."""

    folder: Path
    space: EmbeddingSpace
    dtype: str
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        """Return the number of vectors."""
        return sum(part.rows for part in self.parts)

    def vectors(self, part: Part) -> NDArray[np.floating[Any]]:
        """Return the vectors of a part, (n, D), mapped from disk.

        Raises:
            DatasetError: the file is missing or of another shape.
        """
        import numpy as np

        path = self.folder / f"{part.name}.npy"
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DatasetError(f"cannot read {path} ({error}); embed again") from error
        if found.shape != (part.rows, self.space.dim) or found.dtype != self.dtype:
            raise DatasetError(
                f"{path} holds {found.dtype} {found.shape}, not {self.dtype} "
                f"{(part.rows, self.space.dim)}; embed again"
            )
        return found  # type: ignore[no-any-return]

    def table(self, part: Part) -> pa.Table:
        """Return the table of a part.

        Raises:
            DatasetError: the file is missing or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / f"{part.name}.parquet"
        try:
            return pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"cannot read {path} ({error}); embed again") from error

    def read(self) -> Iterator[tuple[Part, pa.Table, NDArray[np.floating[Any]]]]:
        """Yield each part with its table and its vectors."""
        for part in self.parts:
            yield part, self.table(part), self.vectors(part)

    def verify(self) -> None:
        """Read every file and compare its digest.

        Raises:
            DatasetError: a file is not what was written.
        """
        for part in self.parts:
            for suffix, sha256 in zip((".npy", ".parquet"), part.sha256, strict=True):
                path = self.folder / f"{part.name}{suffix}"
                if not path.is_file() or sha256_of(path) != sha256:
                    raise DatasetError(f"{path} is missing or damaged; embed again")


def open_embeddings(folder: str | Path) -> EmbeddingSet:
    """Return the set that lies in a folder.

    Raises:
        DatasetError: there is none, it is not finished, or of a version that is not known.
    """
    place = Path(folder).expanduser()
    path = place / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(
            f"{place} holds no finished embeddings (there is no {MANIFEST}); "
            "run `colabtools vit embed` with this folder as --out"
        ) from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read {path} ({error}); embed again") from error
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA:
        raise DatasetError(f"{path} is not of this version (schema {_SCHEMA}); embed again")
    try:
        parts = tuple(Part(**part | {"sha256": tuple(part["sha256"])}) for part in found["parts"])
        space = EmbeddingSpace.from_json(found["space"])
        return EmbeddingSet(folder=place, space=space, dtype=found["dtype"], parts=parts)
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{path} lacks or misspells {error}; embed again") from error


def write_manifest(found: EmbeddingSet) -> Path:
    """Write what makes a folder of parts a finished set, and return the file.

    Raises:
        WorkspaceError: the storage failed.
    """
    path = found.folder / MANIFEST
    values = {
        "schema": _SCHEMA,
        "space": found.space.to_json(),
        "dtype": found.dtype,
        "vectors": len(found),
        "parts": [asdict(part) | {"sha256": list(part.sha256)} for part in found.parts],
    }
    write_atomic(path, f"{json.dumps(values, indent=1, ensure_ascii=False)}\n".encode())
    return path


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
