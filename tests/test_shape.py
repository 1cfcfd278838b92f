"""The shape of every module: what it exports, what it documents, and how long it is.

Each checker takes the folder of a package, so that a small synthetic tree can prove it fails.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "colabtools"
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def read_trees(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Each source file of the package with its syntax tree, save those that hold nothing."""
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(), str(path))
        if tree.body:
            yield path, tree


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a module, those under `if` and `try` included."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try):
                waiting.extend(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            waiting.extend(handler.body)


def bound_names(path: Path, tree: ast.Module) -> set[str]:
    """The names that a module binds; a package also holds its submodules."""
    names = set()
    for node in top_level(tree):
        if isinstance(node, Definition):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            stored = (part for part in ast.walk(node) if isinstance(part, ast.Name))
            names |= {part.id for part in stored if isinstance(part.ctx, ast.Store)}
    if path.name == "__init__.py":
        names |= {other.stem for other in path.parent.glob("*.py")}
        names |= {other.parent.name for other in path.parent.glob("*/__init__.py")}
    return names


def exported(tree: ast.Module) -> list[str] | None:
    """The literal value of `__all__`, or None without one."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))
    return None


def isort_key(name: str) -> tuple[int, list[str | int]]:
    """The order of ruff's RUF022, which `make format` applies: CONSTANTS, Classes, the rest."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def check_exports(root: Path) -> list[str]:
    """`__all__` is there, sorted, without ghosts, and holds every public class and function."""
    problems = []
    for path, tree in read_trees(root):
        where = path.relative_to(root)
        names = exported(tree)
        if names is None:
            if where.name != "__main__.py":
                problems.append(f"{where}: no __all__")
            continue
        ordered = sorted(set(names), key=isort_key)
        if names != ordered:
            problems.append(f"{where}: __all__ is not sorted; it should be {ordered}")
        ghosts = sorted(set(names) - bound_names(path, tree))
        public = {node.name for node in top_level(tree) if isinstance(node, Definition)}
        missing = sorted(name for name in public - set(names) if not name.startswith("_"))
        problems += [f"{where}: __all__ names {name}, which does not exist" for name in ghosts]
        problems += [f"{where}: {name} is public and not in __all__" for name in missing]
    return problems


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Public classes and functions, and the public methods of public classes, with their names."""
    for node in top_level(tree):
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node.name, node
            for member in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(member, Function) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


def check_docstrings(root: Path) -> list[str]:
    """Every module and public name says what it is; an `@overload` leaves it to the real one."""
    problems = []
    for path, tree in read_trees(root):
        where = path.relative_to(root)
        if ast.get_docstring(tree) is None:
            problems.append(f"{where}: no docstring")
        for name, node in public_definitions(tree):
            marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
            if ast.get_docstring(node) is None and not marks & {"overload", "override", "setter"}:
                problems.append(f"{where}:{node.lineno}: {name} has no docstring")
    return problems


def check_sizes(root: Path) -> list[str]:
    """No module over 500 lines, no function over 60, docstrings and all."""
    problems = []
    for path, tree in read_trees(root):
        where, length = path.relative_to(root), len(path.read_text().splitlines())
        if length > MAX_MODULE_LINES:
            problems.append(f"{where}: {length} lines, over {MAX_MODULE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, Function):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    problems.append(
                        f"{where}:{node.lineno}: {node.name} has {length} lines, "
                        f"over {MAX_FUNCTION_LINES}"
                    )
    return problems


CHECKS = [check_exports, check_docstrings, check_sizes]


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_keeps_the_rule(check) -> None:
    assert check(PACKAGE) == []


LAWFUL = '''"""A module."""
import json
from typing import overload

__all__ = ["LIMIT", "Thing", "json", "load", "maybe"]
LIMIT: int = 3

try:
    import maybe
except ImportError:
    maybe = None

class Thing:
    """A thing."""
    def size(self):
        """Its size."""
    def _hidden(self): ...
    def __len__(self): ...

@overload
def load(): ...
def load():
    """What is loaded."""

def _hidden(): ...
'''


def make_package(folder: Path, text: str) -> Path:
    root = folder / "pkg"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text('"""A package."""\n__all__ = ["a", "inner"]\n')
    (root / "inner" / "__init__.py").touch()
    (root / "a.py").write_text(text)
    return root


@pytest.mark.parametrize("check", CHECKS)
def test_a_lawful_package_passes(tmp_path: Path, check) -> None:
    assert check(make_package(tmp_path, LAWFUL)) == []


@pytest.mark.parametrize(
    ("check", "old", "new", "expected"),
    [
        (check_exports, '__all__ = ["LIMIT", "Thing", "json", "load", "maybe"]', "", "no __all__"),
        (check_exports, '"Thing", "json"', '"json", "Thing"', "not sorted"),
        (check_exports, '"Thing", ', '"Thing", "Thing", ', "not sorted"),
        (check_exports, '"json"', '"ghost"', "ghost, which does not exist"),
        (check_exports, '"Thing", ', "", "Thing is public and not in"),
        (check_exports, "def _hidden(): ...", "def shown(): ...", "shown is public and not in"),
        (check_exports, "    maybe = None", "    def made(): ...", "made is public"),
        (check_docstrings, '"""A module."""', "", "a.py: no docstring"),
        (check_docstrings, '"""A thing."""', "", "Thing has no docstring"),
        (check_docstrings, '"""Its size."""', "...", "Thing.size has no docstring"),
        (check_docstrings, '"""What is loaded."""', "...", "load has no docstring"),
        (check_sizes, "LIMIT: int = 3\n", "LIMIT: int = 3\n" * 490, "over 500"),
    ],
)
def test_a_breach_is_named(tmp_path: Path, check, old: str, new: str, expected: str) -> None:
    assert old in LAWFUL
    problems = check(make_package(tmp_path, LAWFUL.replace(old, new)))
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize(("lines", "allowed"), [(59, True), (60, False)])
def test_a_function_may_have_sixty_lines(tmp_path: Path, lines: int, allowed: bool) -> None:
    body = "\n".join(["    def _long(self):", *["        ..."] * lines])
    text = LAWFUL.replace("    def _hidden(self): ...", body)
    assert (check_sizes(make_package(tmp_path, text)) == []) is allowed
