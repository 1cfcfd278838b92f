"""Names of sessions: the rule, and what becomes of a name that breaks it."""

from __future__ import annotations

import pytest

from colabtools.dreambooth.names import check_name, clean_name
from colabtools.errors import SessionError

CLEANED = [
    ("my dog", "my dog"),
    ("犬 2", "犬 2"),
    ("my/dog?", "my-dog"),
    ("../../etc/passwd", "etc-passwd"),
    ("a  *  b", "a-b"),
    ("a\nb", "a-b"),
    (".hidden", "hidden"),
    ("-x-", "x"),
    ("dog...", "dog"),
    ("a..b", "a.b"),
    ("🐕 Rex 🐕", "Rex"),
    ("C:\\photos\\rex", "C-photos-rex"),
    ("e\u0301te\u0301", "\u00e9t\u00e9"),
    ("x" * 100, "x" * 64),
    ("𝒜" * 60, "𝒜" * 48),
    ("x" * 62 + " . y", "x" * 62),
]


@pytest.mark.parametrize(("text", "name"), CLEANED)
def test_a_name_is_cleaned_to_the_nearest_that_can_be_a_folder(text: str, name: str) -> None:
    assert clean_name(text) == name
    assert check_name(name) == name
    assert clean_name(name) == name


@pytest.mark.parametrize("text", ["", " ", "..", "🐕", "///", "_-+"])
def test_a_name_of_which_nothing_is_left_is_refused(text: str) -> None:
    with pytest.raises(SessionError, match="no session name can be made of .*up to 64 letters"):
        clean_name(text)


def test_a_refused_name_is_answered_with_the_rule_and_one_that_can_be() -> None:
    with pytest.raises(SessionError, match="'my/dog' cannot be a folder; use up to 64 .*'my-dog'"):
        check_name("my/dog")
    with pytest.raises(SessionError, match="ending with neither . nor a space$"):
        check_name("🐕")
