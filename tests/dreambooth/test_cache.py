"""What the VAE says is asked once, kept, found again, and the same as asking at each step."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from colabtools import images, micro
from colabtools.dreambooth.cache import (
    Crop,
    CropSet,
    LatentCache,
    crop_sets,
    load_pixels,
    scale_by_factor,
    vae_digest,
)
from colabtools.errors import ImageError, TrainingError

PHOTOS = sorted(micro.subject_path().glob("*.png"))
CROPS = (Crop(), Crop(1.125, 1.0, 0.5), Crop(1.125, 0.0, 0.0, mirrored=True))


@pytest.fixture(scope="module")
def pristine() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(micro.sd_path() / "vae", use_safetensors=True)
    return vae.requires_grad_(False)


@pytest.fixture
def vae(pristine: AutoencoderKL) -> AutoencoderKL:
    return copy.deepcopy(pristine)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Three pictures in a folder of their own."""
    folder = tmp_path / "instance_images"
    folder.mkdir()
    return [Path(shutil.copy(photo, folder)) for photo in PHOTOS[:3]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the latents are kept; the cache makes it."""
    return tmp_path / ".cache" / "latents"


@pytest.fixture
def calls(vae: AutoencoderKL) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what the encoder was given so far."""
    shapes: list[tuple[int, ...]] = []
    handle = vae.encoder.register_forward_hook(
        lambda module, given, said: shapes.append(tuple(given[0].shape))
    )
    yield shapes
    handle.remove()


def same(one: LatentCache, other: LatentCache) -> bool:
    pairs = zip(one.means + one.stds, other.means + other.stds, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def window(path: Path, crop: Crop) -> np.ndarray:
    """A crop of a 72 x 72 picture, made the plain way: enlarge all of it, then cut."""
    picture = images.load_upright(path).resize((81, 81), Image.Resampling.LANCZOS)
    left, top = round(crop.x * 9), round(crop.y * 9)
    return np.asarray(picture)[top : top + 72, left : left + 72]


def save_noise(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_pixels_are_in_the_range_that_the_autoencoder_knows(tmp_path: Path) -> None:
    Image.new("RGB", (16, 8), (0, 255, 127)).save(tmp_path / "a.png")
    pixels = load_pixels(tmp_path / "a.png")
    assert (pixels.shape, pixels.dtype) == ((1, 3, 8, 16), torch.float32)
    assert pixels[0, :2, 0, 0].tolist() == [-1.0, 1.0]
    assert abs(pixels[0, 2, 0, 0].item()) < 0.005


@pytest.mark.parametrize("place", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_a_window_is_a_part_of_the_enlarged_picture(
    tmp_path: Path, place: tuple[float, float]
) -> None:
    path = save_noise(tmp_path / "a.png", (72, 72))
    crop = Crop(1.125, *place)
    pixels = (load_pixels(path, crop)[0].permute(1, 2, 0) + 1) * 127.5
    difference = np.abs(pixels.numpy() - window(path, crop))
    assert difference.max() < 1.01  # Pillow rounds to whole values between the two directions


def test_a_mirrored_crop_exchanges_left_and_right(tmp_path: Path) -> None:
    path = save_noise(tmp_path / "a.png", (16, 8))
    mirrored = load_pixels(path, Crop(mirrored=True))
    assert torch.equal(mirrored, load_pixels(path).flip(-1))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 10, 11, 30])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_the_whole_picture_and_different_windows(count: int, flip: bool) -> None:
    for picture in crop_sets(PHOTOS, crops=count, flip=flip):
        assert picture.crops[0] == Crop()
        assert len(set(picture.crops)) == len(picture.crops) == count * (1 + flip)
        assert sum(crop.mirrored for crop in picture.crops) == count * flip
        assert all(0 <= min(crop.x, crop.y) <= max(crop.x, crop.y) <= 1 for crop in picture.crops)
        assert {crop.zoom for crop in picture.crops[1:count]} <= {1.125}


def test_windows_depend_on_the_seed_and_the_name_alone() -> None:
    elsewhere = [Path("elsewhere") / photo.name for photo in PHOTOS]
    here = [picture.crops for picture in crop_sets(PHOTOS, crops=4)]
    assert [picture.crops for picture in crop_sets(elsewhere, crops=4)] == here
    assert [picture.crops for picture in crop_sets(PHOTOS, crops=4, seed=1)] != here
    assert len(set(here)) > 1
    assert crop_sets([Path("\udce9.png")], crops=2)[0].crops[1].zoom == 1.125


def test_cached_latents_are_those_of_a_direct_encoding(
    vae: AutoencoderKL, pictures: list[Path], folder: Path
) -> None:
    sets = [CropSet(path, CROPS) for path in pictures]
    for cache in (
        LatentCache.encode(vae, sets),
        LatentCache.encode(vae, sets, folder=folder),
        LatentCache.encode(vae, sets, folder=folder),
    ):
        assert len(cache) == 3
        for row, path in enumerate(pictures):
            for k, crop in enumerate(CROPS):
                direct = vae.encode(load_pixels(path, crop)).latent_dist
                factor = vae.config.scaling_factor
                mean, std = direct.mean[0] * factor, direct.std[0] * factor
                torch.testing.assert_close(cache.means[row][k], mean, atol=1e-6, rtol=0)
                torch.testing.assert_close(cache.stds[row][k], std, atol=1e-6, rtol=0)
            mode = cache.sample(row, torch.Generator(), mode=True)
            direct = vae.encode(load_pixels(path)).latent_dist
            torch.testing.assert_close(mode, direct.mode()[0] * factor, atol=1e-6, rtol=0)


def test_sampling_the_cache_is_sampling_the_encoder(vae: AutoencoderKL) -> None:
    cache = LatentCache.encode(vae, crop_sets(PHOTOS))
    for row in (3, 0):
        cached = cache.sample(row, torch.Generator().manual_seed(7))
        posterior = vae.encode(load_pixels(PHOTOS[row])).latent_dist
        uncached = posterior.sample(torch.Generator().manual_seed(7))
        expected = uncached[0] * vae.config.scaling_factor
        torch.testing.assert_close(cached, expected, atol=1e-6, rtol=0)
        assert cached.shape == cache.shape(row) == (4, 8, 8)


def test_each_draw_differs_by_the_posteriors_deviation(vae: AutoencoderKL) -> None:
    cache = LatentCache.encode(vae, crop_sets(PHOTOS[:1]))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([cache.sample(0, generator) for _ in range(400)])
    torch.testing.assert_close(draws.mean(0), cache.means[0][0], atol=0.05, rtol=0)
    assert ((draws.std(0) / cache.stds[0][0]) - 1).abs().mean() < 0.1


def test_every_crop_is_drawn_about_as_often_and_by_the_generator_alone() -> None:
    means = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    cache = LatentCache((means,), (torch.zeros(4, 1, 2, 2),))
    generator = torch.Generator().manual_seed(0)
    drawn = [int(cache.sample(0, generator)[0, 0, 0]) for _ in range(400)]
    counts = [drawn.count(crop) for crop in range(4)]
    assert min(counts) > 100 - 4 * 75**0.5  # four deviations of a binomial, 400 x 1/4 x 3/4
    again = torch.Generator().manual_seed(0)
    assert [int(cache.sample(0, again)[0, 0, 0]) for _ in range(400)] == drawn
    before = again.get_state()
    assert cache.sample(0, again, mode=True)[0, 0, 0] == 0
    assert torch.equal(again.get_state(), before)


def test_the_vae_is_asked_once_for_each_crop_and_never_again(
    vae: AutoencoderKL, pictures: list[Path], folder: Path, calls: list[tuple[int, ...]]
) -> None:
    sets = crop_sets(pictures, crops=4)
    first = LatentCache.encode(vae, sets, folder=folder)
    assert calls == [(1, 3, 64, 64)] * 12
    second = LatentCache.encode(vae, sets, folder=folder)
    third = LatentCache.encode(vae, sets[::-1], folder=folder)
    assert len(calls) == 12
    assert same(second, first)
    assert same(third, LatentCache(first.means[::-1], first.stds[::-1]))
    assert [path.name for path in folder.iterdir()] == ["instance_images.safetensors"]


def change_orientation(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as picture:
        picture.save(path, exif=exif)


def change_size(path: Path) -> None:
    images.fit(images.load_upright(path), 80, 48).save(path)


def change_pixel(path: Path) -> None:
    picture = images.load_upright(path)
    picture.putpixel((5, 5), (1, 2, 3))
    picture.save(path)


@pytest.mark.parametrize("change", [change_orientation, change_size, change_pixel])
def test_a_changed_picture_alone_is_encoded_again(
    vae: AutoencoderKL,
    pictures: list[Path],
    folder: Path,
    calls: list[tuple[int, ...]],
    change: object,
) -> None:
    sets = crop_sets(pictures, crops=2)
    before = LatentCache.encode(vae, sets, folder=folder)
    calls.clear()
    change(pictures[1])  # type: ignore[operator]
    after = LatentCache.encode(vae, sets, folder=folder)
    assert len(calls) == 2
    assert same(after, LatentCache.encode(vae, sets))
    kept = [torch.equal(a, b) for a, b in zip(after.means, before.means, strict=True)]
    assert kept == [True, False, True]
    assert after.shape(1) == ((4, 6, 10) if change is change_size else (4, 8, 8))


@pytest.mark.parametrize(
    "crop", [Crop(1.1, 0.5, 0.5), Crop(1.125, 0.5, 0.4), Crop(1.125, 0.4, 0.5), CROPS[2]]
)
def test_another_crop_alone_is_encoded(
    vae: AutoencoderKL,
    pictures: list[Path],
    folder: Path,
    calls: list[tuple[int, ...]],
    crop: Crop,
) -> None:
    old = [CropSet(path, (Crop(), Crop(1.125, 0.5, 0.5))) for path in pictures]
    LatentCache.encode(vae, old, folder=folder)
    calls.clear()
    new = [CropSet(pictures[0], (Crop(), crop)), *old[1:]]
    cache = LatentCache.encode(vae, new, folder=folder)
    assert len(calls) == 1
    assert same(cache, LatentCache.encode(vae, new))


@torch.no_grad()
def change_weight(vae: AutoencoderKL) -> None:
    vae.encoder.conv_in.bias[0] += 1e-3


def change_config(vae: AutoencoderKL) -> None:
    vae.register_to_config(norm_num_groups=1)


def change_dtype(vae: AutoencoderKL) -> None:
    vae.half()


@pytest.mark.parametrize("change", [change_weight, change_config, change_dtype])
def test_another_vae_encodes_everything_again(
    vae: AutoencoderKL,
    pictures: list[Path],
    folder: Path,
    calls: list[tuple[int, ...]],
    change: object,
) -> None:
    sets = crop_sets(pictures)
    LatentCache.encode(vae, sets, folder=folder)
    digest = vae_digest(vae)
    calls.clear()
    change(vae)  # type: ignore[operator]
    assert vae_digest(vae) != digest
    cache = LatentCache.encode(vae, sets, folder=folder)
    assert len(calls) == 3
    assert same(cache, LatentCache.encode(vae, sets))


@torch.no_grad()
def test_what_does_not_touch_the_latents_keeps_the_digest(vae: AutoencoderKL) -> None:
    digest = vae_digest(vae)
    vae.decoder.conv_in.bias += 1
    vae.register_to_config(_name_or_path="elsewhere")
    assert vae_digest(vae.to(memory_format=torch.channels_last)) == digest


@torch.no_grad()
def test_the_same_bits_in_another_dtype_are_other_weights(vae: AutoencoderKL) -> None:
    for parameter in vae.parameters():
        parameter.zero_()
    assert vae_digest(vae.to(torch.float16)) != vae_digest(vae.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_of_half_precision_encodes_in_float32_and_stays_what_it_was(
    vae: AutoencoderKL, dtype: torch.dtype
) -> None:
    vae.to(dtype=dtype)
    before = vae_digest(vae)
    cache = LatentCache.encode(vae, crop_sets(PHOTOS[:1]))
    assert (vae.dtype, vae_digest(vae)) == (dtype, before)
    direct = vae.float().encode(load_pixels(PHOTOS[0])).latent_dist
    expected = direct.mean[0] * vae.config.scaling_factor
    assert cache.means[0].dtype == torch.float32
    torch.testing.assert_close(cache.means[0][0], expected, atol=1e-6, rtol=0)


def test_a_vae_whose_memory_lies_channels_last_is_kept_too(
    vae: AutoencoderKL, pictures: list[Path], folder: Path, calls: list[tuple[int, ...]]
) -> None:
    sets = crop_sets(pictures)
    plain = LatentCache.encode(vae, sets)
    vae.to(memory_format=torch.channels_last)
    for _ in range(2):
        cache = LatentCache.encode(vae, sets, folder=folder)
        torch.testing.assert_close(cache.means, plain.means, atol=1e-6, rtol=0)
    assert len(calls) == 6


def test_the_family_says_how_latents_are_scaled(vae: AutoencoderKL) -> None:
    def shifted(
        of: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert of is vae
        return (mean - 0.1) * 0.36, std * 0.36

    direct = vae.encode(load_pixels(PHOTOS[0])).latent_dist
    cache = LatentCache.encode(vae, crop_sets(PHOTOS[:1]), scale=shifted)
    torch.testing.assert_close(cache.means[0], (direct.mean - 0.1) * 0.36, atol=1e-6, rtol=0)
    torch.testing.assert_close(cache.stds[0], direct.std * 0.36, atol=1e-6, rtol=0)
    mean, std = scale_by_factor(vae, torch.ones(1), torch.full((1,), 2.0))
    assert torch.cat([mean, std]).tolist() == pytest.approx([0.18215, 0.3643])


def test_a_scaling_of_another_family_needs_no_encoding(
    vae: AutoencoderKL, pictures: list[Path], folder: Path, calls: list[tuple[int, ...]]
) -> None:
    sets = crop_sets(pictures)
    plain = LatentCache.encode(vae, sets, folder=folder)
    calls.clear()
    bare = LatentCache.encode(vae, sets, folder=folder, scale=lambda vae, *moments: moments)
    torch.testing.assert_close(bare.means[0] * 0.18215, plain.means[0])
    assert calls == []


def test_pictures_of_several_shapes_stand_side_by_side(
    vae: AutoencoderKL, tmp_path: Path, folder: Path
) -> None:
    sizes = [(64, 64), (80, 48), (48, 80)]
    paths = [save_noise(tmp_path / f"{i}.png", size) for i, size in enumerate(sizes)]
    for _ in range(2):
        cache = LatentCache.encode(vae, crop_sets(paths, crops=2), folder=folder)
        assert [cache.shape(row) for row in range(3)] == [(4, 8, 8), (4, 6, 10), (4, 10, 6)]
        assert [cache.sample(r, torch.Generator()).shape for r in range(3)] == [
            cache.shape(r) for r in range(3)
        ]


def damage_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def damage_owner(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"1.png", b"7.png"))


@pytest.mark.parametrize("damage", [damage_half, damage_empty, damage_bit, damage_owner])
def test_a_damaged_file_is_made_again(
    vae: AutoencoderKL,
    pictures: list[Path],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    damage: object,
) -> None:
    sets = crop_sets(pictures)
    first = LatentCache.encode(vae, sets, folder=folder)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    damage(path)  # type: ignore[operator]
    assert path.read_bytes() != whole
    assert same(LatentCache.encode(vae, sets, folder=folder), first)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is damaged" in caplog.text
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(
    vae: AutoencoderKL, pictures: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = LatentCache.encode(vae, crop_sets(pictures), folder=tmp_path / "file" / "latents")
    assert len(cache) == 3
    assert "the latents are not kept" in caplog.text


def test_pictures_of_one_folder_that_are_asked_for_in_turn_are_all_kept(
    vae: AutoencoderKL, pictures: list[Path], folder: Path, calls: list[tuple[int, ...]]
) -> None:
    """As those to train on and those held out."""
    for _ in range(2):
        LatentCache.encode(vae, crop_sets(pictures[:2]), folder=folder)
        LatentCache.encode(vae, crop_sets(pictures[2:]), folder=folder)
    assert len(calls) == 3


def test_what_nobody_will_ask_for_again_is_dropped(
    vae: AutoencoderKL, pictures: list[Path], folder: Path
) -> None:
    LatentCache.encode(vae, crop_sets(pictures, crops=5), folder=folder)
    (path,) = folder.iterdir()
    large = path.stat().st_size
    pictures[2].unlink()
    change_pixel(pictures[0])
    LatentCache.encode(vae, crop_sets(pictures[:1]), folder=folder)
    # Left are one crop of the changed picture and the five of the other that is there.
    assert path.stat().st_size == pytest.approx(large * 6 / 15, rel=0.05)


def test_a_latent_that_is_not_finite_names_its_picture(
    vae: AutoencoderKL, pictures: list[Path], folder: Path
) -> None:
    vae.quant_conv.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"1\.png encodes to numbers that are not finite"):
        LatentCache.encode(vae, crop_sets(pictures), folder=folder)
    assert not folder.exists()


def test_a_picture_that_cannot_be_decoded_is_named(
    vae: AutoencoderKL, pictures: list[Path]
) -> None:
    pictures[1].write_bytes(pictures[1].read_bytes()[:500])
    with pytest.raises(ImageError, match=rf"^{pictures[1].name} cannot be read"):
        LatentCache.encode(vae, crop_sets(pictures))


def test_no_pictures_make_an_empty_cache(vae: AutoencoderKL, folder: Path) -> None:
    assert len(LatentCache.encode(vae, [], folder=folder)) == 0
    assert not folder.exists()


def test_a_cache_can_be_moved(vae: AutoencoderKL) -> None:
    cache = LatentCache.encode(vae, crop_sets(PHOTOS[:1])).to("meta")
    assert (len(cache), cache.shape(0)) == (1, (4, 8, 8))
    assert cache.means[0].device.type == cache.stds[0].device.type == "meta"
