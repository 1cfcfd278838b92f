"""Where the code runs: every answer of the machine is injected, one test asks a real kernel."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from colabtools import env
from colabtools.env import Gpu, Place, Probes, Ram
from colabtools.errors import MissingSecretError, WorkspaceError

T4 = "Tesla T4, 7.5, 15360, 15095\n"
A100 = "NVIDIA A100-SXM4-40GB, 8.0, 40960, 40000\n"
ROOT = Path(env.__file__).parents[1]


def probes(environ: Mapping[str, str] | None = None, **changes: object) -> Probes:
    """A machine with nothing on it but what the test says."""
    nothing: dict[str, object] = {
        "environ": environ or {},
        "has_module": lambda name: False,
        "in_zmq_kernel": lambda: False,
        "in_colab_shell": lambda: False,
        "run": lambda argv: None,
        "memory": lambda: Ram(16_000, 9_000),
        "read_text": lambda path: None,
    }
    return Probes(**{**nothing, **changes})  # type: ignore[arg-type]


def colab(environ: Mapping[str, str] | None = None) -> Probes:
    """A hosted Colab runtime."""
    release = {"COLAB_RELEASE_TAG": "release-colab_20260101"}
    return probes({**release, **(environ or {})}, has_module=lambda name: name == "google.colab")


def test_plain_python_is_a_process() -> None:
    assert env.where(probes()).place is Place.PROCESS


@pytest.mark.parametrize("variable", ["COLAB_RELEASE_TAG", "COLAB_GPU", "COLAB_BACKEND_VERSION"])
def test_the_module_and_a_colab_variable_even_an_empty_one_are_colab(variable: str) -> None:
    here = env.where(probes({variable: ""}, has_module=lambda name: name == "google.colab"))
    assert here.place is Place.COLAB
    assert f"{variable} is set" in here.reasons


def test_the_module_and_the_shell_of_google_colab_are_colab() -> None:
    machine = probes(has_module=lambda name: True, in_colab_shell=lambda: True)
    assert env.where(machine).place is Place.COLAB


def test_a_pip_installed_google_colab_on_a_laptop_is_not_colab() -> None:
    laptop = probes({"HOME": "/home/me"}, has_module=lambda name: True)
    assert env.where(laptop).place is Place.PROCESS


def test_a_colab_variable_without_the_module_is_not_colab() -> None:
    assert env.where(probes({"COLAB_GPU": "1"})).place is Place.PROCESS


@pytest.mark.parametrize("variable", ["JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD"])
def test_a_kernel_of_a_page_or_an_editor_is_jupyter(variable: str) -> None:
    here = env.where(probes({variable: "x"}, in_zmq_kernel=lambda: True))
    assert here.place is Place.JUPYTER
    assert f"{variable} is set" in here.reasons


def test_an_editors_variable_without_a_kernel_is_a_process() -> None:
    assert env.where(probes({"VSCODE_PID": "1"})).place is Place.PROCESS


def test_a_kernel_that_nobody_looks_at_is_headless() -> None:
    assert env.where(probes(in_zmq_kernel=lambda: True)).place is Place.HEADLESS


def test_a_real_kernel_says_headless_then_jupyter_once_a_page_is_named() -> None:
    from jupyter_client.manager import KernelManager

    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "for name in ('JPY_SESSION_NAME', 'VSCODE_PID', 'VSCODE_CWD'): os.environ.pop(name, None)\n"
        "from colabtools import env\n"
        "print(env.in_kernel(), env.where().place.value)\n"
        "os.environ['JPY_SESSION_NAME'] = 'a.ipynb'; print(env.where().place.value)\n"
    )
    printed: list[str] = []
    manager = KernelManager()
    manager.start_kernel()
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        client.execute_interactive(
            code,
            timeout=60,
            output_hook=lambda message: printed.append(message["content"].get("text", "")),
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "".join(printed).split() == ["True", "headless", "jupyter"]


def test_the_real_probes_find_modules_and_miss_what_is_not_there() -> None:
    real = Probes()
    assert real.has_module("json.decoder")
    assert not real.has_module("no_such_parent.child")
    assert real.run(["no-such-program-here"]) is None
    assert real.run([sys.executable, "-c", "print('hi')"]) == "hi\n"
    assert real.run([sys.executable, "-c", "print('hi'); raise SystemExit(3)"]) is None
    assert not real.in_zmq_kernel()
    assert not real.in_colab_shell()


def test_a_shell_of_google_colab_is_recognised_by_its_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = type("ZMQInteractiveShell", (), {"__module__": "ipykernel.zmqshell"})
    shell = type("Shell", (base,), {"__module__": "google.colab._shell"})()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert Probes().in_zmq_kernel()
    assert Probes().in_colab_shell()


def test_the_gpu_is_read_from_nvidia_smi() -> None:
    asked: list[Sequence[str]] = []
    machine = probes(run=lambda argv: asked.append(argv) or T4)
    assert env.gpu(machine) == Gpu("Tesla T4", (7, 5), 15360 * 1024**2, 15095 * 1024**2)
    assert list(asked[0]) == [
        "nvidia-smi",
        "--query-gpu=name,compute_cap,memory.total,memory.free",
        "--format=csv,noheader,nounits",
    ]


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)]
)
def test_bfloat16_starts_with_ampere(capability: tuple[int, int], expected: bool) -> None:
    assert Gpu("any", capability, 1, 1).supports_bf16 is expected


@pytest.mark.parametrize(
    "output",
    [
        None,
        "",
        "No devices were found\n",
        "Tesla T4, [N/A], 15360, 15095\n",
        "Tesla T4, 7.5, [N/A], 15095\n",
        "Tesla T4, 7, 15360, 15095\n",
        "a\nb\n",
    ],
)
def test_no_nvidia_smi_or_garbage_is_no_gpu(output: str | None) -> None:
    assert env.gpu(probes(run=lambda argv: output)) is None


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "Tesla T4"),
        ("0", "Tesla T4"),
        ("1", "NVIDIA A100-SXM4-40GB"),
        ("1,0", "NVIDIA A100-SXM4-40GB"),
        ("GPU-8f2c", "Tesla T4"),
        ("2", None),
        ("", None),
        ("-1", None),
    ],
)
def test_the_first_visible_gpu_is_taken(visible: str | None, name: str | None) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = env.gpu(probes(environ, run=lambda argv: T4 + A100))
    assert (found.name if found else None) == name


def files(contents: Mapping[str, str]) -> Callable[[str], str | None]:
    """A reader of system files that do not exist here."""
    return contents.get


def test_ram_without_a_limit_is_the_machines() -> None:
    assert env.ram(probes(read_text=files({"/sys/fs/cgroup/memory.max": "max\n"}))) == Ram(
        16_000, 9_000
    )


def test_ram_is_capped_by_cgroup_v2_without_counting_cached_files() -> None:
    read = files(
        {
            "/proc/self/cgroup": "0::/\n",
            "/sys/fs/cgroup/memory.max": "8000\n",
            "/sys/fs/cgroup/memory.current": "7000\n",
            "/sys/fs/cgroup/memory.stat": "anon 1000\ninactive_file 3000\n",
        }
    )
    assert env.ram(probes(read_text=read)) == Ram(8_000, 4_000)


def test_ram_is_capped_by_the_tightest_cgroup_above_us() -> None:
    read = files(
        {
            "/proc/self/cgroup": "0::/user/job\n",
            "/sys/fs/cgroup/user/job/memory.max": "max",
            "/sys/fs/cgroup/user/memory.max": "5000",
            "/sys/fs/cgroup/user/memory.current": "4500",
            "/sys/fs/cgroup/memory.max": "8000",
        }
    )
    assert env.ram(probes(read_text=read)) == Ram(5_000, 500)


def test_ram_is_capped_by_cgroup_v1() -> None:
    read = files(
        {
            "/proc/self/cgroup": "5:cpu:/a\n4:memory:/docker/x\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "6000",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "5000",
            "/sys/fs/cgroup/memory/memory.stat": "total_inactive_file 500",
        }
    )
    assert env.ram(probes(read_text=read)) == Ram(6_000, 1_500)


def test_a_cgroup_that_says_unlimited_in_numbers_changes_nothing() -> None:
    read = files(
        {
            "/proc/self/cgroup": "4:memory:/\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        }
    )
    assert env.ram(probes(read_text=read)) == Ram(16_000, 9_000)


def test_the_real_machine_has_memory() -> None:
    memory = env.ram()
    assert 0 < memory.available_bytes <= memory.total_bytes


class Userdata(types.ModuleType):
    """A stand-in for google.colab.userdata that answers with a value or raises."""

    answer: str | Exception = ""

    def get(self, key: str) -> str:
        """The answer that the test chose."""
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def userdata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Userdata]:
    fake = Userdata("google.colab.userdata")
    package = types.ModuleType("google.colab")
    package.userdata = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "google.colab.userdata", fake)
    yield fake


def test_the_fake_module_is_found_by_the_real_probe(userdata: Userdata) -> None:
    assert Probes().has_module("google.colab")


def test_a_secret_comes_from_colab_before_the_environment(userdata: Userdata) -> None:
    userdata.answer = "from-colab\n"
    assert env.secret("HF_TOKEN", colab({"HF_TOKEN": "from-environ"})) == "from-colab"


def test_off_colab_a_secret_comes_from_the_environment_only(userdata: Userdata) -> None:
    userdata.answer = "from-colab"
    laptop = probes({"HF_TOKEN": " from-environ\n"}, has_module=lambda name: True)
    assert env.secret("HF_TOKEN", laptop) == "from-environ"


FAILURES = {
    "SecretNotFoundError": "not there",
    "NotebookAccessError": "has no access",
    "TimeoutException": "no answer",
    "AttributeError": "cannot be read here, AttributeError",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_when_colab_refuses_the_environment_is_asked(userdata: Userdata, kind: str) -> None:
    userdata.answer = type(kind, (Exception,), {})("hf_SECRETVALUE")
    assert env.secret("HF_TOKEN", colab({"HF_TOKEN": "from-environ"})) == "from-environ"


@pytest.mark.parametrize("kind", FAILURES)
def test_a_missing_secret_says_why_and_both_ways_to_set_it(userdata: Userdata, kind: str) -> None:
    userdata.answer = type(kind, (Exception,), {})("hf_SECRETVALUE")
    with pytest.raises(MissingSecretError) as caught:
        env.secret("HF_TOKEN", colab())
    message = str(caught.value)
    assert FAILURES[kind] in message
    assert "add HF_TOKEN and switch on its notebook access" in message
    assert "environment variable HF_TOKEN" in message
    assert "SECRETVALUE" not in message
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert "\n" not in message


def test_an_empty_secret_is_a_missing_one(userdata: Userdata) -> None:
    userdata.answer = "  "
    with pytest.raises(MissingSecretError, match="it is empty"):
        env.secret("HF_TOKEN", colab({"HF_TOKEN": ""}))


class HostedRuntime:
    """What was asked of stand-ins for google.colab.drive and google.colab.runtime, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failures: dict[str, Exception] = {}

    def answer(self, what: str) -> Callable[[], None]:
        """A function that notes it was called, then fails if the test says so."""

        def call() -> None:
            self.asked.append(what)
            if what in self.failures:
                raise self.failures[what]

        return call


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> HostedRuntime:
    runtime = HostedRuntime()
    package = types.ModuleType("google.colab")
    for module, function in (("drive", "flush_and_unmount"), ("runtime", "unassign")):
        part = types.SimpleNamespace(**{function: runtime.answer(function)})
        setattr(package, module, part)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    return runtime


