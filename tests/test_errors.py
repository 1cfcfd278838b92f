"""The error tree."""

from __future__ import annotations

import ast
import inspect
import pickle

import pytest

from colabtools import errors

BUILTINS = {
    "CheckpointError": ValueError,
    "ConfigError": ValueError,
    "DatasetError": ValueError,
    "ImageError": ValueError,
    "MissingDependencyError": ImportError,
    "MissingSecretError": LookupError,
    "ModelError": ValueError,
    "MountError": OSError,
    "NotebookError": RuntimeError,
    "ProcessError": RuntimeError,
    "SessionBusyError": ValueError,
    "SessionError": ValueError,
    "StorageFullError": OSError,
    "StorageLostError": OSError,
    "TrainingError": RuntimeError,
    "WorkspaceError": OSError,
}


def test_exports_are_exactly_the_classes_of_the_tree() -> None:
    classes = {name for name, item in vars(errors).items() if inspect.isclass(item)}
    assert classes == set(errors.__all__) == {*BUILTINS, "ColabToolsError"}


@pytest.mark.parametrize("name", BUILTINS)
def test_each_class_is_caught_by_the_root_and_by_its_builtin(name: str) -> None:
    error = getattr(errors, name)("disk 'x' is full: free some room")
    assert isinstance(error, errors.ColabToolsError)
    assert isinstance(error, BUILTINS[name])
    assert str(error) == "disk 'x' is full: free some room"


@pytest.mark.parametrize("name", BUILTINS)
def test_the_tree_in_the_docstring_names_each_class_with_its_builtin(name: str) -> None:
    assert f"{name} ({BUILTINS[name].__name__})" in (errors.__doc__ or "")


def test_a_process_error_keeps_its_log_tail_through_pickle() -> None:
    error = pickle.loads(pickle.dumps(errors.ProcessError("it ended", log_tail="boom\nbang")))
    assert (str(error), error.log_tail) == ("it ended", "boom\nbang")


def test_the_ground_imports_nothing_of_ours() -> None:
    tree = ast.parse(inspect.getsource(errors))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert modules == ["__future__"]
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
