"""The embedded ViT: a folder that transformers' own classes read, and that reads digits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from colabtools.micro import vit_path
from colabtools.micro.digits import load_digits

PARAMETERS = 202_698
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageClassification.from_pretrained(vit_path())


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(vit_path())


@pytest.fixture(scope="module")
def predicted(model, processor):
    """What the model says of the test pictures: (360,) int64."""
    batch = processor(list(load_digits("test").images), return_tensors="pt")
    with torch.inference_mode():
        return model(**batch).logits.argmax(-1).numpy()


def test_it_reads_97_of_100_digits_that_it_was_not_trained_on(predicted):
    assert (predicted == load_digits("test").labels).mean() >= 0.97


def test_it_reads_every_digit_and_not_only_the_easy_ones(predicted):
    labels = load_digits("test").labels
    recall = [(predicted[labels == digit] == digit).mean() for digit in range(10)]
    assert min(recall) >= 0.85


def test_against_shuffled_labels_it_is_at_chance(predicted):
    labels = np.random.default_rng(0).permutation(load_digits("test").labels)
    # 36 of 360 expected; 0.02 to 0.18 is five standard errors either side.
    assert 0.02 <= (predicted == labels).mean() <= 0.18


def test_the_card_reports_the_accuracy_that_is_measured(predicted):
    right = int((predicted == load_digits("test").labels).sum())
    row = f"| test | 360 | {right} | {right / 360:.4f} "
    assert row in (vit_path() / "README.md").read_text(encoding="utf-8")


def test_it_has_exactly_the_parameters_of_its_architecture(model):
    patches = 3 * 2 * 2 * 64 + 64
    positions = (1 + 16 + 1) * 64  # class token, then one position each for 16 patches and it
    block = 4 * (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 2 * (64 + 64)
    head = (64 + 64) + (64 * 10 + 10)
    assert model.num_parameters() == patches + positions + 4 * block + head == PARAMETERS


def test_weights_are_one_safetensors_file_of_float32_without_strays(model):
    with safe_open(vit_path() / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert sum(tensor.numel() for tensor in tensors) == PARAMETERS


def test_every_weight_in_the_file_finds_its_place_in_the_model():
    _, info = AutoModelForImageClassification.from_pretrained(vit_path(), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_labels_are_the_ten_digits_in_order(model):
    assert model.config.id2label == dict(enumerate(DIGITS))
    assert model.config.label2id == {name: index for index, name in enumerate(DIGITS)}


def test_the_processor_maps_bytes_to_minus_one_to_one_and_changes_nothing_else(processor):
    images = load_digits("validation").images
    pixel_values = processor(list(images), return_tensors="pt")["pixel_values"]
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(pixel_values, expected, rtol=0, atol=1e-6)


def test_the_preprocessing_names_a_class_that_older_transformers_know():
    settings = json.loads((vit_path() / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert settings["image_processor_type"] == "ViTImageProcessor"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_the_processor_takes_a_large_picture_of_any_mode(mode, model, processor):
    batch = processor(large_zero().convert(mode), return_tensors="pt")
    with torch.inference_mode():
        assert model.config.id2label[int(model(**batch).logits.argmax())] == "0"


def test_a_pipeline_reads_a_picture_from_the_folder_alone():
    answer = pipeline("image-classification", model=str(vit_path()))(large_zero())
    assert answer[0]["label"] == "0"


def large_zero():
    """The first nought of the test part, blown up to 256 pixels."""
    digits = load_digits("test")
    row = int(np.flatnonzero(digits.labels == 0)[0])
    return Image.fromarray(digits.images[row]).resize((256, 256))


def test_the_folder_holds_four_files_no_pickle_and_under_two_megabytes():
    files = {path.name: path.stat().st_size for path in vit_path().rglob("*")}
    expected = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert files.keys() == expected
    assert sum(files.values()) < 2_000_000
