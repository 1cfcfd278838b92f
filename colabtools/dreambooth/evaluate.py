"""How faithful a trained session is: to its photos, to prompts, and to the class it came from."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from colabtools.dreambooth.captions import subject_of
from colabtools.dreambooth.dataset import load_examples
from colabtools.dreambooth.drawing import Drawing
from colabtools.dreambooth.encoders import ClipEncoder, DinoEncoder
from colabtools.dreambooth.generate import (
    Painter,
    ensure_pictures,
    find_weights,
    sampling_of,
    side_to_draw,
)
from colabtools.dreambooth.metrics import (
    PAPER,
    ClassDrift,
    Embedded,
    PromptScores,
    Scores,
    class_drift,
    score_prompts,
    summarize,
)
from colabtools.dreambooth.scoreboard import save_chart
from colabtools.dreambooth.session import now_text, open_session
from colabtools.drive import write_atomic
from colabtools.errors import ConfigError
from colabtools.images import load_upright
from colabtools.registry import find_base
from colabtools.report import get_logger, save_grid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from colabtools.dreambooth.config import EvaluateConfig
    from colabtools.dreambooth.saved import Saved
    from colabtools.dreambooth.session import Session
    from colabtools.drive import Workspace

__all__ = ["Evaluated", "evaluate"]

_METRICS = ("dino", "clip_i", "clip_t")
_MOST_COLUMNS = 8
_LONGEST_TITLE = 60


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The scores, the pictures they judge, and the files that show both.

    Attributes:
        scores: over all prompts.
        prompts: of each picture, by prompt.
        drift: what became of the class; None without class pictures.
        comparable: whether both encoders have the build behind the paper's numbers.
        pictures: those of the subject, first all of the first prompt.
        report: everything as JSON.
        sheet: the pictures with their scores, the photos above.
        chart: the scores as bars.
    """

    scores: Scores
    prompts: tuple[PromptScores, ...]
    drift: ClassDrift | None
    comparable: bool
    pictures: tuple[Path, ...]
    report: Path
    sheet: Path
    chart: Path


def evaluate(workspace: Workspace, session_name: str, config: EvaluateConfig) -> Evaluated:
    """Draw what is missing into `samples/evaluation`, judge it by DINO and CLIP, write the result.

    Raises:
        CheckpointError: the session has no such trained weights, or damaged ones.
        ConfigError: the file of prompts cannot be read, or the session does not say what its
            subject is called.
        DatasetError: the session has no training pictures.
        ModelError: an encoder or the base model cannot be loaded.
        SessionError: there is no such session.
        WorkspaceError: a file cannot be written.
    """
    templates = config.load_prompts()
    session = open_session(workspace, session_name)
    config = _with_subject(config, session)
    photos = [example.path for example in load_examples(session)]
    weights = find_weights(session, config.step)
    # Before an hour of drawing: the encoders are what may be missing.
    judges = _Judges.load(config)
    drawn = _draw(session, weights, config, templates)
    seen = judges.embed(photos, "photos")
    rows = score_prompts(
        [_fill(template, config.token, config.class_name) for template in templates],
        judges.embed(drawn.subject, "pictures of the subject"),
        seen,
        # The token means nothing to CLIP, so the text that a picture is held against goes
        # without it, as in Custom Diffusion's evaluation (arXiv 2212.04488).
        judges.clip.embed_prompts([_fill(t, "", config.class_name) for t in templates]),
    )
    evaluated = Evaluated(
        scores=summarize(session.name, rows, seen),
        prompts=rows,
        drift=_judge_class(judges, drawn, seen, _class_prompt(config)),
        comparable=judges.as_published,
        pictures=drawn.subject,
        report=session.samples_dir / "evaluation.json",
        sheet=session.samples_dir / "evaluation.png",
        chart=session.samples_dir / "evaluation_scores.png",
    )
    _write(session, weights, config, evaluated)
    _show(session, photos, drawn, evaluated)
    return evaluated


def _with_subject(config: EvaluateConfig, session: Session) -> EvaluateConfig:
    """Return the settings with token and class in place of "auto"."""
    prompt = str(session.read_record().get("instance_prompt", ""))
    names = dict(zip(("token", "class_name"), subject_of(prompt), strict=True))
    found: dict[str, Any] = {n: text for n, text in names.items() if getattr(config, n) == "auto"}
    for name, text in found.items():
        if not text:
            raise ConfigError(
                f"{name} is 'auto', and the prompt {prompt!r} that the pictures were prepared with "
                f"does not tell it; give {name}"
            )
    return replace(config, **found)


@dataclass(frozen=True)
class _Judges:
    """Both encoders."""

    dino: DinoEncoder
    clip: ClipEncoder

    @classmethod
    def load(cls, config: EvaluateConfig) -> _Judges:
        judges = cls(DinoEncoder.load(config.dino_model), ClipEncoder.load(config.clip_model))
        if not judges.as_published:
            get_logger(__name__).info(
                "%s and %s are not both what the paper used: compare these scores with each other "
                "only",
                config.dino_model,
                config.clip_model,
            )
        return judges

    @property
    def as_published(self) -> bool:
        return self.dino.as_published and self.clip.as_published

    def embed(self, paths: Sequence[Path], what: str) -> Embedded:
        return Embedded(
            self.dino.embed_pictures(paths, desc=f"DINO looks at {what}"),
            self.clip.embed_pictures(paths, desc=f"CLIP looks at {what}"),
        )


