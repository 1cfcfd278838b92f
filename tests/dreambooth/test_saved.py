from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from colabtools.dreambooth import saved
from colabtools.dreambooth.saved import Snapshot
from colabtools.errors import CheckpointError


def snapshot(step: int = 3, **changes: object) -> Snapshot:
    values: dict[str, object] = {
        "step": step,
        "finished": False,
        "parts": {
            "unet": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([0.1])},
            "text_encoder": {"c": torch.ones(4).half()},
        },
        "trained": ("unet",),
        "state": {"optimizer": {0: (torch.tensor(7.0), float("nan"))}, "position": [1, 2]},
        "description": {"base_model": "micro", "settings": {"betas": (0.9, 0.99)}},
    }
    return Snapshot(**{**values, **changes})  # type: ignore[arg-type]


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_a_snapshot_comes_back(place: Path) -> None:
    written = saved.write_snapshot(place, snapshot(), 42)
    assert names(written.folder) == {
        "manifest.json",
        "state.json",
        "state.safetensors",
        "text_encoder.safetensors",
        "unet.safetensors",
    }
    ([found], problems) = saved.find_saved(place)
    assert (found, problems, found.damage()) == (written, [], "")
    assert (found.step, found.sequence, found.finished, found.trained) == (3, 42, False, ("unet",))
    assert found.description == {"base_model": "micro", "settings": {"betas": [0.9, 0.99]}}
    assert found.load().keys() == {"unet"}
    parts = found.load_all()
    meant = snapshot().parts
    assert {part: list(tensors) for part, tensors in parts.items()} == {
        part: sorted(tensors) for part, tensors in meant.items()
    }
    assert all(parts[p][n].equal(t) for p, tensors in meant.items() for n, t in tensors.items())
    state = found.load_state()
    assert state["optimizer"].keys() == {0}
    assert (state["optimizer"][0][0], state["position"]) == (7, [1, 2])
    assert found.size_bytes == sum(path.stat().st_size for path in found.folder.iterdir())


def test_a_finished_one_has_no_state(place: Path) -> None:
    written = saved.write_snapshot(place, snapshot(finished=True, state={}), 1)
    assert "state.json" not in names(written.folder)
    assert written.load_state() == {}


@pytest.mark.parametrize("finished", [False, True])
def test_the_length_is_known_before(place: Path, finished: bool) -> None:
    meant = snapshot(finished=finished, state={} if finished else snapshot().state)
    written = saved.write_snapshot(place, meant, 1_700_000_000_000)
    assert saved.snapshot_bytes(meant) == written.size_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": {"state": {}}}, "part 'state' cannot name a file"),
        ({"parts": {"../unet": {}}}, "cannot name a file"),
        ({"trained": ("vae",)}, r"trained names \['vae'\]"),
        ({"description": {"step": 4}}, r"description has the keys \['step'\]"),
    ],
)
def test_what_could_not_be_read_again_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        snapshot(**changes)


def test_a_part_that_is_not_there_is_named(place: Path) -> None:
    written = saved.write_snapshot(place, snapshot(), 1)
    with pytest.raises(CheckpointError, match=r"holds no vae\.safetensors; it holds"):
        written.load(["vae"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


DAMAGES = {"flip": flip, "cut": cut, "remove": Path.unlink}
FILES = ["state.json", "state.safetensors", "text_encoder.safetensors", "unet.safetensors"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_never_loaded(place: Path, name: str, damage: str) -> None:
    written = saved.write_snapshot(place, snapshot(), 1)
    DAMAGES[damage](written.folder / name)
    assert str(written.folder / name) in written.damage()
    assert bool(written.damage(quick=True)) is (damage != "flip")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        written.load_all()
        written.load_state()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_named(place: Path, damage: str) -> None:
    DAMAGES[damage](saved.write_snapshot(place, snapshot(), 1).folder / "manifest.json")
    found, [problem] = saved.find_saved(place)
    assert found == []
    assert "step-000003/manifest.json" in problem


def test_every_flipped_bit_of_a_manifest_is_found(place: Path) -> None:
    path = saved.write_snapshot(place, snapshot(), 1).folder / "manifest.json"
    whole = path.read_bytes()
    unnoticed = []
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 4]) + whole[index + 1 :])
        if saved.find_saved(place)[0]:
            unnoticed.append(whole[index : index + 1])
    assert unnoticed == []


def test_a_later_schema_asks_for_an_update(place: Path) -> None:
    path = saved.write_snapshot(place, snapshot(), 1).folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 9}))
    assert "schema version 9, this package reads up to 2; update" in saved.find_saved(place)[1][0]


