"""The command line: the same verbs, options and functions as the notebooks.

Results go to stdout, everything else to stderr. Exit 0 done, 1 an error of ours in one line,
2 usage.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import re
import sys
import types
import typing
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import colabtools
from colabtools import drive, headless, report
from colabtools.checkpoints.convert import ConvertConfig, convert
from colabtools.dreambooth.config import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
)
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import ColabToolsError
from colabtools.storage import size_text
from colabtools.vit.config import ClassifyConfig, EmbedConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    _Step = Callable[[drive.Workspace, str, Any], object]
    _Verb = Callable[[drive.Workspace, argparse.Namespace], object]

__all__ = ["main"]

_INSTALL = "install the extras: pip install 'colabtools[dreambooth,notebook,vit]'"
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)[eE][+-]?\d+|-inf|-nan", re.IGNORECASE)
_NUMBERS = {int: "a whole number", float: "a number"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    # Not `set_defaults`: the verbs share these options, and each would set its default once more,
    # over what was said before the verb.
    args = argparse.Namespace(workspace="workspace", debug=False, quiet=False)
    _parser().parse_args(_dashed(sys.argv[1:] if argv is None else argv), args)
    report.setup_logging(debug=args.debug, quiet=args.quiet)
    try:
        args.run(args)
    except (ColabToolsError, ImportError, OSError) as error:
        if args.debug:
            raise
        missing = isinstance(error, ImportError) and not isinstance(error, ColabToolsError)
        advice = f"; {_INSTALL}" if missing else ""
        sys.stderr.write(f"colabtools: {' '.join(str(error).split())}{advice}\n")
        return 1
    except KeyboardInterrupt as stop:
        # Training says what it saved; a plain Ctrl-C says nothing.
        sys.stderr.write(f"colabtools: {' '.join(str(stop).split()) or 'interrupted'}\n")
        return 130
    return 0


def _dashed(argv: Sequence[str]) -> list[str]:
    """Return the arguments with options by underscores, as notebooks spell fields, by dashes.

    A negative number in scientific notation is tied to its option: argparse would take it for one.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    option = re.compile(r"^--\w+(?=$|=)")
    words: list[str] = []
    for word in argv[:end]:
        if _NEGATIVE.fullmatch(word) and words and re.fullmatch(r"--[\w-]+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(option.sub(lambda match: match[0].replace("_", "-"), word))
    return [*words, *argv[end:]]


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    # Suppressed defaults let the same options stand before and after the verb.
    add = functools.partial(shared.add_argument, default=argparse.SUPPRESS)
    text = "where sessions live: a folder, MyDrive or Shareddrives/NAME (default: ./workspace)"
    add("--workspace", metavar="DIR", help=text)
    add("--debug", action="store_true", help="full log and tracebacks")
    add("--quiet", action="store_true", help="errors and results only")
    about, *_ = (colabtools.__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="colabtools", description=about, parents=[shared])
    version = f"colabtools {colabtools.__version__}"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(verbs, shared)
    _add_demo(verbs, shared)
    _add_convert(verbs, shared)
    _add_session(verbs, shared)
    _add_inspect(verbs, shared)
    _add_dreambooth(verbs, shared)
    _add_vit(verbs, shared)
    return parser


def _add_run(verbs: Any, shared: argparse.ArgumentParser) -> None:
    run = verbs.add_parser("run", parents=[shared], help="run a notebook headless")
    run.add_argument(
        "notebook", type=Path, metavar="NOTEBOOK", help="a notebook with a parameters cell"
    )
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    run.add_argument("-p", **pair, help="set a parameter")
    text = "the executed notebook (default: <name>.out.ipynb)"
    run.add_argument("--out", type=Path, metavar="FILE", help=text)

    def call(args: argparse.Namespace) -> None:
        parameters, keep = dict(args.p), args.debug
        _print(headless.run_notebook(args.notebook, parameters, out=args.out, keep_failed=keep))

    run.set_defaults(run=call)


def _add_demo(verbs: Any, shared: argparse.ArgumentParser) -> None:
    text = "run the notebooks on the embedded models"
    demo = verbs.add_parser("demo", parents=[shared], help=text)
    text = "where to (default: ./demo)"
    demo.add_argument("--out", type=Path, metavar="DIR", default=Path("demo"), help=text)
    demo.set_defaults(run=lambda args: _print(headless.demo(args.out)))


def _add_convert(verbs: Any, shared: argparse.ArgumentParser) -> None:
    text = "convert a model between a folder, .safetensors and .ckpt"
    verb = verbs.add_parser("convert", parents=[shared], help=text, description=text)
    verb.add_argument("src", metavar="SRC", help="a folder in diffusers' layout, or a file")
    text = "a name in .safetensors or .ckpt for one file, any other for a folder"
    verb.add_argument("dst", metavar="DST", help=text)
    _add_fields(verb, ConvertConfig)

    def call(args: argparse.Namespace) -> None:
        settings = {field.name: getattr(args, field.name) for field in fields(ConvertConfig)}
        _print(convert(args.src, args.dst, ConvertConfig(**settings)).path)

    verb.set_defaults(run=call)


def _add_session(verbs: Any, shared: argparse.ArgumentParser) -> None:
    text = "list, move and delete training sessions"
    room = verbs.add_parser("session", help=text, description=text)
    steps = room.add_subparsers(metavar="VERB", required=True)

    def add(verb: str, call: _Verb, text: str, *operands: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser
        parser = steps.add_parser(verb, parents=[shared], help=text, description=text)
        for operand in operands:
            parser.add_argument(operand.lower(), metavar=operand)

        def run(args: argparse.Namespace) -> None:
            with _open_workspace(args.workspace) as workspace:
                _print(call(workspace, args))

        parser.set_defaults(run=run)
        return parser

    listed = add("list", _session_list, "list all sessions")
    add("create", _session_create, "make an empty session", "NAME")
    shown = add("show", _session_show, "show one session", "NAME")
    for parser in (listed, shown):
        parser.add_argument("--json", action="store_true", help="print JSON")
    text = "make a session of a folder or a zip: another session, or photos with captions"
    brought = add("import", _session_import, text, "SOURCE")
    brought.add_argument("--name", default="", help="the session's name (default: the source's)")
    text = "write a session as one zip, which imports to the same bytes"
    sent = add("export", _session_export, text, "NAME")
    text = "a .zip, or a folder for it (default: the workspace)"
    sent.add_argument("--to", metavar="PATH", default="", help=text)
    add("delete", _session_delete, "move a session to the workspace's trash", "NAME")
    add("empty-trash", _session_empty_trash, "remove deleted sessions for good")
    text = "take a session from a runtime on another machine that is gone for good"
    add("release", _session_release, text, "NAME")


def _add_inspect(verbs: Any, shared: argparse.ArgumentParser) -> None:
    text = "say what a model file or folder is, without loading it"
    verb = verbs.add_parser("inspect", parents=[shared], help=text, description=text)
    text = "a .safetensors, .ckpt, .pt or .bin file, or a folder"
    verb.add_argument("file", metavar="FILE", help=text)
    verb.add_argument("--json", action="store_true", help="as JSON")

    def call(args: argparse.Namespace) -> None:
        from colabtools.checkpoints.inspect import inspect as inspect_weights

        found = inspect_weights(args.file)
        _print(found.to_json() if args.json else found.table())

    verb.set_defaults(run=call)


def _add_dreambooth(verbs: Any, shared: argparse.ArgumentParser) -> None:
    text = "train Stable Diffusion on a handful of photos"
    pillar = verbs.add_parser("dreambooth", help=text, description=text)
    steps = pillar.add_subparsers(metavar="VERB", required=True)

    def add(verb: str, config: type[Any], call: _Step, text: str) -> None:
        parser = steps.add_parser(verb, parents=[shared], help=text, description=text)
        parser.add_argument("--session", required=True, metavar="NAME", help="the session's name")
        _add_fields(parser, config)

        def run(args: argparse.Namespace) -> None:
            names = [field.name for field in fields(config)]
            settings = config(**{name: getattr(args, name) for name in names})
            with _open_workspace(args.workspace) as workspace:
                _print(call(workspace, args.session, settings))

        parser.set_defaults(run=run)

    add("prepare", PrepareConfig, _prepare, "make photos upright pictures with captions")
    add("train", TrainConfig, _train, "train, or go on where a run was stopped")
    add("generate", GenerateConfig, _generate, "draw with the trained session")
    add("evaluate", EvaluateConfig, _evaluate, "judge subject and prompts by DINO and CLIP")
    add("export", ExportConfig, _export, "write the trained model as one file")


def _add_vit(verbs: Any, shared: argparse.ArgumentParser) -> None:
    text = "classify, embed and search pictures with a vision transformer"
    pillar = verbs.add_parser("vit", help=text, description=text)
    steps = pillar.add_subparsers(metavar="VERB", required=True)

    def add(verb: str, config: type[Any], call: Callable[[Any], object], text: str) -> None:
        """Add a verb; what its config calls `src` is an operand."""
        parser = steps.add_parser(verb, parents=[shared], help=text, description=text)
        parser.add_argument("src", metavar="SRC", help=_field_texts(config)["src"])
        _add_fields(parser, config, but=("src",))

        def run(args: argparse.Namespace) -> None:
            names = [field.name for field in fields(config)]
            _print(call(config(**{name: getattr(args, name) for name in names})))

        parser.set_defaults(run=run)

    add("classify", ClassifyConfig, _classify, "name what each picture shows, in one table")
    add("embed", EmbedConfig, _embed, "make a vector of each picture, in one folder")


@contextmanager
def _open_workspace(path: str) -> Iterator[drive.Workspace]:
    """Open the workspace; one that was made for a command that failed and left it empty goes."""
    existed = _exists(path)
    workspace = drive.mount(path)
    try:
        yield workspace
    except BaseException:
        # Of a place in Drive, whose path is another than the text, nothing is taken away.
        if not existed and workspace.root == Path(path).expanduser().absolute():
            with suppress(OSError):
                workspace.root.rmdir()
        raise


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # `open_local` explains
        return True


def _session_list(workspace: drive.Workspace, args: argparse.Namespace) -> object:
    from colabtools.dreambooth.shelf import list_sessions

    found = list_sessions(workspace)
    if args.json:
        return _json([summary.as_json() for summary in found])
    if not found:
        report.get_logger(__name__).info("no sessions in %s", workspace.sessions_dir)
    return [summary.line() for summary in found]


def _session_create(workspace: drive.Workspace, args: argparse.Namespace) -> object:
    from colabtools.dreambooth.session import create_session

    return create_session(workspace, args.name).folder


def _session_show(workspace: drive.Workspace, args: argparse.Namespace) -> object:
    from colabtools.dreambooth.shelf import show_session

    summary = show_session(workspace, args.name)
    return _json(summary.as_json()) if args.json else summary.lines()


def _session_import(workspace: drive.Workspace, args: argparse.Namespace) -> object:
    from colabtools.dreambooth.transfer import import_session

    imported = import_session(workspace, args.source, name=args.name)
    if imported.left_out:
        report.get_logger(__name__).warning(
            "no part of a session and left out: %s", ", ".join(imported.left_out)
        )
    return imported.session.folder


def _session_export(workspace: drive.Workspace, args: argparse.Namespace) -> object:
    from colabtools.dreambooth.transfer import export_session

    return export_session(workspace, args.name, args.to).path


def _session_delete(workspace: drive.Workspace, args: argparse.Namespace) -> object:
    from colabtools.dreambooth.trash import delete_session

    deleted = delete_session(workspace, args.name)
    report.get_logger(__name__).info(
        "%s are free once the trash is emptied: colabtools session empty-trash; to bring it back: "
        "colabtools session import %r --name %r",
        *(size_text(deleted.size_bytes), str(deleted.place), deleted.name),
    )
    return deleted.place


def _session_empty_trash(workspace: drive.Workspace, args: argparse.Namespace) -> object:
    from colabtools.dreambooth.trash import empty_trash

    emptied = empty_trash(workspace)
    return f"{emptied.sessions} sessions removed, {size_text(emptied.size_bytes)}"


def _session_release(workspace: drive.Workspace, args: argparse.Namespace) -> object:
    from colabtools.dreambooth.session import release_session

    return release_session(workspace, args.name).folder


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


# Torch and diffusers take seconds to import, so each verb imports its own module when it runs.


def _prepare(workspace: drive.Workspace, session: str, config: Any) -> object:
    from colabtools.dreambooth.dataset import prepare

    prepared = prepare(workspace, session, config)
    return [prepared.session.instance_images_dir, prepared.contact_sheet]


def _train(workspace: drive.Workspace, session: str, config: Any) -> object:
    from colabtools.dreambooth.train import train

    trained = train(workspace, session, config)
    return [trained.weights.folder, trained.loss_curve]


def _generate(workspace: drive.Workspace, session: str, config: Any) -> object:
    from colabtools.dreambooth.generate import generate

    generated = generate(workspace, session, config)
    return [*generated.pictures, generated.grid]


def _evaluate(workspace: drive.Workspace, session: str, config: Any) -> object:
    from colabtools.dreambooth.evaluate import evaluate

    evaluated = evaluate(workspace, session, config)
    return [evaluated.report, evaluated.sheet, evaluated.chart]


def _export(workspace: drive.Workspace, session: str, config: Any) -> object:
    from colabtools.dreambooth.export import export

    return [file.path for file in export(workspace, session, config)]


def _classify(config: Any) -> object:
    from colabtools.vit.classify import classify

    return classify(config).line()


def _embed(config: Any) -> object:
    from colabtools.vit.embed import embed

    return embed(config).line()


def _print(result: object) -> None:
    lines = result if isinstance(result, list) else [result]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _add_fields(
    parser: argparse.ArgumentParser, config: type[Any], *, but: Sequence[str] = ()
) -> None:
    """Add one option for each field of a config, with its default and its docstring's text."""
    hints = typing.get_type_hints(config)
    texts = _field_texts(config)
    for field in (field for field in fields(config) if field.name not in but):
        options: dict[str, Any] = {"dest": field.name, "help": texts.get(field.name, "")}
        if field.default is MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
            options["help"] += f" (default: {_default_text(field.default)})"
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, **options, **_value_options(hints[field.name], field.name))


def _default_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text.replace("%", "%%") or "none"


def _value_options(hint: Any, name: str) -> dict[str, Any]:
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    metavar = name.upper()
    if typing.get_origin(hint) is tuple:
        # The config takes texts apart and checks the items.
        return {"nargs": "+", "metavar": metavar}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        number = next(kind for kind in typing.get_args(hint) if kind in _NUMBERS)
        return {"type": _parse(number, auto=True), "metavar": metavar}
    return {"type": _parse(hint), "metavar": metavar}


def _parse(kind: Any, *, auto: bool = False) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if kind not in _NUMBERS or (auto and text == "auto"):
            return text
        try:
            return kind(text)
        except ValueError:
            choice = " or auto" if auto else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {_NUMBERS[kind]}{choice}") from None

    return parse


def _field_texts(config: type[Any]) -> dict[str, str]:
    """Return what `Attributes` of the docstrings of a config and its bases says of each field."""
    texts: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")
        entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", section, flags=re.MULTILINE)
        # argparse reads % as a format.
        texts |= {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}
    return texts


if __name__ == "__main__":
    sys.exit(main())