def test_a_runtime_is_given_back_after_drive_has_everything(hosted: HostedRuntime) -> None:
    assert env.release_runtime(colab()) is True
    assert hosted.asked == ["flush_and_unmount", "unassign"]


def test_off_colab_there_is_nothing_to_give_back(
    hosted: HostedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "colabtools"):
        assert env.release_runtime(probes({"COLAB_GPU": "1"})) is False
    assert "no hosted runtime to give back" in caplog.text
    assert hosted.asked == []


def test_a_runtime_whose_files_are_not_on_drive_yet_is_kept(hosted: HostedRuntime) -> None:
    hosted.failures["flush_and_unmount"] = ValueError("flush_and_unmount failed")
    with pytest.raises(WorkspaceError, match="so the runtime is kept") as caught:
        env.release_runtime(colab())
    assert "\n" not in str(caught.value)
    assert hosted.asked == ["flush_and_unmount"]


def test_a_runtime_that_cannot_be_given_back_is_told(
    hosted: HostedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    hosted.failures["unassign"] = OSError("no answer")
    assert env.release_runtime(colab()) is False
    assert "could not be given back (no answer); disconnect it yourself" in caplog.text


def test_importing_the_ground_is_light_and_has_no_heavy_company() -> None:
    code = (
        "import sys, colabtools.env, colabtools.drive, colabtools.errors\n"
        "import colabtools.process, colabtools.report\n"
        "heavy = {'torch', 'numpy', 'PIL', 'psutil', 'tqdm', 'matplotlib', 'IPython', 'google'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
