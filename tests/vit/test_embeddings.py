from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colabtools.errors import DatasetError
from colabtools.storage import sha256_of
from colabtools.vit.embeddings import (
    EmbeddingSet,
    EmbeddingSpace,
    Part,
    open_embeddings,
    write_manifest,
)

SPACE = EmbeddingSpace(
    model="micro",
    fingerprint="ab" * 32,
    layers=(4,),
    norm=True,
    pooling="cls",
    normalized=True,
    dim=4,
    preprocessing={"height": 8, "width": 8, "mean": [0.5, 0.5, 0.5]},
)


def write_set(folder: Path, rows: int = 3) -> EmbeddingSet:
    np.save(folder / "part-00000.npy", np.eye(rows, 4, dtype=np.float16))
    columns = {
        "path": [f"{row}.png" for row in range(rows)] + ["bad.png"],
        "status": ["ok"] * rows + ["error"],
        "error": [None] * rows + ["not a picture"],
        "row": [*range(rows), None],
    }
    pq.write_table(pa.table(columns), folder / "part-00000.parquet")
    sha256 = tuple(sha256_of(folder / f"part-00000{end}") for end in (".npy", ".parquet"))
    part = Part(name="part-00000", items=rows + 1, rows=rows, sha256=sha256)
    found = EmbeddingSet(folder=folder, space=SPACE, dtype="float16", parts=(part,))
    write_manifest(found)
    return found


def test_a_set_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = write_set(tmp_path)
    found = open_embeddings(tmp_path)
    assert found == written
    assert len(found) == 3
    found.verify()
    ((_, table, vectors),) = found.read()
    assert table.column("status").to_pylist() == ["ok", "ok", "ok", "error"]
    assert np.array_equal(vectors, np.eye(3, 4, dtype=np.float16))


def test_a_space_names_in_what_it_differs() -> None:
    assert SPACE.differences(replace(SPACE, model="another name of the same weights")) == []
    assert SPACE.differences(replace(SPACE, pooling="mean")) == ["pooling: cls, not mean"]
    other = replace(SPACE, preprocessing=SPACE.preprocessing | {"height": 16})
    assert "preprocessing" in SPACE.differences(other)[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no finished embeddings"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "not of this version"),
        (lambda folder: (folder / "manifest.json").write_text('{"schema": 1}'), "lacks"),
        (lambda folder: (folder / "part-00000.npy").unlink(), "cannot read"),
        (lambda folder: np.save(folder / "part-00000.npy", np.eye(3)), "holds float64"),
        (lambda folder: (folder / "part-00000.parquet").write_text("x"), "cannot read"),
    ],
)
def test_a_damaged_set_is_refused_in_one_line(tmp_path: Path, damage, message: str) -> None:
    write_set(tmp_path)
    damage(tmp_path)
    with pytest.raises(DatasetError, match=message) as caught:
        list(open_embeddings(tmp_path).read())
    assert "\n" not in str(caught.value)


def test_other_bytes_of_the_same_shape_are_found(tmp_path: Path) -> None:
    write_set(tmp_path)
    np.save(tmp_path / "part-00000.npy", np.zeros((3, 4), dtype=np.float16))
    with pytest.raises(DatasetError, match="damaged"):
        open_embeddings(tmp_path).verify()


def test_a_space_with_other_fields_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = tmp_path / "manifest.json"
    found = json.loads(path.read_text())
    found["space"]["depth"] = 4
    path.write_text(json.dumps(found))
    with pytest.raises(DatasetError, match="depth"):
        open_embeddings(tmp_path)
