"""Hostile and broken files: nothing runs, one line each, no more than a second or 200 MB.

Each file is right but for one trick, and its refusal has to name the trick.
"""

from __future__ import annotations

import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colabtools import cli

from .conftest import file_content

Corpus = dict[str, tuple[bytes, str]]

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight"
DATA = (struct.pack("<40f", *range(40)), struct.pack("<40f", *range(40, 80)))
NOT_OF_TORCH = "it is a pickle, and none that torch writes"


# Pickles, operation by operation.


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(b"\x8a\x09%b" % value.to_bytes(9, "little") for value in values) + b"t"


@dataclass(frozen=True)
class Stored:
    """A tensor of float32 as torch pickles it, over a storage of its own."""

    name: str
    key: str
    shape: tuple[int, int]
    strides: tuple[int, int]
    count: int = 40
    offset: int = 0
    kind: str = "FloatStorage"

    def pickled(self) -> bytes:
        storage = b"ctorch\n%b\n" % self.kind.encode() + text(self.key) + text("cpu")
        view = numbers([self.offset])[1:-1] + numbers(self.shape) + numbers(self.strides)
        return (
            text(self.name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + storage
            + numbers([self.count])[1:] + b"Q" + view + b"\x89ccollections\nOrderedDict\n)RtR"
        )  # fmt: skip


TENSORS = (Stored(DOWN, "0", (4, 10), (10, 1)), Stored(UP, "1", (10, 4), (4, 1)))


def pickled(
    value: bytes = b"N", tensors: tuple[Stored, ...] = TENSORS, *, view: bytes = b""
) -> bytes:
    """The pickle of a LoRA that has one more value."""
    rows = b"".join(tensor.pickled() for tensor in tensors).replace(b"tQ", view + b"tQ")
    return b"\x80\x02}(" + rows + text("x") + value + b"u."


def legacy(value: bytes) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    first = [0x1950A86A20F9469CFC6C, 1001, system]
    storages = b"".join((40).to_bytes(8, "little") + data for data in DATA)
    before = b"".join(pickle.dumps(each, 2) for each in first)
    return before + pickled(value, view=b"N") + pickle.dumps(["0", "1"], 2) + storages


RUN, TOUCH = b"cposix\nsystem\n", text("touch canary")
OPEN = text("open('canary', 'w')")

# What runs when it is unpickled, and what of it is to be named.
RUNNING: dict[str, tuple[bytes, str]] = {
    "BUILD": (
        b"ctypes\nSimpleNamespace\n)R}" + text("__setstate__") + RUN + b"sb" + TOUCH + b"b",
        "types.SimpleNamespace",
    ),
    "INST": (b"(" + TOUCH + b"iposix\nsystem\n", "posix.system"),
    "OBJ": (b"(" + RUN + TOUCH + b"o", "posix.system"),
    "REDUCE": (RUN + TOUCH + b"\x85R", "posix.system"),
    "STACK_GLOBAL": (text("posix") + text("system") + b"\x93" + TOUCH + b"\x85R", "posix.system"),
    "a name of Python 2": (b"c__builtin__\neval\n" + OPEN + b"\x85R", "builtins.eval"),
    "a path of names": (
        b"\x80\x04" + text("shutil") + text("os.system") + b"\x93" + TOUCH + b"\x85R",
        "shutil.os.system",
    ),
}  # fmt: skip

CALLING: dict[str, tuple[bytes, str]] = RUNNING | {
    "BUILD of a label": (b"ctorch._utils\n_rebuild_tensor_v2\n}b", "operation BUILD"),
    "EXT1": (b"\x82\x01", "operation EXT1"),
    "GLOBAL": (RUN, "posix.system"),
    "NEWOBJ": (b"cbuiltins\neval\n" + TOUCH + b"\x85\x81", "builtins.eval"),
    "NEWOBJ_EX": (b"ctorch\nSize\n)}\x92", "operation NEWOBJ_EX"),
    "a name that clears the screen": (b"cposix\x1b[2J\nsystem\n", r"'posix\x1b[2J.system'"),
    "a storage of no storage": (
        b"(" + text("storage") + b"ctorch\ndevice\n" + text("0") + text("cpu") + b"K(tQ",
        "the storage torch.device",
    ),
    "named by text": (b"(S'touch canary'\niposix\nsystem\n", "operation STRING"),
    "persistent": (text("a") + b"Q", "an object outside of it"),
}

# What is small in a pickle and large when it is walked.
SWELLING: dict[str, bytes] = {
    "deep tuples": b")" + b"\x85" * 400_000,
    "laughs": b"](]" + b"".join(b"q%c](h%ch%ch%ch%ch%ce" % ((n,) * 6) for n in range(99)) + b"e",
    "lists in themselves": b"]q\x00" + b"h\x00a" * 100_000,
    "same table": b"}q\x00" + text("state_dict") + b"h\x00s",
}

# What other readers take long or much memory for, and what is nothing here.
COLLIDING = b"".join(
    b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(16_000)
)
HARMLESS: dict[str, bytes] = {
    "colliding names": b"}(" + COLLIDING + b"u",
    "memo far away": b"Nr\xff\xff\xff\xff",
}

BROKEN: dict[str, tuple[bytes, str]] = {
    "huge text": (b"\x80\x02X\xff\xff\xff\xff.", "in a value of 4294967295 bytes"),
    "many steps": (b"\x80\x02" + b"N" * 2_000_000 + b".", "more than 500000 steps"),
    "of nothing": (b"\x80\x02.", "cannot be read at byte 2"),
    "of protocol 5": (b"\x80\x05N.", "of protocol 5"),
    "without end": (b"\x80\x02}", "lacks its end, after 3 bytes"),
}


def pickles() -> Corpus:
    made = {f"bare {n}.ckpt": (b"\x80\x02%b." % body, r) for n, (body, r) in CALLING.items()}
    for name, body in (SWELLING | HARMLESS).items():
        made[f"bare {name}.ckpt"] = (b"\x80\x02%b." % body, NOT_OF_TORCH)
    too_much = dict.fromkeys(SWELLING.values(), "more than the tensors of a model")
    values = CALLING | {name: (body, too_much[body]) for name, body in SWELLING.items()}
    for name, (body, reason) in values.items():
        made[f"zipped {name}.ckpt"] = (packed(changed(0, data=pickled(body))), reason)
        made[f"legacy {name}.ckpt"] = (legacy(body), reason)
    for name, (data, reason) in BROKEN.items():
        made[f"bare {name}.ckpt"] = (data, reason)
        made[f"zipped {name}.ckpt"] = (packed(changed(0, data=data)), reason)
    for name, lie, reason in (
        ("count", {"count": 41}, f"bytes of its tensor {UP} are not all there"),
        ("kind", {"key": "0", "kind": "HalfStorage"}, "storage 0 is described in two ways"),
        ("offset", {"offset": 1}, f"tensor {UP} reaches past its bytes"),
        ("shape", {"shape": (11, 4)}, f"tensor {UP} reaches past its bytes"),
        ("size", {"shape": (2**62, 4)}, f"tensor {UP} reaches past its bytes"),
        ("strides", {"strides": (0, 0)}, f"tensor {UP} does not lie in one piece"),
    ):
        data = pickled(tensors=(TENSORS[0], replace(TENSORS[1], **lie)))
        made[f"lying {name}.ckpt"] = (packed(changed(0, data=data)), reason)
    return made | {
        "two pickles.ckpt": (packed(changed(0, data=pickled() * 2)), "bytes follow its pickle"),
        "protocol 0.ckpt": (RUN + b"(S'touch canary'\ntR.", "posix.system"),
    }


# Archives, field by field, since zipfile tells no lies.


@dataclass(frozen=True)
class Entry:
    """An entry of an archive.

    Attributes:
        name: in the directory and before the data.
        data: as they lie there.
        size: of the data once they are unpacked, where it differs.
        listed_size: the one in the directory, where it differs.
        crc: of the unpacked data, where they are packed.
        extra: fields before the data.
        wide: whether the narrow sizes before the data are full, since `extra` has them.
        place: the number of the entry whose bytes it shares.
        listed: whether the directory has it.
    """

    name: str
    data: bytes
    size: int = -1
    listed_size: int = -1
    crc: int = -1
    method: int = 0
    flags: int = 0
    mode: int = 0
    extra: bytes = b""
    wide: bool = False
    place: int = -1
    listed: bool = True


ENTRIES = (
    Entry("archive/data.pkl", pickled()),
    Entry("archive/data/0", DATA[0]),
    Entry("archive/data/1", DATA[1]),
    Entry("archive/version", b"3\n"),
)


def changed(number: int, **fields: Any) -> list[Entry]:
    entries = list(ENTRIES)
    entries[number] = replace(entries[number], **fields)
    return entries


def packed(entries: Iterable[Entry] = ENTRIES, count: int = 0, comment: bytes = b"") -> bytes:
    """An archive; `count` is added to the number of its entries."""
    body, rows, places = bytearray(), [], []
    for entry in entries:
        name = entry.name.encode()
        size = len(entry.data) if entry.size < 0 else entry.size
        length = len(entry.data) if entry.method else size
        crc = zlib.crc32(entry.data) if entry.crc < 0 else entry.crc
        places.append(len(body) if entry.place < 0 else places[entry.place])
        if entry.place < 0:
            sizes = (2**32 - 1,) * 2 if entry.wide else (length, size)
            fields = (20, entry.flags, entry.method, 0, 33, crc, *sizes)
            lengths = (len(name), len(entry.extra))
            body += struct.pack("<4s5H3L2H", b"PK\3\4", *fields, *lengths) + name
            body += entry.extra + entry.data
        if entry.listed:
            told = size if entry.listed_size < 0 else entry.listed_size
            fields = (0x314, 20, entry.flags, entry.method, 0, 33, crc)
            sizes = (length if entry.method else told, told)
            rest = (len(name), 0, 0, 0, 0, entry.mode << 16, places[-1])
            rows.append(struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields, *sizes, *rest) + name)
    total, directory = len(rows) + count, b"".join(rows)
    sizes = (total, total, len(directory), len(body), len(comment))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *sizes)
    return bytes(body) + directory + end + comment


