"""A real JupyterLab and a real Chromium, both on this machine alone and started by the tests."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
START_S = 60
# Nothing that calls home, and no profile of a person; Chromium's sandbox refuses to run as root.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,1500",
]


def missing() -> str:
    """What these tests lack on this machine, empty if nothing."""
    lacks = [name for name in ("selenium", "jupyterlab") if importlib.util.find_spec(name) is None]
    lacks += [] if shutil.which("chromium") else ["chromium"]
    lacks += [] if shutil.which("chromedriver") else ["chromedriver"]
    return f"missing {', '.join(lacks)}; run: make setup-test" if lacks else ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that runs: where it is, its token, and the folder that it shows."""

    url: str
    token: str
    folder: Path

    def open(self, browser: Any, cells: list[str]) -> None:
        """Show a notebook of these cells, and run them all."""
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        )
        nbformat.write(notebook, self.folder / "forms.ipynb")
        browser.get(f"{self.url}/lab/tree/forms.ipynb?token={self.token}&reset")
        self.run(browser)

    def run(self, browser: Any) -> None:
        """Run all cells of the notebook that is shown."""
        ready = (
            "const app = window.jupyterapp; const panel = app && app.shell.currentWidget;"
            "const context = panel && panel.context && panel.context.sessionContext;"
            "return !!(context && context.session && context.session.kernel"
            " && context.session.kernel.connectionStatus === 'connected')"
        )
        wait(lambda: browser.execute_script(ready), "the notebook to be connected", START_S)
        browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def wait(look: Callable[[], Any], what: str, timeout_s: float = 30) -> Any:
    """What `look` returns once that is true; parts of a page that are being rebuilt are none."""
    from selenium.common.exceptions import WebDriverException

    end_s, last = time.monotonic() + timeout_s, None
    while time.monotonic() < end_s:
        try:
            if last := look():
                return last
        except WebDriverException:
            pass
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s} s in vain for {what}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if reason := missing():
        pytest.skip(reason)
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("notebooks")
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    port, token = free_port(), secrets.token_hex(16)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    command += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    command += ["--allow-root"] if os.name == "posix" else []
    surroundings = {
        **os.environ,
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_TOKEN": token,
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "PYTHONPATH": str(ROOT),
    }
    log = home / "lab.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=surroundings, stdout=output, stderr=output)
    try:
        wait_for_server(f"{url}/api?token={token}", server, log)
        yield Lab(url, token, folder)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for_server(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="session")
def browser(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    # By its path: without one, Selenium looks for a driver on the internet.
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver") or "")
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def screenshot(browser: Any, tmp_path: Path) -> Callable[[str], Path]:
    """Save what the page shows under a name, in COLABTOOLS_SCREENSHOTS if that is set."""
    folder = Path(os.environ.get("COLABTOOLS_SCREENSHOTS", tmp_path))

    def save(name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        assert browser.save_screenshot(str(path))
        return path

    return save
