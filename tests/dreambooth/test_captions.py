from __future__ import annotations

import logging
import random
import unicodedata
from itertools import permutations
from pathlib import Path

import pytest

from colabtools.dreambooth.captions import (
    CaptionRules,
    check_captions,
    every_form,
    fill_template,
    find_faults,
    index_captions,
    name_subject,
    read_caption,
    subject_of,
    vary,
)
from colabtools.errors import ConfigError, DatasetError

TAGGED = "a sks r2-d2 robot, weiß,  8k photo, café — nuit, 2023-05"


def draws(caption: str, rules: CaptionRules, count: int = 200, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [vary(caption, rules, rng) for _ in range(count)]


def test_without_rules_a_caption_is_untouched_and_nothing_is_drawn() -> None:
    rng = random.Random(0)
    assert vary(" a  sks star,  blue ", CaptionRules(), rng) == " a  sks star,  blue "
    assert rng.getstate() == random.Random(0).getstate()


def test_shuffling_keeps_every_tag_and_the_first_ones_in_place() -> None:
    rules = CaptionRules(shuffle_tokens=True, keep_tokens=2)
    forms = draws(TAGGED, rules)
    rest = ["8k photo", "café — nuit", "2023-05"]
    expected = {", ".join(["a sks r2-d2 robot", "weiß", *order]) for order in permutations(rest)}
    assert set(forms) == expected


def test_without_kept_tags_any_tag_may_come_first() -> None:
    forms = draws(TAGGED, CaptionRules(shuffle_tokens=True))
    assert {form.split(", ")[0] for form in forms} == {tag.strip() for tag in TAGGED.split(",")}


@pytest.mark.parametrize("caption", ["a  photo of sks star", "", "one, two", "only,", " , "])
def test_a_caption_with_no_two_tags_to_exchange_is_untouched(caption: str) -> None:
    rules = CaptionRules(shuffle_tokens=True, keep_tokens=1)
    assert set(draws(caption, rules, 20)) == {caption}


def test_the_separator_can_be_another() -> None:
    forms = draws("a, b; c", CaptionRules(shuffle_tokens=True, separator=";"))
    assert set(forms) == {"a, b; c", "c; a, b"}


def test_the_share_of_empty_prompts_is_the_dropout() -> None:
    count = 20_000
    empty = draws("a sks star", CaptionRules(dropout=0.1), count).count("")
    # Five standard deviations of a binomial count.
    assert abs(empty - 0.1 * count) < 5 * (count * 0.1 * 0.9) ** 0.5
    assert set(draws("a sks star", CaptionRules(dropout=1), 20)) == {""}


def test_the_same_generator_gives_the_same_prompts() -> None:
    rules = CaptionRules(dropout=0.2, shuffle_tokens=True)
    assert draws(TAGGED, rules, seed=1) == draws(TAGGED, rules, seed=1)
    assert draws(TAGGED, rules, seed=1) != draws(TAGGED, rules, seed=2)


@pytest.mark.parametrize(
    "rules",
    [
        CaptionRules(),
        CaptionRules(dropout=0.5),
        CaptionRules(dropout=1),
        CaptionRules(shuffle_tokens=True),
        CaptionRules(shuffle_tokens=True, keep_tokens=1, dropout=0.3),
    ],
)
def test_every_form_is_what_varying_gives_in_the_long_run(rules: CaptionRules) -> None:
    captions = ["a, b, c", "a, b, c", "a sks  star", "x,x"]
    rng = random.Random(0)
    seen = {vary(caption, rules, rng) for _ in range(300) for caption in captions}
    assert every_form(captions, rules) == seen


def test_too_many_orders_are_not_listed() -> None:
    shuffled = CaptionRules(shuffle_tokens=True)
    assert every_form(["a, b, c, d, e"], shuffled) is None
    assert every_form([f"{i}, a, b, c" for i in range(3)], shuffled) is None
    assert len(every_form([f"{i}, a, b, c" for i in range(2)], shuffled) or ()) == 48


def test_many_captions_that_do_not_change_are_all_listed() -> None:
    captions = [f"caption {i}" for i in range(500)]
    rules = CaptionRules(dropout=0.1, shuffle_tokens=True)
    assert every_form(captions, rules) == {"", *captions}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dropout", -0.1),
        ("dropout", 1.1),
        ("shuffle_tokens", "false"),
        ("keep_tokens", -1),
        ("keep_tokens", 1.5),
        ("separator", ""),
    ],
)
def test_a_rule_that_cannot_be_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} is "):
        CaptionRules(**{field: value})


def make_folder(folder: Path, **captions: str) -> Path:
    folder.mkdir()
    for stem, text in captions.items():
        (folder / f"{stem}.txt").write_text(text, encoding="utf-8")
    return folder