def archive_with_two_directories() -> bytes:
    once = packed()
    size, begin = struct.unpack("<LL", once[-10:-2])
    again = once[begin : begin + size] + once[-22:-6] + struct.pack("<LH", len(once), 0)
    return packed(comment=again)


def bomb() -> list[Entry]:
    """Entries where a tensor has a storage of 256 MB, packed to less than one."""
    squeeze, block = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(2**24)
    data = (squeeze.compress(block) + squeeze.flush(zlib.Z_FULL_FLUSH)) * 16 + squeeze.flush()
    crc = 0
    for _ in range(16):
        crc = zlib.crc32(block, crc)
    return large(replace(ENTRIES[1], data=data, size=2**28, crc=crc, method=8))


def large(storage: Entry) -> list[Entry]:
    """Entries where a tensor is a part of a large storage."""
    count = max(len(storage.data), storage.size) // 4
    data = pickled(tensors=(replace(TENSORS[0], count=count), TENSORS[1]))
    return [replace(ENTRIES[0], data=data), storage, *ENTRIES[2:]]


def archives() -> Corpus:
    pkl, first, second, version = ENTRIES
    link = stat.S_IFLNK | 0o777
    deflated = zlib.compress(pkl.data, wbits=-15)
    crc = zlib.crc32(pkl.data)
    small = changed(0, data=deflated, size=len(pkl.data), crc=crc, method=8)
    wide = struct.pack("<2H2Q", 1, 16, 40, 40)
    to_second = len(first.data) + 30 + len(second.name) + len(second.data)
    strange = "which torch never writes"
    twice = f"entry {second.name} overlaps {first.name}"
    tricks: dict[str, tuple[list[Entry], str]] = {
        "bomb": (bomb(), f"entry {first.name} is compressed"),
        "big-endian": ([*ENTRIES, Entry("archive/byteorder", b"big")], "not little-endian"),
        "compressed": (small, f"entry {pkl.name} is compressed"),
        "encrypted": (changed(1, flags=1), f"entry {first.name} is encrypted"),
        "hidden at the end": ([*ENTRIES, replace(pkl, listed=False)], "are in no entry"),
        "hidden first": ([replace(pkl, listed=False), *ENTRIES], "bytes at byte 0 are in no entry"),
        "hidden inside": ([pkl, replace(pkl, listed=False), *ENTRIES[1:]], "are in no entry"),
        "link": (changed(1, mode=link), f"entry {first.name} is a link"),
        "link beside": ([*ENTRIES, Entry("archive/a", b"../canary", mode=link)], "archive/a is a"),
        "missing": ([pkl, first, version], f"bytes of its tensor {UP} are missing"),
        "nested": ([*ENTRIES, Entry("archive/a.zip", packed())], f"archive/a.zip, {strange}"),
        "no pickle": ([first, second, version], "no data.pkl"),
        "path": ([*ENTRIES, Entry("../canary", b"")], f"entry ../canary, {strange}"),
        "path from the root": ([*ENTRIES, Entry("/canary", b"")], f"entry /canary, {strange}"),
        "path inside": ([*ENTRIES, Entry("archive/data/../../canary", b"")], "data/../../canary"),
        "path of windows": ([*ENTRIES, Entry("archive\\..\\canary", b"")], r"archive\..\canary"),
        "screen": ([*ENTRIES, Entry("archive/\x1b[2J\n", b"")], r"'archive/\x1b[2J\n'"),
        "short": (changed(2, data=DATA[1][:8]), f"bytes of its tensor {UP} are not all there"),
        "size in 64 bits": (changed(1, wide=True, extra=wide), "two sizes, 160 and 40 bytes"),
        "size in the directory": (changed(1, listed_size=152), "two sizes, 152 and 160 bytes"),
        "size of more": (changed(3, size=9), f"entry {version.name} reaches past its data"),
        "size over the next": (changed(1, size=to_second), twice),
        "size without bits": (changed(1, wide=True), "lacks a size in 64 bits"),
        "two folders": ([*ENTRIES, Entry("b/byteorder", b"little")], "byteorder are in two fold"),
        "two in one place": ([pkl, first, replace(second, place=1), version], twice),
        "two pickles": ([*ENTRIES, pkl], "it has data.pkl twice"),
    }  # fmt: skip
    made = {f"zip {n}.ckpt": (packed(entries), reason) for n, (entries, reason) in tricks.items()}
    return made | {
        "zip and more.ckpt": (packed() + b"more", "bytes follow the end of its archive"),
        "zip cut.ckpt": (packed()[:-9], "is cut off"),
        "zip of one less.ckpt": (packed(count=-1), "too many entries"),
        "zip of one more.ckpt": (packed(count=1), "too few entries"),
        "zip other name.ckpt": (packed().replace(b"data/0", b"data/2", 1), "another name before"),
        "zip two directories.ckpt": (archive_with_two_directories(), "are in no entry"),
    }


