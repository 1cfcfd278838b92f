"""The scores of an evaluation as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colabtools.dreambooth.metrics import PAPER
from colabtools.drive import atomic_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from colabtools.dreambooth.metrics import ClassDrift, Scores

__all__ = ["save_chart"]

_BAR = 0.36
_TALL = 0.15
_GREY, _BLUE, _ORANGE = "0.72", "C0", "C1"
_MARKS = dict(zip(PAPER, (("0.25", ":"), ("C3", "--")), strict=True))


def save_chart(
    scores: Scores, drift: ClassDrift | None, path: Path, *, title: str, comparable: bool
) -> Path:
    """Return the path of a PNG with the scores as bars, and what became of the class beside them.

    Args:
        scores: of the session.
        drift: of its class, if that was measured.
        path: where the PNG goes; its folder must exist.
        title: above the picture.
        comparable: draw the paper's numbers too; with other encoders they would mislead.

    Raises:
        WorkspaceError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10 if drift else 6.4, 4.6), dpi=120, layout="constrained")
    ratios = [3, 2] if drift else [1]
    panels = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    _draw_fidelity(panels[0], scores, comparable=comparable)
    if drift is not None:
        _draw_drift(panels[1], drift)
    note = "" if comparable else "\nencoders are not the paper's: compare with each other only"
    figure.suptitle(f"{title}{note}", fontsize=12)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")
    return path


def _draw_fidelity(axes: Axes, scores: Scores, *, comparable: bool) -> None:
    reached = [scores.dino, scores.clip_i, scores.clip_t]
    photos = [scores.real_dino, scores.real_clip_i, None]
    _draw_bars(axes, reached, -_BAR / 2, _BLUE, "drawn pictures")
    _draw_bars(axes, photos, _BAR / 2, _GREY, "photos among themselves")
    for name, values in PAPER.items() if comparable else ():
        color, dashes = _MARKS[name]
        label = f"paper: {name}"
        for x, value in enumerate(values):
            if value is not None:
                ends = (x - 0.46, x + 0.46)
                axes.plot(ends, (value, value), color=color, ls=dashes, lw=1.6, label=label)
                label = "_"  # one entry in the legend
    labels = ["DINO\nsubject", "CLIP-I\nsubject", "CLIP-T\nprompt"]
    _finish(axes, labels, "cosine, larger is better", reached + photos)


def _draw_drift(axes: Axes, drift: ClassDrift) -> None:
    before = [drift.likeness_before, drift.diversity_before]
    after = [drift.likeness_after, drift.diversity_after]
    _draw_bars(axes, before, -_BAR / 2, _GREY, "base model")
    _draw_bars(axes, after, _BAR / 2, _ORANGE, "after training")
    labels = ["likeness to\nthe subject", "diversity"]
    _finish(axes, labels, f"pictures of “{drift.prompt}”: equal is best", before + after)


def _draw_bars(
    axes: Axes, values: Sequence[float | None], shift: float, color: str, label: str
) -> None:
    there = [(x + shift, value) for x, value in enumerate(values) if value is not None]
    if not there:
        return
    xs, heights = zip(*there, strict=True)
    axes.bar(xs, heights, _BAR * 0.94, color=color, label=label)
    for x, height in there:
        # Inside a tall bar no line of reference crosses the number.
        inside = abs(height) >= _TALL
        y = height / 2 if inside else max(height, 0.0) + 0.03
        ink = "white" if inside and color != _GREY else "0.1"
        axes.text(x, y, f"{height:.3f}", ha="center", va="center", fontsize=9, color=ink)


def _finish(axes: Axes, labels: Sequence[str], title: str, values: Sequence[float | None]) -> None:
    present = [value for value in values if value is not None]
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.55, len(labels) - 0.45)
    # Headroom for the legend above the tallest bar.
    axes.set_ylim(min(0.0, *present) * 1.15, max(1.0, *present) * 1.32)
    axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.axhline(0, color="0.35", linewidth=0.8)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right", ncols=2)
