"""What a session may be called, and what becomes of a name that it may not."""

from __future__ import annotations

import re
import unicodedata

from colabtools.errors import SessionError

__all__ = ["RULE", "check_name", "clean_name"]

_LONGEST_NAME = 64
# A file system's limit is 255; the rest is for what export and temporary files append.
_LONGEST_NAME_BYTES = 192
# Beside letters and digits of any script, what Drive, Windows and zip archives all take.
_PUNCTUATION = frozenset(" .+-_")

RULE = (
    f"up to {_LONGEST_NAME} letters, digits, spaces and . + - _ beginning with a letter or digit "
    "and ending with neither . nor a space"
)


def check_name(name: str) -> str:
    """A session's name in its one spelling.

    Raises:
        SessionError: it cannot be a folder's; the message has the rule, and a name that can.
    """
    # A Mac composes letters another way; both spellings are one name.
    name = unicodedata.normalize("NFC", name)
    if not _can_be_folder(name):
        other = _cleaned(name)
        instead = f", such as {other!r}" if other else ""
        raise SessionError(f"session name {name!r} cannot be a folder; use {RULE}{instead}")
    return name


def clean_name(text: str) -> str:
    """The session's name that is nearest to a text: what the rule forbids becomes one hyphen.

    Raises:
        SessionError: nothing of the text is left.
    """
    name = _cleaned(text)
    if not name:
        raise SessionError(f"no session name can be made of {text!r}; give one of {RULE}")
    return name


def _cleaned(text: str) -> str:
    """The cleaned name, empty where nothing is left."""
    text = unicodedata.normalize("NFC", text)
    name = "".join(c if _is_known(c) else "\0" for c in text)
    name = re.sub(r"\s*\0[\0\s]*", "-", name)
    name = re.sub(r"\.{2,}", ".", name)
    start = next((at for at, c in enumerate(name) if c.isalnum()), len(name))
    name = name[start:][:_LONGEST_NAME]
    while len(name.encode()) > _LONGEST_NAME_BYTES:
        name = name[:-1]
    return name.rstrip(" .-")


def _is_known(character: str) -> bool:
    # L letters, M the vowel signs and accents that some scripts write with marks, N digits.
    return character in _PUNCTUATION or unicodedata.category(character)[0] in "LMN"


def _can_be_folder(name: str) -> bool:
    size_bytes = len(name.encode("utf-8", "replace"))
    fits = 0 < len(name) <= _LONGEST_NAME and size_bytes <= _LONGEST_NAME_BYTES
    # The first character keeps hidden folders and options out, the last what Windows drops.
    return (
        all(map(_is_known, name))
        and fits
        and name[0].isalnum()
        and name[-1] not in " ."
        and ".." not in name
    )
