from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from colabtools import cli, vit
from colabtools.errors import ConfigError, DatasetError, ModelError, WorkspaceError
from colabtools.vit import parts
from colabtools.vit.classify import classify
from colabtools.vit.config import ClassifyConfig
from colabtools.vit.engine import Runner

GOOD = 60


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Sixty digits, named by what they show, among files that are none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    digits = load_digits()
    for number in range(GOOD):
        pixels = (16 * digits.images[number]).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}-{digits.target[number]}.png")
    (folder / "000-empty.jpg").touch()
    (folder / "030-page.jpg").write_text("<html>")
    (folder / "059-folder.jpg").mkdir()
    whole = (folder / "001-1.png").read_bytes()
    (folder / "zz-cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def config(photos: Path, **settings: object) -> ClassifyConfig:
    values = {"src": str(photos), "out": str(photos.parent / "preds.parquet"), "dtype": "fp32"}
    return ClassifyConfig(**values | {"shard_size": 7, "batch_size": 4} | settings)


def test_every_picture_has_a_row_in_order(photos: Path) -> None:
    done = classify(config(photos))
    assert (done.pictures, done.failed) == (GOOD + 4, 4)
    rows = pq.read_table(done.path).to_pylist()
    assert [row["path"] for row in rows] == sorted(path.name for path in photos.iterdir())
    right = 0
    bad = {row["path"] for row in rows if row["status"] == "error"}
    assert bad == {"000-empty.jpg", "030-page.jpg", "059-folder.jpg", "zz-cut.png"}
    for row in rows:
        if row["path"] in bad:
            assert row["error"]
            assert row["label_1"] is None
            assert row["probability_5"] is None
        else:
            assert row["error"] is None
            right += row["label_1"] == row["path"][4]
    assert right >= GOOD - 2  # it reads one of these wrongly
    assert not list(photos.parent.glob(".*parts*"))


def test_a_row_is_what_a_single_call_gives(photos: Path) -> None:
    rows = pq.read_table(classify(config(photos)).path).to_pylist()
    model = vit.load(dtype="fp32")
    for row in rows[:8]:
        if row["status"] == "ok":
            (labels,) = model.predict(photos / row["path"])
            for rank, label in enumerate(labels, start=1):
                assert row[f"label_{rank}"] == label.name
                assert row[f"probability_{rank}"] == pytest.approx(label.probability, abs=1e-6)


def test_csv_and_json_lines_say_the_same(photos: Path) -> None:
    rows = pq.read_table(classify(config(photos)).path).to_pylist()
    odd = photos / 'a,"b\n.png'
    (photos / "001-1.png").rename(odd)
    table = classify(config(photos, out=str(photos.parent / "preds.CSV"))).path
    with table.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(rows)
    assert {row["path"] for row in found} == {path.name for path in photos.iterdir()}
    lines = classify(config(photos, out=str(photos.parent / "preds.jsonl"))).path
    again = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert sorted(row["path"] for row in again) == sorted(row["path"] for row in found)
    assert {row["path"]: row["label_1"] for row in again} == {
        row["path"]: row["label_1"] or None for row in found
    }


def count_pictures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the pictures that a model is given from now on."""
    seen: list[int] = []
    run = Runner.run

    def counted(self, source, shards, done):
        def count(number: int) -> None:
            seen.append(number)
            done(number)

        return run(self, source, shards, count)

    monkeypatch.setattr(Runner, "run", counted)
    return seen


def test_a_second_run_does_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = classify(config(photos))
    before = first.path.read_bytes()
    seen = count_pictures(monkeypatch)
    assert classify(config(photos)) == first
    assert seen == []
    assert first.path.read_bytes() == before
    classify(config(photos, restart=True))
    assert sum(seen) == GOOD + 4
    assert first.path.read_bytes() == before


def test_only_what_changed_is_done_again_after_an_interruption(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = classify(config(photos, out=str(photos.parent / "whole.parquet")))
    write = parts.write_table
    written: list[Path] = []

    def stop(table, path: Path) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        write(table, path)

    monkeypatch.setattr("colabtools.vit.classify.write_table", stop)
    with pytest.raises(KeyboardInterrupt):
        classify(config(photos))
    monkeypatch.undo()
    seen = count_pictures(monkeypatch)
    done = classify(config(photos))
    assert sum(seen) == GOOD + 4 - 5 * 7
    assert pq.read_table(done.path).equals(pq.read_table(expected.path))


def test_a_damaged_part_is_made_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("colabtools.vit.classify._join", stop)
    with pytest.raises(KeyboardInterrupt):
        classify(config(photos))
    monkeypatch.undo()
    part = sorted((photos.parent / ".preds.parquet.parts").glob("part-*"))[2]
    part.write_bytes(part.read_bytes()[:-20])
    seen = count_pictures(monkeypatch)
    assert classify(config(photos)).failed == 4
    assert sum(seen) == 7


def test_another_model_or_another_picture_is_noticed(
    photos: Path, write_vit: Callable[..., Path]
) -> None:
    first = pq.read_table(classify(config(photos)).path)
    other = classify(config(photos, model=str(write_vit(image_size=8, patch_size=4))))
    assert pq.read_table(other.path).column_names != first.column_names
    classify(config(photos))
    (photos / "000-0.png").write_bytes((photos / "003-3.png").read_bytes())
    rows = pq.read_table(classify(config(photos)).path).to_pylist()
    assert next(row for row in rows if row["path"] == "000-0.png")["label_1"] == "3"


def test_the_dtype_that_was_measured_is_kept(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from colabtools.vit import host

    monkeypatch.setattr(host, "choose_dtype", lambda *_: host.Choice("bf16", "said so"))
    classify(config(photos, dtype="auto"))
    monkeypatch.setattr(host, "choose_dtype", lambda *_: host.Choice("fp32", "said otherwise"))
    seen = count_pictures(monkeypatch)
    classify(config(photos, dtype="auto"))
    assert seen == []


def test_memory_that_runs_out_makes_batches_smaller(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colabtools.vit.backends.torch_backend import TorchBackend

    expected = pq.read_table(classify(config(photos)).path)
    start = TorchBackend.start
    sizes: list[int] = []

    def small(self, pixels, ask):
        if len(pixels) > 3:
            raise MemoryError
        sizes.append(len(pixels))
        return start(self, pixels, ask)

    monkeypatch.setattr(TorchBackend, "start", small)
    settings = {"restart": True, "batch_size": 16}
    found = pq.read_table(classify(config(photos, **settings)).path)
    assert max(sizes) == 3
    assert found.select(range(3)).equals(expected.select(range(3)))
    first, second = (table.column("probability_1").to_pylist() for table in (found, expected))
    assert first == pytest.approx(second, abs=1e-6)
    monkeypatch.setattr(TorchBackend, "start", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ModelError, match="does not fit in the memory"):
        classify(config(photos, restart=True))


def test_numbers_that_are_not_finite_are_a_fault_of_their_row(
    photos: Path, write_vit: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_vit(image_size=8, patch_size=4)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    done = classify(config(photos, model=str(folder)))
    assert done.failed == GOOD + 4
    rows = pq.read_table(done.path).to_pylist()
    assert "no finite numbers in fp32" in rows[0]["error"]


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"src": "/nothing/here"}, DatasetError, "is not there"),
        ({"out": "preds.xlsx"}, ConfigError, "out is 'preds.xlsx'"),
        ({"top_k": 0}, ConfigError, "top_k"),
        ({"model": "no/such"}, ModelError, "no/such"),
        ({"out": "/proc/preds.csv"}, WorkspaceError, "/proc"),
    ],
)
def test_a_wrong_setting_is_one_line(
    photos: Path, settings: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        classify(config(photos, **settings))
    assert "\n" not in str(caught.value)


def test_an_output_among_the_pictures_is_refused(photos: Path) -> None:
    with pytest.raises(ConfigError, match="inside of the pictures"):
        classify(config(photos, out=str(photos / "preds.csv")))
    link = photos.parent / "link"
    link.symlink_to(photos)
    with pytest.raises(ConfigError, match="inside of the pictures"):
        classify(config(link, out=str(photos / "preds.csv")))


def test_a_model_without_a_head_is_refused(photos: Path, write_vit: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_vit()
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ModelError, match="no classification head"):
        classify(config(photos, model=str(folder)))


def test_the_command_line_does_the_same(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.parent / "preds.csv"
    words = ["vit", "classify", str(photos), "--out", str(out), "--dtype", "fp32", "--top-k", "2"]
    assert cli.main([*words, "--quiet"]) == 0
    assert capsys.readouterr().out.startswith(f"{GOOD + 4} pictures in {out}, 4 could not be read")
    assert out.read_text().splitlines()[0].endswith('"label_2","probability_2"')
    assert cli.main(["vit", "classify", str(photos / "none"), "--out", str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_was_killed_goes_on_row_for_row(photos: Path) -> None:
    expected = pq.read_table(classify(config(photos, out=str(photos.parent / "w.parquet"))).path)
    killed_run(config(photos), kills=3, longest_s=4.0, seed=1)
    found = pq.read_table(config(photos).out)
    assert found.equals(expected)


def killed_run(settings: ClassifyConfig, *, kills: int, longest_s: float, seed: int) -> int:
    """Run the command again and again, each time killed, then to its end; return its peak RSS."""
    words = [sys.executable, "-c", "from colabtools.cli import main; raise SystemExit(main())"]
    words += ["vit", "classify", settings.src, "--out", settings.out, "--dtype", settings.dtype]
    words += ["--shard-size", str(settings.shard_size), "--batch-size", str(settings.batch_size)]
    chance, peak = random.Random(seed), 0
    for number in range(kills + 1):
        child = subprocess.Popen([*words, "--quiet"], stdout=subprocess.DEVNULL)
        until = time.monotonic() + (chance.uniform(1, longest_s) if number < kills else 1e9)
        while child.poll() is None and time.monotonic() < until:
            try:
                peak = max(peak, psutil.Process(child.pid).memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.05)
        if number < kills:
            child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == 0
    return peak


@pytest.mark.heavy
@pytest.mark.timeout(2400)
def test_a_hundred_thousand_pictures_killed_five_times_in_bounded_memory(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    generator = np.random.default_rng(0)
    for group in range(100):
        (folder / f"{group:02}").mkdir(parents=True)
        pixels = generator.integers(0, 256, (1000, 8, 8), dtype=np.uint8)
        for number, picture in enumerate(pixels):
            Image.fromarray(picture).save(folder / f"{group:02}" / f"{number:03}.png")
    settings = replace(config(folder), shard_size=2048, batch_size=256)
    whole = replace(settings, out=str(tmp_path / "whole.parquet"))
    undisturbed = killed_run(whole, kills=0, longest_s=0, seed=0)
    peak = killed_run(settings, kills=5, longest_s=60, seed=2)
    assert max(peak, undisturbed) < 1.5e9
    assert pq.read_table(settings.out).equals(pq.read_table(whole.out))
    assert pq.read_metadata(settings.out).num_rows == 100_000
    assert not (tmp_path / ".preds.parquet.parts").exists()