def test_the_folders_of_the_first_version_open(place: Path) -> None:
    folder = place / "step-000012"
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, folder / "unet.safetensors")
    digest = hashlib.sha256((folder / "unet.safetensors").read_bytes()).hexdigest()
    manifest = {"base_model": "micro", "schema_version": 1, "step": 12, "sha256": {"unet": digest}}
    manifest["saved"] = "2026-01-01T00:00:00+00:00"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    [found], problems = saved.find_saved(place)
    assert (problems, found.damage()) == ([], "")
    assert (found.step, found.finished, found.trained) == (12, True, ("unet",))
    assert found.description == {"base_model": "micro"}
    assert found.load()["unet"]["a"].tolist() == [1, 1]
    assert found.sequence == 1767225600000
    flip(folder / "unet.safetensors")
    assert "other bytes" in found.damage()


def test_folders_of_other_names_are_not_checkpoints(place: Path) -> None:
    folder = saved.write_snapshot(place, snapshot(5), 1).folder
    for name in ("step-5_v2", "step-000005_v2", "step-5", "step-000005 (1)", "xstep-000005"):
        folder.rename(place / name)
        assert saved.find_saved(place) == ([], [])
        folder = place / name
    folder.rename(place / "step-1234567")
    assert len(saved.find_saved(place)[0]) == 1


def test_the_same_step_again_replaces_the_former(place: Path) -> None:
    saved.write_snapshot(place, snapshot(), 1)
    saved.write_snapshot(place, snapshot(parts={"unet": {"a": torch.ones(1)}}), 2)
    [found], _ = saved.find_saved(place)
    assert (found.sequence, found.load()["unet"].keys()) == (2, {"a"})
    assert names(place) == {"step-000003"}


def test_between_the_two_renames_the_former_one_counts(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.write_snapshot(place, snapshot(), 1)
    seen: list[int] = []
    rename = Path.rename

    def looking_rename(self: Path, target: Path) -> Path:
        result = rename(self, target)
        seen.extend(one.sequence for one in saved.find_saved(place)[0])
        return result

    monkeypatch.setattr(Path, "rename", looking_rename)
    saved.write_snapshot(place, snapshot(), 2)
    assert seen == [1, 2]


def test_litter_goes_and_an_interrupted_replacement_is_put_back(place: Path) -> None:
    folder = saved.write_snapshot(place, snapshot(3), 1).folder
    folder.rename(place / ".step-000003.old")
    for name in (".step-000004.part", ".step-000005.gone", ".step-000003.part"):
        (place / name).mkdir()
    (place / "notes.part").mkdir()
    saved.write_snapshot(place, snapshot(6), 2)
    assert names(place) == {"step-000003", "step-000006", "notes.part"}


def test_a_replaced_one_that_was_not_yet_removed_goes(place: Path) -> None:
    folder = saved.write_snapshot(place, snapshot(3), 1).folder
    folder.rename(place / ".step-000003.old")
    folder.mkdir()
    saved.remove_litter(place)
    assert names(place) == {"step-000003"}


def test_removal_that_stops_in_the_middle_leaves_nothing_that_looks_like_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved.write_snapshot(place, snapshot(), 1).folder

    def die(path: Path, **_: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(saved.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        saved.remove_folder(folder)
    assert saved.find_saved(place) == ([], [])


def test_a_copy_is_the_same_and_needs_its_parent(place: Path, tmp_path: Path) -> None:
    written = saved.write_snapshot(place, snapshot(), 7)
    (tmp_path / "drive").mkdir()
    copy = saved.copy_saved(written, tmp_path / "drive" / "checkpoints")
    assert [saved.find_saved(copy.folder.parent)[0][0], copy.damage()] == [copy, ""]
    for name in names(written.folder):
        assert (copy.folder / name).read_bytes() == (written.folder / name).read_bytes()
    with pytest.raises(FileNotFoundError):
        saved.copy_saved(written, tmp_path / "unmounted" / "checkpoints")
    assert not (tmp_path / "unmounted").exists()


def test_a_damaged_one_is_not_copied(place: Path, tmp_path: Path) -> None:
    written = saved.write_snapshot(place, snapshot(), 7)
    flip(written.folder / "unet.safetensors")
    with pytest.raises(OSError, match=r"unet\.safetensors has other bytes than were saved"):
        saved.copy_saved(written, tmp_path / "copies")
    assert names(tmp_path / "copies") == set()


def test_a_failed_write_leaves_what_was_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.write_snapshot(place, snapshot(), 1)
    calls: list[int] = []

    def fail_late(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail_late)
    with pytest.raises(OSError, match="No space left"):
        saved.write_snapshot(place, snapshot(), 2)
    assert saved.find_saved(place) == ([before], [])
    assert (names(place), before.damage()) == ({"step-000003"}, "")


def test_a_state_that_cannot_be_saved_touches_nothing(place: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\['x'\] is a set"):
        saved.write_snapshot(place, snapshot(state={"x": {1}}), 1)
    assert not place.exists()
