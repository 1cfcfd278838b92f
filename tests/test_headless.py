"""Notebooks run by a program, in a real kernel; each notebook is made here."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from colabtools import env, headless
from colabtools.errors import NotebookError, WorkspaceError
from colabtools.headless import find_notebook, run_notebook

# pyzmq and jupyter_client close their sockets when they are collected, which may be in any test.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SETTINGS = """\
# @title Settings
name = "my-subject"  # @param {type: "string"}
empty = ""  # @param {type: "string"}
steps = "auto"  # @param ["\\"auto\\"", "100"] {type: "raw", allow-input: true}
count = 3  # @param {type: "integer"}
rate = 1e-3  # @param {type: "number"}
again = False  # @param {type: "boolean"}
"""
NAMES = "again, count, empty, name, rate, steps"
SHOW = """\
# @title 1. Show values
import json
print(json.dumps([name, empty, steps, count, rate, again]))
"""


def write_notebook(path: Path, *cells: str, settings: str | None = SETTINGS) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = new_notebook(metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    notebook.cells.append(new_markdown_cell("# A notebook"))
    if settings is not None:
        notebook.cells.append(new_code_cell(settings, metadata={"tags": ["parameters"]}))
    notebook.cells += [new_code_cell(cell) for cell in cells]
    nbformat.write(notebook, path)
    return path


def printed(executed: Path) -> str:
    """What the last cell printed."""
    cell = nbformat.read(executed, as_version=4).cells[-1]
    return "".join(output["text"] for output in cell.outputs if output["name"] == "stdout")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder we are in; what IPython keeps goes beside it."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    return tmp_path / "my runs"


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been run; the executed copy is the notebook itself."""
    runs: list[dict[str, Any]] = []

    def execute(notebook: Path, running: Path, values: Any) -> None:
        runs.append(dict(values))
        running.write_bytes(notebook.read_bytes())

    monkeypatch.setattr(headless, "_execute", execute)
    return runs