def test_good_captions_pass_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folder(tmp_path / "captions", one="a sks star", two="weiß")
    (folder / "._one.txt").write_bytes(b"\xff")
    (folder / "notes.md").touch()
    check_captions([Path("one.png"), Path("two.png")], folder, strict=True)
    check_captions([Path("one.png"), Path("two.png")], folder, strict=False)
    assert caplog.records == []


FAULTY = {"one": "a sks star", "two": "\ufeff \n", "lost": "of no picture"}
PICTURES = [Path("one.png"), Path("two.png"), Path("bare.jpg")]


def test_strict_names_every_faulty_file_in_one_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "captions", **FAULTY)
    with pytest.raises(DatasetError) as caught:
        check_captions(PICTURES, folder, strict=True)
    message = str(caught.value)
    assert "without a caption: bare.jpg; empty: two.txt; of no picture: lost.txt" in message
    assert "one.txt" not in message
    assert "\n" not in message


def test_otherwise_the_same_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "captions", **FAULTY)
    with caplog.at_level(logging.WARNING, logger="colabtools"):
        check_captions(PICTURES, folder, strict=False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "bare.jpg; empty: two.txt; of no picture: lost.txt" in record.getMessage()


def test_a_second_sidecar_with_text_fills_an_empty_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "captions", one="")
    (folder / "one.caption").write_text("a sks star", encoding="utf-8")
    check_captions([Path("one.png")], folder, strict=True)


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "captions")
    with pytest.raises(DatasetError, match=r"0\.png, 1\.png, 2\.png, 3\.png, 4\.png and 4 more;"):
        check_captions([Path(f"{i}.png") for i in range(9)], folder, strict=True)


def test_a_caption_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "captions")
    (folder / "one.txt").write_bytes("weiß".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"one\.txt cannot be read .* save it as UTF-8"):
        check_captions([Path("one.png")], folder, strict=False)


@pytest.mark.parametrize(
    ("prompt", "token", "class_name"),
    [
        ("a photo of sks dog", "sks", "dog"),
        ("a photo of a r2-d2 toy robot", "r2-d2", "toy robot"),
        ("a sks star", "sks", "star"),
        ("A Picture OF the ünï  dog", "ünï", "dog"),
        ("sks", "sks", ""),
        ("the", "", ""),
        ("", "", ""),
    ],
)
def test_token_and_class_are_read_from_the_prompt(prompt: str, token: str, class_name: str) -> None:
    assert subject_of(prompt) == (token, class_name)


def test_faults_are_listed_whole_and_by_kind(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "captions", **FAULTY)
    faults = find_faults(PICTURES, folder)
    assert (faults.missing, faults.empty, faults.orphan) == (
        ("bare.jpg",),
        ("two.txt",),
        ("lost.txt",),
    )
    assert faults
    (folder / "bare.txt").write_text("a sks star")
    (folder / "two.txt").write_text("a sks star")
    (folder / "lost.txt").unlink()
    assert not find_faults(PICTURES, folder)


def test_captions_beside_the_photo_come_before_those_of_a_folder(tmp_path: Path) -> None:
    beside = make_folder(tmp_path / "photos", one="beside")
    folder = make_folder(beside / "captions", one="folder", two="only here")
    (beside / "one.CAPTION").write_text("second")
    index = index_captions(beside, folder, tmp_path / "not there")
    assert [read_caption(path) for path in index["one"]] == ["beside", "second", "folder"]
    assert [read_caption(path) for path in index["two"]] == ["only here"]
    assert find_faults([Path("one.png"), Path("two.png")], beside, folder) == find_faults([])


def test_a_name_that_a_mac_spells_otherwise_is_the_same_picture(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "müsli")
    folder = make_folder(tmp_path / "captions", **{decomposed: "a bowl"})
    assert not find_faults([Path("müsli.png")], folder)


@pytest.mark.parametrize("token", ["sks", "r2-d2", "犬犬", "weiß42", "{class}", r"\1", "o'neil"])
def test_a_token_goes_into_a_template_as_it_is(token: str) -> None:
    assert fill_template("a {token} {class},  {x}", token, "dog") == f"a {token} dog, {{x}}"
    named = name_subject("A dog and a dog", "unused", token, "dog")
    assert named == f"A {token} dog and a dog"


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("a Toy Car on grass", "a r2-d2 Toy Car on grass"),
        ("toy cars on grass", "a r2-d2 toy car, toy cars on grass"),
        ("two paws", "a r2-d2 toy car, two paws"),
        ("the R2-D2 toy car", "the R2-D2 toy car"),
        ("", "a r2-d2 toy car"),
    ],
)
def test_a_description_is_made_to_name_the_subject(description: str, expected: str) -> None:
    assert name_subject(description, "a r2-d2 toy car", "r2-d2", "toy car") == expected
