"""Tables that name pictures: by path, by address, or holding them."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools.errors import DatasetError, ImageError
from colabtools.images import Encoded

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["RESULT_COLUMNS", "is_table", "open_table"]

# What the results say of each picture; a table's own column of that name is left behind.
RESULT_COLUMNS = ("path", "status", "error", "row")
_USUAL = ("path", "file", "image", "filename", "file_name", "url")
_TIMEOUT_S = 30
_LARGEST_BYTES = 256 * 1024**2


class _Paths:
    """A column of paths, relative to the table's folder, or of web addresses."""

    def __init__(self, names: Sequence[str], folder: Path, columns: pa.Table | None) -> None:
        self.names = names
        self.columns = columns
        self._folder = folder
        self.stamps = [self._stamp(name) for name in names]

    def read(self, number: int) -> Path | Encoded:
        name = self.names[number]
        if not name:
            raise ImageError(f"row {number} of the table names no picture")
        if _is_address(name):
            return Encoded(name, _fetch(name))
        return self._folder / Path(name).expanduser()

    def _stamp(self, name: str) -> str:
        if not name or _is_address(name):
            return name
        try:
            stat = (self._folder / Path(name).expanduser()).stat()
        except (OSError, ValueError):
            return ""
        return f"{stat.st_size} {stat.st_mtime_ns}"


class _Held:
    """A column of pictures themselves: structs of `bytes` and `path`, as Hub datasets have them.

    One group of rows at a time is in memory.
    """

    def __init__(self, file: pq.ParquetFile, path: Path, column: str, columns: Any) -> None:
        self.columns = columns
        self._file, self._column = file, column
        self._lock = threading.Lock()
        self._group, self._rows = -1, []
        counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        self._starts = [sum(counts[:n]) for n in range(len(counts))]
        stat = path.stat()
        self.names = [f"{path.name}/{number}" for number in range(sum(counts))]
        self.stamps = [f"{stat.st_size} {stat.st_mtime_ns} {n}" for n in range(len(self.names))]

    _rows: list[Any]

    def read(self, number: int) -> Encoded:
        group = max(n for n, start in enumerate(self._starts) if start <= number)
        with self._lock:
            if group != self._group:
                table = self._file.read_row_group(group, columns=[self._column])
                self._rows, self._group = table.column(self._column).to_pylist(), group
            value = self._rows[number - self._starts[group]]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ImageError(f"{self.names[number]} holds no picture")
        name = value.get("path") if isinstance(value, dict) else None
        return Encoded(name or self.names[number], data)


def is_table(path: Path) -> bool:
    """Whether a file is a table by its name."""
    return path.suffix.lower() in (".csv", ".parquet")


def open_table(path: Path, column: str) -> _Paths | _Held:
    """Return the pictures that a table names or holds, with its other columns.

    Args:
        path: a .csv or .parquet file.
        column: of paths, addresses or pictures; "auto" for the first of the usual names.

    Raises:
        DatasetError: it cannot be read or has no such column.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".csv":
            table = pyarrow.csv.read_csv(path)
            name = _choose(column, table.column_names, path)
            return _of_texts(table, name, path)
        file = pq.ParquetFile(path)
        name = _choose(column, file.schema_arrow.names, path)
        rest = [other for other in file.schema_arrow.names if other != name]
        kind = file.schema_arrow.field(name).type
        if pa.types.is_struct(kind) or pa.types.is_binary(kind):
            own = _own(file.read(columns=_plain(file.schema_arrow, rest)))
            return _Held(file, path, name, own)
        return _of_texts(file.read(columns=[name, *_plain(file.schema_arrow, rest)]), name, path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(f"{path} cannot be read as a table ({reason})") from error


def _of_texts(table: pa.Table, name: str, path: Path) -> _Paths:
    names = ["" if value is None else str(value) for value in table.column(name).to_pylist()]
    return _Paths(names, path.absolute().parent, _own(table.drop_columns([name])))


def _choose(column: str, names: Sequence[str], path: Path) -> str:
    if column != "auto":
        if column not in names:
            raise DatasetError(f"{path} has no column {column!r}; it has {', '.join(names)}")
        return column
    for usual in _USUAL:
        for name in names:
            if name.lower() == usual:
                return name
    raise DatasetError(
        f"{path} has none of the columns {', '.join(_USUAL)}; name the column of paths: it has "
        f"{', '.join(names)}"
    )


def _plain(schema: pa.Schema, names: Sequence[str]) -> list[str]:
    """Return those columns that hold one value a row."""
    import pyarrow as pa

    return [name for name in names if not pa.types.is_nested(schema.field(name).type)]


def _own(table: pa.Table) -> pa.Table | None:
    kept = [name for name in table.column_names if name not in RESULT_COLUMNS]
    return table.select(kept) if kept else None


def _is_address(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _fetch(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "colabtools"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            data: bytes = answer.read(_LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"{address} cannot be fetched ({error})") from error
    if len(data) > _LARGEST_BYTES:
        raise ImageError(f"{address} has more than {_LARGEST_BYTES} bytes; that is no photo")
    return data
