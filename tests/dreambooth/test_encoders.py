from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, ViTConfig

from colabtools import micro
from colabtools.dreambooth import encoders
from colabtools.dreambooth.encoders import ClipEncoder, DinoEncoder
from colabtools.errors import ImageError, ModelError

from .judges import SIDE, make_clip, make_dino

PHOTOS = sorted(micro.subject_path().glob("*.png"))
# Source: ImageNet's mean and deviation as in transformers' IMAGENET_STANDARD_MEAN (ViT's
# processor) and OPENAI_CLIP_MEAN.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dino(tmp_path_factory.mktemp("judges") / "dino")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("judges") / "clip")


@pytest.fixture
def dino(dino_folder: Path) -> DinoEncoder:
    return DinoEncoder.load(str(dino_folder))


@pytest.fixture
def clip(clip_folder: Path) -> ClipEncoder:
    return ClipEncoder.load(str(clip_folder))


@pytest.fixture
def small_photo(tmp_path: Path) -> Path:
    """A picture of the encoders' own size, so that nothing is resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    return tmp_path / "small.png"


def _pixel_values(path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    values = (np.asarray(Image.open(path)) / 255 - mean) / std
    return torch.from_numpy(values).float().permute(2, 0, 1)[None]


@torch.no_grad()
def test_dino_is_the_class_token_after_the_last_norm(dino: DinoEncoder, small_photo: Path) -> None:
    pixel_values = _pixel_values(small_photo, (0.5,) * 3, (0.5,) * 3)
    expected = dino.model(pixel_values=pixel_values).last_hidden_state[:, 0]
    found = dino.embed_pictures([small_photo], desc="looking")
    assert found.dtype == torch.float32
    assert found.allclose(expected, atol=1e-5)


@torch.no_grad()
def test_clip_is_the_projected_place_of_a_picture(clip: ClipEncoder, small_photo: Path) -> None:
    pooled = clip.model.vision_model(
        pixel_values=_pixel_values(small_photo, CLIP_MEAN, CLIP_STD)
    ).pooler_output
    found = clip.embed_pictures([small_photo], desc="looking")
    assert found.shape == (1, 12)
    assert found.allclose(clip.model.visual_projection(pooled), atol=1e-5)


def test_neither_batch_nor_order_changes_an_embedding(
    dino: DinoEncoder, clip: ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoder in (dino, clip):
        together = encoder.embed_pictures(PHOTOS, desc="looking")
        monkeypatch.setattr(encoders, "_BATCH_SIZE", 2)
        apart = encoder.embed_pictures(PHOTOS[::-1], desc="looking")
        assert together.shape[0] == len(PHOTOS)
        assert together.allclose(apart.flip(0), atol=1e-5)
        assert not together[0].allclose(together[1], atol=1e-3)


def test_a_wide_picture_is_judged_by_its_middle(
    dino: DinoEncoder, clip: ClipEncoder, tmp_path: Path
) -> None:
    middle = Image.open(PHOTOS[0]).convert("RGB")
    wide = Image.new("RGB", (middle.width * 2, middle.height), "red")
    wide.paste(middle, (middle.width // 2, 0))
    wide.save(tmp_path / "wide.png")
    for encoder in (dino, clip):
        found = encoder.embed_pictures([tmp_path / "wide.png", PHOTOS[0]], desc="looking")
        assert found[0].allclose(found[1], atol=1e-5)


def test_a_prompt_means_the_same_beside_others_and_the_longest_is_cut(clip: ClipEncoder) -> None:
    alone = clip.embed_prompts(["a star"])
    long = "a red star on a white background " * 30
    beside = clip.embed_prompts(["a star", "a red ring", long])
    assert beside.shape == (3, 12)
    assert beside[0].allclose(alone[0], atol=1e-5)
    assert not beside[0].allclose(beside[1], atol=1e-3)


def test_the_published_builds_are_known_and_others_are_not(
    dino: DinoEncoder, clip: ClipEncoder
) -> None:
    vit_small = SimpleNamespace(config=ViTConfig(hidden_size=384, num_attention_heads=6))
    vit_base = SimpleNamespace(config=ViTConfig())
    clip_base = SimpleNamespace(config=CLIPConfig())
    clip_16 = SimpleNamespace(config=CLIPConfig(vision_config={"patch_size": 16}))
    assert DinoEncoder("x", vit_small, None).as_published
    assert ClipEncoder("x", clip_base, None, None).as_published
    assert not DinoEncoder("x", vit_base, None).as_published
    assert not ClipEncoder("x", clip_16, None, None).as_published
    assert not dino.as_published
    assert not clip.as_published


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_repository_that_was_downloaded_before_needs_no_network(
    hub_cache: Path, dino_folder: Path, dino: DinoEncoder, file: str
) -> None:
    repository = hub_cache / "models--somebody--dino"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(dino_folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    if file == "pytorch_model.bin":
        tensors = load_file(snapshot / "model.safetensors")
        (snapshot / "model.safetensors").unlink()
        torch.save(tensors, snapshot / file)
    loaded = DinoEncoder.load("somebody/dino")
    found = loaded.embed_pictures(PHOTOS[:1], desc="looking")
    assert found.equal(dino.embed_pictures(PHOTOS[:1], desc="looking"))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_downloaded_once_and_as_safetensors_if_there_are_any(
    dino_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    shutil.copytree(dino_folder, tmp_path / "repository")
    if file == "pytorch_model.bin":
        tensors = load_file(tmp_path / "repository" / "model.safetensors")
        (tmp_path / "repository" / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "repository" / file)
    asked = []

    def hub(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns[-1]))
        return str(tmp_path / "repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    DinoEncoder.load("somebody/dino")
    order = list(dict.fromkeys(["model.safetensors", file]))
    assert asked == [("somebody/dino", name) for name in order]


@pytest.mark.parametrize("name", ["facebook/dino-vits16", "no/such/folder", "../x", "a b"])
def test_a_model_that_cannot_be_had_is_one_line_with_its_name(hub_cache: Path, name: str) -> None:
    for load, field in ((DinoEncoder.load, "dino_model"), (ClipEncoder.load, "clip_model")):
        with pytest.raises(ModelError, match=f"^{field} '.*' cannot be loaded .*local") as why:
            load(name)
        assert name in str(why.value)
        assert "\n" not in str(why.value)


def test_a_folder_with_files_amiss_is_refused(
    dino_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        DinoEncoder.load(str(tmp_path))
    shutil.copytree(dino_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("layernorm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of .* \(layernorm\.weight\)"):
        DinoEncoder.load(str(tmp_path / "cut"))
    with pytest.raises(ModelError, match="is a ViTModel without a text encoder; give a CLIP"):
        ClipEncoder.load(str(dino_folder))
    shutil.copytree(clip_folder, tmp_path / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / file).unlink()
    with pytest.raises(
        ModelError, match="^clip_model .* a tokenizer of . tokens for a model of 632"
    ):
        ClipEncoder.load(str(tmp_path / "mute"))


def test_numbers_that_are_not_finite_are_refused(dino: DinoEncoder) -> None:
    dino.model.layernorm.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        dino.embed_pictures(PHOTOS[:1], desc="looking")


def test_a_damaged_picture_is_named(dino: DinoEncoder, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(PHOTOS[0].read_bytes()[:100])
    with pytest.raises(ImageError, match=r"broken\.png"):
        dino.embed_pictures([tmp_path / "broken.png"], desc="looking")
