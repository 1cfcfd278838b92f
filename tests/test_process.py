"""Child processes, all of them real."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from colabtools.errors import ProcessError
from colabtools.process import Child, run

SECRET = "ngrok-2abcDEF"


def python(code: str, *argv: str) -> list[str]:
    """A command that runs this Python code."""
    return [sys.executable, "-c", code, *argv]


def start(tmp_path: Path, code: str, *argv: str, redact: tuple[str, ...] = ()) -> Child:
    """A Python child with its log in the test's folder."""
    return Child.start(python(code, *argv), log_path=tmp_path / "child.log", redact=redact)


def is_running(pid: int) -> bool:
    """Whether the process exists and is not merely waiting to be reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_gone_soon(pid: int) -> bool:
    """Whether the process ends within a few seconds."""
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_lines_come_from_both_outputs_in_order_and_end_with_the_child(tmp_path: Path) -> None:
    code = "import os; os.write(1, b'one\\n'); os.write(2, b'two\\n'); os.write(1, b'last')"
    with start(tmp_path, code) as child:
        assert list(child.lines(30)) == ["one", "two", "last"]
        assert child.wait(5) == 0
    assert (tmp_path / "child.log").read_text() == "one\ntwo\nlast"


def test_lines_come_while_the_child_still_runs(tmp_path: Path) -> None:
    argv = python("import time; print('ready'); time.sleep(60)")
    with Child.start(argv, log_path=tmp_path / "log", env={"MARK": "x"}) as child:
        assert next(child.lines(10), "nothing yet") == "ready"
        assert child.poll() is None


def test_lines_stop_at_the_timeout_and_go_on_later(tmp_path: Path) -> None:
    code = "import sys, time; print('a'); time.sleep(1.5); print('b')"
    with start(tmp_path, code) as child:
        assert child.wait_for("a", 30)
        began = time.monotonic()
        assert list(child.lines(0.2)) == []
        assert time.monotonic() - began < 1.2
        assert list(child.lines(30)) == ["b"]


def test_carriage_returns_end_lines_and_broken_utf8_is_no_error(tmp_path: Path) -> None:
    code = "import os; os.write(1, b'10%\\r20%\\r\\n\\xff caf\\xc3'); os.write(1, b'\\xa9\\n')"
    with start(tmp_path, code) as child:
        assert list(child.lines(30)) == ["10%", "20%", "\ufffd café"]


def test_wait_for_gives_the_match_and_keeps_the_lines_after_it(tmp_path: Path) -> None:
    code = "print('noise\\nat http://127.0.0.1:7860 now\\nafter'); import time; time.sleep(60)"
    with start(tmp_path, code) as child:
        assert child.wait_for(r"http://\S+:(\d+)", 30).group(1) == "7860"
        assert next(child.lines(5)) == "after"


def test_wait_for_a_child_that_dies_carries_the_tail(tmp_path: Path) -> None:
    said = "exit code 3 before it printed 'ready'"
    child = start(tmp_path, "print('port taken'); raise SystemExit(3)")
    with child, pytest.raises(ProcessError, match=said) as caught:
        child.wait_for("ready", 30)
    assert caught.value.log_tail == "port taken"
    assert "'port taken'" in str(caught.value)
    assert str(child.log_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wait_for_times_out_and_leaves_the_child_running(tmp_path: Path) -> None:
    with start(tmp_path, "import time; print('slow'); time.sleep(60)") as child:
        child.wait_for("slow", 30)
        with pytest.raises(ProcessError, match=r"did not print 'ready' within 0\.2 s"):
            child.wait_for("ready", 0.2)
        assert child.poll() is None


def test_wait_gives_the_code_and_times_out(tmp_path: Path) -> None:
    with start(tmp_path, "raise SystemExit(7)") as child:
        assert child.wait(30) == 7
    child = start(tmp_path, "import time; time.sleep(60)")
    with child, pytest.raises(ProcessError, match=r"still runs after 0\.1 s"):
        child.wait(0.1)
    assert child.poll() is not None


def test_leaving_the_block_stops_the_child(tmp_path: Path) -> None:
    with start(tmp_path, "import time; print('up'); time.sleep(60)") as child:
        child.wait_for("up", 30)
    assert child.poll() == -signal.SIGTERM
    assert child.stop() == -signal.SIGTERM


GRANDCHILD = (
    "import subprocess, sys, time\n"
    "code = 'import signal, time; {prepare} print(\"up\", flush=True); time.sleep(60)'\n"
    "grandchild = subprocess.Popen([sys.executable, '-c', code])\n"
    "print('pid', grandchild.pid)\n"
    "{then}"
)


@pytest.mark.parametrize("then", ["time.sleep(60)", "raise SystemExit(0)"])
def test_stop_ends_the_grandchildren_even_of_a_dead_child(tmp_path: Path, then: str) -> None:
    with start(tmp_path, GRANDCHILD.format(prepare="", then=then)) as child:
        pid = int(child.wait_for(r"pid (\d+)", 30).group(1))
        if then.startswith("raise"):
            child.wait(30)
        assert is_running(pid)
    assert is_gone_soon(pid)


def test_stop_insists_when_a_grandchild_ignores_the_request(tmp_path: Path) -> None:
    prepare = "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    with start(tmp_path, GRANDCHILD.format(prepare=prepare, then="time.sleep(60)")) as child:
        pid = int(child.wait_for(r"pid (\d+)", 30).group(1))
        child.wait_for("up", 30)
        child.stop(grace_s=0.3)
        assert is_gone_soon(pid)


def test_stop_kills_a_child_that_ignores_the_request(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"
    with start(tmp_path, code) as child:
        child.wait_for("up", 30)
        assert child.stop(grace_s=0.2) == -signal.SIGKILL


def test_stop_gives_the_child_time_to_tidy_up(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "def tidy(*_): time.sleep(0.3); print('tidied'); sys.exit(0)\n"
        "signal.signal(15, tidy); print('up'); time.sleep(60)\n"
    )
    with start(tmp_path, code) as child:
        child.wait_for("up", 30)
        assert child.stop(grace_s=30) == 0
        assert list(child.lines(1)) == ["tidied"]


def test_the_child_leads_its_own_group(tmp_path: Path) -> None:
    with start(tmp_path, "import os; print(os.getpgrp() == os.getpid())") as child:
        assert list(child.lines(30)) == ["True"]
        assert child.pid != os.getpgrp()


def test_the_log_is_private_and_new_even_over_an_open_old_one(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    log.parent.mkdir()
    log.write_text("old")
    log.chmod(0o644)
    with Child.start(python("print('new')"), log_path=log) as child:
        child.wait(30)
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.read_text() == "new\n"


def test_environment_and_folder_are_passed_on(tmp_path: Path) -> None:
    code = "import os; print(os.environ.get('MARK'), os.environ.get('HOME'), os.getcwd())"
    output = run(python(code), timeout_s=30, env={"MARK": "x"}, cwd=tmp_path)
    assert output == f"x None {tmp_path}\n"


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="cannot start `no-such-program .*installed"):
        Child.start(["no-such-program", "--x"], log_path=tmp_path / "log")


@pytest.mark.parametrize("argv", [[], ["a\0b"]])
def test_an_impossible_command_is_an_error(tmp_path: Path, argv: list[str]) -> None:
    with pytest.raises(ProcessError, match="cannot start"):
        Child.start(argv, log_path=tmp_path / "log")


def test_a_log_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(ProcessError, match="cannot start"):
        Child.start(python("pass"), log_path="/proc/no-such/log")


def test_secrets_are_hidden_in_lines_tail_and_messages(tmp_path: Path) -> None:
    code = "import sys; print('token', sys.argv[1]); raise SystemExit(1)"
    with start(tmp_path, code, SECRET, redact=(SECRET, "")) as child:
        with pytest.raises(ProcessError) as caught:
            child.wait_for(f"no {SECRET}", 30)
        assert child.log_tail() == caught.value.log_tail == "token ***"
        assert SECRET not in str(caught.value)
        assert "***" in str(caught.value)
    with start(tmp_path, code, SECRET, redact=(SECRET,)) as child:
        assert list(child.lines(30)) == ["token ***"]


def test_of_two_secrets_the_longer_is_hidden_whole(tmp_path: Path) -> None:
    code = "import sys; print(*sys.argv[1:])"
    output = run(python(code, "abc", "abcdef"), timeout_s=30, redact=("abc", "abcdef"))
    assert output == "*** ***\n"


def test_a_failed_start_does_not_show_the_secret_either(tmp_path: Path) -> None:
    with pytest.raises(ProcessError) as caught:
        Child.start([f"/no/{SECRET}"], log_path=tmp_path / "log", redact=[SECRET])
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("shift", range(16))
def test_a_secret_cut_by_the_start_of_the_tail_is_hidden_too(tmp_path: Path, shift: int) -> None:
    log = tmp_path / "child.log"
    child = Child.start(python("pass"), log_path=log, redact=[SECRET])
    child.wait(30)
    log.write_text(SECRET + "x" * (16 * 1024 + shift))
    tail = child.log_tail()
    assert len(tail) > 16_000
    assert not any(SECRET[i:] + "x" in tail for i in range(len(SECRET)))


def test_the_tail_is_the_last_lines_only(tmp_path: Path) -> None:
    with start(tmp_path, "for i in range(20000): print('line', i)") as child:
        child.wait(30)
        assert child.log_tail(2) == "line 19998\nline 19999"
        assert len(child.log_tail().splitlines()) == 30


def test_run_gives_all_output(tmp_path: Path) -> None:
    code = "for i in range(5000): print(i)"
    assert run(python(code), timeout_s=30).split() == [str(i) for i in range(5000)]


def test_run_raises_with_code_and_tail() -> None:
    with pytest.raises(ProcessError, match=r"ended with exit code 2; .*'bad flag'$") as caught:
        run(python("print('bad flag'); raise SystemExit(2)"), timeout_s=30)
    assert caught.value.log_tail == "bad flag"


def test_run_names_the_signal_that_ended_the_command() -> None:
    with pytest.raises(ProcessError, match="ended by SIGKILL, often because memory ran out"):
        run(python("import os; os.kill(os.getpid(), 9)"), timeout_s=30)


def test_run_stops_what_takes_too_long(tmp_path: Path) -> None:
    code = "import os, time; print('pid', os.getpid()); time.sleep(60)"
    with pytest.raises(ProcessError, match="was stopped because it still ran after 2 s") as caught:
        run(python(code), timeout_s=2)
    assert is_gone_soon(int(caught.value.log_tail.split()[-1]))


def test_a_long_command_is_shortened_in_messages() -> None:
    with pytest.raises(ProcessError) as caught:
        run(python("raise SystemExit(1)", "x" * 5000), timeout_s=30)
    assert len(str(caught.value)) < 400
