"""Install the torch that fits this machine, into the Python that runs this file.

    python scripts/install_torch.py

pip's own answer to `torch` on Linux is the CUDA build, gigabytes that a machine without a card
cannot use. torchvision is never installed: nothing here needs it, and its version must match
torch's exactly. Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import NamedTuple

TORCH_VERSION = "2.13.0"
# The lowest torch of pyproject.toml's extras; one that is already here and not older is kept.
TORCH_FLOOR = "2.10"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INDEX_TIMEOUT_S = 3.0
NVIDIA_SMI_TIMEOUT_S = 20.0


class Choice(NamedTuple):
    """What to do, why, and the arguments for pip (empty: nothing to install)."""

    what: str
    why: str
    pip_args: tuple[str, ...]


def choose(
    installed: str | None, has_nvidia: Callable[[], bool], index_answers: Callable[[], bool]
) -> Choice:
    """The torch for this machine; a probe is called only if the answer depends on it."""
    wanted = f"torch=={TORCH_VERSION}"
    if installed is not None and release(installed) >= release(TORCH_FLOOR):
        return Choice(f"keep torch {installed}", "it is installed and new enough", ())
    if has_nvidia():
        return Choice(f"install {wanted}", "nvidia-smi sees a card", (wanted,))
    if index_answers():
        return Choice(
            f"install {wanted} from {CPU_INDEX}",
            "no NVIDIA card, and PyTorch's CPU index answers",
            (wanted, "--index-url", CPU_INDEX),
        )
    return Choice(
        f"install whatever pip finds for {wanted}",
        f"no NVIDIA card, and no answer from {CPU_INDEX} within {INDEX_TIMEOUT_S:g} s",
        (wanted,),
    )


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: `2.11.0+cu128` -> (2, 11, 0); empty, so below all, without any."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def installed_torch() -> str | None:
    """The version of the torch that `import torch` would find, without the seconds it takes."""
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_card_works() -> bool:
    """Whether nvidia-smi runs and lists a card: the driver, not only the program, must be there."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--list-gpus"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def cpu_index_answers(url: str = f"{CPU_INDEX}/torch/", timeout_s: float = INDEX_TIMEOUT_S) -> bool:
    """Whether the index answers in time."""
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                answers.append(reply.status == 200)
        except (OSError, urllib.error.URLError, ValueError):
            answers.append(False)

    # In a thread, because urllib's timeout does not cover the resolution of the name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_s)
    return bool(answers) and answers[0]


def main() -> int:
    """Choose, say so in one line, and run pip; its exit code is ours."""
    choice = choose(installed_torch(), nvidia_card_works, cpu_index_answers)
    print(f"torch: {choice.what} ({choice.why})", flush=True)
    if not choice.pip_args:
        return 0
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *choice.pip_args],
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
