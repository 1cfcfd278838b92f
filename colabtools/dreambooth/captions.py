"""Captions as prompts: their order of tags, their dropping out, and what is wrong with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from colabtools.errors import DatasetError
from colabtools.fields import check_flag, check_number, check_text, check_whole
from colabtools.report import get_logger

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable
    from pathlib import Path

__all__ = [
    "CAPTION_SUFFIXES",
    "CaptionRules",
    "check_captions",
    "every_form",
    "subject_of",
    "vary",
]

# The first one that holds text is a picture's caption.
CAPTION_SUFFIXES = (".txt", ".caption")

# Beyond this, computing the embeddings of all orders costs more time and memory than it saves: for
# SDXL's two encoders one takes 0.6 MB.
_MOST_SHUFFLED = 64
_MOST_NAMES = 5
_ARTICLES = frozenset({"a", "an", "one", "the"})


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """How a caption changes from step to step.

    Attributes:
        dropout: share of steps whose prompt is empty, so that guidance has something to guide from.
        shuffle_tokens: put the tags between separators in a new order each time.
        keep_tokens: how many tags stay in front, in place.
        separator: what stands between tags.
    """

    dropout: float = 0.0
    shuffle_tokens: bool = False
    keep_tokens: int = 0
    separator: str = ","

    def __post_init__(self) -> None:
        """Check every field."""
        check_number("dropout", self.dropout, least=0, most=1)
        check_flag("shuffle_tokens", self.shuffle_tokens)
        check_whole("keep_tokens", self.keep_tokens, 0)
        check_text("separator", self.separator, "the mark between tags, such as ','")


def vary(caption: str, rules: CaptionRules, rng: random.Random) -> str:
    """Return the prompt of one step: the caption, a new order of its tags, or nothing.

    A caption without two tags to exchange comes back exactly as it was. The generator is not
    touched by rules that change nothing.
    """
    if rules.dropout and rng.random() < rules.dropout:
        return ""
    kept, moving = _split(caption, rules)
    if not moving:
        return caption
    rng.shuffle(moving)
    return _join(kept + moving, rules)


def every_form(captions: Iterable[str], rules: CaptionRules) -> set[str] | None:
    """Return all prompts that `vary` can make of these captions, or None if there are too many.

    With all of them known, their embeddings can be computed once and the text encoders freed.
    """
    if rules.dropout == 1:
        return {""}
    forms = {""} if rules.dropout else set()
    shuffled: set[str] = set()
    for caption in dict.fromkeys(captions):
        kept, moving = _split(caption, rules)
        if not moving:
            forms.add(caption)
            continue
        if len(shuffled) + math.factorial(len(moving)) > _MOST_SHUFFLED:
            return None
        shuffled |= {_join([*kept, *order], rules) for order in permutations(moving)}
    return forms | shuffled


def check_captions(pictures: Iterable[Path], captions_dir: Path, *, strict: bool) -> None:
    """Warn about pictures without words and words without a picture, or refuse them all if strict.

    Args:
        pictures: the pictures; a caption belongs to one by its name without the suffix.
        captions_dir: where the caption files are, which may be where the pictures are.
        strict: raise instead of warning.

    Raises:
        DatasetError: a caption file cannot be read as UTF-8; with `strict`, also a caption that is
            missing, empty, or of no picture.
    """
    stems = {path.stem: path for path in pictures}
    files = _caption_files(captions_dir)
    filled = {path.stem for path in files if not _is_empty(path)}
    with_file = {path.stem for path in files}
    problems = [
        _sentence("without a caption", [p.name for s, p in stems.items() if s not in with_file]),
        _sentence("empty", [p.name for p in files if p.stem in stems and p.stem not in filled]),
        _sentence("of no picture", [p.name for p in files if p.stem not in stems]),
    ]
    found = "; ".join(filter(None, problems))
    if not found:
        return
    message = f"captions in {captions_dir}: {found}"
    if strict:
        raise DatasetError(f"{message}; write, rename or remove these files, or turn strict off")
    get_logger(__name__).warning("%s", message)


def _split(caption: str, rules: CaptionRules) -> tuple[list[str], list[str]]:
    """Return the tags that stay and those that move; none move where no two can be exchanged."""
    if not rules.shuffle_tokens:
        return [], []
    tags = [tag.strip() for tag in caption.split(rules.separator)]
    tags = [tag for tag in tags if tag]
    kept, moving = tags[: rules.keep_tokens], tags[rules.keep_tokens :]
    return (kept, moving) if len(moving) > 1 else ([], [])


def _join(tags: list[str], rules: CaptionRules) -> str:
    return f"{rules.separator} ".join(tags)


def _caption_files(folder: Path) -> list[Path]:
    """Return the caption files of a folder; hidden ones are what a Mac or Drive leaves there."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in CAPTION_SUFFIXES
        and path.is_file()
        and not path.name.startswith(".")
    )


def _is_empty(path: Path) -> bool:
    try:
        # Notepad begins its files with a byte order mark.
        return not path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"caption {path} cannot be read ({error}); save it as UTF-8 text"
        ) from error


def _sentence(fault: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{fault}: {shown}{more}"


def subject_of(prompt: str) -> tuple[str, str]:
    """Return token and class of a prompt: ("sks", "dog") of "a photo of a sks dog".

    The subject is what follows the last "of", its article left out; either is empty if it is not
    there.
    """
    words = prompt.split()
    last = max((at for at, word in enumerate(words) if word.lower() == "of"), default=-1)
    subject = words[last + 1 :]
    if subject and subject[0].lower() in _ARTICLES:
        subject = subject[1:]
    token, *class_words = subject or [""]
    return (token, " ".join(class_words))
