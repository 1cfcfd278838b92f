"""Checks of a setting's value: what passes, what is refused, and what the refusal says."""

from __future__ import annotations

from typing import Any

import pytest

from colabtools import fields
from colabtools.errors import ConfigError


def refusal(check: Any, *args: Any, **options: Any) -> str:
    """What a check says of a value that it does not let pass."""
    with pytest.raises(ConfigError) as why:
        check("size", *args, **options)
    return str(why.value)


def test_a_refusal_names_field_value_and_what_to_give() -> None:
    fields.check("size", "x", True, "anything")
    assert refusal(fields.check, "x\n", False, "a size") == "size is 'x\\n'; give a size"


@pytest.mark.parametrize("value", [2, 3, 7])
def test_a_whole_number_within_its_limits_passes(value: int) -> None:
    fields.check_whole("size", value, 2, 7)
    fields.check_whole("size", value + 10**9, 2)


@pytest.mark.parametrize("value", [1, 8, -3, 2.0, "3", True, None, float("nan"), [3]])
def test_other_than_a_whole_number_within_its_limits_is_refused(value: Any) -> None:
    said = refusal(fields.check_whole, value, 2, 7, also=", or auto")
    assert said == f"size is {value!r}; give a whole number of at least 2 and at most 7, or auto"


def test_a_limit_that_is_not_there_is_not_told() -> None:
    said = refusal(fields.check_whole, 1, 2)
    assert said == "size is 1; give a whole number of at least 2"


@pytest.mark.parametrize("value", [1e-12, 1, 2.5])
def test_a_number_above_zero_passes(value: float) -> None:
    fields.check_number("size", value)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "1", None, 1j])
def test_a_number_is_above_zero_where_no_limit_is_given(value: Any) -> None:
    assert refusal(fields.check_number, value) == f"size is {value!r}; give a number above 0"


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1])
def test_a_number_at_its_limits_passes(value: float) -> None:
    fields.check_number("size", value, least=0, most=1)


@pytest.mark.parametrize("value", [-1e-9, 1.001, float("inf"), float("nan"), False])
def test_a_number_outside_its_limits_is_refused(value: Any) -> None:
    said = refusal(fields.check_number, value, least=0, most=1)
    assert said == f"size is {value!r}; give a number of at least 0 and at most 1"


def test_a_flag_is_true_or_false_and_nothing_that_looks_like_it() -> None:
    fields.check_flag("size", True)
    fields.check_flag("size", False)
    for value in (0, 1, "False", "", None):
        assert refusal(fields.check_flag, value) == f"size is {value!r}; give True or False"


def test_a_text_has_something_in_it() -> None:
    fields.check_text("size", " a ", "a text")
    for value in ("", " \n", None, 3, ["a"]):
        assert refusal(fields.check_text, value, "a text") == f"size is {value!r}; give a text"


def test_a_choice_is_one_of_the_texts() -> None:
    fields.check_choice("size", "b", ("a", "b"))
    for value in ("", "ab", "A", None, 1, ["a"], ("a", "b")):
        assert refusal(fields.check_choice, value, ("a", "b")).endswith("; give one of a, b")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("a", ("a",)),
        (" a |b|| c ", ("a", "b", "", "c")),
        ("", ("",)),
        (["a|b", 3, None], ("a", "b", 3, None)),
        ((), ()),
    ],
)
def test_texts_are_taken_apart_and_other_items_left(value: Any, parts: tuple[Any, ...]) -> None:
    assert fields.split_text("size", value, "|") == parts


@pytest.mark.parametrize("value", [None, 3, {"a": 1}, {"a"}])
def test_what_is_neither_text_nor_list_is_refused(value: Any) -> None:
    said = refusal(fields.split_text, value, ",")
    assert said == f"size is {value!r}; give a list, or a text with ',' between"


def test_only_a_text_of_digits_becomes_a_number() -> None:
    assert fields.whole_from_text("007") == 7
    for value in ("-1", "1.0", "", "x", "1e3", 2.5, None, True):
        assert fields.whole_from_text(value) is value
