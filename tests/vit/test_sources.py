from __future__ import annotations

import http.server
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from colabtools.errors import DatasetError, ImageError
from colabtools.images import Encoded, load_upright
from colabtools.vit.sources import open_source


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return file.getvalue()


def colour_of(photo: Path | Encoded) -> tuple[int, int, int]:
    return load_upright(photo).getpixel((0, 0))


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_a_folder_is_listed_to_its_depth_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", ".cache/d.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png())
    (tmp_path / "folder.jpg").mkdir()
    source = open_source(str(tmp_path))
    assert list(source.names) == ["a.JPG", "b.png", "folder.jpg", "sub/c.webp"]
    assert colour_of(source.read(1)) == RED
    with pytest.raises(ImageError, match="is a folder"):
        source.read(2)


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    before = open_source(str(tmp_path)).stamps
    assert open_source(str(tmp_path)).stamps == before
    os.utime(path, ns=(0, 0))
    assert open_source(str(tmp_path)).stamps != before


def test_a_pattern_and_a_single_file(tmp_path: Path) -> None:
    for name in ("a1.png", "a2.png", "b1.png"):
        (tmp_path / name).write_bytes(png())
    assert len(open_source(str(tmp_path / "a*.png")).names) == 2
    assert len(open_source(str(tmp_path / "a1.png")).names) == 1


def test_members_of_archives_are_read_in_place(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.png", png("red"))
        archive.writestr("deep/two.png", png("blue"))
        archive.writestr("readme.txt", "x")
        archive.mkdir("folder.png")
    for number in (0, 1):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for name in ("key.png", "key.json"):
                data = png("blue") if name.endswith("png") else b"{}"
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    found = open_source(str(tmp_path / "a.zip"))
    assert list(found.names) == ["a.zip/one.png", "a.zip/deep/two.png"]
    assert [colour_of(found.read(n)) for n in (0, 1)] == [RED, BLUE]
    shards = open_source(str(tmp_path / "*.tar"))
    assert list(shards.names) == ["0.tar/key.png", "1.tar/key.png"]
    assert colour_of(shards.read(1)) == BLUE


def test_a_name_that_comes_twice_counts_once(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for colour in ("red", "blue"):
            member = tarfile.TarInfo("x.png")
            member.size = len(png(colour))
            archive.addfile(member, io.BytesIO(png(colour)))
    source = open_source(str(tmp_path / "a.tar"))
    assert len(source.names) == 2
    with pytest.raises(ImageError, match="again further on"):
        source.read(0)
    assert colour_of(source.read(1)) == BLUE


def test_a_damaged_member_is_one_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.png", png() + os.urandom(1000))
        archive.writestr("two.png", png("blue"))
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(ImageError, match="one.png"):
        source.read(0)
    assert colour_of(source.read(1)) == BLUE


def test_tables_name_pictures_and_keep_their_columns(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    table = tmp_path / "list.csv"
    table.write_text("id,File,status\n7,a.png,old\n8,gone.png,old\n9,,old\n")
    source = open_source(str(table))
    assert list(source.names) == ["a.png", "gone.png", ""]
    assert source.columns.to_pylist() == [{"id": 7}, {"id": 8}, {"id": 9}]
    assert colour_of(source.read(0)) == RED
    with pytest.raises(ImageError):
        load_upright(source.read(1))
    with pytest.raises(ImageError, match="names no picture"):
        source.read(2)
    with pytest.raises(DatasetError, match="no column 'photo'; it has id, File"):
        open_source(str(table), "photo")


def test_pictures_held_in_a_table_are_read_by_groups(tmp_path: Path) -> None:
    colours = ["red", "blue"] * 5
    held = [{"bytes": png(colour), "path": f"{n}.png"} for n, colour in enumerate(colours)]
    table = pa.table({"image": [*held, None], "label": [*range(10), 10]})
    path = tmp_path / "set.parquet"
    pq.write_table(table, path, row_group_size=3)
    source = open_source(str(path))
    assert source.columns.column_names == ["label"]
    for number in (9, 0, 4, 3):
        assert colour_of(source.read(number)) == (BLUE if number % 2 else RED)
    with pytest.raises(ImageError, match="holds no picture"):
        source.read(10)


@pytest.fixture
def address() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/a.png"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(png("blue") if known else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched(tmp_path: Path, address: str) -> None:
    table = tmp_path / "list.csv"
    table.write_text(f"url\n{address}/a.png\n{address}/b.png\nfile:///etc/passwd\n")
    source = open_source(str(table))
    assert colour_of(source.read(0)) == BLUE
    with pytest.raises(ImageError, match="404"):
        source.read(1)
    with pytest.raises(ImageError):
        load_upright(source.read(2))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty", None, "no picture in"),
        ("a.zip", b"nothing", "cannot be read as a zip"),
        ("a.tar", b"nothing" * 100, "cannot be read as an uncompressed tar"),
        ("a.tar.gz", b"\x1f\x8b" + b"x" * 600, "cannot be read as an uncompressed tar"),
        ("a.parquet", b"PAR1", "cannot be read as a table"),
        ("a.csv", b"a,b\n1,2\n", "none of the columns"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read as a table|none of the columns"),
        ("a.csv", b"path\n", "no picture in"),
    ],
)
def test_what_is_no_source_is_one_line(
    tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    path = tmp_path / name
    path.mkdir() if data is None else path.write_bytes(data)
    with pytest.raises(DatasetError, match=message) as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not there"):
        open_source(str(tmp_path / "nothing"))
    with pytest.raises(DatasetError, match="no picture"):
        open_source(str(tmp_path / "*.png"))
