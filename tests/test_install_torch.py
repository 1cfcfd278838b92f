"""The choice of torch, with injected probes, and the probes themselves, offline."""

from __future__ import annotations

import ast
import http.server
import importlib.util
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "scripts" / "install_torch.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_torch", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def url() -> Iterator[str]:
    """An index on loopback: /ok/ answers, /late/ answers after a second, anything else is 404."""

    class Index(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            if self.path == "/late/":
                time.sleep(1)
            self.send_response(200 if self.path in ("/ok/", "/late/") else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def never() -> bool:
    raise AssertionError("this probe must not be called")


def answer(value: bool) -> Callable[[], bool]:
    return lambda: value


@pytest.mark.parametrize("installed", ["2.10", "2.10.0", "2.11.0+cu128", "2.13.0+cpu", "3.0.0"])
def test_a_torch_in_range_is_kept_without_any_probe(script: ModuleType, installed: str) -> None:
    choice = script.choose(installed, never, never)
    assert choice.pip_args == ()
    assert installed in choice.what


@pytest.mark.parametrize("installed", [None, "2.9.1", "1.13.1+cu117", "unknown"])
def test_a_card_gets_the_normal_wheel_and_no_question_to_the_index(
    script: ModuleType, installed: str | None
) -> None:
    choice = script.choose(installed, answer(True), never)
    assert choice.pip_args == (f"torch=={script.TORCH_VERSION}",)
    assert "card" in choice.why


def test_without_a_card_the_cpu_index_is_used_when_it_answers(script: ModuleType) -> None:
    choice = script.choose(None, answer(False), answer(True))
    assert choice.pip_args == (f"torch=={script.TORCH_VERSION}", "--index-url", script.CPU_INDEX)


def test_without_card_and_index_pip_is_left_to_find_the_pinned_version(script: ModuleType) -> None:
    choice = script.choose(None, answer(False), answer(False))
    assert choice.pip_args == (f"torch=={script.TORCH_VERSION}",)
    assert script.CPU_INDEX in choice.why


def test_torchvision_is_never_installed(script: ModuleType) -> None:
    for card in (True, False):
        for index in (True, False):
            packages = script.choose(None, answer(card), answer(index)).pip_args
            assert not any("torchvision" in argument for argument in packages)


@pytest.mark.parametrize(("path", "expected"), [("/ok/", True), ("/gone/", False)])
def test_an_index_answers_only_with_200(
    script: ModuleType, url: str, path: str, expected: bool
) -> None:
    assert script.cpu_index_answers(url + path) is expected


def test_a_late_index_is_given_up_in_time(script: ModuleType, url: str) -> None:
    begin = time.monotonic()
    assert script.cpu_index_answers(f"{url}/late/", timeout_s=0.2) is False
    assert time.monotonic() - begin < 0.8


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("echo 'GPU 0: Tesla T4 (UUID: GPU-0)'", True),
        ("echo 'GPU 0: Tesla T4'; exit 9", False),
        ("echo 'No devices were found'", False),
    ],
)
def test_a_card_counts_only_if_nvidia_smi_lists_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, expected: bool
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.nvidia_card_works() is expected


def test_a_missing_nvidia_smi_means_no_card(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.nvidia_card_works() is False


def test_running_it_where_torch_is_says_one_line_and_is_fast() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed here")
    begin = time.monotonic()
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 3
    assert re.fullmatch(r"torch: keep torch \S+ \(.+\)\n", done.stdout)


def test_its_floor_is_the_one_of_every_extra(script: ModuleType) -> None:
    floors = re.findall(r'"torch>=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert floors
    assert set(floors) == {script.TORCH_FLOOR}


def test_it_imports_the_standard_library_only() -> None:
    nodes = list(ast.walk(ast.parse(SCRIPT.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - {"__future__"} <= sys.stdlib_module_names
