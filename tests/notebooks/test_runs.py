"""The notebooks run headless, from top to bottom, on the embedded models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from colabtools import headless, images, micro
from colabtools.dreambooth.boxes import write_box
from colabtools.images import load_upright

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SESSION = Path("Fast-Dreambooth") / "Sessions" / "my-subject"
# Enough to run every line; how well it learns is measured elsewhere.
SHORT = {"text_encoder_steps": "2", "unet_steps": "3", "prompts": "a sks star"}


def outputs(notebook: Path) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(notebook, as_version=4).cells
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def check_session(session: Path) -> None:
    assert (session / "my-subject.safetensors").stat().st_size > 1e7
    assert len(list((session / "instance_images").iterdir())) == 5
    assert load_upright(session / "samples" / "grid.png").width > 400
    assert load_upright(session / "logs" / "loss.png").width > 400


@pytest.mark.slow
def test_the_dreambooth_notebook_runs_with_plain_papermill(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    command += [str(NOTEBOOKS / "dreambooth_training.ipynb"), str(tmp_path / "out.ipynb")]
    for name, value in {**SHORT, "workspace_folder": str(tmp_path / "my work")}.items():
        command += ["-p", name, value]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    check_session(tmp_path / "my work" / SESSION)
    said = "".join(output.get("text", "") for output in outputs(tmp_path / "out.ipynb"))
    assert said.count("no form is shown here (headless): ") == 4


def test_a_crop_that_is_chosen_counts_once_the_photos_are_cut_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = nbformat.read(NOTEBOOKS / "dreambooth_training.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    titles = [source.partition("\n")[0].removeprefix("# @title ") for source in code]
    form, again = titles.index("4. Choose crops"), titles.index("5. Cut photos again")
    values: dict[str, Any] = {}
    for source in code[1 : form + 1]:
        exec(source, values)
    session = values["prepared"].session
    before = [load_upright(example.path) for example in values["prepared"].examples]
    photo = sorted(micro.subject_path().glob("*.png"))[0]
    size = load_upright(photo).size
    write_box(photo, session, box := (0, 0, size[0] // 2, size[1] // 2), size)

    exec(code[again], values)
    after = [load_upright(example.path) for example in values["prepared"].examples]
    chosen = images.cut(load_upright(photo), box, before[0].size)
    assert [picture.tobytes() for picture in after] == [
        picture.tobytes() for picture in (chosen, *before[1:])
    ]
    assert after[0].tobytes() != before[0].tobytes()
    # With that crop in its file, the step before it finds nothing to change.
    exec(code[form - 1], values)
    assert sorted(path.name for path in session.folder.glob("instance_images*")) == [
        "instance_images",
        "instance_images.old-1",
    ]


@pytest.mark.slow
def test_the_dreambooth_notebook_runs_twice_in_one_session(tmp_path: Path) -> None:
    values = {**SHORT, "workspace_folder": str(tmp_path / "work"), "export_formats": "ckpt"}
    notebook = NOTEBOOKS / "dreambooth_training.ipynb"
    session = tmp_path / "work" / SESSION
    written = []
    for number in (1, 2):
        out = headless.run_notebook(notebook, values, out=tmp_path / f"{number}.ipynb")
        pictures = [o for o in outputs(out) if "image/png" in o.get("data", {})]
        assert len(pictures) == 4
        kept = [*(session / "checkpoints").rglob("*.safetensors"), *session.glob("samples/*.png")]
        written.append({path: path.stat().st_mtime_ns for path in kept if path.name != "grid.png"})
    # Neither trained nor drawn a second time.
    assert written[0] == written[1]
    assert len(written[0]) > 3
    assert (session / "my-subject.ckpt").is_file()
