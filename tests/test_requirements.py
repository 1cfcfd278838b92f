"""What the package needs is on Colab: in its image, or in the file of what the image lacks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Read by eye, not by `tomllib`, which Python 3.10 has not.
PROJECT = (ROOT / "pyproject.toml").read_text()
COLAB = (ROOT / "requirements-colab.txt").read_text()
PINNED = dict(re.findall(r"(?m)^([\w-]+)==([\d.]+)$", COLAB))
# Only of use with a CUDA card, and told so where it is missed.
OPTIONAL = {"bitsandbytes"}


def needed(table: str) -> dict[str, str]:
    """The lower bound of each package of one list in pyproject.toml."""
    found = re.search(rf"(?ms)^{table} = \[\n(.*?)^\]", PROJECT)
    assert found is not None
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', found[1]))


def in_image() -> set[str]:
    """The packages that the head of the Colab file says are the image's own."""
    found = re.search(r"(?s)the image's own \((.*?)\)", COLAB.replace("\n# ", " "))
    assert found is not None
    return set(found[1].split(", "))


def test_every_package_is_in_the_image_or_installed_there_and_none_in_both() -> None:
    tables = map(needed, ("dependencies", "dreambooth", "notebook"))
    names = {name for table in tables for name in table}
    assert names == in_image() | PINNED.keys() - OPTIONAL
    assert not in_image() & PINNED.keys()


def test_what_is_installed_there_is_within_the_bounds() -> None:
    least = {**needed("dreambooth"), **needed("notebook")}
    both = least.keys() & PINNED.keys()
    assert both == PINNED.keys() - OPTIONAL
    for name in both:
        assert as_numbers(PINNED[name]) >= as_numbers(least[name])


def as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