# Headers of .safetensors files.


def row(begin: int, end: int, shape: list[int], dtype: str = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


def tensors_file(rows: str, data: bytes = b"".join(DATA)) -> bytes:
    return len(rows).to_bytes(8, "little") + rows.encode() + data


def headers() -> Corpus:
    down = f'{{"{DOWN}": {row(0, 160, [4, 10])}'

    def with_up(begin: int, end: int, shape: list[int], dtype: str = "F32") -> str:
        return f'{down}, "{UP}": {row(begin, end, shape, dtype)}}}'

    lies = {
        "array bomb": (f'{{"{DOWN}": ' + "[" * 900_000, "recursion depth"),
        "hole": (with_up(164, 320, [39]), f"tensor {UP} follows a hole"),
        "items": (f'{{"{DOWN}": [' + "1," * 1_000_001, "more than 1000000 items"),
        "metadata": (f'{down}, "__metadata__": {{"a": 1}}}}', "__metadata__ is no table"),
        "name twice": (f"{with_up(160, 320, [40])[:-1]}, {down[1:]}}}", "weight stands there twic"),
        "overlap": (with_up(80, 320, [60]), f"tensor {UP} overlaps another tensor"),
        "screen": (f'{{"\\u001b[2J\\n": {row(0, 4, [2])}}}', r"tensor '\x1b[2J\n' of shape"),
        "size": (with_up(160, 320, [10, 5]), f"{UP} of shape [10, 5] has 160 bytes of F32"),
        "size of 2-62": (with_up(160, 320, [2**62, 8]), f"tensor {UP} of shape [{2**62}, 8]"),
        "type": (with_up(160, 320, [10, 4], "Q7"), f"tensor {UP} is of type Q7"),
    }  # fmt: skip
    made = {f"{n}.safetensors": (tensors_file(head), reason) for n, (head, reason) in lies.items()}
    return made | {
        "2-63.safetensors": ((2**63).to_bytes(8, "little") + b"{}", "would have 92233720368547758"),
        "more.safetensors": (tensors_file(down + "}"), "160 bytes follow its last tensor"),
    }  # fmt: skip


def corpus() -> Corpus:
    return pickles() | archives() | headers() | {
        "empty.ckpt": (b"", "is empty"),
        "empty.safetensors": (b"", "is empty"),
        "lfs.ckpt": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "page.safetensors": (b"<!DOCTYPE html>", "it is a web page"),
    }  # fmt: skip


def controls() -> dict[str, bytes]:
    whole = f'{{"{DOWN}": {row(0, 160, [4, 10])}, "{UP}": {row(160, 320, [10, 4])}}}'
    wide = struct.pack("<2H2Q", 1, 16, 160, 160)
    made = {
        "header.safetensors": tensors_file(whole),
        "legacy.ckpt": legacy(b"N"),
        "zip of a large storage.ckpt": packed(large(replace(ENTRIES[1], data=bytes(2**20)))),
        "zip with byteorder.ckpt": packed([*ENTRIES, Entry("archive/byteorder", b"little")]),
        "zip with modes.ckpt": packed(changed(1, mode=stat.S_IFREG | 0o644)),
        "zip with sizes in 64 bits.ckpt": packed(changed(1, wide=True, extra=wide)),
        "zip.ckpt": packed(),
    }
    for name, body in HARMLESS.items():
        made[f"legacy {name}.ckpt"] = legacy(body)
        made[f"zip {name}.ckpt"] = packed(changed(0, data=pickled(body)))
    return made


CHILD = """
import contextlib, io, json, os, pickle, resource, signal, sys, time, zipfile
from pathlib import Path
from colabtools import cli
from colabtools.checkpoints import inspect as _

def inspect(path):
    return cli.main(["inspect", path])

def convert(path):
    return cli.main(["convert", path, "out.safetensors"])

def walk(value):
    return sum(map(walk, value)) if type(value) is list else 1

def believe(path):
    if not zipfile.is_zipfile(path):
        return walk(pickle.loads(Path(path).read_bytes()))
    with zipfile.ZipFile(path) as archive:
        return sum(archive.read(name) == b"" for name in archive.namelist())

def stop(*_):
    raise RuntimeError("out of time")

signal.signal(signal.SIGPROF, stop)
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 200 * 2**20,) * 2)
before = set(os.listdir())
for path in sorted(Path("corpus").iterdir()):
    for verb in sys.argv[1:]:
        out, err, begin = io.StringIO(), io.StringIO(), time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            signal.setitimer(signal.ITIMER_PROF, 1.5)
            try:
                code = globals()[verb](str(path))
            except BaseException as error:
                code = repr(error)[:200]
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds, left = time.process_time() - begin, sorted(set(os.listdir()) - before)
        for name in left:
            os.remove(name)
        print(json.dumps([path.name, verb, code, out.getvalue(), err.getvalue(), seconds, left]))
"""


def read_all(folder: Path, *verbs: str) -> list[tuple[str, str, Any, str, str, float, list[str]]]:
    """What a process of little memory makes of each file: name, verb, exit code, output, ..."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *verbs],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr[-500:]) == (0, "")
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def faults(reading: tuple[str, str, Any, str, str, float, list[str]], reason: str) -> list[str]:
    """What is wrong with the refusal of a file, and how."""
    _, _, code, out, err, seconds, left = reading
    line = err.removesuffix("\n")
    checks = {
        f"exit {code}": code != 1 or out,
        f"no line of an error: {err[:300]}": not err.startswith("colabtools: "),
        f"more than a line: {err[:300]}": not line.isprintable() or "Traceback" in err,
        f"no {reason!r}: {err[:300]}": reason not in err,
        "slow": seconds > 1,
        f"left {left}": left,
    }
    return [fault for fault, found in checks.items() if found]


def test_nothing_hostile_runs_or_takes_long_and_each_trick_is_named(tmp_path: Path) -> None:
    place = tmp_path / "corpus"
    place.mkdir()
    written = corpus()
    for name, (data, _) in written.items():
        (place / name).write_bytes(data)
    os.mkfifo(place / "pipe.ckpt")
    (place / "folder.ckpt").mkdir()
    (place / "link.ckpt").symlink_to("link.ckpt")
    reasons = {name: reason for name, (_, reason) in written.items()} | {
        "folder.ckpt": "model_index.json",
        "link.ckpt": "Too many levels of symbolic links",
        "pipe.ckpt": "no regular file",
    }
    readings = read_all(tmp_path, "inspect", "convert")
    assert len(readings) == 2 * len(reasons)
    found = {
        (name, verb): faults((name, verb, *rest), reasons[name]) for name, verb, *rest in readings
    }
    assert {key: wrong for key, wrong in found.items() if wrong} == {}
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert all((place / name).read_bytes() == data for name, (data, _) in written.items())


def test_a_reader_that_believes_is_found_out(tmp_path: Path) -> None:
    files = {name: b"\x80\x02%b." % body for name, (body, _) in RUNNING.items()} | {
        "bomb": packed(bomb()),
        "laughs": b"\x80\x02%b." % SWELLING["laughs"],
    }
    (tmp_path / "corpus").mkdir()
    for name, data in files.items():
        (tmp_path / "corpus" / name).write_bytes(data)
    found = {
        reading[0]: (reading[2], faults(reading, "")) for reading in read_all(tmp_path, "believe")
    }
    assert found.keys() == files.keys()
    for name in RUNNING:
        assert "left ['canary']" in found[name][1]
    assert found["bomb"][0].startswith("MemoryError(")
    assert found["laughs"][0] == "RuntimeError('out of time')"
    assert "slow" in found["laughs"][1]


def test_a_file_that_is_admitted_or_refused_for_another_reason_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.ckpt").write_bytes(packed())
    (tmp_path / "corpus/b.ckpt").write_bytes(b"")
    admitted, refused = read_all(tmp_path, "inspect")
    assert faults(admitted, "") == ["exit 0", "no line of an error: "]
    assert faults(refused, "is empty") == []
    assert [wrong[:9] for wrong in faults(refused, "posix")] == ["no 'posix"]


@pytest.mark.parametrize("name", controls())
def test_without_its_trick_a_file_is_admitted_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path, made = tmp_path / name, tmp_path / "out.safetensors"
    path.write_bytes(controls()[name])
    assert cli.main(["inspect", str(path)]) == 0
    assert "lora" in capsys.readouterr().out
    assert cli.main(["convert", str(path), str(made)]) == 0
    values = b"".join(data for _, _, data in file_content(made).values())
    assert values in (DATA[0] + DATA[1], bytes(160) + DATA[1])
    # Torch takes more than a second for names that collide.
    if path.suffix == ".ckpt" and "colliding" not in name:
        assert torch.load(path, weights_only=True)[UP].flatten().tolist() == list(range(40, 80))