@dataclass(frozen=True)
class _Drawn:
    """Picture files: of the subject, prompt by prompt, and of the class before and after."""

    subject: tuple[Path, ...]
    before: tuple[Path, ...]
    after: tuple[Path, ...]


def _draw(
    session: Session, weights: Saved, config: EvaluateConfig, templates: Sequence[str]
) -> _Drawn:
    base = find_base(weights.manifest["base_model"])
    side = side_to_draw(config, session, base)
    sampling = sampling_of(config, base)

    def drawing(prompt: str, seed: int) -> Drawing:
        return Drawing(
            prompt=prompt,
            seed=seed,
            **sampling,
            resolution=side,
        )

    prompts = [_fill(template, config.token, config.class_name) for template in templates]
    subject = [drawing(*pair) for pair in itertools.product(prompts, config.seeds)]
    of_class = [drawing(_class_prompt(config), seed) for seed in range(config.class_images)]
    folder = session.samples_dir / "evaluation"
    trained = Painter(base=base, weights=weights)
    after, _ = ensure_pictures(trained, [*subject, *of_class], folder)
    before, _ = ensure_pictures(Painter(base=base), of_class, folder)
    return _Drawn(after[: len(subject)], before, after[len(subject) :])


def _fill(template: str, token: str, class_name: str) -> str:
    """Return the prompt; without a token its place closes up."""
    filled = template.replace("{token}", token.strip()).replace("{class}", class_name.strip())
    return " ".join(filled.split())


def _class_prompt(config: EvaluateConfig) -> str:
    return _fill("a {class}", "", config.class_name)


def _judge_class(
    judges: _Judges, drawn: _Drawn, photos: Embedded, prompt: str
) -> ClassDrift | None:
    if not drawn.before:
        return None
    before = judges.embed(drawn.before, "the class before training")
    after = judges.embed(drawn.after, "the class after training")
    return class_drift(prompt, before, after, photos)


def _write(session: Session, weights: Saved, config: EvaluateConfig, evaluated: Evaluated) -> None:
    """Write the JSON, and the run into the session's record."""
    scores = asdict(evaluated.scores)
    content = {
        "schema_version": 1,
        "time": now_text(),
        "session": session.name,
        "base_model": weights.manifest["base_model"],
        "step": weights.step,
        "config": asdict(config),
        "comparable": evaluated.comparable,
        "scores": scores,
        "class_drift": asdict(evaluated.drift) if evaluated.drift else None,
        "prompts": [asdict(row) for row in evaluated.prompts],
        "pictures": [f"evaluation/{path.name}" for path in evaluated.pictures],
        "paper": {name: dict(zip(_METRICS, row, strict=True)) for name, row in PAPER.items()},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(evaluated.report, text.encode())
    session.add_run({"verb": "evaluate", **asdict(config), "step": weights.step, "scores": scores})


def _show(session: Session, photos: Sequence[Path], drawn: _Drawn, evaluated: Evaluated) -> None:
    """Save the sheet and the chart."""
    per_prompt = len(drawn.subject) // len(evaluated.prompts)
    widest = max(per_prompt, min(len(photos), _MOST_COLUMNS))
    rows = [(_photos_title(evaluated.scores), photos[:widest])]
    for i, row in enumerate(evaluated.prompts):
        rows.append((_prompt_title(row), drawn.subject[i * per_prompt : (i + 1) * per_prompt]))
    if evaluated.drift is not None:
        rows.append((f"before: {evaluated.drift.prompt}", drawn.before[:widest]))
        rows.append((f"after: {evaluated.drift.prompt}", drawn.after[:widest]))
    save_grid(
        [[load_upright(path) for path in paths] for _, paths in rows],
        evaluated.sheet,
        row_titles=[title for title, _ in rows],
    )
    save_chart(
        evaluated.scores,
        evaluated.drift,
        evaluated.chart,
        title=f"Fidelity of {session.name}",
        comparable=evaluated.comparable,
    )


def _photos_title(scores: Scores) -> str:
    if scores.real_dino is None or scores.real_clip_i is None:
        return "photo"
    return f"photos among themselves: DINO={scores.real_dino:.3f} CLIP-I={scores.real_clip_i:.3f}"


def _prompt_title(row: PromptScores) -> str:
    prompt = shorten(row.prompt, _LONGEST_TITLE, placeholder="...")
    means = (fmean(row.dino), fmean(row.clip_i), fmean(row.clip_t))
    return f"{prompt}: DINO={means[0]:.3f} CLIP-I={means[1]:.3f} CLIP-T={means[2]:.3f}"
