"""Classes of any number of pictures: one table, one row for each picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colabtools.errors import DatasetError
from colabtools.report import get_logger
from colabtools.storage import atomic_path, sha256_of, write_atomic
from colabtools.vit.backends.base import LOGITS
from colabtools.vit.formats import count_rows, open_writer
from colabtools.vit.model import Model, open_model, softmax
from colabtools.vit.parts import (
    Job,
    describe_model,
    ensure_apart,
    is_whole,
    item_columns,
    read_part,
    remove_folder,
    settled,
    shards_of,
    write_table,
)
from colabtools.vit.sources import open_source

if TYPE_CHECKING:
    import pyarrow as pa

    from colabtools.vit.config import ClassifyConfig
    from colabtools.vit.engine import Results
    from colabtools.vit.sources import Source

__all__ = ["Classified", "classify"]


@dataclass(frozen=True, kw_only=True)
class Classified:
    """A table of classes that was written and read back.

    Attributes:
        path: of the table. Its columns are path, status ("ok" or "error"), error, the source
            table's own, then label_1, probability_1 and so on, the likeliest first.
        record: of how it was made, beside it: settings, model, preprocessing, digests.
        pictures: number of rows.
        failed: how many of them have no classes.
    """

    path: Path
    record: Path
    pictures: int
    failed: int

    def line(self) -> str:
        """Return a line for people."""
        failed = f", {self.failed} could not be read: see the column error" if self.failed else ""
        return f"{self.pictures} pictures in {self.path}{failed}"


def classify(config: ClassifyConfig) -> Classified:
    """Classify all pictures of a source, going on where an earlier run was cut off.

    Raises:
        ConfigError: a setting cannot work.
        DatasetError: there is no picture.
        ModelError: the model cannot classify, or does not fit in memory.
        WorkspaceError: the storage failed; what was written stays for the next run.
    """
    out = Path(config.out).expanduser()
    ensure_apart(config.src, out)
    source = open_source(config.src, config.column)
    folder = out.with_name(f".{out.name}.parts")
    record = out.with_name(f"{out.name}.json")
    if config.restart:
        remove_folder(folder)
        record.unlink(missing_ok=True)
    config = settled(config, folder, record)
    model = open_model(config)
    model.require_head()
    top_k = min(config.top_k, len(model.labels))
    settings = describe_model(model, model.files.fingerprint()) | {"top_k": top_k}
    job = Job(
        config=config,
        source=source,
        shards=shards_of(source, config, settings),
        folder=folder,
        is_done=lambda shard: is_whole(folder / f"{shard.name}.parquet", len(shard)),
        write=lambda results: write_table(
            _table(source, results, model, top_k),
            folder / f"{results.shard.name}.parquet",
        ),
    )
    done = _earlier(out, record, job.key)
    if done is not None:
        get_logger(__name__).info("%s is up to date", out)
        remove_folder(folder)
        return done
    job.run(model, LOGITS, "classifying")
    failed = _join(job, out)
    return _finish(job, out, record, settings, failed)


def _finish(job: Job, out: Path, record: Path, settings: dict[str, Any], failed: int) -> Classified:
    """Record how the table was made, and only then give its parts up."""
    values = {
        "key": job.key,
        "sha256": sha256_of(out),
        "pictures": len(job.source.names),
        "failed": failed,
        "made_with": settings,
        "settings": asdict(job.config),
    }
    write_atomic(record, f"{json.dumps(values, indent=1, ensure_ascii=False)}\n".encode())
    remove_folder(job.folder)
    return Classified(path=out, record=record, pictures=len(job.source.names), failed=failed)


def _earlier(out: Path, record: Path, key: str) -> Classified | None:
    """Return the result of an earlier run on the same, None if there is none."""
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        if values["key"] != key or values["sha256"] != sha256_of(out):
            return None
        return Classified(
            path=out, record=record, pictures=values["pictures"], failed=values["failed"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _table(source: Source, results: Results, model: Model, top_k: int) -> pa.Table:
    import pyarrow as pa

    columns = item_columns(source, results)
    probabilities = softmax(results.rows(len(model.labels)))
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(probabilities, order, axis=1)
    # Where in the table the rows that have a result are.
    places = np.asarray(results.numbers, dtype=np.int64) - results.shard.start
    names = np.asarray(model.labels, dtype=object)
    for rank in range(top_k):
        labels: list[str | None] = [None] * len(results.shard)
        for place, name in zip(places, names[order[:, rank]], strict=True):
            labels[place] = name
        values = np.zeros(len(results.shard), np.float32)
        values[places] = best[:, rank]
        missing = np.ones(len(results.shard), bool)
        missing[places] = False
        columns[f"label_{rank + 1}"] = pa.array(labels, pa.string())
        columns[f"probability_{rank + 1}"] = pa.array(values, mask=missing)
    return pa.table(columns)


def _join(job: Job, out: Path) -> int:
    """Write all parts as one table, in order, and return how many rows failed."""
    failed = rows = 0

    def verify(written: Path) -> None:
        found = count_rows(written, out.suffix)
        if found != rows:
            raise DatasetError(f"{out} came out with {found} rows instead of {rows}")

    with atomic_path(out, verify=verify) as temporary, open_writer(temporary, out.suffix) as write:
        for shard in job.shards:
            table = read_part(job.folder / f"{shard.name}.parquet")
            failed += table.column("status").to_pylist().count("error")
            rows += table.num_rows
            write(table)
    return failed
