"""The contract every notebook keeps; each rule is a function from a notebook to what is wrong.

A notebook that keeps the contract is built below, and one that breaks it for every rule.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
BLOB = "https://colab.research.google.com/github/colabtools/colabtools/blob/main/notebooks/"
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
MAX_STEP_LINES = 15
MAX_STEP_CALLS = 3
TITLE = re.compile(r"# @title (\d+)\. [A-Z][a-z]+ \S")
# Colab's own; another version of one breaks the running kernel or its CUDA libraries.
NEVER_INSTALLED = {"numpy", "torch", "torchaudio", "torchvision"}
LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.comprehension)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_settings(cell: NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def step_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in code_cells(notebook) if not is_settings(cell)]


def parse_cell(cell: NotebookNode) -> ast.Module:
    """The syntax tree of a cell, its `%` and `!` lines blanked in place."""
    lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in cell.source.splitlines()]
    return ast.parse("\n".join(lines))


def settings_names(notebook: NotebookNode) -> list[str]:
    names = []
    for cell in filter(is_settings, code_cells(notebook)):
        for node in parse_cell(cell).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def headings(text: str) -> list[str]:
    """The H1 lines of a Markdown text, those inside code fences left out."""
    return re.findall(r"(?m)^# .+$", re.sub(r"(?ms)^```.*?^```", "", text))


def check_format(notebook: NotebookNode, _file: str) -> Iterator[str]:
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {error.message}"


def check_head(notebook: NotebookNode, file: str) -> Iterator[str]:
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown":
        yield "the first cell is not text"
        return
    if len(headings(first.source)) != 1:
        yield "the first cell does not hold exactly one H1"
    others = [cell.source for cell in notebook.cells[1:] if cell.cell_type == "markdown"]
    if any(headings(source) for source in others):
        yield "a later cell holds another H1"
    if f"]({BLOB}{file})" not in first.source and f'href="{BLOB}{file}"' not in first.source:
        yield f"no Open-in-Colab link to {BLOB}{file}"
    if BADGE_IMAGE not in first.source:
        yield "no Open-in-Colab badge"


def check_overview(notebook: NotebookNode, _file: str) -> Iterator[str]:
    kinds = [cell.cell_type for cell in notebook.cells]
    before_code = kinds.index("code") if "code" in kinds else len(kinds)
    text = "\n".join(cell.source for cell in notebook.cells[:before_code])
    yield from (
        f"the overview before the first code says no {word!r}"
        for word in ("minute", "GPU")
        if word not in text
    )


def check_settings(notebook: NotebookNode, _file: str) -> Iterator[str]:
    settings = [cell for cell in code_cells(notebook) if is_settings(cell)]
    if len(settings) != 1:
        yield f"{len(settings)} cells are tagged `parameters`, not one"
    for cell in step_cells(notebook):
        if "# @param" in cell.source:
            yield "a `# @param` stands outside the settings cell"
    for cell in settings:
        for node in parse_cell(cell).body:
            line = cell.source.splitlines()[node.lineno - 1]
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                yield f"the settings cell does more than set values: {line}"
            elif not is_literal(node.value):
                yield f"a setting is not a plain value: {line}"
            elif "# @param" not in line:
                yield f"a setting has no `# @param` on its line: {line}"


def is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def check_settings_used(notebook: NotebookNode, _file: str) -> Iterator[str]:
    cells = code_cells(notebook)
    last = max((index for index, cell in enumerate(cells) if is_settings(cell)), default=0)
    read = set()
    for cell in cells[last + 1 :]:
        names = (node for node in ast.walk(parse_cell(cell)) if isinstance(node, ast.Name))
        read |= {node.id for node in names if isinstance(node.ctx, ast.Load)}
    unused = [name for name in settings_names(notebook) if name not in read]
    yield from (f"the setting {name} is used in no later cell" for name in unused)


def check_titles(notebook: NotebookNode, _file: str) -> Iterator[str]:
    for number, cell in enumerate(step_cells(notebook), start=1):
        line = (cell.source.splitlines() or [""])[0]
        found = TITLE.match(line)
        if found is None:
            yield f"step {number} does not begin `# @title {number}. Verb object`: {line!r}"
        elif int(found[1]) != number:
            yield f"step {number} is numbered {found[1]}"


def check_size(notebook: NotebookNode, _file: str) -> Iterator[str]:
    for number, cell in enumerate(step_cells(notebook), start=1):
        lines = len(cell.source.splitlines())
        if lines > MAX_STEP_LINES:
            yield f"step {number} has {lines} lines, over {MAX_STEP_LINES}"


def check_plain(notebook: NotebookNode, _file: str) -> Iterator[str]:
    """A step has no definition, no loop, no shell, no change of folder, and no magic but %pip."""
    for number, cell in enumerate(step_cells(notebook), start=1):
        for line in cell.source.splitlines():
            if re.match(r"\s*([\w, ]+=\s*)?!", line) or "get_ipython" in line:
                yield f"step {number} runs a shell: {line.strip()}"
            elif re.match(r"\s*%(?!pip\b)", line):
                yield f"step {number} uses a magic: {line.strip()}"
        if not re.search(r"(?m)^\s*[\w, ]+=\s*[!%]", cell.source):
            yield from (f"step {number} {what}" for what in forbidden_nodes(parse_cell(cell)))


def forbidden_nodes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            yield "holds a definition"
        elif isinstance(node, LOOPS):
            yield "holds a loop"
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in ("chdir", "system"):
                yield f"calls {name}"


def check_calls(notebook: NotebookNode, _file: str) -> Iterator[str]:
    """A step makes few calls into the package: to its names, or to what such a call returned."""
    ours: set[str] = set()
    for number, cell in enumerate(step_cells(notebook), start=1):
        if re.search(r"(?m)^\s*[\w, ]+=\s*[!%]", cell.source):
            continue
        tree = parse_cell(cell)
        ours |= set(imported_names(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and root_name(node.value) in ours:
                stored = (part for target in node.targets for part in ast.walk(target))
                ours |= {part.id for part in stored if isinstance(part, ast.Name)}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        count = sum(root_name(call) in ours for call in calls)
        if count > MAX_STEP_CALLS:
            yield f"step {number} makes {count} calls into colabtools, over {MAX_STEP_CALLS}"


def imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] == "colabtools"]
            yield from ((alias.asname or "colabtools") for alias in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("colabtools"):
            yield from (alias.asname or alias.name for alias in node.names)


def root_name(node: ast.expr) -> str | None:
    """The name a chain begins with: `a.b(1)[2].c()` -> `a`."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Attribute | ast.Subscript | ast.Await):
            node = node.value
        else:
            return None
    return node.id


