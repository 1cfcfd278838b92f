"""Where the code runs and on what: hosted Colab, Jupyter or a plain process; GPU, RAM, secrets.

Google Drive is mounted and a hosted runtime is given back here as well.

The only module that imports `google.colab`, and only inside functions. Each question takes a
`Probes`, the set of things it asks the machine, so a test can answer in the machine's place.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath

from colabtools.errors import MissingSecretError, MountError, StorageLostError, WorkspaceError

__all__ = [
    "Gpu",
    "Place",
    "Probes",
    "Ram",
    "Where",
    "flush_drive",
    "gpu",
    "in_kernel",
    "mount_drive",
    "ram",
    "release_runtime",
    "secret",
    "where",
]

_MIB = 1024**2
_NVIDIA_SMI_TIMEOUT_S = 20.0

# Set by the image of a hosted runtime, in the kernel and in what it starts; COLAB_GPU is there,
# though empty, on a CPU runtime as well.
_COLAB_VARIABLES = ("COLAB_RELEASE_TAG", "COLAB_GPU", "COLAB_BACKEND_VERSION")

# Set for a kernel that a person's page or editor opened: jupyter_server, then VS Code.
_JUPYTER_VARIABLES = ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD")

_GPU_QUERY = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,memory.total,memory.free",
    "--format=csv,noheader,nounits",
)

# Source: class names in google.colab.userdata; they are matched by name because the module
# exists on Colab only.
_COLAB_SECRET_FAILURES = {
    "NotebookAccessError": "it exists, but this notebook has no access to it",
    "SecretNotFoundError": "not there",
    "TimeoutException": "no answer, they can be read from a notebook open in Colab only",
}


class Place(Enum):
    """Who started this Python."""

    COLAB = "colab"  # a hosted Colab runtime
    JUPYTER = "jupyter"  # a kernel behind a person's Jupyter page or editor
    HEADLESS = "headless"  # a kernel run by a program such as papermill
    PROCESS = "process"  # no kernel at all


@dataclass(frozen=True)
class Where:
    """The place and the observations that led to it, for `colabtools doctor`."""

    place: Place
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """The NVIDIA GPU that a framework would use first."""

    name: str
    compute_capability: tuple[int, int]
    vram_bytes: int
    free_vram_bytes: int

    @property
    def supports_bf16(self) -> bool:
        """Whether the hardware computes in bfloat16 (Ampere, 8.0, and later; not a T4)."""
        return self.compute_capability >= (8, 0)


@dataclass(frozen=True)
class Ram:
    """Main memory that this process may use."""

    total_bytes: int
    available_bytes: int


def _has_module(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _shell_classes() -> Iterator[type]:
    """The class of the running IPython shell and its bases; none outside IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        yield from type(shell).__mro__


def _in_zmq_kernel() -> bool:
    return any(cls.__name__ == "ZMQInteractiveShell" for cls in _shell_classes())


def _in_colab_shell() -> bool:
    return any(cls.__module__.startswith("google.colab") for cls in _shell_classes())


