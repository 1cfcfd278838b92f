"""Vectors of any number of pictures: a folder of matrices and tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colabtools.errors import DatasetError
from colabtools.report import get_logger
from colabtools.storage import atomic_path, sha256_of, write_atomic
from colabtools.vit.embeddings import (
    MANIFEST,
    EmbeddingSet,
    Part,
    open_embeddings,
    write_manifest,
)
from colabtools.vit.model import open_model, unit
from colabtools.vit.parts import (
    MEASURED,
    Job,
    describe_model,
    ensure_apart,
    is_whole,
    item_columns,
    settled,
    shards_of,
    write_table,
)
from colabtools.vit.sources import open_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from colabtools.vit.config import EmbedConfig
    from colabtools.vit.engine import Results, Shard
    from colabtools.vit.sources import Source

__all__ = ["Embedded", "embed"]

_RECORD = "run.json"


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A folder of vectors that was written and read back.

    Attributes:
        embeddings: the set; its `folder` is where.
        pictures: how many there were.
    """

    embeddings: EmbeddingSet
    pictures: int

    def line(self) -> str:
        """Return a line for people."""
        failed = self.pictures - len(self.embeddings)
        said = f", {failed} could not be read: see the column error" if failed else ""
        return f"{len(self.embeddings)} vectors in {self.embeddings.folder}{said}"


def embed(config: EmbedConfig) -> Embedded:
    """Embed all pictures of a source, going on where an earlier run was cut off.

    Raises:
        ConfigError: a setting cannot work.
        DatasetError: there is no picture, or other embeddings lie in the folder.
        ModelError: the model is broken, or does not fit in memory.
        WorkspaceError: the storage failed; what was written stays for the next run.
    """
    folder = Path(config.out).expanduser()
    ensure_apart(config.src, folder)
    source = open_source(config.src, config.column)
    _ensure_ours(folder)
    if config.restart:
        _remove_others(folder, keep=())
        for name in (MANIFEST, _RECORD):
            (folder / name).unlink(missing_ok=True)
    config = settled(config, folder, folder / _RECORD)
    model = open_model(config)
    ask = model.ask(config.layers, config.pooling, config.norm)
    space = model.space(ask, normalized=config.normalize)
    settings = describe_model(model, space.fingerprint) | {
        "space": space.to_json(),
        "vector_dtype": config.vector_dtype,
    }

    def write(results: Results) -> None:
        rows = results.rows(space.dim)
        vectors = unit(rows) if config.normalize else rows
        _write_part(source, results, vectors.astype(config.vector_dtype), folder)

    job = Job(
        config=config,
        source=source,
        shards=shards_of(source, config, settings),
        folder=folder,
        is_done=lambda shard: _is_done(folder, shard, config.vector_dtype, space.dim),
        write=write,
    )
    job.run(model, ask, "embedding")
    parts = tuple(_describe(folder, shard) for shard in job.shards)
    found = EmbeddingSet(folder=folder, space=space, dtype=config.vector_dtype, parts=parts)
    write_manifest(found)
    record = {"key": job.key, "made_with": settings, "settings": asdict(config)}
    write_atomic(folder / _RECORD, f"{json.dumps(record, indent=1, ensure_ascii=False)}\n".encode())
    _remove_others(folder, keep=[part.name for part in parts])
    job.forget()
    embedded = Embedded(embeddings=open_embeddings(folder), pictures=len(source.names))
    embedded.embeddings.verify()
    return embedded


def _ensure_ours(folder: Path) -> None:
    """Refuse a folder that holds something else.

    Raises:
        DatasetError: it does.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DatasetError(f"{folder} is a file; give a folder for the vectors")
    others = [
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(("part-", "."))
        and path.name not in (MANIFEST, _RECORD, MEASURED)
    ]
    if others:
        raise DatasetError(
            f"{folder} holds other files, such as {sorted(others)[0]}; give a folder of its own"
        )


def _write_part(
    source: Source, results: Results, vectors: NDArray[np.floating], folder: Path
) -> None:
    """Write the vectors, then the table that makes the part whole."""
    import pyarrow as pa

    path = folder / f"{results.shard.name}.npy"

    def verify(written: Path) -> None:
        if not np.array_equal(np.load(written, allow_pickle=False), vectors):
            raise DatasetError(f"{path} was read back with other values")

    with atomic_path(path, verify=verify) as temporary, temporary.open("wb") as file:
        np.save(file, vectors)
    columns = item_columns(source, results)
    places = np.asarray(results.numbers, dtype=np.int64) - results.shard.start
    rows = np.zeros(len(results.shard), np.int64)
    rows[places] = np.arange(len(places))
    missing = np.ones(len(results.shard), bool)
    missing[places] = False
    columns["row"] = pa.array(rows, mask=missing)
    write_table(pa.table(columns), folder / f"{results.shard.name}.parquet")


def _is_done(folder: Path, shard: Shard, dtype: str, dim: int) -> bool:
    if not is_whole(folder / f"{shard.name}.parquet", len(shard)):
        return False
    try:
        found = np.load(folder / f"{shard.name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return bool(found.dtype == dtype and found.shape[1:] == (dim,))


def _describe(folder: Path, shard: Shard) -> Part:
    matrix, table = (folder / f"{shard.name}{end}" for end in (".npy", ".parquet"))
    rows = len(np.load(matrix, mmap_mode="r", allow_pickle=False))
    return Part(
        name=shard.name,
        items=len(shard),
        rows=rows,
        sha256=(sha256_of(matrix), sha256_of(table)),
    )


def _remove_others(folder: Path, keep: tuple[str, ...] | list[str]) -> None:
    """Remove parts of earlier pictures or settings."""
    stale = [path for path in folder.glob("part-*") if path.stem not in keep]
    for path in stale:
        path.unlink(missing_ok=True)
    if stale:
        get_logger(__name__).info("%s files of other pictures or settings removed", len(stale))
