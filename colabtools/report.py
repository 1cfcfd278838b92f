"""What a person sees: progress, log lines and pictures, in notebooks, terminals and log files."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar, cast, overload

from colabtools import env
from colabtools.drive import atomic_path
from colabtools.errors import ImageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image, ImageDraw, ImageFont

    Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

__all__ = [
    "PlainProgress",
    "Progress",
    "get_logger",
    "progress",
    "save_curve",
    "save_grid",
    "set_quiet",
    "setup_logging",
    "show",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_ROOT_LOGGER = "colabtools"
_quiet = False


class Progress(Protocol[T_co]):
    """What `progress` gives back, a tqdm bar or our plain lines."""

    def update(self, n: int = 1) -> object:
        """Count `n` more units as done."""

    def set_postfix(self, **values: object) -> object:
        """Show these values, such as the loss, behind the count."""

    def close(self) -> object:
        """Show the final state; further calls do nothing."""

    def __enter__(self) -> Progress[T_co]:
        """The progress itself; leaving the block closes it."""

    def __exit__(self, *error: object) -> None:
        """Close."""

    def __iter__(self) -> Iterator[T_co]:
        """The items of the iterable, each counted once its turn is over."""


@dataclass
class PlainProgress(Generic[T]):
    """Progress as plain lines on stderr: the first, the last and one every few seconds between."""

    desc: str
    unit: str
    iterable: Iterable[T] | None = None
    total: int | None = None
    silent: bool = False
    interval_s: float = 5.0
    clock: Callable[[], float] = time.monotonic
    n: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Print the first line."""
        self._postfix = ""
        self._closed = False
        self._started_s = self._printed_s = self.clock()
        self._print(self._count())

    def update(self, n: int = 1) -> None:
        """Count `n` more units as done, and print a line if the last one is old enough."""
        self.n += n
        now_s = self.clock()
        if now_s - self._printed_s >= self.interval_s:
            self._printed_s = now_s
            self._print(self._count() + self._pace(now_s) + self._postfix)

    def set_postfix(self, **values: object) -> None:
        """Show these values behind the count from the next line on."""
        self._postfix = "".join(f", {name} {_number(value)}" for name, value in values.items())

    def close(self) -> None:
        """Print the last line, once."""
        if not self._closed:
            self._closed = True
            elapsed_s = self.clock() - self._started_s
            taken = f"{self._rate(elapsed_s)}, {_clock_text(elapsed_s)} in all"
            self._print(self._count() + taken + self._postfix)

    def __enter__(self) -> PlainProgress[T]:
        """The progress itself; leaving the block closes it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Print the last line."""
        self.close()

    def __iter__(self) -> Iterator[T]:
        """The items of the iterable, each counted once its turn is over."""
        if self.iterable is None:
            raise TypeError(f"the progress of {self.desc!r} was made without an iterable")
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def _count(self) -> str:
        total = "" if self.total is None else f"/{self.total}"
        return f"{self.desc}: {self.n}{total} {self.unit}"

    def _pace(self, now_s: float) -> str:
        elapsed_s = now_s - self._started_s
        pace = self._rate(elapsed_s)
        if self.total is not None and 0 < self.n <= self.total:
            pace += f", {_clock_text(elapsed_s / self.n * (self.total - self.n))} left"
        return pace

    def _rate(self, elapsed_s: float) -> str:
        return f", {_number(self.n / elapsed_s)} {self.unit}/s" if self.n and elapsed_s > 0 else ""

    def _print(self, line: str) -> None:
        if not self.silent:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


@overload
def progress(
    iterable: Iterable[T], *, total: int | None = None, desc: str, unit: str
) -> Progress[T]: ...


@overload
def progress(
    iterable: None = None, *, total: int | None = None, desc: str, unit: str
) -> Progress[None]: ...


def progress(
    iterable: Iterable[T] | None = None, *, total: int | None = None, desc: str, unit: str
) -> Progress[T] | Progress[None]:
    """A tqdm bar where a person watches a terminal or notebook, else plain lines on stderr.

    Args:
        iterable: what to iterate; without it call `update`.
        total: number of units; by default the length of the iterable, if it has one.
        desc: what is being done, such as "training".
        unit: the plural of what is counted, such as "steps".
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(cast("Sequence[T]", iterable))
    if _quiet or not _is_watched():
        return PlainProgress(desc, unit, iterable, total, silent=_quiet)
    from tqdm.auto import tqdm

    bar = tqdm(iterable, total=total, desc=desc, unit=f" {unit}")
    return cast("Progress[T]", bar)


def set_quiet(quiet: bool) -> None:
    """Switch progress off or on for everything that starts from now on."""
    global _quiet
    _quiet = quiet


def _is_watched() -> bool:
    watched = (env.Place.COLAB, env.Place.JUPYTER)
    return sys.stderr.isatty() or (env.in_kernel() and env.where().place in watched)


def _number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"


def _clock_text(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; call it with `__name__`."""
    inside = name == _ROOT_LOGGER or name.startswith(f"{_ROOT_LOGGER}.")
    return logging.getLogger(name if inside else f"{_ROOT_LOGGER}.{name}")


