"""Training with the real bitsandbytes, which `make test` does without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("quantized_runs.py")
# What the kernels were read at; see the sources named in optimizers.py.
REQUIREMENT = "bitsandbytes==0.50.2"

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("quantized")
    library = folder / "library"
    # Without its dependencies: torch is here, and another one would come from the index.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(library), REQUIREMENT], check=True)
    paths = [str(library), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", ["8-bit", "nf4"])
def test_a_stopped_run_goes_on_bit_equal(results: dict[str, Any], kind: str) -> None:
    assert results[kind]["tensors"] > 10
    assert results[kind]["equal"]
    assert results[kind]["same_losses"]


def test_eight_bits_and_four_change_the_numbers_a_little(results: dict[str, Any]) -> None:
    for coarse, fine, rel in (("8-bit", "fp32", 1e-3), ("nf4", "whole", 0.05)):
        assert results[coarse]["losses"] == pytest.approx(results[fine]["losses"], rel=rel)
        assert results[coarse]["losses"] != results[fine]["losses"]
