"""Pictures of every kind that a camera, a scanner or an image editor leaves behind."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from colabtools.errors import ImageError
from colabtools.images import PHOTO_SUFFIXES, fit, load_upright, square, upright_size

ORIENTATION = 0x0112
# How a camera held in another way stores the picture; each is undone by what the tag stands for.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def pixels(image: Image.Image) -> list[list[int]]:
    """Rows of the pictures below are one pixel high: a list of (r, g, b)."""
    return np.asarray(image).reshape(-1, 3).tolist()


@pytest.fixture
def scene() -> Image.Image:
    """A picture without any symmetry, 24 x 16, in blocks that JPEG keeps apart."""
    colours = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 0, 0), (255, 255, 255)]]
    return Image.fromarray(np.kron(np.uint8(colours), np.ones((8, 8, 1), np.uint8)))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_gives_the_same_upright_picture(
    tmp_path: Path, scene: Image.Image, suffix: str, orientation: int
) -> None:
    turn = STORED[orientation]
    stored = scene if turn is None else scene.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"photo{suffix}"
    lossy = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}
    stored.save(path, exif=exif, **lossy.get(suffix, {}))
    upright = load_upright(path)
    assert upright.size == upright_size(path) == scene.size
    difference = np.abs(np.asarray(upright, dtype=int) - np.asarray(scene, dtype=int))
    assert difference.max() <= (12 if suffix == ".jpg" else 0)


def test_an_upright_picture_is_not_turned_again_and_carries_nothing_but_pixels(
    tmp_path: Path, scene: Image.Image
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    scene.save(tmp_path / "a.png", exif=exif, icc_profile=b"not for the model", dpi=(300, 300))
    upright = load_upright(tmp_path / "a.png")
    assert upright.info == {}
    upright.save(tmp_path / "b.png")
    assert load_upright(tmp_path / "b.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(
    tmp_path: Path, scene: Image.Image, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    scene.save(tmp_path / "a.png", exif=exif)
    assert load_upright(tmp_path / "a.png").tobytes() == scene.tobytes()


def test_a_damaged_tag_beside_the_orientation_spoils_neither_turn_nor_picture(
    tmp_path: Path, scene: Image.Image
) -> None:
    """Rewriting such EXIF, as ImageOps.exif_transpose does, fails."""
    entries = struct.pack("<HHII", ORIENTATION, 3, 1, 6)
    entries += struct.pack("<HHI4s", 0x011A, 2, 4, b"odd\0")  # a resolution that is a text
    block = b"II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    stored = scene.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "a.png", exif=b"Exif\0\0" + block)
    assert load_upright(tmp_path / "a.png").tobytes() == scene.tobytes()


def test_exif_that_is_noise_leaves_the_picture_as_it_is(tmp_path: Path, scene: Image.Image) -> None:
    scene.save(tmp_path / "a.png", exif=b"Exif\0\0" + bytes(range(7, 90)))
    assert load_upright(tmp_path / "a.png").tobytes() == scene.tobytes()


def palette(*, transparency: int | None) -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def picture(mode: str, values: list[object]) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def grey(values: list[float], kind: str) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=kind))


WHITE, BLACK = [255, 255, 255], [0, 0, 0]
RED, GREEN, BLUE = [255, 0, 0], [0, 255, 0], [0, 0, 255]
MODES = [
    ("1", ".png", picture("1", [0, 255]), [BLACK, WHITE]),
    ("L", ".png", picture("L", [0, 100, 255]), [BLACK, [100] * 3, WHITE]),
    ("LA", ".png", picture("LA", [(50, 255), (90, 0), (90, 0)]), [[50] * 3, WHITE, WHITE]),
    ("P", ".png", palette(transparency=None), [RED, GREEN, BLUE]),
    ("P see-through", ".png", palette(transparency=1), [RED, [127, 0, 127], BLUE]),
    ("P see-through", ".gif", palette(transparency=1), [RED, [127, 0, 127], BLUE]),
    ("RGB", ".bmp", picture("RGB", [(1, 2, 3), (250, 251, 252)]), [[1, 2, 3], [250, 251, 252]]),
    ("RGBA", ".png", picture("RGBA", [(9, 8, 7, 255), (0, 0, 0, 0)]), [[9, 8, 7], WHITE]),
    ("RGBA half", ".png", picture("RGBA", [(0, 0, 0, 127)]), [[128] * 3]),
    ("CMYK", ".tif", picture("CMYK", [(0, 0, 0, 0), (0, 255, 255, 0)]), [WHITE, RED]),
    ("I;16", ".png", grey([0, 25700, 65535], "uint16"), [BLACK, [100] * 3, WHITE]),
    ("I;16 dark", ".tif", grey([0, 100, 200], "uint16"), [BLACK, BLACK, [1] * 3]),
    ("I", ".tif", grey([0, 25700, 65535], "int32"), [BLACK, [100] * 3, WHITE]),
    ("I of 8 bits", ".tif", grey([-5, 100, 255], "int32"), [BLACK, [100] * 3, WHITE]),
    ("I of 31 bits", ".tif", grey([0, 2**30, 2**31 - 1], "int32"), [BLACK, [128] * 3, WHITE]),
    ("F", ".tif", grey([0, 100.4, 255], "float32"), [BLACK, [100] * 3, WHITE]),
    ("F to 1", ".tif", grey([0, 0.2, 1], "float32"), [BLACK, [51] * 3, WHITE]),
    ("F broken", ".tif", grey([float("nan"), float("inf"), 255], "float32"), [BLACK, BLACK, WHITE]),
]


@pytest.mark.parametrize(
    ("suffix", "image", "expected"),
    [row[1:] for row in MODES],
    ids=[f"{row[0]}{row[1]}" for row in MODES],
)
def test_every_mode_becomes_rgb_of_the_right_values(
    tmp_path: Path, suffix: str, image: Image.Image, expected: list[list[int]]
) -> None:
    path = tmp_path / f"photo{suffix}"
    image.save(path)
    with Image.open(path) as stored:
        assert stored.mode == image.mode or suffix == ".gif"
    loaded = load_upright(path)
    assert loaded.mode == "RGB"
    assert pixels(loaded) == expected


def test_an_animation_gives_its_first_picture(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert pixels(load_upright(tmp_path / "a.gif"))[0] == RED


def test_suffixes_in_the_list_are_those_that_can_be_read() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    assert set(Image.registered_extensions()) >= PHOTO_SUFFIXES


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in less than 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def broken_files(folder: Path) -> dict[str, bytes]:
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    files = {"text.jpg": b"these are\nmy notes\n", "empty.png": b"", "bomb.png": bomb()}
    for suffix in (".jpg", ".png", ".webp", ".gif", ".tif", ".bmp"):
        noise.save(folder / f"whole{suffix}")
        data = (folder / f"whole{suffix}").read_bytes()
        files[f"cut{suffix}"] = data[: len(data) // 2]
    return files


@pytest.mark.parametrize(
    "name",
    [
        *("text.jpg", "empty.png", "bomb.png"),
        *(f"cut{suffix}" for suffix in (".jpg", ".png", ".webp", ".gif", ".tif", ".bmp")),
    ],
)
def test_a_file_that_is_no_whole_picture_is_one_line_with_its_name(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(broken_files(tmp_path)[name])
    with pytest.raises(ImageError) as caught:
        load_upright(path)
    message = str(caught.value)
    assert message.startswith(f"{name} cannot be read as a picture (")
    assert f"remove it from {tmp_path} or replace it" in message
    assert "\n" not in message


def test_a_size_is_read_from_the_head_of_a_file_that_is_cut(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(broken_files(tmp_path)["cut.png"])
    assert upright_size(tmp_path / "cut.png") == (64, 64)
    (tmp_path / "a.jpg").write_text("my notes")
    with pytest.raises(ImageError, match=r"^a\.jpg cannot be read as a picture .*remove it from"):
        upright_size(tmp_path / "a.jpg")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^gone\.jpg cannot be read"):
        load_upright(tmp_path / "gone.jpg")


def test_a_photo_of_a_hundred_megapixels_is_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns from 89 megapixels on, phones take 108; here the limit is moved instead."""
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert load_upright(tmp_path / "a.png").size == (30, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ImageError, match="bomb"):
        load_upright(tmp_path / "a.png")


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 900), (900, 1), (7, 5), (511, 513), (512, 512), (1023, 767), (4000, 3)]
)
@pytest.mark.parametrize("side", [64, 512])
def test_a_square_has_exactly_the_size_asked_for(size: tuple[int, int], side: int) -> None:
    result = square(Image.new("RGB", size, (10, 200, 30)), side)
    assert result.size == (side, side)
    assert result.getextrema() == ((10, 10), (200, 200), (30, 30))


