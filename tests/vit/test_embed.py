from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from colabtools import cli, vit
from colabtools.errors import ConfigError, DatasetError
from colabtools.vit import parts
from colabtools.vit.config import EmbedConfig
from colabtools.vit.embed import embed
from colabtools.vit.embeddings import open_embeddings


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, digit in enumerate(load_digits().images[:20]):
        pixels = (16 * digit).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    (folder / "005-bad.png").touch()
    return folder


def config(photos: Path, **settings: object) -> EmbedConfig:
    values = {"src": str(photos), "out": str(photos.parent / "vectors"), "dtype": "fp32"}
    return EmbedConfig(**values | {"shard_size": 6, "batch_size": 4} | settings)


def all_vectors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for _, table, vectors in open_embeddings(folder).read():
        for row in table.to_pylist():
            if row["status"] == "ok":
                found[row["path"]] = np.array(vectors[row["row"]])
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_are_those_of_a_single_call(photos: Path, dtype: str) -> None:
    done = embed(config(photos, vector_dtype=dtype))
    assert (len(done.embeddings), done.pictures) == (20, 21)
    found = all_vectors(done.embeddings.folder)
    assert sorted(found) == sorted(p.name for p in photos.iterdir() if "bad" not in p.name)
    expected = vit.load(dtype="fp32").embed([photos / name for name in found])
    tolerance = 1e-3 if dtype == "float16" else 1e-6
    assert np.abs(np.stack(list(found.values())) - expected).max() < tolerance
    assert next(iter(found.values())).dtype == dtype


def test_the_manifest_says_in_which_space_they_lie(photos: Path) -> None:
    settings = {"layers": "-1,2", "pooling": "mean", "norm": False, "normalize": False}
    done = embed(config(photos, **settings))
    space = done.embeddings.space
    assert (space.layers, space.pooling, space.norm, space.dim) == ((2, 4), "mean", False, 128)
    assert not space.normalized
    assert space.preprocessing["height"] == 8
    name, vector = next(iter(all_vectors(done.embeddings.folder).items()))
    expected = vit.load(dtype="fp32").embed(
        photos / name, layers=(2, 4), pooling="mean", norm=False, normalize=False
    )
    assert np.abs(vector - expected[0]).max() < 0.02


def test_it_goes_on_where_it_was_cut_off(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embed(config(photos, out=str(photos.parent / "whole"))).embeddings
    write, written = parts.write_table, []

    def stop(table, path: Path) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(table, path)

    monkeypatch.setattr("colabtools.vit.embed.write_table", stop)
    with pytest.raises(KeyboardInterrupt):
        embed(config(photos))
    monkeypatch.undo()
    with pytest.raises(DatasetError, match="no finished embeddings"):
        open_embeddings(config(photos).out)
    kept = {path: path.stat().st_mtime_ns for path in written}
    found = embed(config(photos)).embeddings
    assert {path: path.stat().st_mtime_ns for path in written} == kept
    for first, second in zip(found.read(), whole.read(), strict=True):
        assert first[1].equals(second[1])
        assert np.array_equal(first[2], second[2])


def test_a_picture_more_changes_only_its_part(photos: Path) -> None:
    first = embed(config(photos)).embeddings
    (photos / "zzz.png").write_bytes((photos / "000.png").read_bytes())
    second = embed(config(photos)).embeddings
    assert len(second) == 21
    assert [part.name for part in second.parts[:3]] == [part.name for part in first.parts[:3]]
    assert second.parts[3].name != first.parts[3].name
    assert not (second.folder / f"{first.parts[3].name}.npy").exists()


def test_a_folder_of_something_else_is_left_alone(photos: Path) -> None:
    other = photos.parent / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match=r"thesis\.txt"):
        embed(config(photos, out=str(other)))
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="inside of the pictures"):
        embed(config(photos, out=str(photos / "vectors")))


@pytest.mark.parametrize("layers", ["9", "x", "", "1.5"])
def test_a_layer_that_is_not_there_is_one_line(photos: Path, layers: str) -> None:
    with pytest.raises(ConfigError, match="layers"):
        embed(config(photos, layers=layers))


def test_the_command_line_does_the_same(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.parent / "vectors"
    words = ["vit", "embed", str(photos), "--out", str(out), "--layers", "-1", "--dtype", "fp32"]
    assert cli.main([*words, "--quiet"]) == 0
    said = capsys.readouterr().out
    assert said == f"20 vectors in {out}, 1 could not be read: see the column error\n"
    open_embeddings(out).verify()
