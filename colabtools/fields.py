"""Checks of a setting's value; the error names the field, the value and what to give instead."""

from __future__ import annotations

import math
import typing
from typing import Any

from colabtools.errors import ConfigError

__all__ = [
    "LARGEST_SEED",
    "check",
    "check_choice",
    "check_flag",
    "check_number",
    "check_text",
    "check_whole",
    "split_text",
    "whole_from_text",
]

LARGEST_SEED = 2**63 - 1


def check(name: str, value: object, ok: bool, want: str) -> None:
    """Refuse a value that is not `ok`.

    Raises:
        ConfigError: "<name> is <value>; give <want>".
    """
    if not ok:
        raise ConfigError(f"{name} is {value!r}; give {want}")


def check_whole(
    name: str, value: object, least: int, most: float = math.inf, also: str = ""
) -> None:
    """Refuse what is not a whole number in [least, most]; `also` names other choices."""
    valid = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    limit = "" if most == math.inf else f" and at most {most}"
    check(name, value, valid, f"a whole number of at least {least}{limit}{also}")


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    most: float = math.inf,
    also: str = "",
) -> None:
    """Refuse what is not a finite number above 0, or in [least, most] where `least` is given."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    valid = math.isfinite(number) and number <= most
    valid = valid and (number > 0 if least is None else number >= least)
    limit = "" if most == math.inf else f" and at most {most:g}"
    want = "a number above 0" if least is None else f"a number of at least {least:g}"
    check(name, value, valid, f"{want}{limit}{also}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False; the text "false" would count as true."""
    check(name, value, isinstance(value, bool), "True or False")


def check_text(name: str, value: object, want: str) -> None:
    """Refuse what is not a text, or an empty one."""
    check(name, value, isinstance(value, str) and bool(value.strip()), want)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    known = isinstance(value, str) and value in choices
    check(name, value, known, f"one of {', '.join(choices)}")


def split_text(name: str, value: object, mark: str) -> tuple[Any, ...]:
    """Return the items of a sequence, its texts taken apart at the mark."""
    items = [value] if isinstance(value, str) else value
    check(name, value, isinstance(items, (list, tuple)), f"a list, or a text with {mark!r} between")
    parts: list[Any] = []
    for item in typing.cast("list[Any]", items):
        text = isinstance(item, str)
        parts += [part.strip() for part in item.split(mark)] if text else [item]
    return tuple(parts)


def whole_from_text(value: Any) -> Any:
    """Return the whole number that a text spells; anything else stays, for a check to refuse."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value
