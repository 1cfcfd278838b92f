"""Notebooks run by a program: parameters in, an executed notebook out."""

from __future__ import annotations

import ast
import json
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools.drive import atomic_path, open_local, write_atomic
from colabtools.errors import NotebookError
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["demo", "find_notebook", "run_notebook"]

_DEMO_SESSION = "demo"

# By these `env.where` knows a person's page or editor; the kernel of a program has none, whoever
# started the program.
_FRONT_END_VARIABLES = ("JPY_SESSION_NAME", "VSCODE_CWD", "VSCODE_PID")


def find_notebook(name: str) -> Path:
    """Return a notebook that comes with the package, from the checkout or from where pip put it.

    Raises:
        NotebookError: it is in neither place.
    """
    file = f"{name}.ipynb"
    places = (
        Path(__file__).parents[1] / "notebooks",
        Path(sys.prefix) / "share" / "colabtools" / "notebooks",
    )
    for place in places:
        if (place / file).is_file():
            return place / file
    searched = ", ".join(map(str, places))
    raise NotebookError(f"{file} is in none of {searched}; install colabtools again")


def run_notebook(
    notebook: Path,
    parameters: Mapping[str, str],
    *,
    out: Path | None = None,
    keep_failed: bool = False,
) -> Path:
    """Run a notebook from top to bottom and return the executed copy.

    What the cells print goes to stderr while they run.

    Args:
        notebook: the file to run; it is only read.
        parameters: values for its parameters cell, as text; each is read as the kind of value
            that the default is.
        out: the executed copy; `<name>.out.ipynb` in the current folder if not given.
        keep_failed: keep the copy of a run that failed.

    Raises:
        NotebookError: there is no such notebook or parameter, or a cell failed.
        WorkspaceError: the executed copy cannot be written.
    """
    target = out or Path(f"{notebook.stem}.out.ipynb")
    if target.is_dir() or not target.parent.is_dir():
        raise NotebookError(f"{str(target)!r} cannot be a file; give one in a folder that exists")
    values = _typed(notebook, parameters, _known_parameters(notebook))
    with atomic_path(target) as partial:
        # A place that cannot be written to shall fail now, not after the run.
        partial.touch()
        # papermill picks its writer by the suffix.
        running = partial.with_suffix(".ipynb")
        try:
            with _without_front_end():
                _execute(notebook, running, values)
            _name_output(running, target)
            running.replace(partial)
        except NotebookError:
            if keep_failed and running.is_file():
                _name_output(running, target)
                running.replace(target)
            raise
        finally:
            running.unlink(missing_ok=True)
    return target


def _known_parameters(notebook: Path) -> dict[str, Any]:
    """Return papermill's description of each parameter of a notebook."""
    import papermill

    if not notebook.is_file():
        raise NotebookError(f"no notebook {str(notebook)!r}; give the path of an .ipynb file")
    try:
        return dict(papermill.inspect_notebook(str(notebook)))
    except Exception as error:  # nbformat and papermill have no class in common for this
        raise NotebookError(
            f"{notebook} is not a notebook that can be run ({_brief(error)}); "
            "open it in Jupyter or Colab and save it again"
        ) from error


def _execute(notebook: Path, running: Path, values: Mapping[str, Any]) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            str(notebook),
            str(running),
            dict(values),
            progress_bar=False,
            stdout_file=sys.stderr,
            stderr_file=sys.stderr,
            extra_arguments=["--log-level=ERROR"],
        )
    except PapermillExecutionError as error:
        raise NotebookError(_failed_step(notebook, error)) from error
    except OSError:
        raise  # the disk, which `atomic_path` explains
    except Exception as error:  # no such kernel, or one that died: again no class in common
        raise NotebookError(
            f"{notebook.name} did not run to its end ({_brief(error)}); "
            "if the kernel died, it most often ran out of memory"
        ) from error


@contextmanager
def _without_front_end() -> Iterator[None]:
    """Hide from the kernel, which inherits the environment, that a person is watching us."""
    hidden = {name: os.environ.pop(name) for name in _FRONT_END_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _name_output(executed: Path, target: Path) -> None:
    """Correct what papermill noted as the place of the executed copy."""
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    with suppress(KeyError, TypeError):
        notebook["metadata"]["papermill"]["output_path"] = str(target)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    write_atomic(executed, f"{text}\n".encode("utf-8", "surrogatepass"))


def _typed(
    notebook: Path, parameters: Mapping[str, str], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Return parameters as the kind of value that the notebook's default has."""
    if unknown := sorted(parameters.keys() - known.keys()):
        names = ", ".join(sorted(known)) or "none"
        raise NotebookError(f"{notebook.name} has no parameter {unknown[0]!r}; it has {names}")
    return {name: _value(name, text, known[name]["default"]) for name, text in parameters.items()}


def _value(name: str, text: str, default: str) -> Any:
    """Read a value: text stays text where the default is text other than "auto"."""
    usual = _literal(default)
    if isinstance(usual, bool):
        try:
            return {"false": False, "true": True}[text.lower()]
        except KeyError:
            raise NotebookError(f"{name} is {text!r}; give True or False") from None
    if isinstance(usual, str) and usual != "auto":
        return text
    return _literal(text)


def _literal(text: str) -> Any:
    """Return the Python value that a text spells, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _failed_step(notebook: Path, error: Any) -> str:
    """Return what went wrong, and in which step."""
    lines = error.source.splitlines()
    title = next((line for line in lines if line.startswith("# @title")), "")
    step = title.removeprefix("# @title").strip() or f"cell {error.exec_count}"
    reason = " ".join(str(error.evalue).split()) or error.ename
    return f"{notebook.name}, step {step!r}: {reason}"


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def demo(out: Path) -> list[str]:
    """Run the notebooks on the embedded models, and return lines that say where to look.

    Raises:
        NotebookError: a notebook failed.
        WorkspaceError: the folder cannot be used.
    """
    notebook = find_notebook("dreambooth_training")
    workspace = open_local(out)
    get_logger(__name__).info(
        "DreamBooth training on the embedded model, about two minutes on two cores"
    )
    executed = run_notebook(
        notebook,
        {
            "workspace_folder": str(workspace.root),
            "session_name": _DEMO_SESSION,
            "images_folder": "demo",
        },
        out=workspace.root / "dreambooth_training.ipynb",
    )
    session = workspace.sessions_dir / _DEMO_SESSION
    return [
        "The demo is done. Where to look:",
        f"  before and after   {session / 'samples' / 'grid.png'}",
        f"  loss curve         {session / 'logs' / 'loss.png'}",
        f"  exported model     {session / f'{_DEMO_SESSION}.safetensors'}",
        f"  executed notebook  {executed}",
    ]