@pytest.mark.parametrize("turned", [False, True])
def test_a_square_is_the_middle_of_a_panorama(turned: bool) -> None:
    values = np.zeros((10, 50, 3), np.uint8)
    values[:, 20:30] = (0, 255, 0)
    image = Image.fromarray(values.transpose(1, 0, 2) if turned else values)
    assert pixels(square(image, 10)) == [GREEN] * 100


def test_a_picture_of_the_right_size_is_unchanged_to_the_bit() -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    assert square(noise, 64).tobytes() == noise.tobytes()


@pytest.mark.parametrize("size", [(65, 64), (64, 65), (67, 64)])
def test_a_crop_that_needs_no_resize_blurs_nothing(size: tuple[int, int]) -> None:
    noise = Image.effect_noise(size, 90).convert("RGB")
    left, top = (size[0] - 64) // 2, (size[1] - 64) // 2
    whole = noise.crop((left, top, left + 64, top + 64))
    assert square(noise, 64).tobytes() == whole.tobytes()


def test_the_photo_itself_is_left_alone_by_square() -> None:
    noise = Image.effect_noise((40, 30), 90).convert("RGB")
    before = noise.tobytes()
    square(noise, 16)
    assert (noise.size, noise.tobytes()) == ((40, 30), before)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 900), (900, 1), (7, 5), (511, 513), (645, 512), (1023, 767), (4000, 3)]
)
@pytest.mark.parametrize("shape", [(64, 64), (80, 48), (48, 80), (640, 384)])
def test_a_fitted_picture_has_exactly_the_size_asked_for(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    result = fit(Image.new("RGB", size, (10, 200, 30)), *shape)
    assert result.size == shape
    assert result.getextrema() == ((10, 10), (200, 200), (30, 30))


@pytest.mark.parametrize("turned", [False, True])
def test_a_fitted_picture_is_the_middle_of_the_photo_in_the_right_proportion(turned: bool) -> None:
    """Of 90 x 20 pixels the middle 40 are 2:1; a stripe in it is as wide as it was high."""
    values = np.zeros((20, 90, 3), np.uint8)
    values[:, 25:65] = (0, 255, 0)
    values[5:15, 40:50] = (255, 0, 0)
    shape = (20, 40) if turned else (40, 20)
    image = Image.fromarray(values.transpose(1, 0, 2) if turned else values)
    result = np.asarray(fit(image, *shape))
    result = result.transpose(1, 0, 2) if turned else result
    assert np.array_equal(result, values[:, 25:65])


@pytest.mark.parametrize("suffix", [".avif", ".heic"])
def test_the_formats_of_phones_are_read(tmp_path: Path, suffix: str) -> None:
    if suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (64, 48), (200, 40, 30)).save(tmp_path / f"a{suffix}")
    found = np.asarray(load_upright(tmp_path / f"a{suffix}"), dtype=int)
    assert found.shape == (48, 64, 3)
    assert np.abs(found - (200, 40, 30)).max() <= 6


def test_without_the_plugin_a_heic_photo_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.heic").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"^a\.heic cannot be read .*pip install pillow-heif"):
        load_upright(tmp_path / "a.heic")


@pytest.mark.parametrize(("hole", "expected"), [(20, (10, 60, 90)), (32, (255, 255, 255))])
def test_what_is_transparent_takes_the_colour_of_an_opaque_border(
    tmp_path: Path, hole: int, expected: tuple[int, int, int]
) -> None:
    """Where the border itself is transparent, as round a cut-out, the page is white."""
    image = Image.new("RGBA", (32, 32), (10, 60, 90, 255))
    start = (32 - hole) // 2
    image.paste((0, 0, 0, 0), (start, start, start + hole, start + hole))
    image.save(tmp_path / "a.png")
    assert load_upright(tmp_path / "a.png").getpixel((16, 16)) == expected


def test_an_error_stays_on_one_line_though_the_name_does_not(tmp_path: Path) -> None:
    (tmp_path / "a\nb.png").touch()
    with pytest.raises(ImageError) as caught:
        load_upright(tmp_path / "a\nb.png")
    assert str(caught.value).startswith("'a\\nb.png' cannot be read")
