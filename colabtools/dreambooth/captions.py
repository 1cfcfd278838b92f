"""Captions as prompts: their order of tags, their dropping out, and what is wrong with them."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from colabtools.errors import DatasetError
from colabtools.fields import check_flag, check_number, check_text, check_whole
from colabtools.report import get_logger

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Set
    from pathlib import Path

__all__ = [
    "CAPTION_SUFFIXES",
    "CaptionFaults",
    "CaptionRules",
    "check_captions",
    "every_form",
    "fill_template",
    "find_faults",
    "index_captions",
    "name_subject",
    "read_caption",
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
_PLACEHOLDER = re.compile(r"\{(token|class)\}")


@dataclass(frozen=True, kw_only=True)
class CaptionFaults:
    """What is wrong with the captions of some pictures, by the names of files.

    Attributes:
        missing: pictures without a caption file.
        empty: caption files without words, of pictures that have no other with words.
        orphan: caption files of no picture.
    """

    missing: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    orphan: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.missing or self.empty or self.orphan)

    def __str__(self) -> str:
        """All faults on one line, long lists cut."""
        sentences = (
            _sentence("without a caption", self.missing),
            _sentence("empty", self.empty),
            _sentence("of no picture", self.orphan),
        )
        return "; ".join(filter(None, sentences))


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
    faults = find_faults(pictures, captions_dir)
    if not faults:
        return
    message = f"captions in {captions_dir}: {faults}"
    if strict:
        raise DatasetError(f"{message}; write, rename or remove these files, or turn strict off")
    get_logger(__name__).warning("%s", message)


def find_faults(pictures: Iterable[Path], *folders: Path) -> CaptionFaults:
    """Return which pictures lack a caption, and which caption files say nothing or are of none.

    Raises:
        DatasetError: a caption file cannot be read as UTF-8.
    """
    names = {_key(path.stem): path.name for path in pictures}
    captions = index_captions(*folders)
    filled = {stem for stem, files in captions.items() if any(map(read_caption, files))}
    return CaptionFaults(
        missing=tuple(name for stem, name in names.items() if stem not in captions),
        empty=_file_names(captions, names.keys() - filled),
        orphan=_file_names(captions, captions.keys() - names.keys()),
    )


def _file_names(captions: dict[str, list[Path]], stems: Set[str]) -> tuple[str, ...]:
    return tuple(path.name for stem in captions if stem in stems for path in captions[stem])


def index_captions(*folders: Path) -> dict[str, list[Path]]:
    """Return the caption files of folders by the stem of their picture, the first to read first.

    A Mac spells the same name with other characters, so stems are composed (NFC). Hidden files
    are what a Mac or Drive leaves there.

    Raises:
        DatasetError: a folder that is there cannot be read.
    """
    index: dict[str, list[Path]] = {}
    for folder in folders:
        try:
            found = list(folder.iterdir()) if folder.is_dir() else []
        except OSError as error:
            raise DatasetError(
                f"captions in {folder} cannot be read ({error}); check the folder"
            ) from error
        files = [path for path in found if _is_caption(path)]
        order = CAPTION_SUFFIXES.index
        for path in sorted(files, key=lambda path: (path.stem, order(path.suffix.lower()))):
            index.setdefault(_key(path.stem), []).append(path)
    return index


def _is_caption(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return path.suffix.lower() in CAPTION_SUFFIXES and not hidden and path.is_file()


def _key(stem: str) -> str:
    return unicodedata.normalize("NFC", stem)


def read_caption(path: Path) -> str:
    """Return the text of a caption file on one line.

    Raises:
        DatasetError: it cannot be read as UTF-8.
    """
    try:
        # Notepad begins its files with a byte order mark.
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"caption {path} cannot be read ({error}); save it as UTF-8 text"
        ) from error


def fill_template(template: str, token: str, class_name: str) -> str:
    """Return a prompt on one line: "a {token} {class}" with both words in place.

    The words go in as they are, digits, hyphens and letters of any script; other braces stay.
    """
    words = {"token": token, "class": class_name}
    return " ".join(_PLACEHOLDER.sub(lambda match: words[match[1]], template).split())


def name_subject(description: str, prompt: str, token: str, class_name: str) -> str:
    """Return a description that names the subject: "a dog on grass" as "a sks dog on grass".

    Where it does not speak of the class, it follows the prompt: "a sks dog, two paws on grass".

    Args:
        description: what is to be seen in a picture.
        prompt: names the subject by itself.
        token: the word that stands for the subject.
        class_name: what the subject is one of.
    """
    words = [rf"(?<!\w){re.escape(part)}(?!\w)" for part in (token, class_name)]
    if not re.search(words[0], description, re.IGNORECASE):
        named, count = re.subn(
            words[1], lambda match: f"{token} {match[0]}", description, count=1, flags=re.IGNORECASE
        )
        description = named if count else ", ".join(filter(None, (prompt, description)))
    return " ".join(description.split())


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


def _sentence(fault: str, names: tuple[str, ...]) -> str:
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