class _OneLineFormatter(logging.Formatter):
    """One line per record: line ends become ` | `, an exception its class and message."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" ({record.exc_info[0].__name__}: {record.exc_info[1]})"
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return level + " | ".join(text.splitlines())


def setup_logging(debug: bool = False, quiet: bool = False) -> None:
    """Send our log to stderr; for the command line only. May be called again.

    Args:
        debug: show everything, also when quiet.
        quiet: show warnings and errors only, and no progress.
    """
    logger = logging.getLogger(_ROOT_LOGGER)
    logger.handlers.clear()
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLineFormatter())
    logger.addHandler(handler)
    logger.propagate = False
    level = logging.WARNING if quiet else logging.INFO
    logger.setLevel(logging.DEBUG if debug else level)
    set_quiet(quiet)


# Pictures below this size are pixel art or outputs of the embedded model: blur would lie.
_NEAREST_BELOW_PX = 128
_INK = (32, 33, 36)
_PAPER = (255, 255, 255)
_COLUMN_TITLE_LINES = 3
_SMALLEST_CELL_PX = 16


def save_grid(
    rows: Sequence[Sequence[Image.Image]],
    path: str | os.PathLike[str],
    *,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    cell_size: int = 160,
) -> Path:
    """The path of a PNG that shows the pictures in a titled grid on a white page.

    Args:
        rows: pictures of any size and mode; a row may be shorter than the others.
        path: where the PNG goes; its folder must exist.
        row_titles: none, or one per row; long ones are wrapped, then shortened.
        column_titles: none, or one per column.
        cell_size: width and height of a cell in pixels; a picture is fitted into it.

    Raises:
        ImageError: there is nothing to show, the titles do not match the pictures, or the cells
            are smaller than 16 pixels.
        WorkspaceError: the file cannot be written.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ImageError(f"no pictures for {path}: give at least one row with one picture")
    if cell_size < _SMALLEST_CELL_PX:
        raise ImageError(f"cell_size {cell_size} is too small: give {_SMALLEST_CELL_PX} or more")
    _check_titles("row", row_titles, len(rows))
    _check_titles("column", column_titles, columns)
    sheet = _GridPage.plan(row_titles, column_titles, cell_size).draw(rows, columns)
    return _save_png(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _check_titles(kind: str, titles: Sequence[str], expected: int) -> None:
    if titles and len(titles) != expected:
        raise ImageError(f"{len(titles)} {kind} titles for {expected} {kind}s: give all or none")


@dataclass(frozen=True)
class _GridPage:
    """Where everything goes on the page, in pixels; titles already broken into lines."""

    cell: int
    gap: int
    margin: int
    left: int  # width of the row titles
    top: int  # height of the column titles
    font: Font
    row_titles: tuple[str, ...]
    column_titles: tuple[str, ...]

    @classmethod
    def plan(
        cls, row_titles: Sequence[str], column_titles: Sequence[str], cell_size: int
    ) -> _GridPage:
        from PIL import ImageFont

        font_px = min(28, max(13, cell_size // 10))
        font = ImageFont.load_default(font_px)
        line_px = round(font_px * 1.3)
        row_limit = max(1, cell_size // line_px)
        row_lines = [_wrap(text, font, cell_size, row_limit) for text in row_titles]
        column_lines = [_wrap(text, font, cell_size, _COLUMN_TITLE_LINES) for text in column_titles]
        widest = max((font.getlength(line) for lines in row_lines for line in lines), default=0)
        tallest = max((len(lines) for lines in column_lines), default=0)
        return cls(
            cell=cell_size,
            gap=max(4, cell_size // 20),
            margin=max(12, cell_size // 10),
            left=math.ceil(widest) + font_px if row_titles else 0,
            top=tallest * line_px + font_px // 2 if column_titles else 0,
            font=font,
            row_titles=tuple("\n".join(lines) for lines in row_lines),
            column_titles=tuple("\n".join(lines) for lines in column_lines),
        )

    def corner(self, row: int, column: int) -> tuple[int, int]:
        step = self.cell + self.gap
        return self.margin + self.left + column * step, self.margin + self.top + row * step

    def draw(self, rows: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
        from PIL import Image, ImageDraw

        right, bottom = self.corner(len(rows), columns)
        size = (right - self.gap + self.margin, bottom - self.gap + self.margin)
        sheet = Image.new("RGB", size, _PAPER)
        for i, row in enumerate(rows):
            for j, picture in enumerate(row):
                x, y = self.corner(i, j)
                fitted = _fit(picture, self.cell)
                left, top = (self.cell - fitted.width) // 2, (self.cell - fitted.height) // 2
                sheet.paste(fitted, (x + left, y + top))
        self._draw_titles(ImageDraw.Draw(sheet))
        return sheet

    def _draw_titles(self, draw: ImageDraw.ImageDraw) -> None:
        half = self.cell // 2
        for i, title in enumerate(self.row_titles):
            at = (self.margin, self.corner(i, 0)[1] + half)
            draw.multiline_text(at, title, fill=_INK, font=self.font, anchor="lm")
        for j, title in enumerate(self.column_titles):
            at = (self.corner(0, j)[0] + half, self.margin + self.top - self.gap)
            draw.multiline_text(at, title, fill=_INK, font=self.font, anchor="md", align="center")


def _wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """At most `max_lines` lines no wider than `width`; the last one ends in ... if text is left."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    lines = [line for line in lines if line]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last.rstrip()}..."]
    return lines


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """The picture on white, as large as the cell allows; small ones keep their hard pixels."""
    from PIL import Image

    layered = picture.convert("RGBA")
    paper = Image.new("RGBA", layered.size, (*_PAPER, 255))
    flat = Image.alpha_composite(paper, layered).convert("RGB")
    longest = max(flat.size)
    scale = cell / longest
    target = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
    if longest >= min(cell, _NEAREST_BELOW_PX):
        return flat.resize(target, Image.Resampling.LANCZOS)
    # Nearest to the next whole multiple, then area: every pixel keeps the same size.
    factor = math.ceil(scale)
    whole = flat.resize((flat.width * factor, flat.height * factor), Image.Resampling.NEAREST)
    return whole.resize(target, Image.Resampling.BOX)


def save_curve(  # noqa: PLR0913 - the labels of one figure, each said once
    series: Mapping[str, Sequence[tuple[int, float]]],
    path: str | os.PathLike[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Mapping[str, int] | None = None,
) -> Path:
    """The path of a PNG with each series as light raw points and their running mean.

    Args:
        series: name to (x, y) points in order; points that are not finite are left out.
        path: where the PNG goes; its folder must exist.
        title: above the picture.
        x_label: below the picture.
        y_label: beside the picture.
        marks: label to x of a dashed vertical line, such as the end of a stage.

    Raises:
        ImageError: no series has a finite point.
        WorkspaceError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    drawn = {name: points for name, points in finite.items() if points}
    if not drawn:
        raise ImageError(f"no finite points for {path}: {list(series) or 'no series'} given")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(drawn.items()):
        _draw_series(axes, name, points, f"C{index}")
    _draw_marks(axes, marks or {})
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(drawn) > 1:
        axes.legend(frameon=False)
    return _save_png(path, lambda temporary: figure.savefig(temporary, format="png"))


def _draw_series(axes: Axes, name: str, points: Sequence[tuple[int, float]], color: str) -> None:
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    axes.plot(xs, ys, ".", color=color, alpha=0.25, markersize=5, markeredgewidth=0)
    axes.plot(xs, _running_mean(ys), "-", color=color, linewidth=1.8, label=name)


def _draw_marks(axes: Axes, marks: Mapping[str, int]) -> None:
    middle = sum(axes.get_xlim()) / 2
    for label, x in marks.items():
        side = 1 if x < middle else -1  # the label stands on the inner side of its line
        axes.axvline(x, color="0.35", linestyle="--", linewidth=1)
        axes.annotate(
            label,
            xy=(x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4 * side, -4),
            textcoords="offset points",
            rotation=90,
            ha="left" if side > 0 else "right",
            va="top",
            fontsize=8,
            color="0.35",
        )


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the last twentieth of the series up to each point; one value per value."""
    window = max(1, len(values) // 20)
    means = []
    total = 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def _save_png(path: str | os.PathLike[str], save: Callable[[Path], object]) -> Path:
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ImageError(f"cannot write {target}: pictures are PNG files, end the name in .png")
    with atomic_path(target, verify=_reopen_png) as temporary:
        save(temporary)
    return target


def _reopen_png(path: Path) -> None:
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} does not open as a PNG after writing: {error}") from error


def show(path: str | os.PathLike[str]) -> None:
    """Display the picture below the notebook cell, or log its path where there is no notebook.

    Raises:
        ImageError: there is no such file.
    """
    if not Path(path).is_file():
        raise ImageError(f"no picture at {path}: make it first")
    if env.in_kernel():
        from IPython import display

        display.display(display.Image(filename=os.fspath(path)))  # type: ignore[no-untyped-call,unused-ignore]
    else:
        get_logger(__name__).info("picture: %s", path)
