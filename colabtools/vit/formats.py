"""Tables as files that other programs read: Parquet, CSV, and JSON by line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import pyarrow as pa

    Write: TypeAlias = Callable[[pa.Table], object]

__all__ = ["count_rows", "open_writer"]


@contextmanager
def open_writer(path: Path, suffix: str) -> Iterator[Write]:
    """Open a table for writing in pieces, all of the same columns.

    Args:
        path: the file to make.
        suffix: ".parquet", ".csv" or ".jsonl", in any case.
    """
    opened = {".csv": _open_csv, ".jsonl": _open_jsonl, ".parquet": _open_parquet}
    with opened[suffix.lower()](path) as write:
        yield write


def count_rows(path: Path, suffix: str) -> int:
    """Return the number of rows of a table, all of it read.

    Args:
        path: the file.
        suffix: that tells its kind, as the file may have another name as yet.
    """
    import pyarrow.csv
    import pyarrow.parquet as pq

    if suffix.lower() == ".jsonl":
        with path.open(encoding="utf-8") as file:
            return sum(1 for line in file if json.loads(line) is not None)
    if suffix.lower() == ".csv":
        options = pyarrow.csv.ParseOptions(newlines_in_values=True)
        return sum(batch.num_rows for batch in pyarrow.csv.open_csv(path, parse_options=options))
    return sum(batch.num_rows for batch in pq.ParquetFile(path).iter_batches())


@contextmanager
def _open_parquet(path: Path) -> Iterator[Write]:
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None

    def write(table: pa.Table) -> None:
        nonlocal writer
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _open_csv(path: Path) -> Iterator[Write]:
    import pyarrow.csv

    with path.open("wb") as file:

        def write(table: pa.Table) -> None:
            options = pyarrow.csv.WriteOptions(include_header=file.tell() == 0)
            pyarrow.csv.write_csv(table, file, options)

        yield write


@contextmanager
def _open_jsonl(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(table: pa.Table) -> None:
            for row in table.to_pylist():
                file.write(f"{json.dumps(row, ensure_ascii=False, default=str)}\n")

        yield write