def check_pip(notebook: NotebookNode, _file: str) -> Iterator[str]:
    """Specifiers are quoted (a bare `>=` is a shell redirect), and Colab's core stays as it is."""
    for cell in code_cells(notebook):
        for line in re.findall(r"(?m)^\s*%pip\s+(.*)$", cell.source):
            for word in re.findall(r"\"[^\"]*\"|'[^']*'|\S+", line):
                bare = word.strip("\"'")
                name = (re.match(r"[\w.-]*", bare) or [""])[0].lower()
                if name in NEVER_INSTALLED:
                    yield f"%pip installs {name}"
                if word == bare and not word.startswith("-") and re.search(r"[<>=~!;\[@]", word):
                    yield f"a %pip specifier is not quoted: {word}"


def check_stripped(notebook: NotebookNode, _file: str) -> Iterator[str]:
    for cell in code_cells(notebook):
        if cell.outputs or cell.execution_count is not None:
            yield f"a cell was saved with its output: {cell.source.splitlines()[:1]}"


def check_metadata(notebook: NotebookNode, _file: str) -> Iterator[str]:
    colab = notebook.metadata.get("colab", {})
    if colab.get("toc_visible") is not True:
        yield "metadata: colab.toc_visible is not true"
    if notebook.metadata.get("accelerator") != "GPU":
        yield "metadata: accelerator is not GPU"
    if not colab.get("gpuType"):
        yield "metadata: colab.gpuType is missing"


