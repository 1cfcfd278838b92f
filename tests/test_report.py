"""Progress, log lines and pictures."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from colabtools import env, report
from colabtools.env import Place, Where
from colabtools.errors import ImageError, WorkspaceError
from colabtools.report import PlainProgress

ROOT = Path(report.__file__).parents[1]


class Clock:
    """A clock that the test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        """The time that the test set."""
        return self.now_s


def test_plain_lines_are_the_first_the_last_and_one_each_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    bar = PlainProgress[None]("training", "steps", total=600, clock=clock)
    bar.set_postfix(loss=0.01234, stage="unet")
    for tenth in range(1, 61):
        clock.now_s = 100 + tenth / 10
        bar.update(2)
    bar.close()
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "training: 0/600 steps",
        "training: 100/600 steps, 20 steps/s, 0:25 left, loss 0.0123, stage unet",
        "training: 120/600 steps, 20 steps/s, 0:06 in all, loss 0.0123, stage unet",
    ]


def test_plain_lines_without_a_total_have_no_end_in_sight(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    with PlainProgress[None]("reading", "files", clock=clock) as bar:
        clock.now_s += 3700
        bar.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 0 files",
        "reading: 10 files, 0.0027 files/s",
        "reading: 10 files, 0.0027 files/s, 1:01:40 in all",
    ]


def test_iterating_counts_the_items_and_closes(capsys: pytest.CaptureFixture[str]) -> None:
    items = report.progress(["a", "b", "c"], desc="tagging", unit="pictures")
    assert list(items) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tagging: 0/3 pictures"
    assert lines[-1].startswith("tagging: 3/3 pictures")
    assert len(lines) == 2


def test_a_loop_that_fails_still_prints_how_far_it_came(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bar = report.progress(total=3, desc="tagging", unit="pictures")
    with pytest.raises(ValueError, match="second"), bar:
        bar.update()
        raise ValueError("second")
    assert "tagging: 1/3 pictures" in capsys.readouterr().err.splitlines()[-1]


def test_a_progress_without_items_cannot_be_iterated() -> None:
    with pytest.raises(TypeError, match="without an iterable"):
        list(report.progress(total=3, desc="x", unit="y"))


@pytest.mark.parametrize("on_terminal", [False, True])
def test_quiet_prints_nothing_and_still_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal, raising=False)
    report.set_quiet(True)
    assert list(report.progress(range(3), desc="x", unit="y")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("in_kernel", "place", "is_tqdm"),
    [
        (True, Place.COLAB, True),
        (True, Place.JUPYTER, True),
        (True, Place.HEADLESS, False),
        (False, Place.COLAB, False),
        (False, Place.PROCESS, False),
    ],
)
def test_a_person_gets_tqdm_and_a_log_file_gets_lines(
    monkeypatch: pytest.MonkeyPatch, in_kernel: bool, place: Place, is_tqdm: bool
) -> None:
    monkeypatch.setattr(env, "in_kernel", lambda: in_kernel)
    monkeypatch.setattr(env, "where", lambda: Where(place, ()))
    with report.progress(total=1, desc="x", unit="y") as bar:
        assert isinstance(bar, PlainProgress) is not is_tqdm


def test_on_a_terminal_it_is_tqdm_with_the_same_methods(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with report.progress(total=4, desc="training", unit="steps") as bar:
        bar.update(3)
        bar.set_postfix(loss=0.5)
    assert list(report.progress([1, 2], desc="x", unit="y")) == [1, 2]
    printed = capsys.readouterr().err
    assert "training:" in printed
    assert "3/4" in printed
    assert "steps/s" in printed
    assert "loss=0.5" in printed


def test_loggers_are_all_below_ours() -> None:
    assert report.get_logger("colabtools.vit.data").name == "colabtools.vit.data"
    assert report.get_logger("__main__").name == "colabtools.__main__"
    assert report.get_logger("colabtoolset").name == "colabtools.colabtoolset"


def test_a_log_record_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    report.setup_logging()
    report.setup_logging()
    logger = report.get_logger("colabtools.x")
    logger.debug("hidden")
    logger.info("two\nlines")
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logger.exception("failed with %s", "this")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "two | lines",
        "error: failed with this (ValueError: bad | value)",
    ]


