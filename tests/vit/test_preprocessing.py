from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from transformers import AutoImageProcessor, DeiTImageProcessorPil, ViTImageProcessorPil

from colabtools import micro
from colabtools.errors import ConfigError, ImageError, ModelError
from colabtools.images import Encoded
from colabtools.vit.preprocessing import Preprocessing

VIT = Preprocessing(height=96, width=96)


def photographs() -> dict[str, Image.Image]:
    found = {name: Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee")}
    found["tall"] = found["coffee"].crop((100, 0, 250, 400))
    found["small"] = found["astronaut"].resize((37, 41))
    found["grey"] = Image.fromarray(data.camera())
    return found


def processors() -> dict[str, object]:
    return {
        "vit": ViTImageProcessorPil(size={"height": 96, "width": 96}),
        "bicubic": ViTImageProcessorPil(
            size={"height": 80, "width": 96},
            resample=3,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        "deit": DeiTImageProcessorPil(),
        "short side": DeiTImageProcessorPil(
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
        ),
        "lanczos, not normalised": ViTImageProcessorPil(
            size={"height": 64, "width": 64}, resample=1, do_normalize=False
        ),
    }


@pytest.mark.parametrize("kind", sorted(processors()))
def test_exact_equals_the_processor_of_transformers_to_the_bit(kind: str) -> None:
    processor = processors()[kind]
    spec = Preprocessing.from_config(processor.to_dict(), (96, 96))
    for name, photo in photographs().items():
        theirs = processor(photo.convert("RGB"), return_tensors="np")["pixel_values"]
        ours = spec.normalize(spec.fit_picture(photo)[None])
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs), name


def test_the_embedded_model_is_prepared_for_as_it_says() -> None:
    processor = AutoImageProcessor.from_pretrained(micro.vit_path())
    spec = Preprocessing.from_config(processor.to_dict(), (8, 8))
    assert spec == Preprocessing(height=8, width=8)


def test_a_model_of_timm_is_cut_from_the_middle() -> None:
    told = {
        "input_size": [3, 384, 384],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    spec = Preprocessing.from_config(told, (384, 384))
    assert (spec.fit, spec.side_before_cut, spec.interpolation) == ("crop", 404, "bicubic")
    squashed = Preprocessing.from_config(told | {"crop_mode": "squash"}, (384, 384))
    assert (squashed.fit, squashed.side_before_cut) == ("resize", 0)


def large_jpeg(orientation: int = 1) -> bytes:
    """Return a JPEG of 12 megapixels with detail at every scale."""
    chance = np.random.default_rng(0)
    photo = Image.fromarray(data.astronaut()).resize((4000, 3000), Image.Resampling.BICUBIC)
    noise = chance.normal(0, 6, (3000, 4000, 3))
    photo = Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=92, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("size", [(384, 384), (224, 224), (512, 256)])
@pytest.mark.parametrize("fit", ["resize", "crop", "pad"])
def test_fast_is_near_exact(size: tuple[int, int], fit: str) -> None:
    photo = Encoded("large.jpg", large_jpeg())
    spec = Preprocessing(height=size[0], width=size[1], fit=fit)
    exact = spec.read(photo).astype(int)
    difference = np.abs(replace(spec, decoding="fast").read(photo) - exact)
    assert difference.mean() < 0.25
    assert difference.max() <= 3


def test_fast_decodes_a_large_jpeg_at_a_fraction() -> None:
    photo = Encoded("large.jpg", large_jpeg())
    near = replace(VIT, decoding="fast")
    assert not np.array_equal(near.read(photo), VIT.read(photo))


def test_a_turned_photo_is_seen_upright_either_way() -> None:
    spec = Preprocessing(height=300, width=100)
    turned = Encoded("turned.jpg", large_jpeg(orientation=6))
    exact = spec.read(turned)
    with Image.open(io.BytesIO(turned.data)) as plain:
        upright = plain.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(exact, spec.fit_picture(upright))
    difference = np.abs(replace(spec, decoding="fast").read(turned) - exact.astype(int))
    assert difference.max() <= 3


def test_bars_have_the_mean_colour() -> None:
    spec = replace(VIT, fit="pad", mean=(0.2, 0.4, 0.6))
    pixels = spec.fit_picture(Image.new("RGB", (200, 50), "white"))
    assert pixels[0, 0].tolist() == [51, 102, 153]
    assert pixels[48, 48].tolist() == [255, 255, 255]
    assert np.abs(spec.normalize(pixels[None])[0, :, 0, 0]).max() < 1e-6


@pytest.mark.parametrize("fit", ["resize", "crop", "pad"])
def test_any_shape_and_mode_gets_the_size(fit: str) -> None:
    spec = replace(VIT, fit=fit, width=64)
    for size in ((1, 1), (1, 500), (500, 1), (64, 96), (97, 63)):
        for mode in ("1", "L", "LA", "P", "CMYK", "RGBA", "RGB"):
            assert spec.fit_picture(Image.new(mode, size)).shape == (96, 64, 3)


def test_a_model_of_greys_gets_greys() -> None:
    spec = Preprocessing.from_config({}, (28, 28), channels=1)
    assert spec.fit_picture(Image.fromarray(data.astronaut())).shape == (28, 28, 1)
    assert spec.normalize(np.full((2, 28, 28, 1), 255, np.uint8)).shape == (2, 1, 28, 28)


def test_it_survives_being_saved() -> None:
    spec = replace(VIT, fit="pad", std=(0.1, 0.2, 0.3))
    assert Preprocessing.from_json(spec.to_json()) == spec
    with pytest.raises(ConfigError, match="colour"):
        Preprocessing.from_json(spec.to_json() | {"colour": 1})


@pytest.mark.parametrize(
    "told",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"resample": 9},
        {"size": {"longest_edge": 5}},
        {"size": {"height": 9, "width": 8}, "do_center_crop": True, "crop_size": 4},
    ],
)
def test_what_cannot_be_done_is_said(told: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="preprocessing"):
        Preprocessing.from_config(told, (8, 8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 0},
        {"interpolation": "cubic"},
        {"fit": "stretch"},
        {"std": (0.0, 1.0, 1.0)},
        {"mean": (0.0, 1.0)},
        {"mean": (0.5,)},
        {"decoding": "slow"},
    ],
)
def test_a_wrong_value_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)) + "|std"):
        replace(VIT, **wrong)


def test_what_is_no_picture_is_said(tmp_path: Path) -> None:
    page = tmp_path / "page.jpg"
    page.write_text("<html>")
    with pytest.raises(ImageError, match="page.jpg"):
        VIT.read(page)
    with pytest.raises(ImageError, match="cut.jpg"):
        VIT.read(Encoded("cut.jpg", large_jpeg()[:200_000]))


def test_a_small_photo_is_sharp_and_decoded_whole() -> None:
    file = io.BytesIO()
    Image.fromarray(data.astronaut()).resize((1600, 1600)).save(file, "JPEG")
    photo = Encoded("small.jpg", file.getvalue())
    assert np.array_equal(replace(VIT, decoding="fast").read(photo), VIT.read(photo))
