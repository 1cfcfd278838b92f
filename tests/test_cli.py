"""The command line: exit codes, one line per error, and nothing changed by what was refused."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import colabtools
from colabtools import cli, drive, headless, micro, report
from colabtools.dreambooth import config
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import ColabToolsError, MissingDependencyError, SessionError

VERBS = {
    "evaluate": config.EvaluateConfig,
    "export": config.ExportConfig,
    "generate": config.GenerateConfig,
    "prepare": config.PrepareConfig,
    "train": TrainConfig,
}
PREPARE = ["dreambooth", "prepare", "--session", "dog", "--images", "demo"]
Seen = list[tuple[Path, str, Any]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that we are in."""
    (tmp_path / "my place").mkdir()
    monkeypatch.chdir(tmp_path / "my place")
    return tmp_path / "my place"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the dreambooth verbs were called with, in the place of doing it."""
    calls: Seen = []

    def call(workspace: drive.Workspace, session: str, settings: Any) -> object:
        calls.append((workspace.root, session, settings))
        return ["first result", "second result"]

    for verb in VERBS:
        monkeypatch.setattr(cli, f"_{verb}", call)
    return calls


def run_cli(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "colabtools.cli", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **options
    )


def contents(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What stderr says of a wrong use; its exit code is 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def help_text(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The help, its line ends and runs of spaces as one space."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*argv, "--help"])
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_real_process_does_its_work_and_puts_results_on_stdout(folder: Path) -> None:
    done = run_cli(*PREPARE, "--workspace", "my work")
    session = folder / "my work" / "Fast-Dreambooth" / "Sessions" / "dog"
    assert done.returncode == 0, done.stderr
    lines = [session / "instance_images", session / "logs" / "training_pictures.png"]
    assert done.stdout.splitlines() == [str(line) for line in lines]
    assert all(line.exists() for line in lines)
    assert "preparing photos: 5/5 photos" in done.stderr


def test_a_real_process_that_fails_says_why_in_one_line(folder: Path) -> None:
    done = run_cli("dreambooth", "prepare", "--session", "dog", "--images", "nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == ("colabtools: images 'nowhere' does not exist; give a folder of photos\n")
    assert list(folder.iterdir()) == []


def test_a_real_process_with_debug_shows_the_traceback() -> None:
    done = run_cli("dreambooth", "prepare", "--session", "dog", "--images", "nowhere", "--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "DatasetError: images 'nowhere' does not exist" in done.stderr


def test_steps_of_zero_are_refused_by_a_process_that_loads_no_model(folder: Path) -> None:
    code = (
        "import sys; from colabtools.cli import main; print(main(sys.argv[1:]));"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    argv = ["dreambooth", "train", "--session", "dog"]
    argv += ["--text-encoder-steps", "0", "--unet-steps", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    )
    exit_code, modules = done.stdout.splitlines()
    assert exit_code == "1"
    assert not {"torch", "diffusers", "transformers"} & set(eval(modules))
    assert done.stderr.count("\n") == 1
    assert "text_encoder_steps and unet_steps are both 0" in done.stderr
    assert list(folder.iterdir()) == []


def test_exit_0_prints_each_result_on_a_line(
    seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(PREPARE) == 0
    assert capsys.readouterr() == ("first result\nsecond result\n", "")
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["dreambooth"], "VERB"),
        (["dreambooth", "paint"], "paint"),
        (["dreambooth", "train"], "--session"),
        (["dreambooth", "prepare", "--session", "dog"], "--images"),
        ([*PREPARE, "--stepz", "4"], "--stepz"),
        (["dreambooth", "train", "--session", "dog", "--unet-steps", "many"], "many"),
        (["dreambooth", "train", "--session", "dog", "--unet-steps", "1.5"], "or auto"),
        (["dreambooth", "train", "--session", "dog", "--seed", "auto"], "a whole number"),
        (["dreambooth", "train", "--session", "dog", "--unet-lr", "fast"], "a number or auto"),
        (["dreambooth", "train", "--session", "dog", "--lora-alpha", "big"], "a number or auto"),
        (["dreambooth", "train", "--session", "dog", "--restart"], "--restart"),
        (["dreambooth", "train", "--session", "dog", "--resume"], "--resume"),
        (["dreambooth", "train", "--session", "-x"], "--session"),
        (["run"], "NOTEBOOK"),
        (["run", "a.ipynb", "-p", "name"], "-p"),
    ],
)
def test_wrong_use_is_exit_2_and_says_what(
    argv: list[str], complaint: str, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in usage_error(argv, capsys)
    assert seen == []


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"colabtools {colabtools.__version__}\n"


@pytest.mark.parametrize("place", ["before", "after", "between"])
def test_global_options_stand_before_and_after_the_verb(
    folder: Path, seen: Seen, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up: list[dict[str, bool]] = []
    monkeypatch.setattr(report, "setup_logging", lambda **options: set_up.append(options))
    options = ["--workspace", "here", "--debug", "--quiet"]
    argv = {"before": [*options, *PREPARE], "after": [*PREPARE, *options]}
    argv["between"] = ["--debug", *PREPARE, "--quiet", "--workspace=here"]
    assert cli.main(argv[place]) == 0
    assert seen[0][0] == folder / "here"
    assert set_up == [{"debug": True, "quiet": True}]


def test_the_usual_workspace_is_in_the_folder_we_are_in(folder: Path, seen: Seen) -> None:
    cli.main(PREPARE)
    assert seen[0][0] == folder / "workspace"


SEEDS = (["3,4", "5"], (3, 4, 5))
ALL_OPTIONS = {
    "evaluate": {
        "token": "xyz",
        "class_name": "dog",
        "prompts": (
            ["a {token} {class}|{class} {token}"],
            ("a {token} {class}", "{class} {token}"),
        ),
        "prompts_file": "",
        "seeds": SEEDS,
        "class_images": 0,
        "step": 200,
        "num_inference_steps": 7,
        "guidance_scale": 2.5,
        "resolution": 128,
        "dino_model": "my dino",
        "clip_model": "my/clip",
    },
    "export": {
        "formats": (["ckpt", "safetensors"], ("ckpt", "safetensors")),
        "dtype": "bf16",
        "step": 500,
        "disconnect": True,
    },
    "generate": {
        "prompts": (["a dog | a cat", "a cow"], ("a dog", "a cat", "a cow")),
        "prompts_file": "",
        "negative_prompt": "rain",
        "seeds": SEEDS,
        "step": 200,
        "num_inference_steps": 7,
        "guidance_scale": 2.5,
        "resolution": 128,
        "compare": False,
    },
    "prepare": {
        "images": "my photos",
        "base_model": "sd-1.5",
        "instance_prompt": "100% my dog",
        "resolution": 128,
        "buckets": True,
        "crop": "centre",
        "replace": True,
        "allow_resolution": True,
    },
    "train": {
        "base_model": "sd-1.5",
        "method": "dora",
        "stages": "separate",
        "text_encoder_steps": 1,
        "unet_steps": 2,
        "text_encoder_lr": 1e-5,
        "unet_lr": 2e-5,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 5,
        "optimizer": "prodigy",
        "weight_decay": 0.5,
        "max_grad_norm": 2.5,
        "batch_size": 3,
        "gradient_accumulation_steps": 4,
        "lora_rank": 8,
        "lora_alpha": 12.5,
        "lora_dropout": 0.25,
        "prior_preservation": True,
        "class_prompt": "a dog",
        "num_class_images": 4,
        "prior_loss_weight": 0.5,
        "caption_dropout": 0.125,
        "shuffle_tokens": True,
        "keep_tokens": 1,
        "strict_captions": True,
        "offset_noise": 0.0625,
        "min_snr_gamma": 5.0,
        "zero_terminal_snr": True,
        "ema": True,
        "ema_decay": 0.75,
        "crops": 3,
        "heldout_images": 2,
        "seed": 6,
        "allow_resolution": True,
        "quantize": "none",
        "precision": "fp16",
        "gradient_checkpointing": "off",
        "attention": "xformers",
        "compile": True,
        "checkpoint_every": 10,
        "keep_last": 4,
        "save_every": 100,
        "sample_every": 50,
        "sample_prompts": (["a dog | a cat", "a cow"], ("a dog", "a cat", "a cow")),
        "sample_seeds": SEEDS,
        "tensorboard": True,
        "resume": "require",
        "allow_changes": True,
    },
}


@pytest.mark.parametrize("spelling", ["-", "_", "="])
@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_field_is_an_option_in_both_spellings(seen: Seen, verb: str, spelling: str) -> None:
    given = ALL_OPTIONS[verb]
    assert list(given) == [field.name for field in fields(VERBS[verb])]
    argv, expected = ["dreambooth", verb, "--session", "dog"], {}
    for name, value in given.items():
        words, expected[name] = value if isinstance(value, tuple) else ([str(value)], value)
        option = name if spelling == "_" else name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{option}" if value else f"--no{'-_'[spelling == '_']}{option}")
        elif spelling == "=" and len(words) == 1:
            argv.append(f"--{option}={words[0]}")
        else:
            argv += [f"--{option}", *words]
    assert cli.main(argv) == 0
    ((_, session, settings),) = seen
    assert session == "dog"
    assert settings == VERBS[verb](**expected)
    types = {name: type(getattr(settings, name)) for name in expected}
    assert types == {name: type(value) for name, value in expected.items()}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_without_options_the_defaults_are_those_of_the_config(seen: Seen, verb: str) -> None:
    needed = {"images": "demo"} if verb == "prepare" else {}
    words = [word for name, value in needed.items() for word in (f"--{name}", value)]
    assert cli.main(["dreambooth", verb, "--session", "dog", *words]) == 0
    assert seen[0][2] == VERBS[verb](**needed)


def test_auto_may_be_said(seen: Seen) -> None:
    argv = ["dreambooth", "train", "--session", "dog", "--unet-steps", "auto", "--unet-lr", "auto"]
    assert cli.main(argv) == 0
    assert seen[0][2] == TrainConfig()


@pytest.mark.parametrize("resume", ["auto", "never", "require"])
def test_a_run_is_resumed_begun_again_or_must_be_there(seen: Seen, resume: str) -> None:
    assert cli.main(["dreambooth", "train", "--session", "dog", "--resume", resume]) == 0
    assert seen[0][2].resume == resume


@pytest.mark.parametrize("number", ["-1", "-1e-4", "-.5E3", "-inf"])
def test_a_negative_number_is_a_value_and_refused_by_its_name(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["dreambooth", "train", "--session", "dog", "--unet-lr", number]) == 1
    assert f"unet_lr is {float(number)!r}; give a number above 0" in capsys.readouterr().err


def test_no_sample_prompt_may_be_said(seen: Seen) -> None:
    assert cli.main(["dreambooth", "train", "--session", "dog", "--sample-prompts", ""]) == 0
    assert seen[0][2].sample_prompts == ()


def test_a_value_with_underscores_is_left_as_it_is(seen: Seen) -> None:
    cli.main([*PREPARE[:-1], "my_photos", "--instance_prompt=--a_b", "--base-model", "a_b/c_d"])
    assert seen[0][2].images == "my_photos"
    assert seen[0][2].instance_prompt == "--a_b"
    assert seen[0][2].base_model == "a_b/c_d"


def field_texts(settings: type[Any]) -> dict[str, str]:
    """The text of each field, read from the docstring line by line, unlike in the module."""
    _, _, section = (inspect.getdoc(settings) or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if not line.startswith(" " * 8):
            name, _, line = line.strip().partition(":")
        texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return texts


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_tells_of_every_field_with_its_text_and_default(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    told = help_text(["dreambooth", verb], capsys)
    texts = field_texts(VERBS[verb])
    for field in fields(VERBS[verb]):
        assert len(texts[field.name]) > 5
        assert f"--{field.name.replace('_', '-')}" in told
        assert texts[field.name] in told
    for option in ("--session", "--workspace", "--debug", "--quiet"):
        assert option in told
    assert "(default: " in told


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """A share.

    Attributes:
        share: in % of all (100% at most).
    """

    share: str = "5%"


def test_a_percent_sign_is_told_as_it_is() -> None:
    parser = argparse.ArgumentParser()
    cli._add_fields(parser, ShareConfig)
    assert "in % of all (100% at most). (default: 5%)" in " ".join(parser.format_help().split())


def test_help_lists_commands_and_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    told = help_text([], capsys)
    assert all(word in told for word in ("run", "demo", "dreambooth", "--workspace"))
    assert "Shape letters" not in told
    told = help_text(["dreambooth"], capsys)
    assert all(verb in told for verb in VERBS)
    assert "NAME VALUE" in help_text(["run"], capsys)


def test_quiet_leaves_results_alone_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PREPARE, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert captured.err == ""


def test_debug_raises_what_is_one_line_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*PREPARE[:3], "../dog", *PREPARE[4:]]
    assert cli.main(argv) == 1
    with pytest.raises(SessionError):
        cli.main([*argv, "--debug"])
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ColabToolsError("two\nlines   here"), 1, "colabtools: two lines here\n"),
        (
            ModuleNotFoundError("No module named 'torch'"),
            1,
            "colabtools: No module named 'torch'; ",
        ),
        (KeyboardInterrupt(), 130, "colabtools: interrupted\n"),
        (KeyboardInterrupt("saved\nat step 3"), 130, "colabtools: saved at step 3\n"),
    ],
)
def test_each_kind_of_failure_is_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_train", fail)
    assert cli.main(["dreambooth", "train", "--session", "dog"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_missing_library_is_told_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "papermill", None)
    notebook = headless.find_notebook("dreambooth_training")
    assert cli.main(["run", str(notebook)]) == 1
    assert "pip install 'colabtools[dreambooth,notebook,vit]'" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["peft", "torch"])
def test_a_library_of_training_that_is_missing_is_told_the_same_way(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*args: object) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        importlib.import_module(module)

    monkeypatch.setattr(cli, "_train", train)
    assert cli.main(["dreambooth", "train", "--session", "dog"]) == 1
    error = capsys.readouterr().err
    assert f"import of {module} halted" in error
    assert "pip install 'colabtools[dreambooth,notebook,vit]'" in error


def test_a_missing_library_that_was_explained_is_not_explained_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*args: object) -> None:
        raise MissingDependencyError("optimizer 'lion' needs it; pip install lion-pytorch")

    monkeypatch.setattr(cli, "_train", train)
    assert cli.main(["dreambooth", "train", "--session", "dog"]) == 1
    line = "colabtools: optimizer 'lion' needs it; pip install lion-pytorch\n"
    assert capsys.readouterr().err == line


def test_an_error_that_is_not_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_train", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["dreambooth", "train", "--session", "dog"])


def no_images(folder: Path) -> list[str]:
    (folder / "photos").mkdir()
    return ["prepare", "--images", "photos", "--session", "dog"]


def images_is_a_file(folder: Path) -> list[str]:
    (folder / "photo.jpg").write_bytes(b"")
    return ["prepare", "--images", "photo.jpg", "--session", "dog"]


def images_has_a_text(folder: Path) -> list[str]:
    (folder / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "photos" / "a.png")
    (folder / "photos" / "b.jpg").write_text("my\nnotes")
    return ["prepare", "--images", "photos", "--session", "dog"]


def no_steps(folder: Path) -> list[str]:
    return ["train", "--session", "old", "--text-encoder-steps", "0", "--unet_steps", "0"]


def session_with(name: str, verb: str) -> Callable[[Path], list[str]]:
    return lambda folder: [
        verb,
        f"--session={name}",
        *["--images", "demo"][: 2 * (verb == "prepare")],
    ]


WRONG: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "images are a file": (images_is_a_file, "is a file; give the folder that it is in"),
    "images hold a text": (
        images_has_a_text,
        "none of the 2 photos in 'photos' can be used; 'a.png': 9 x 9 pixels are too few",
    ),
    "no images": (no_images, "no photos in 'photos'; put some of"),
    "no steps": (no_steps, "text_encoder_steps and unet_steps are both 0"),
    **{
        f"{verb} {name!r}": (session_with(name, verb), "cannot be a folder")
        for verb in sorted(VERBS)
        for name in ("../up", "a/b", "..", "", "/tmp/x", "-x")
    },
    **{
        f"{verb} of no session": (session_with("new", verb), "no session 'new' in ")
        for verb in ("train", "generate", "evaluate", "export")
    },
    "nothing trained": (session_with("old", "export"), "has no trained weights; run train"),
    "unknown model": (
        lambda folder: ["train", "--session", "old", "--base-model", "nope"],
        "unknown base_model 'nope'; use one of flux-dev, ",
    ),
    "bad choice": (
        lambda folder: ["train", "--session", "old", "--method", "lokr"],
        "method is 'lokr'; give one of auto, full, lora, dora",
    ),
    "bad rank": (
        lambda folder: ["train", "--session", "old", "--method=lora", "--lora-rank=0"],
        "lora_rank is 0; give a whole number of at least 1",
    ),
    "unknown optimizer": (
        lambda folder: ["train", "--session", "old", "--optimizer", "sgdw"],
        "'sgdw'",
    ),
    "nothing to resume": (
        lambda folder: ["train", "--session", "old", "--resume", "require"],
        "holds no state to go on from; set resume to auto to begin",
    ),
    "prior without a class": (
        lambda folder: ["train", "--session", "old", "--prior-preservation"],
        "class_prompt is ''; prior_preservation needs one",
    ),
    "bad seed": (lambda folder: ["train", "--session", "old", "--seed", "-1"], "seed is -1; give"),
    "bad seeds": (lambda f: ["generate", "--session", "old", "--seeds", "x"], "seeds is 'x'; give"),
    "bad format": (lambda f: ["export", "--session", "old", "--formats", "onnx"], "formats is "),
    "bad dtype": (lambda f: ["export", "--session", "old", "--dtype", "int4"], "dtype is 'int4'"),
    "other photos": (
        lambda folder: ["prepare", "--images", "demo", "--session", "old", "--resolution", "72"],
        "session 'old' already holds 5 pictures that are not these",
    ),
}


@pytest.mark.parametrize("wrong", sorted(WRONG))
@pytest.mark.parametrize("existing", [False, True])
def test_wrong_input_is_one_line_and_leaves_the_workspace_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str], wrong: str, existing: bool
) -> None:
    make, message = WRONG[wrong]
    if existing:
        old = ["dreambooth", "prepare", "--session", "old", "--images", "demo", "--quiet"]
        assert cli.main(old) == 0
    argv = make(folder)
    if not existing and "old" in argv + [word.partition("=")[2] for word in argv]:
        message = ""  # without a workspace the session is missing as well, or is made
    before = contents(folder)
    capsys.readouterr()
    code = cli.main(["dreambooth", *argv, "--quiet"])
    if wrong == "other photos" and not existing:
        assert code == 0
        return
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    assert captured.err.startswith("colabtools: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert contents(folder) == before


@pytest.mark.parametrize("place", ["/proc/colabtools", "/sys/colabtools/deeper"])
@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_read_only_workspace_is_one_line_even_for_root(
    place: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = session_with("dog", verb)(Path())
    assert cli.main(["--workspace", place, "dreambooth", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"colabtools: cannot use as the workspace {place}: ")
    assert error.count("\n") == 1
    assert not Path(place).exists()


def test_a_workspace_that_becomes_read_only_is_one_line_and_unchanged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "workspace").mkdir()

    def read_only(*args: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "fsync", read_only)
    assert cli.main(PREPARE) == 1
    error = capsys.readouterr().err
    assert "Read-only file system (errno 30); this place is read-only: choose another" in error
    assert error.count("\n") == 1
    assert contents(folder) == {str(folder / "workspace"): None}


def test_a_workspace_that_is_a_file_is_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "workspace").write_text("mine")
    assert cli.main(PREPARE) == 1
    assert "a file stands where a folder is needed" in capsys.readouterr().err
    assert (folder / "workspace").read_text() == "mine"


def test_an_unknown_home_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--workspace", "~no-such-user-here/x", *PREPARE]) == 1
    assert capsys.readouterr().err.startswith("colabtools: no home folder for ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"parameters": {}, "out": None, "keep_failed": False}),
        (["--debug"], {"parameters": {}, "out": None, "keep_failed": True}),
        (
            ["-p", "name", "007", "-p", "seed", "-1", "--out", "x.ipynb"],
            {
                "parameters": {"name": "007", "seed": "-1"},
                "out": Path("x.ipynb"),
                "keep_failed": False,
            },
        ),
        (["-p", "a", "1", "-p", "a", "2"], {"parameters": {"a": "2"}}),
    ],
)
def test_run_gives_the_notebook_its_parameters_as_text(
    words: list[str],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {}

    def run_notebook(notebook: Path, parameters: Any, **options: Any) -> Path:
        given.update(notebook=notebook, parameters=parameters, **options)
        return Path("made.ipynb")

    monkeypatch.setattr(headless, "run_notebook", run_notebook)
    assert cli.main(["run", "note.ipynb", *words]) == 0
    assert given["notebook"] == Path("note.ipynb")
    assert expected.items() <= given.items()
    assert capsys.readouterr().out == "made.ipynb\n"


def test_run_of_an_unknown_parameter_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = headless.find_notebook("dreambooth_training")
    assert cli.main(["run", str(notebook), "-p", "stepz", "4"]) == 1
    error = capsys.readouterr().err
    assert "has no parameter 'stepz'; it has allow_changes, " in error
    assert error.count("\n") == 1


def test_demo_goes_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places: list[Path] = []
    monkeypatch.setattr(headless, "demo", lambda out: [places.append(out), "done"][1:])
    assert cli.main(["demo"]) == cli.main(["demo", "--out", "there"]) == 0
    assert places == [Path("demo"), Path("there")]
    assert capsys.readouterr().out == "done\ndone\n"


@pytest.mark.slow
def test_a_training_that_is_stopped_is_exit_130_and_the_same_command_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*PREPARE, "--quiet"]) == 0
    argv = ["dreambooth", "train", "--session", "dog", "--text-encoder-steps", "0"]
    argv += ["--unet-steps", "3", "--batch-size", "1", "--checkpoint-every", "100"]
    command = [sys.executable, "-m", "colabtools.cli", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        next(line for line in running.stderr if line.startswith("training the unet"))
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "stopping after this update" in said
    assert said.splitlines()[-1].startswith("colabtools: ")
    assert "Traceback" not in said
    session = folder / "workspace" / "Fast-Dreambooth" / "Sessions" / "dog"
    (state,) = (session / "checkpoints").glob("step-*")
    assert state.name < "step-000003"
    capsys.readouterr()
    assert cli.main([*argv, "--resume", "require", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(state.with_name("step-000003"))


def test_a_model_is_converted_there_and_back(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    base = str(micro.sd_path())
    assert cli.main(["convert", base, "m.safetensors", "--dtype", "fp16"]) == 0
    assert capsys.readouterr().out == f"{folder / 'm.safetensors'}\n"
    verify = ["convert", base, "m.safetensors", "--dtype", "fp16", "--verify-only"]
    assert cli.main(verify) == 0
    assert cli.main(["convert", "m.safetensors", "m", "--config-from", base, "--no-fetch"]) == 0
    assert (folder / "m" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "m" / "tokenizer").is_dir()
    capsys.readouterr()
    assert cli.main(["convert", "m.safetensors", "n.safetensors", "--ema"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("colabtools: ")
    assert "no average of its weights" in error
    assert sorted(path.name for path in folder.iterdir()) == ["m", "m.safetensors"]


def test_sessions_live_and_die_by_the_command_line(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(b"picture")
    sessions = folder / "workspace" / "Fast-Dreambooth" / "Sessions"

    def session(*argv: str) -> subprocess.CompletedProcess[str]:
        done = run_cli("session", *argv)
        assert done.returncode == 0, done.stderr
        return done

    assert session("create", "cat").stdout == f"{sessions / 'cat'}\n"
    imported = session("import", "photos", "--name", "my/dog")
    assert imported.stdout == f"{sessions / 'my-dog'}\n"
    assert "called 'my-dog', since 'my/dog' cannot be a folder" in imported.stderr
    lines = session("list").stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["cat", "my-dog"]
    assert [item["pictures"] for item in json.loads(session("list", "--json").stdout)] == [0, 1]
    assert "pictures: 1" in session("show", "my-dog").stdout.splitlines()
    assert json.loads(session("show", "my-dog", "--json").stdout)["name"] == "my-dog"
    assert session("export", "my-dog").stdout == f"{folder / 'workspace' / 'my-dog.zip'}\n"
    deleted = session("delete", "my-dog")
    assert Path(deleted.stdout.strip()).parent == sessions / ".trash"
    assert (
        "7 B are free once the trash is emptied: colabtools session empty-trash" in deleted.stderr
    )
    assert session("empty-trash").stdout == "1 sessions removed, 7 B\n"
    session("import", "workspace/my-dog.zip")
    assert (sessions / "my-dog" / "instance_images" / "a.png").read_bytes() == b"picture"
    assert session("release", "my-dog").stdout == f"{sessions / 'my-dog'}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["create", "a/b"], "such as 'a-b'"),
        (["show", "dog"], "no session 'dog'"),
        (["delete", "dog"], "no session 'dog'"),
        (["release", "dog"], "no session 'dog'"),
        (["export", "dog"], "no session 'dog'"),
        (["import", "nowhere"], "does not exist; give a folder or a zip"),
    ],
)
def test_a_session_verb_that_fails_says_why_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert cli.main(["session", *argv]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_session_verbs_load_no_torch(folder: Path) -> None:
    code = (
        "import sys; from colabtools.cli import main; main(sys.argv[1:]);"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    argv = ["session", "create", "dog"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    )
    assert not {"torch", "diffusers", "transformers"} & set(eval(done.stdout.splitlines()[-1]))


def test_google_drive_off_colab_is_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["session", "list", "--workspace", "MyDrive"]) == 1
    assert "can be mounted on hosted Colab only; give a local folder" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_an_empty_shelf_is_said_beside_the_results(folder: Path) -> None:
    done = run_cli("session", "list")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no sessions in" in done.stderr
    assert json.loads(run_cli("session", "list", "--json").stdout) == []


def test_an_empty_folder_in_drive_stays_when_a_command_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "drive" / "art").mkdir(parents=True)
    workspace = drive.Workspace(folder / "drive" / "art")
    monkeypatch.setattr(drive, "mount", lambda place: workspace)
    assert cli.main(["session", "show", "dog", "--workspace", "MyDrive/art"]) == 1
    assert workspace.root.is_dir()