@pytest.mark.parametrize(
    ("debug", "quiet", "shown"),
    [(False, False, "iw"), (True, False, "diw"), (False, True, "w"), (True, True, "diw")],
)
def test_debug_shows_more_and_quiet_shows_less(
    capsys: pytest.CaptureFixture[str], debug: bool, quiet: bool, shown: str
) -> None:
    report.setup_logging(debug=debug, quiet=quiet)
    logger = report.get_logger("x")
    for level, text in ((10, "d"), (20, "i"), (30, "w")):
        logger.log(level, text)
    assert "".join(line[-1] for line in capsys.readouterr().err.splitlines()) == shown
    list(report.progress([1], desc="x", unit="y"))
    assert (capsys.readouterr().err == "") is quiet


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def checks(size: int) -> Image.Image:
    """Red left half, blue right half."""
    picture = Image.new("RGB", (size, size), RED)
    picture.paste(BLUE, (size // 2, 0, size, size))
    return picture


def opened(path: Path) -> Image.Image:
    """The picture as a reader sees it."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.convert("RGB")


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    """All the colours of a picture."""
    return {colour for _, colour in picture.getcolors(2**24) or ()}  # type: ignore[misc]


def test_a_grid_has_margins_and_a_cell_for_each_picture(tmp_path: Path) -> None:
    rows = [[checks(200)] * 3, [checks(200)]]
    path = report.save_grid(rows, tmp_path / "grid.png", cell_size=100)
    sheet = opened(path)
    assert path == tmp_path / "grid.png"
    assert sheet.size == (12 + 3 * 100 + 2 * 5 + 12, 12 + 2 * 100 + 5 + 12)
    assert sheet.getpixel((5, 5)) == WHITE
    assert [sheet.getpixel((12 + i * 105 + 10, 60)) for i in range(3)] == [RED] * 3
    assert [sheet.getpixel((12 + i * 105 + 90, 165)) for i in range(3)] == [BLUE, WHITE, WHITE]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [2, 32, 64])
def test_small_pictures_keep_hard_pixels(tmp_path: Path, size: int) -> None:
    path = report.save_grid([[checks(size)]], tmp_path / "grid.png")
    assert colours(opened(path)) == {RED, BLUE, WHITE}


def test_a_picture_is_fitted_not_stretched(tmp_path: Path) -> None:
    wide = Image.new("RGB", (200, 50), RED)
    sheet = opened(report.save_grid([[wide]], tmp_path / "grid.png"))
    red = [y for y in range(sheet.height) if sheet.getpixel((80, y)) == RED]
    assert len(red) == 40
    assert red[0] + red[-1] == sheet.height - 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_any_mode_is_drawn(tmp_path: Path, mode: str) -> None:
    assert opened(report.save_grid([[Image.new(mode, (20, 20))]], tmp_path / "grid.png"))


def test_transparency_shows_the_page(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert colours(opened(report.save_grid([[clear]], tmp_path / "grid.png"))) == {WHITE}


def test_titles_take_room_and_ink_outside_the_pictures(tmp_path: Path) -> None:
    plain = opened(report.save_grid([[checks(64)]], tmp_path / "plain.png"))
    titled = opened(
        report.save_grid(
            [[checks(64)]], tmp_path / "t.png", row_titles=["row"], column_titles=["column"]
        )
    )
    left, top = titled.width - plain.width, titled.height - plain.height
    assert left > 20
    assert top > 15
    picture = titled.crop((left + 16, top + 16, *titled.size))
    assert picture.tobytes() == plain.crop((16, 16, *plain.size)).tobytes()
    assert (32, 33, 36) in colours(titled.crop((0, top, left, titled.height)))
    assert (32, 33, 36) in colours(titled.crop((left, 0, titled.width, top)))
    assert titled.crop((0, 0, titled.width, 14)).getcolors() == [(titled.width * 14, WHITE)]


def test_long_titles_are_wrapped_and_then_shortened() -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(16)
    lines = report._wrap("a photo of a dog " * 9 + "x" * 90, font, 160, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("...")
    assert all(font.getlength(line) <= 160 for line in lines)
    words = report._wrap("short and sweet " + "y" * 40, font, 160, 9)
    assert "".join(words).replace(" ", "") == "shortandsweet" + "y" * 40
    assert all(font.getlength(line) <= 160 for line in words)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (0, {}, "no pictures"),
        (2, {"row_titles": ["one"]}, "1 row titles for 2 rows"),
        (2, {"column_titles": ["one", "two"]}, "2 column titles for 1 columns"),
        (1, {"cell_size": 0}, "cell_size 0 is too small"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(
    tmp_path: Path, rows: int, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        report.save_grid([[checks(8)]] * rows, tmp_path / "g.png", **settings)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_png_in_a_folder_that_exists(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"end the name in \.png"):
        report.save_grid([[checks(8)]], tmp_path / "grid.jpg")
    with pytest.raises(WorkspaceError, match="still mounted"):
        report.save_grid([[checks(8)]], tmp_path / "gone" / "grid.png")


def test_a_picture_that_does_not_reopen_is_never_kept(tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    report.save_grid([[checks(8)]], target)
    before = target.read_bytes()
    with pytest.raises(ImageError, match="does not open as a PNG"):
        report._save_png(target, lambda path: path.write_bytes(before[: len(before) // 2]))
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_curve_draws_points_mean_and_marks(tmp_path: Path) -> None:
    points = [(step, 1 / (1 + step)) for step in range(50)]
    labels = {"title": "Loss", "x_label": "step", "y_label": "loss"}
    plain = report.save_curve({"loss": points}, tmp_path / "plain.png", **labels)
    marked = report.save_curve(
        {"loss": points}, tmp_path / "marked.png", **labels, marks={"stage 2": 25, "end": 49}
    )
    assert opened(plain).size == (960, 540)
    assert (31, 119, 180) in colours(opened(plain))
    assert opened(plain).tobytes() != opened(marked).tobytes()


def test_a_curve_survives_one_point_and_values_that_are_not_finite(tmp_path: Path) -> None:
    series = {"loss": [(0, 1.0), (1, float("nan")), (2, float("inf"))], "empty": []}
    path = report.save_curve(series, tmp_path / "c.png", title="t", x_label="x", y_label="y")
    assert opened(path)


@pytest.mark.parametrize("series", [{}, {"loss": []}, {"loss": [(0, float("nan"))]}])
def test_a_curve_of_nothing_is_refused(
    tmp_path: Path, series: dict[str, list[tuple[int, float]]]
) -> None:
    with pytest.raises(ImageError, match="no finite points"):
        report.save_curve(series, tmp_path / "c.png", title="t", x_label="x", y_label="y")


def test_the_running_mean_is_the_mean_of_the_last_twentieth() -> None:
    values = [float(i % 7) for i in range(60)]
    means = report._running_mean(values)
    assert means[0] == 0.0
    assert means[1] == 0.5
    assert means[40] == pytest.approx(sum(values[38:41]) / 3)
    assert len(means) == 60


def test_curves_leave_the_global_state_of_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from colabtools import report\n"
        "report.save_curve({'a': [(0, 1.0)]}, sys.argv[1], title='t', x_label='x', y_label='y')\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "c.png")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_show_displays_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    fake = types.ModuleType("IPython.display")
    fake.Image = lambda filename: ("picture", filename)  # type: ignore[attr-defined]
    fake.display = shown.append  # type: ignore[attr-defined]
    package = types.ModuleType("IPython")
    package.display = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setattr(env, "in_kernel", lambda: True)
    path = report.save_grid([[checks(8)]], tmp_path / "g.png")
    report.show(path)
    assert shown == [("picture", str(path))]


def test_show_logs_the_path_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = report.save_grid([[checks(8)]], tmp_path / "g.png")
    with caplog.at_level(logging.INFO, "colabtools"):
        report.show(path)
    assert str(path) in caplog.text


def test_show_refuses_a_picture_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no picture at"):
        report.show(tmp_path / "gone.png")
