"""The forms with the ipywidgets and the kernel of Colab, in an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# Source: the package list of Colab's GPU image of 2026.08.
IPYWIDGETS, IPYKERNEL = "7.7.1", "6.17.1"


@pytest.mark.heavy
def test_the_forms_work_with_the_ipywidgets_of_colab(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # Without what ipywidgets 7 asks for on the side of the page: a whole classic notebook.
    for wanted in (
        ["--no-deps", f"ipywidgets=={IPYWIDGETS}"],
        [f"ipykernel=={IPYKERNEL}", "ipython-genutils"],
    ):
        subprocess.run([*pip, *wanted], check=True, timeout=240)
    # All else is that of these tests, and comes after what was just installed.
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    place = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (place / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    said = "import ipykernel, ipywidgets; print(ipywidgets.__version__, ipykernel.__version__)"
    done = subprocess.run([str(python), "-c", said], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [IPYWIDGETS, IPYKERNEL]
    # ipywidgets 7 warns of what later versions of traitlets and Python will not take.
    command = [str(python), "-m", "pytest", "-q", "-n", "0", "-W", "ignore::DeprecationWarning"]
    tests = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(HERE)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert tests.returncode == 0, tests.stdout[-4000:]
    assert " passed" in tests.stdout
