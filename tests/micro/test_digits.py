"""The digits: three parts of one set, the same on every machine."""

import hashlib
import sys

import numpy as np
import pytest
from sklearn import datasets

from colabtools.errors import ConfigError, MissingDependencyError
from colabtools.micro.digits import SPLIT_SIZES, load_digits, split_indices

GOLDEN_INDICES = {
    "test": "2fbaae31b8c6aad12464a07771b64269876d904bfed86f77a63c8265fa201621",
    "train": "90a701323dac3dbae61d0cfcefaa95e6a4b55c51a0021eb8047a7c9340f1eb30",
    "validation": "56b3d5b3ec521127f4fb48b8c3b11f4390e375f93d757b92b4e73f19fad69f54",
}


def test_the_parts_are_disjoint_and_together_the_whole_set():
    rows = np.concatenate([split_indices(split) for split in SPLIT_SIZES])
    assert np.array_equal(np.sort(rows), np.arange(1797))


@pytest.mark.parametrize(("split", "size"), [("train", 1257), ("validation", 180), ("test", 360)])
def test_every_part_has_the_documented_size_and_types(split, size):
    digits = load_digits(split)
    assert digits.images.shape == (size, 8, 8, 3)
    assert digits.images.dtype == np.uint8
    assert digits.labels.shape == (size,)
    assert digits.labels.dtype == np.int64


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_every_class_has_its_share_of_every_part(split):
    share = np.bincount(datasets.load_digits().target) / 1797
    counts = np.bincount(load_digits(split).labels, minlength=10)
    assert np.abs(counts - share * SPLIT_SIZES[split]).max() < 1


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_the_split_never_moves(split):
    rows = split_indices(split).astype("<i8").tobytes()
    assert hashlib.sha256(rows).hexdigest() == GOLDEN_INDICES[split]


def test_pictures_are_the_ink_levels_stretched_to_bytes_in_three_equal_channels():
    ink = datasets.load_digits().images[split_indices("test")]
    images = load_digits("test").images
    assert images.min() == 0
    assert images.max() == 255
    assert np.array_equal(images[..., 0], images[..., 1])
    assert np.array_equal(images[..., 0], images[..., 2])
    assert np.array_equal(np.rint(images[..., 0] / 255 * 16), ink)


def test_labels_belong_to_their_pictures():
    labels = datasets.load_digits().target[split_indices("validation")]
    assert np.array_equal(load_digits("validation").labels, labels)


def test_an_unknown_split_is_refused_with_the_names_that_exist():
    with pytest.raises(ConfigError, match="'dev'.*train, validation, test"):
        load_digits("dev")


def test_a_missing_scikit_learn_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match="pip install scikit-learn"):
        load_digits("test")