@pytest.mark.slow
def test_a_notebook_runs_with_its_parameters_and_the_copy_says_what_happened(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = write_notebook(folder / "note.ipynb", SHOW)
    before = notebook.read_bytes()
    given = {"name": "007", "steps": "40", "count": "5", "again": "true"}
    executed = run_notebook(notebook, given)
    assert executed == Path("note.out.ipynb")
    assert sorted(path.name for path in folder.iterdir()) == ["note.ipynb", "note.out.ipynb"]
    assert notebook.read_bytes() == before
    assert json.loads(printed(executed)) == ["007", "", 40, 5, 0.001, True]
    written = nbformat.read(executed, as_version=4)
    nbformat.validate(written)
    assert written.metadata.papermill.output_path == "note.out.ipynb"
    assert written.metadata.papermill.parameters == {
        "name": "007",
        "steps": 40,
        "count": 5,
        "again": True,
    }
    assert ".part" not in executed.read_text()
    assert not re.search(r"\.note\.out\.ipynb-[0-9a-f]+", executed.read_text())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert '"007"' in captured.err


@pytest.mark.slow
def test_a_failing_cell_is_one_line_with_its_step_and_leaves_the_old_copy(folder: Path) -> None:
    fail = '# @title 2. Fail here\nraise ValueError("the reason\\nin two lines")'
    notebook = write_notebook(folder / "note.ipynb", SHOW, fail, "print('never')")
    (folder / "out.ipynb").write_text("an older copy")
    with pytest.raises(NotebookError) as why:
        run_notebook(notebook, {}, out=folder / "out.ipynb")
    assert str(why.value) == "note.ipynb, step '2. Fail here': the reason in two lines"
    assert (folder / "out.ipynb").read_text() == "an older copy"
    assert sorted(path.name for path in folder.iterdir()) == ["note.ipynb", "out.ipynb"]


@pytest.mark.slow
def test_keep_failed_keeps_the_copy_with_the_error_in_it(folder: Path) -> None:
    notebook = write_notebook(folder / "note.ipynb", "raise SystemError")
    with pytest.raises(NotebookError, match=r"^note\.ipynb, step 'cell \d': SystemError$"):
        run_notebook(notebook, {}, out=folder / "out.ipynb", keep_failed=True)
    kept = nbformat.read(folder / "out.ipynb", as_version=4)
    nbformat.validate(kept)
    assert [output.ename for output in kept.cells[-1].outputs] == ["SystemError"]
    assert kept.metadata.papermill.output_path == str(folder / "out.ipynb")
    assert sorted(path.name for path in folder.iterdir()) == ["note.ipynb", "out.ipynb"]


@pytest.mark.slow
def test_a_kernel_that_dies_is_one_line_and_leaves_no_file(folder: Path) -> None:
    notebook = write_notebook(folder / "note.ipynb", "import os; os._exit(9)")
    with pytest.raises(
        NotebookError, match=r"^note\.ipynb did not run to its end .*memory$"
    ) as why:
        run_notebook(notebook, {})
    assert "\n" not in str(why.value)
    assert [path.name for path in folder.iterdir()] == ["note.ipynb"]


@pytest.mark.slow
def test_the_kernel_does_not_take_our_page_or_editor_for_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"JPY_SESSION_NAME": "page", "VSCODE_PID": "12", "VSCODE_CWD": "/x", "KEPT_BY_US": "yes"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    ask = (
        "import os\nfrom colabtools import env\n"
        f"print(sorted(set({list(ours)}) & os.environ.keys()), env.where().place.value)"
    )
    executed = run_notebook(write_notebook(folder / "note.ipynb", ask), {})
    assert printed(executed).split("\n")[0] == "['KEPT_BY_US'] headless"
    assert {name: os.environ[name] for name in ours} == ours


def test_the_variables_hidden_are_those_that_betray_a_person() -> None:
    assert set(headless._FRONT_END_VARIABLES) == set(env._JUPYTER_VARIABLES)


def test_hidden_variables_come_back_after_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def fail(*args: object) -> None:
        seen.append(os.environ.get("VSCODE_PID"))
        raise KeyboardInterrupt

    monkeypatch.setenv("VSCODE_PID", "12")
    monkeypatch.delenv("VSCODE_CWD", raising=False)
    monkeypatch.setattr(headless, "_execute", fail)
    with pytest.raises(KeyboardInterrupt):
        run_notebook(write_notebook(folder / "note.ipynb"), {})
    assert seen == [None]
    assert os.environ["VSCODE_PID"] == "12"
    assert "VSCODE_CWD" not in os.environ
    assert [path.name for path in folder.iterdir()] == ["note.ipynb"]


TYPED = [
    *(("name", "007", "007"), ("name", "True", "True"), ("name", "", ""), ("name", "[1]", "[1]")),
    *(("empty", "5", "5"), ("empty", "None", "None")),
    *(("steps", "400", 400), ("steps", "1e-6", 1e-6), ("steps", "auto", "auto")),
    *(("steps", "007", "007"), ("steps", "many", "many"), ("steps", "0", 0)),
    *(("count", "7", 7), ("count", "-1", -1), ("count", "auto", "auto"), ("count", "x", "x")),
    *(("rate", "1", 1), ("rate", "2e-6", 2e-6), ("rate", "fast", "fast")),
    *(("again", "true", True), ("again", "True", True), ("again", "FALSE", False)),
]


@pytest.mark.parametrize(("name", "text", "value"), TYPED)
def test_a_parameter_is_read_as_the_kind_of_its_default(
    folder: Path, without_kernel: list[dict[str, Any]], name: str, text: str, value: object
) -> None:
    run_notebook(write_notebook(folder / "note.ipynb"), {name: text})
    assert [{name: (type(v), v) for name, v in run.items()} for run in without_kernel] == [
        {name: (type(value), value)}
    ]


@pytest.mark.parametrize("text", ["yes", "0", "", "None"])
def test_a_flag_that_is_neither_true_nor_false_is_refused_before_anything_runs(
    folder: Path, without_kernel: list[dict[str, Any]], text: str
) -> None:
    with pytest.raises(NotebookError, match=f"^again is {text!r}; give True or False$"):
        run_notebook(write_notebook(folder / "note.ipynb"), {"again": text})
    assert without_kernel == []


def test_an_unknown_parameter_is_refused_with_the_known(
    folder: Path, without_kernel: list[dict[str, Any]]
) -> None:
    notebook = write_notebook(folder / "note.ipynb")
    with pytest.raises(NotebookError, match="^note.ipynb has no parameter 'stepz'; it has ") as why:
        run_notebook(notebook, {"stepz": "4", "steps": "3"})
    assert str(why.value).endswith(NAMES)
    assert without_kernel == []
    assert [path.name for path in folder.iterdir()] == ["note.ipynb"]


def test_a_notebook_without_settings_has_no_parameters(
    folder: Path, without_kernel: list[dict[str, Any]]
) -> None:
    notebook = write_notebook(folder / "note.ipynb", settings=None)
    assert run_notebook(notebook, {}) == Path("note.out.ipynb")
    with pytest.raises(NotebookError, match="has no parameter 'steps'; it has none"):
        run_notebook(notebook, {"steps": "4"})


def test_names_that_are_not_ascii_survive(
    folder: Path, without_kernel: list[dict[str, Any]]
) -> None:
    notebook = write_notebook(folder / "ё 犬.ipynb", "# 🐕")
    executed = run_notebook(notebook, {"name": "犬"})
    assert executed.name == "ё 犬.out.ipynb"
    assert nbformat.read(executed, as_version=4).cells[-1].source == "# 🐕"
    assert without_kernel == [{"name": "犬"}]


@pytest.mark.parametrize("content", [b"", b"not json", b"{}", b'{"cells": 3}', b"\xff\xfe", b"[]"])
def test_a_file_that_is_no_notebook_is_one_line(folder: Path, content: bytes) -> None:
    (folder / "note.ipynb").write_bytes(content)
    with pytest.raises(NotebookError, match="note.ipynb is not a notebook that can be run") as why:
        run_notebook(folder / "note.ipynb", {})
    assert "\n" not in str(why.value)
    assert [path.name for path in folder.iterdir()] == ["note.ipynb"]


@pytest.mark.parametrize("name", ["gone.ipynb", ".", ""])
def test_a_missing_notebook_is_one_line(folder: Path, name: str) -> None:
    with pytest.raises(NotebookError, match=r"no notebook .*; give the path of an \.ipynb file"):
        run_notebook(Path(name), {}, out=folder / "out.ipynb")
    assert list(folder.iterdir()) == []


def test_a_kernel_that_is_not_installed_is_one_line(folder: Path) -> None:
    notebook = write_notebook(folder / "note.ipynb")
    text = notebook.read_text().replace('"name": "python3"', '"name": "no-such-kernel"')
    notebook.write_text(text)
    with pytest.raises(NotebookError, match="no-such-kernel") as why:
        run_notebook(notebook, {})
    assert "\n" not in str(why.value)
    assert [path.name for path in folder.iterdir()] == ["note.ipynb"]


@pytest.mark.parametrize("out", ["gone/out.ipynb", ".", "note.ipynb/out.ipynb"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    folder: Path, without_kernel: list[dict[str, Any]], out: str
) -> None:
    notebook = write_notebook(folder / "note.ipynb")
    with pytest.raises(NotebookError, match="cannot be a file; give one in a folder that exists"):
        run_notebook(notebook, {}, out=folder / out)
    assert without_kernel == []
    assert [path.name for path in folder.iterdir()] == ["note.ipynb"]


def test_a_read_only_place_is_refused_before_anything_runs(
    folder: Path, without_kernel: list[dict[str, Any]]
) -> None:
    notebook = write_notebook(folder / "note.ipynb")
    with pytest.raises(WorkspaceError, match="cannot write /proc/out.ipynb"):
        run_notebook(notebook, {}, out=Path("/proc/out.ipynb"))
    assert without_kernel == []


def test_the_notebooks_of_the_package_are_found() -> None:
    found = find_notebook("dreambooth_training")
    assert found.is_file()
    assert found.name == "dreambooth_training.ipynb"


def test_notebooks_that_pip_installed_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "share" / "colabtools" / "notebooks"
    place.mkdir(parents=True)
    (place / "extra.ipynb").touch()
    monkeypatch.setattr(headless.sys, "prefix", str(tmp_path))
    assert find_notebook("extra") == place / "extra.ipynb"
    with pytest.raises(
        NotebookError, match=r"nope\.ipynb is in none of .*install colabtools again"
    ):
        find_notebook("nope")


def test_the_demo_gives_the_embedded_model_its_pictures_and_says_where_to_look(
    tmp_path: Path, without_kernel: list[dict[str, Any]]
) -> None:
    lines = headless.demo(tmp_path / "my demo")
    workspace = str(tmp_path / "my demo")
    assert without_kernel == [
        {"workspace_folder": workspace, "session_name": "demo", "images_folder": "demo"}
    ]
    assert (tmp_path / "my demo" / "dreambooth_training.ipynb").is_file()
    assert all(workspace in line for line in lines[1:])


def test_a_demo_in_a_place_that_cannot_be_written_is_refused(
    without_kernel: list[dict[str, Any]],
) -> None:
    with pytest.raises(WorkspaceError):
        headless.demo(Path("/proc/demo"))
    assert without_kernel == []