def _run(argv: Sequence[str]) -> str | None:
    program = shutil.which(argv[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_NVIDIA_SMI_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _memory() -> Ram:
    import psutil

    memory = psutil.virtual_memory()
    return Ram(total_bytes=memory.total, available_bytes=memory.available)


def _read_text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, kw_only=True)
class Probes:
    """What the questions below ask the machine; the defaults ask the real one.

    Attributes:
        environ: the environment variables.
        has_module: whether a module of this name can be imported.
        in_zmq_kernel: whether this Python is a Jupyter kernel of any kind.
        in_colab_shell: whether its shell is the one of google.colab.
        run: standard output of a command, None if it is missing or fails.
        memory: main memory of the machine, before any cgroup limit.
        read_text: contents of a system file, None if it cannot be read.
    """

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    has_module: Callable[[str], bool] = _has_module
    in_zmq_kernel: Callable[[], bool] = _in_zmq_kernel
    in_colab_shell: Callable[[], bool] = _in_colab_shell
    run: Callable[[Sequence[str]], str | None] = _run
    memory: Callable[[], Ram] = _memory
    read_text: Callable[[str], str | None] = _read_text


def where(probes: Probes | None = None) -> Where:
    """The place this Python runs in, with the reasons for saying so."""
    probes = probes or Probes()
    colab_reasons = _colab_reasons(probes)
    if colab_reasons:
        return Where(Place.COLAB, colab_reasons)
    if not probes.in_zmq_kernel():
        return Where(Place.PROCESS, ("no Jupyter kernel is running in this Python",))
    person = [name for name in _JUPYTER_VARIABLES if name in probes.environ]
    if person:
        return Where(Place.JUPYTER, ("a Jupyter kernel is running", f"{person[0]} is set"))
    unset = ", ".join(_JUPYTER_VARIABLES)
    return Where(Place.HEADLESS, ("a Jupyter kernel is running", f"none of {unset} is set"))


def _colab_reasons(probes: Probes) -> tuple[str, ...]:
    # google-colab can be pip-installed on a laptop, so the module alone proves nothing.
    if not probes.has_module("google.colab"):
        return ()
    signs = [f"{name} is set" for name in _COLAB_VARIABLES if name in probes.environ]
    if probes.in_colab_shell():
        signs.append("the kernel runs google.colab's shell")
    return ("google.colab can be imported", *signs) if signs else ()


def in_kernel(probes: Probes | None = None) -> bool:
    """Whether this Python is a Jupyter kernel of any kind, one that can display pictures."""
    return (probes or Probes()).in_zmq_kernel()


def gpu(probes: Probes | None = None) -> Gpu | None:
    """The first NVIDIA GPU visible to this process, or None.

    `CUDA_VISIBLE_DEVICES` is honoured where it starts with an index; one that hides every GPU
    gives None.
    """
    probes = probes or Probes()
    index = _first_visible_index(probes.environ.get("CUDA_VISIBLE_DEVICES"))
    if index is None:
        return None
    rows = [row for row in (probes.run(_GPU_QUERY) or "").splitlines() if row.strip()]
    return _parse_gpu(rows[index]) if index < len(rows) else None


def _first_visible_index(visible_devices: str | None) -> int | None:
    if visible_devices is None:
        return 0
    first = visible_devices.split(",")[0].strip()
    if first in ("", "-1"):
        return None
    return int(first) if first.isdecimal() else 0


def _parse_gpu(row: str) -> Gpu | None:
    try:
        name, capability, total_mib, free_mib = (part.strip() for part in row.rsplit(",", 3))
        major, minor = (int(number) for number in capability.split("."))
        return Gpu(name, (major, minor), int(total_mib) * _MIB, int(free_mib) * _MIB)
    except ValueError:
        return None


def ram(probes: Probes | None = None) -> Ram:
    """Main memory, never more than the cgroup limit of the container this process is in."""
    probes = probes or Probes()
    bounds = [probes.memory(), *_cgroup_bounds(probes.read_text)]
    return Ram(
        total_bytes=min(bound.total_bytes for bound in bounds),
        available_bytes=min(bound.available_bytes for bound in bounds),
    )


@dataclass(frozen=True)
class _CgroupFiles:
    root: str
    limit: str
    usage: str
    reclaimable: str  # key in memory.stat


# Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
_CGROUP_V1 = _CgroupFiles(
    "/sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_CGROUP_V2 = _CgroupFiles("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _cgroup_bounds(read_text: Callable[[str], str | None]) -> Iterator[Ram]:
    """The bound of each cgroup from this process's own up to the root; none if not limited."""
    for line in (read_text("/proc/self/cgroup") or "0::/").splitlines():
        _, controllers, own = (line + "::").split(":")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _CGROUP_V1 if controllers else _CGROUP_V2
        for folder in (PurePosixPath(own), *PurePosixPath(own).parents):
            bound = _cgroup_bound(read_text, files, str(folder).rstrip("/"))
            if bound is not None:
                yield bound


def _cgroup_bound(
    read_text: Callable[[str], str | None], files: _CgroupFiles, folder: str
) -> Ram | None:
    limit = (read_text(f"{files.root}{folder}/{files.limit}") or "").strip()
    if not limit.isdecimal():
        return None
    usage = (read_text(f"{files.root}{folder}/{files.usage}") or "").strip()
    stat = (read_text(f"{files.root}{folder}/memory.stat") or "").split()
    # Cached file pages count as used, yet the kernel drops them before it kills anyone.
    cached = dict(zip(stat[::2], stat[1::2], strict=False)).get(files.reclaimable, "0")
    used = max(0, int(usage or 0) - int(cached))
    return Ram(total_bytes=int(limit), available_bytes=max(0, int(limit) - used))


def secret(name: str, probes: Probes | None = None) -> str:
    """The value of a token: from Colab Secrets, else from the environment.

    Raises:
        MissingSecretError: neither has it; the message says how to set it in both places.
    """
    probes = probes or Probes()
    reason = "not on Colab"
    if where(probes).place is Place.COLAB:
        value, reason = _colab_secret(name)
        if value:
            return value
    value = probes.environ.get(name, "").strip()
    if value:
        return value
    raise MissingSecretError(
        f"secret {name} is not set (Colab Secrets: {reason}; environment: not set); on Colab open "
        f"the key icon on the left, add {name} and switch on its notebook access; elsewhere set "
        f"the environment variable {name} before starting"
    )


def _colab_secret(name: str) -> tuple[str, str]:
    """The value, or an empty one and the reason; never raises, the environment may have it."""
    try:
        from google.colab import userdata  # type: ignore[import-not-found,import-untyped,unused-ignore]

        value = str(userdata.get(name) or "").strip()
    except Exception as error:  # outside the page's own kernel it fails in ways nobody documents
        kind = type(error).__name__
        return "", _COLAB_SECRET_FAILURES.get(kind, f"they cannot be read here, {kind}")
    return value, "it is empty"


def mount_drive(
    mountpoint: str,
    *,
    force_remount: bool = False,
    timeout_s: float = 120.0,
    probes: Probes | None = None,
) -> None:
    """Ask hosted Colab to mount the user's Google Drive, which asks the user for consent.

    It may return without having mounted anything: look before using the folder.

    Raises:
        MountError: consent was refused, or Drive cannot be mounted from here; the message says why.
        StorageLostError: mounting failed in a way that another try may mend.
    """
    probes = probes or Probes()
    if where(probes).place is not Place.COLAB:
        raise MountError(
            "Google Drive can be mounted on hosted Colab only; give a local folder as the workspace"
        )
    main = threading.current_thread() is threading.main_thread()
    if not (probes.in_zmq_kernel() and main):
        raise MountError(
            "Google Drive is not mounted, and only a notebook's cell can ask for it; run "
            f"`from google.colab import drive; drive.mount({mountpoint!r})` in a cell, then again"
        )
    from google.colab import drive  # type: ignore[import-not-found,import-untyped,unused-ignore]

    try:
        drive.mount(mountpoint, force_remount=force_remount, timeout_ms=round(timeout_s * 1000))
    except Exception as error:  # the classes of its message errors can only be named on Colab
        raise _mount_failure(mountpoint, error) from error


def _mount_failure(mountpoint: str, error: Exception) -> WorkspaceError:
    """The error of ours for what google.colab raised, matched by name and words."""
    said = " ".join(str(error).split()) or type(error).__name__
    # Source: google.colab.drive and google.colab._message; Enterprise has the module and no Drive.
    if isinstance(error, NotImplementedError):
        return MountError(
            f"this runtime has no Google Drive ({said}), as in Colab Enterprise; give a local "
            "folder as the workspace, or one on a bucket that you mounted"
        )
    if type(error).__name__ == "MessageError":
        return MountError(
            f"access to Google Drive was not granted ({said}); run the cell again and allow it for "
            "the account of this notebook, or give a local folder as the workspace"
        )
    if isinstance(error, ValueError) and "already contain files" in said:
        return MountError(
            f"{mountpoint} holds files though Drive is not mounted there ({said}); they are on "
            "this runtime only: move them away, then run the cell again"
        )
    if isinstance(error, ValueError) and said.startswith("Mountpoint"):
        return MountError(f"Drive cannot be mounted at {mountpoint!r}: {said}; use /content/drive")
    return StorageLostError(
        f"Google Drive could not be mounted at {mountpoint} ({type(error).__name__}: {said}); run "
        "the cell again, and if it stays so disconnect the runtime and start a new one"
    )


def flush_drive(probes: Probes | None = None) -> bool:
    """Wait until all that was written to Google Drive is there, and unmount it; False off Colab.

    Raises:
        StorageLostError: not everything has arrived.
    """
    if where(probes).place is not Place.COLAB:
        return False
    from google.colab import drive  # type: ignore[import-not-found,import-untyped,unused-ignore]

    try:
        drive.flush_and_unmount()
    except Exception as error:  # a ValueError without the reason, or whatever a child fails with
        raise StorageLostError(
            f"Google Drive has not taken everything that was written ({error}); look at the files "
            "on Drive before this runtime ends"
        ) from error
    return True


def release_runtime(probes: Probes | None = None) -> bool:
    """Give a hosted Colab runtime back, which ends this Python; False where that is not possible.

    First it waits until everything that was written to a mounted Google Drive has arrived there.
    The runtime's own disk is lost.

    Raises:
        StorageLostError: not everything has arrived; the runtime is kept.
    """
    log = logging.getLogger(__name__)
    if where(probes).place is not Place.COLAB:
        log.info("there is no hosted runtime to give back here")
        return False
    from google.colab import runtime  # type: ignore[import-not-found,import-untyped,unused-ignore]

    try:
        flush_drive(probes)
    except StorageLostError as error:
        raise StorageLostError(
            f"{error}, so the runtime is kept; then disconnect it yourself in the menu Runtime"
        ) from error
    log.info("giving the runtime back")
    try:
        runtime.unassign()
    except Exception as error:  # its errors are classes of google.colab, or of a HTTP library
        log.warning(
            "the runtime could not be given back (%s); disconnect it yourself in the menu Runtime",
            error,
        )
        return False
    return True
