"""Kill -9 at random moments of everything that moves a session: whatever opens is whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from colabtools.dreambooth.session import open_session, session_names
from colabtools.dreambooth.transfer import export_session, import_session
from colabtools.dreambooth.trash import delete_session, empty_trash
from colabtools.drive import Workspace

# How long each verb takes, or a little more, in seconds.
VERBS_S = {"create": 0.006, "import": 0.06, "export": 0.05, "delete": 0.003}
KILLS_EACH = 8

CHILD = """
import itertools, sys
from pathlib import Path
from colabtools import report
from colabtools.dreambooth.session import create_session
from colabtools.dreambooth.transfer import export_session, import_session
from colabtools.dreambooth.trash import delete_session
from colabtools.drive import Workspace

report.set_quiet(True)
workspace, source = Workspace(Path(sys.argv[1])), Path(sys.argv[2])
for number in itertools.count(int(sys.argv[3])):
    for verb in ("create", "import", "export", "delete"):
        print(verb, number, flush=True)
        if verb == "create":
            create_session(workspace, f"new {number}")
        elif verb == "import":
            import_session(workspace, source, name=f"in {number}")
        elif verb == "export":
            export_session(workspace, "kept", workspace.root / "kept.zip")
        else:
            delete_session(workspace, f"in {number}")
"""


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def make_source(folder: Path) -> dict[str, bytes]:
    chance = random.Random(0)
    for number in range(12):
        for name, size in (
            (f"instance_images/{number}.png", 60_000),
            (f"captions/{number}.txt", 9),
        ):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chance.randbytes(size))
    (folder / "session.ckpt").write_bytes(chance.randbytes(3_000_000))
    return contents(folder)


def kill_once(workspace: Workspace, source: Path, number: int, verb: str, after_s: float) -> str:
    """Kill a child so long after it began a verb, and say what it was doing."""
    command = [sys.executable, "-c", CHILD, str(workspace.root), str(source), str(number)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    seen = b""
    while not seen.endswith(b"\n") or not seen.splitlines()[-1].startswith(verb.encode()):
        seen += child.stdout.readline()
    time.sleep(after_s)
    os.kill(child.pid, signal.SIGKILL)
    out, err = child.communicate()
    assert err == b""
    return (seen + out).splitlines()[-1].decode().split()[0]


def test_thirty_kills_lose_no_photo_and_every_session_opens(tmp_path: Path) -> None:
    workspace, source = Workspace(tmp_path / "work"), tmp_path / "source"
    workspace.root.mkdir()
    whole = make_source(source)
    kept = import_session(workspace, source, name="kept").session
    kept_files = contents(kept.folder)
    chance = random.Random(1)
    interrupted = dict.fromkeys(VERBS_S, 0)
    for number, verb in enumerate(list(VERBS_S) * KILLS_EACH):
        after_s = chance.uniform(0, VERBS_S[verb])
        interrupted[kill_once(workspace, source, 1000 * number, verb, after_s)] += 1
        assert contents(source) == whole
        assert contents(kept.folder) == kept_files
        for name in session_names(workspace):
            session = open_session(workspace, name)
            if name.startswith("in "):
                assert contents(session.folder) == whole
        for place in (workspace.sessions_dir / ".trash").glob("in *"):
            assert contents(place) == whole
        exported = workspace.root / "kept.zip"
        assert not exported.exists() or zipfile.ZipFile(exported).testzip() is None
    assert sum(interrupted.values()) >= 30
    # The others are over too soon for every one of a few kills to find them.
    assert min(interrupted[verb] for verb in ("import", "export")) > 0, interrupted
    # Everything that was cut off can be done again at once, and leaves nothing behind.
    start_s = time.monotonic()
    export_session(workspace, "kept")
    import_session(workspace, source, name="last")
    for name in session_names(workspace):
        delete_session(workspace, name)
    empty_trash(workspace)
    assert time.monotonic() - start_s < 20
    assert sorted(p.name for p in workspace.root.iterdir()) == ["Fast-Dreambooth", "kept.zip"]
    assert [p.name for p in workspace.sessions_dir.iterdir() if p.name != ".leases"] == []
