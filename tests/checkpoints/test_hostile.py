"""Hostile and broken files: nothing runs, one line each, no more than a second or 200 MB."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

RUN = b"cposix\nsystem\n"
CALL = b"X\x0c\x00\x00\x00touch canary"

PICKLES: dict[str, bytes] = {
    "BUILD": b"\x80\x02cposix\nsystem\n}b.",
    "EXT1": b"\x80\x02\x82\x01.",
    "GLOBAL": b"\x80\x02" + RUN + b".",
    "INST": b"\x80\x02(" + CALL + b"iposix\nsystem\n.",
    "NEWOBJ": b"\x80\x02cbuiltins\neval\n" + CALL + b"\x85\x81.",
    "OBJ": b"\x80\x02(" + RUN + CALL + b"o.",
    "REDUCE": b"\x80\x02" + RUN + CALL + b"\x85R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + CALL + b"\x85R.",
    "deep tuples": b"\x80\x02)" + b"\x85" * 400_000 + b".",
    "huge text": b"\x80\x02X\xff\xff\xff\xff.",
    "lists in themselves": b"\x80\x02]q\x00" + b"h\x00a" * 100_000 + b".",
    "laughs": b"\x80\x02]"
    + b"".join(b"q%c](h%ch%ch%ch%ch%ce" % ((n,) * 6) for n in range(99))
    + b".",
    "many steps": b"\x80\x02" + b"N" * 2_000_000 + b".",
    "memo far away": b"\x80\x02Nr\xff\xff\xff\xff.",
    "named by text": b"(S'touch canary'\niposix\nsystem\n.",
    "of nothing": b"\x80\x02.",
    "persistent": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "protocol 0": RUN + b"(S'touch canary'\ntR.",
    "same table": b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.",
    "without end": b"\x80\x02}",
}  # fmt: skip


def archive(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, data in entries:
            made.writestr(name, data)
    return buffer.getvalue()


def files() -> dict[str, bytes]:
    saved = io.BytesIO()
    torch.save({"a": torch.ones(40)}, saved)
    good, pkl = saved.getvalue(), ("x/data.pkl", b"\x80\x02}.")
    entry = '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    texts = {
        "array bomb": "[" * 900_000,
        "gap": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        "name twice": entry + "," + entry[1:] + "}",
        "overlap": entry + ',"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    }
    made = {f"{name}.ckpt": data for name, data in PICKLES.items()}
    made |= {f"zipped {n}.ckpt": archive([("x/data.pkl", d)]) for n, d in PICKLES.items()}
    made |= {
        f"{name}.safetensors": len(text).to_bytes(8, "little") + text.encode() + b"12"
        for name, text in texts.items()
    }
    return made | {
        "2-63.safetensors": (2**63).to_bytes(8, "little") + b"{}",
        "bomb.ckpt": archive([("x/data.pkl", b"N" * 50_000_000)], zipfile.ZIP_DEFLATED),
        "cut.ckpt": good[:-9],
        "empty.ckpt": b"",
        "empty.safetensors": b"",
        "lfs.ckpt": b"version https://git-lfs.github.com/spec/v1\n",
        "lying.ckpt": good.replace(b"data/0", b"data/1", 1),
        "nested.ckpt": archive([("x/a.zip", archive([pkl]))]),
        "page.safetensors": b"<!DOCTYPE html>",
        "path.ckpt": archive([pkl, ("../../x", b"")]),
        "two.ckpt": archive([pkl, ("y/data.pkl", b"\x80\x02}.")]),
    }


CHILD = """
import resource, sys, time
from pathlib import Path
from colabtools.checkpoints.convert import convert
from colabtools.checkpoints.inspect import inspect
from colabtools.errors import CheckpointError
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 200 * 2**20,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    for call in (inspect, lambda path: convert(path, "out.safetensors")):
        begin = time.process_time()
        try:
            call(path)
            print(path.name, "was admitted")
        except CheckpointError as error:
            if not str(error).isprintable(): print(path.name, "is no line")
        except BaseException as error:
            print(path.name, "raised", repr(error)[:200])
        if time.process_time() - begin > 1: print(path.name, "was slow")
print("done")
"""


def test_nothing_hostile_runs_or_takes_long(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, data in files().items():
        (corpus / name).write_bytes(data)
    os.mkfifo(corpus / "pipe.ckpt")
    (corpus / "folder.ckpt").mkdir()
    (corpus / "link.ckpt").symlink_to(corpus / "link.ckpt")
    assert len(list(corpus.iterdir())) >= 25
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(corpus)],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.stdout, done.stderr[-500:]) == ("done\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


@pytest.mark.parametrize("name", ["GLOBAL", "INST", "REDUCE", "STACK_GLOBAL", "protocol 0"])
def test_what_would_have_run_is_named(tmp_path: Path, name: str) -> None:
    from colabtools.checkpoints.pickles import ensure_safe
    from colabtools.errors import CheckpointError

    path = tmp_path / "a.ckpt"
    path.write_bytes(PICKLES[name])
    with pytest.raises(CheckpointError, match=r"posix\.system.*safetensors"):
        ensure_safe(path)