Check = Callable[[NotebookNode, str], Iterator[str]]
CHECKS: list[Check] = [
    check_format,
    check_head,
    check_overview,
    check_settings,
    check_settings_used,
    check_titles,
    check_size,
    check_plain,
    check_calls,
    check_pip,
    check_stripped,
    check_metadata,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_keeps_the_contract(path: Path, check: Check) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert list(check(notebook, path.name)) == []


# What follows proves that each check can fail, and that a lawful notebook passes all of them.

FILE = "example.ipynb"
HEAD = f"# Example\n\n[![Open In Colab]({BADGE_IMAGE})]({BLOB}{FILE})"
INSTALL = '# @title 1. Install colabtools\n%pip install -q "colabtools[vit]>=0.1" -r some.txt'
SETTINGS = '# @title Settings\nname = "cat"  # @param {type:"string"}\nsteps = 3  # @param [3, 9]'
TRAIN = """\
# @title 2. Train model
from colabtools import vit
session = vit.open_session(name)
session.train(steps)
session.show()"""


def lawful() -> NotebookNode:
    new = nbformat.v4
    return new.new_notebook(
        cells=[
            new.new_markdown_cell(HEAD),
            new.new_markdown_cell(
                "Trains a model in two minutes.\nAny GPU will do.\n```\n# no\n```"
            ),
            new.new_code_cell(INSTALL),
            new.new_code_cell(SETTINGS, metadata={"tags": ["parameters"]}),
            new.new_code_cell(TRAIN),
        ],
        metadata={"accelerator": "GPU", "colab": {"toc_visible": True, "gpuType": "T4"}},
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_lawful_notebook_passes(check: Check) -> None:
    assert list(check(lawful(), FILE)) == []


@pytest.mark.parametrize(
    ("check", "cell", "old", "new", "expected"),
    [
        (check_head, 0, "# Example", "Example", "exactly one H1"),
        (check_head, 0, "# Example", "# Example\n# Again", "exactly one H1"),
        (check_head, 1, "Trains", "# Trains\nTrains", "another H1"),
        (check_head, 0, f"/{FILE}", "/other.ipynb", "link to"),
        (check_head, 0, "blob/main", "blob/dev", "link to"),
        (check_head, 0, BADGE_IMAGE, "badge.svg", "no Open-in-Colab badge"),
        (check_overview, 1, "minutes", "moments", "no 'minute'"),
        (check_overview, 1, "GPU", "card", "no 'GPU'"),
        (check_settings, 4, "session.show()", "x = 1  # @param", "outside the settings"),
        (check_settings, 3, '"cat"', "input()", "not a plain value"),
        (check_settings, 3, "steps = 3", "import os", "more than set values"),
        (check_settings, 3, "# @param [3, 9]", "", "no `# @param`"),
        (check_settings, 3, '"cat"  # @param', '(\n"cat")  # @param', "no `# @param` on its line"),
        (check_settings_used, 4, "train(steps)", "train(9)", "steps is used in no"),
        (check_settings_used, 4, "train(steps)", "train(steps=9)", "steps is used in no"),
        (check_titles, 4, "2. Train model", "3. Train model", "numbered 3"),
        (check_titles, 4, "2. Train model", "2. Train", "does not begin"),
        (check_titles, 4, "# @title 2. Train model\n", "", "does not begin"),
        (check_size, 4, "session.show()", "session.show()\n" * 12, "16 lines"),
        (check_plain, 4, "session.show()", "def f(): ...", "definition"),
        (check_plain, 4, "session.show()", "class C: ...", "definition"),
        (check_plain, 4, "session.show()", "for x in session: x.show()", "loop"),
        (check_plain, 4, "session.show()", "while steps: ...", "loop"),
        (check_plain, 4, "session.show()", "[x for x in session]", "loop"),
        (check_plain, 4, "session.show()", "if steps:\n    !ls", "shell"),
        (check_plain, 4, "session.show()", "files = !ls", "shell"),
        (check_plain, 4, "session.show()", "get_ipython().system('ls')", "shell"),
        (check_plain, 4, "session.show()", "%cd /content", "magic"),
        (check_plain, 4, "# @title 2", "%%bash\n# @title 2", "magic"),
        (check_plain, 4, "session.show()", "import os; os.chdir('/')", "chdir"),
        (check_plain, 4, "session.show()", "from os import chdir; chdir('/')", "chdir"),
        (check_calls, 4, "session.show()", "session.show()\nvit.evaluate()", "4 calls"),
        (check_calls, 4, "session.show()", "session.show().save()", "4 calls"),
        (check_calls, 4, "session.show()", "print(vit.a(), vit.b())", "4 calls"),
        (check_pip, 2, '"colabtools[vit]>=0.1"', "colabtools>=0.1", "not quoted"),
        (check_pip, 2, '"colabtools[vit]>=0.1"', "colabtools[vit]", "not quoted"),
        (check_pip, 2, "-r some.txt", "-U torch", "installs torch"),
        (check_pip, 2, "install -q", "-q install Torch", "installs torch"),
        (check_pip, 2, "-r some.txt", '"numpy<3"', "installs numpy"),
    ],
)
def test_a_changed_cell_is_named(
    check: Check, cell: int, old: str, new: str, expected: str
) -> None:
    notebook = lawful()
    assert old in notebook.cells[cell].source
    notebook.cells[cell].source = notebook.cells[cell].source.replace(old, new)
    problems = list(check(notebook, FILE))
    assert any(expected in problem for problem in problems), problems


def drop_first(notebook: NotebookNode) -> None:
    del notebook.cells[0]
    del notebook.cells[0]


def two_settings(notebook: NotebookNode) -> None:
    notebook.cells.append(copy.deepcopy(notebook.cells[3]))


def settings_last(notebook: NotebookNode) -> None:
    notebook.cells.append(notebook.cells.pop(3))


def keep_output(notebook: NotebookNode) -> None:
    notebook.cells[4].outputs = [nbformat.v4.new_output("stream", text="hello")]


def keep_count(notebook: NotebookNode) -> None:
    notebook.cells[4].execution_count = 1


def no_outputs_field(notebook: NotebookNode) -> None:
    del notebook.cells[4]["outputs"]


def no_settings(notebook: NotebookNode) -> None:
    notebook.cells[3].metadata.tags = ["settings"]


def no_contents(notebook: NotebookNode) -> None:
    notebook.metadata.colab.toc_visible = "true"


def no_accelerator(notebook: NotebookNode) -> None:
    del notebook.metadata["accelerator"]


def no_gpu_type(notebook: NotebookNode) -> None:
    notebook.metadata.colab.gpuType = ""


@pytest.mark.parametrize(
    ("check", "change", "expected"),
    [
        (check_format, no_outputs_field, "not a valid notebook"),
        (check_head, drop_first, "not text"),
        (check_overview, drop_first, "no 'minute'"),
        (check_settings, two_settings, "2 cells are tagged"),
        (check_settings, no_settings, "0 cells are tagged"),
        (check_settings_used, settings_last, "name is used in no later"),
        (check_stripped, keep_output, "saved with its output"),
        (check_stripped, keep_count, "saved with its output"),
        (check_metadata, no_contents, "toc_visible"),
        (check_metadata, no_accelerator, "accelerator"),
        (check_metadata, no_gpu_type, "gpuType"),
    ],
)
def test_a_changed_notebook_is_named(
    check: Check, change: Callable[[NotebookNode], None], expected: str
) -> None:
    notebook = lawful()
    change(notebook)
    problems = list(check(notebook, FILE))
    assert any(expected in problem for problem in problems), problems


def test_every_check_has_a_notebook_that_breaks_it() -> None:
    broken = set()
    for test in (test_a_changed_cell_is_named, test_a_changed_notebook_is_named):
        marks = test.pytestmark
        broken |= {case[0] for mark in marks for case in mark.args[1]}
    assert broken == set(CHECKS)
