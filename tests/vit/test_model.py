from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, ViTForImageClassification, ViTModel

from colabtools import micro, vit
from colabtools.errors import CheckpointError, ColabToolsError, ConfigError, ModelError
from colabtools.images import Encoded
from colabtools.vit.config import ModelConfig
from colabtools.vit.model import open_model, softmax

Write = Callable[..., Path]


def pictures() -> list[Image.Image]:
    return [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea")]


def digits(count: int) -> list[Image.Image]:
    found = load_digits().images[:count]
    return [Image.fromarray((16 * digit).clip(0, 255).astype(np.uint8)) for digit in found]


@pytest.fixture
def reference(write_vit: Write) -> tuple[Path, ViTForImageClassification, torch.Tensor]:
    folder = write_vit()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    values = processor(pictures(), return_tensors="pt")["pixel_values"]
    return folder, ViTForImageClassification.from_pretrained(folder).eval(), values


def test_logits_are_those_of_transformers(reference: tuple) -> None:
    folder, theirs, values = reference
    model = vit.load(str(folder), dtype="fp32")
    with torch.inference_mode():
        expected = theirs(values).logits.numpy()
    assert np.abs(model.logits(pictures()) - expected).max() < 1e-5
    best = [labels[0] for labels in model.predict(pictures(), top_k=2)]
    assert [label.index for label in best] == expected.argmax(axis=1).tolist()
    assert [label.name for label in best] == [theirs.config.id2label[b.index] for b in best]
    assert best[0].probability == pytest.approx(softmax(expected)[0].max(), abs=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features_of_every_layer_are_those_of_transformers(reference: tuple, pooling: str) -> None:
    folder, theirs, values = reference
    model = vit.load(str(folder), dtype="fp32")
    with torch.inference_mode():
        hidden = theirs(values, output_hidden_states=True).hidden_states

    def pooled(tokens: torch.Tensor) -> np.ndarray:
        return (tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1)).numpy()

    settings = {"pooling": pooling, "normalize": False}
    for layer, tokens in enumerate(hidden):
        found = model.embed(pictures(), layers=[layer], norm=False, **settings)
        assert np.abs(found - pooled(tokens)).max() < 1e-5
        with torch.inference_mode():
            normed = theirs.vit.layernorm(tokens)
        found = model.embed(pictures(), layers=[layer], norm=True, **settings)
        assert np.abs(found - pooled(normed)).max() < 1e-5
    joined = model.embed(pictures(), layers=[-1, 0, 2], norm=False, **settings)
    expected = np.concatenate([pooled(hidden[layer]) for layer in (0, 2, 3)], axis=1)
    assert np.abs(joined - expected).max() < 1e-5
    unit = model.embed(pictures(), layers=[-1], pooling=pooling)
    assert np.linalg.norm(unit, axis=1) == pytest.approx(1, abs=1e-6)


def test_the_final_vector_is_that_of_the_model_without_its_pooler(reference: tuple) -> None:
    folder, _, values = reference
    bare = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.inference_mode():
        expected = bare(values).last_hidden_state[:, 0].numpy()
    found = vit.load(str(folder), dtype="fp32").embed(pictures(), normalize=False)
    assert np.abs(found - expected).max() < 1e-5


def respell(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by the names that transformers 5 has in memory."""
    pairs = [
        ("encoder.layer.", "layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ]
    found = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)  # noqa: PLW2901
        found[name] = tensor
    return found


def as_timm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by timm's names, q, k and v in one."""
    from colabtools.vit.architecture import canonical_names

    places = {"patch_embed": "patch_embed.proj", "qkv": "attn.qkv", "proj": "attn.proj"}
    places |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    found = {}
    for name, tensor in canonical_names(tensors, tensors, torch.cat).items():
        *start, role, end = name.split(".") if "." in name else ([], name, "")
        text = ".".join([*start, places.get(role, role), end]) if end else name
        found[text] = tensor.contiguous()
    return found


def test_both_spellings_of_transformers_are_the_same_model(write_vit: Write) -> None:
    folder = write_vit()
    expected = vit.load(str(folder), dtype="fp32").logits(pictures())
    tensors = load_file(folder / "model.safetensors")
    changed = respell(tensors)
    assert changed.keys() != tensors.keys()
    save_file(changed, folder / "model.safetensors")
    assert np.array_equal(vit.load(str(folder), dtype="fp32").logits(pictures()), expected)


def test_a_model_of_timm_is_read(write_vit: Write) -> None:
    folder = write_vit(hidden_size=128, num_attention_heads=2, layer_norm_eps=1e-6)
    expected = vit.load(str(folder), dtype="fp32").logits(pictures())
    save_file(as_timm(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    (folder / "preprocessor_config.json").unlink()
    told = {
        "architecture": "vit_tiny_patch8_32",
        "label_names": ["cat", "dog", "duck"],
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "crop_mode": "squash",
            "interpolation": "bilinear",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
    }
    (folder / "config.json").write_text(json.dumps(told))
    model = vit.load(str(folder), dtype="fp32")
    assert np.array_equal(model.logits(pictures()), expected)
    assert model.labels == ("cat", "dog", "duck")


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_lower_precision_reads_the_same_digits(dtype: str) -> None:
    full = vit.load("micro", dtype="fp32").logits(digits(600))
    low = vit.load("micro", dtype=dtype).logits(digits(600))
    assert not np.array_equal(low, full)
    assert (low.argmax(axis=1) == full.argmax(axis=1)).mean() >= 0.99


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_picture_does_not_depend_on_those_beside_it(write_vit: Write, dtype: str) -> None:
    model = vit.load(str(write_vit()), dtype=dtype)
    together = model.logits(pictures())
    for row, picture in zip(together, pictures(), strict=True):
        assert np.abs(model.logits(picture)[0] - row).max() < 1e-5


def test_any_kind_of_picture_is_taken(tmp_path: Path) -> None:
    model = vit.load(dtype="fp32")
    (digit,) = digits(1)
    path = tmp_path / "digit.png"
    digit.save(path)
    kinds = [digit, np.asarray(digit), path, str(path), Encoded("x.png", path.read_bytes())]
    expected = model.logits(digit)
    for kind in kinds:
        assert np.array_equal(model.logits(kind), expected)
    assert model.logits(kinds).shape == (5, 10)
    assert model.logits([]).shape == (0, 10)
    assert [labels[0].name for labels in model.predict(digits(5))] == ["0", "1", "2", "3", "4"]


def test_a_pickle_is_read_only_where_it_is_allowed(write_vit: Write) -> None:
    folder = write_vit()
    expected = vit.load(str(folder), dtype="fp32").logits(pictures())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="allow_pickle"):
        vit.load(str(folder))
    config = ModelConfig(model=str(folder), dtype="fp32", allow_pickle=True)
    assert np.array_equal(open_model(config).logits(pictures()), expected)


def test_a_pickle_that_runs_code_is_refused(write_vit: Write, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    folder = write_vit()
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        open_model(ModelConfig(model=str(folder), allow_pickle=True))
    assert not (tmp_path / "ran").exists()


def test_shards_are_read_together(write_vit: Write) -> None:
    folder = write_vit()
    expected = vit.load(str(folder), dtype="fp32").logits(pictures())
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[:20], names[20:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert np.array_equal(vit.load(str(folder), dtype="fp32").logits(pictures()), expected)
    (folder / file).unlink()
    with pytest.raises(ModelError, match=file):
        vit.load(str(folder))


def without(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in names}, folder / "model.safetensors")


def test_a_model_without_a_head_embeds_only(write_vit: Write) -> None:
    folder = write_vit()
    without(folder, "classifier.weight", "classifier.bias")
    model = vit.load(str(folder), dtype="fp32")
    assert model.embed(pictures()).shape == (3, 48)
    with pytest.raises(ModelError, match="no classification head"):
        model.predict(pictures())


def test_missing_label_names_become_numbers(write_vit: Write) -> None:
    folder = write_vit()
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert vit.load(str(folder)).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: without(f, "vit.layernorm.bias"), "1 missing: norm.bias"),
        (lambda f: without(f, "vit.encoder.layer.1.attention.attention.key.bias"), "not whole"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99), "cannot load"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot read"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "'bert', not a ViT"),
        (lambda f: (f / "config.json").write_text('{"model_type": "vit"}'), "hidden_size"),
        (lambda f: (f / "preprocessor_config.json").write_text('{"size": 40}'), "not of one model"),
    ],
)
def test_a_broken_model_is_one_line(write_vit: Write, damage: Callable, message: str) -> None:
    folder = write_vit()
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        vit.load(str(folder))
    assert "\n" not in str(caught.value)


def test_tensors_of_another_model_are_named(write_vit: Write) -> None:
    folder = write_vit()
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"decoder.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"decoder\.weight"):
        vit.load(str(folder))


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "no/such/model"},
        {"model": "nothing"},
        {"backend": "caffe"},
        {"dtype": "fp8"},
        {"dtype": "fp16", "device": "cpu"},
        {"device": "tpu"},
        {"compile": "perhaps"},
    ],
)
def test_a_wrong_setting_is_one_line(wrong: dict[str, str]) -> None:
    with pytest.raises((ConfigError, ModelError)) as caught:
        vit.load(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
def test_a_card_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no card"):
        vit.load(device="cuda")


@pytest.mark.parametrize("layers", [[5], [-6], [], [1.0]])
def test_a_layer_that_is_not_there_is_named(layers: list) -> None:
    with pytest.raises(ConfigError, match="layers"):
        vit.load().embed(digits(1), layers=layers)


def test_the_space_knows_the_weights(write_vit: Write, tmp_path: Path) -> None:
    first = vit.load(str(write_vit()), dtype="fp32")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "model", copy)
    second = vit.load(str(copy), dtype="fp32")
    ask = first.ask([-1], "cls", norm=True)
    assert first.space(ask, normalized=True).differences(second.space(ask, normalized=True)) == []
    (difference,) = first.space(ask, normalized=True).differences(
        vit.load(micro.vit_path().as_posix()).space(ask, normalized=True)
    )[:1]
    assert difference.startswith("fingerprint")


def test_an_unfit_picture_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ColabToolsError, match="nothing.jpg"):
        vit.load().predict(tmp_path / "nothing.jpg")
