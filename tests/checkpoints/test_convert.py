"""Models through every layout and back, and everything that must stop a conversion."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from colabtools.checkpoints import description, folder_files
from colabtools.checkpoints.convert import ConvertConfig, WrittenModel, convert
from colabtools.checkpoints.headers import read_safetensors_header
from colabtools.checkpoints.keymaps.families import FAMILIES, ema_name
from colabtools.drive import sha256_of
from colabtools.errors import CheckpointError, ConfigError, WorkspaceError

from ..dreambooth.tiny import KINDS
from .conftest import Content, ModelOf, file_content, folder_content, write_rows

COUNTS = {"sd1": 1130, "sd2": 1215, "sd2-v": 1215, "sdxl": 2513, "flux-dev": 1439,
          "flux-schnell": 1435}  # fmt: skip


def back(src: Path, dst: Path, like: Path, **settings: Any) -> WrittenModel:
    return convert(src, dst, ConvertConfig(config_from=str(like), fetch=False, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_survives_the_way_to_one_file_and_back(
    model: ModelOf, tmp_path: Path, kind: str
) -> None:
    source = model(kind)
    written = convert(source, tmp_path / "one.safetensors")
    (file,) = written.files
    assert (file.tensor_count, file.sha256) == (COUNTS[kind], sha256_of(file.path))
    assert file.size_bytes == file.path.stat().st_size
    folder = back(file.path, tmp_path / "folder", source)
    assert folder.missing == ()
    assert folder_content(tmp_path / "folder") == folder_content(source)
    for made in folder.files:
        assert made.sha256 == sha256_of(made.path)
    again = convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert file_content(again.path) == file_content(file.path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "folder", local_files_only=True
    )
    assert (
        type(pipeline).__name__
        == json.loads((source / "model_index.json").read_text())["_class_name"]
    )


PIPELINES = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}


def differences(found: Any, meant: Any) -> list[str]:
    left, right = found.state_dict(), meant.state_dict()
    assert left.keys() == right.keys()
    return [name for name in right if not left[name].equal(right[name])]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own argument names change
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_every_tensor_of_our_file_to_the_bit(
    model: ModelOf, tmp_path: Path, kind: str, suffix: str
) -> None:
    file = convert(model(kind), tmp_path / f"model.{suffix}").path
    loaded = PIPELINES[kind].from_single_file(
        str(file), config=str(model(kind)), local_files_only=True, torch_dtype=torch.float32
    )
    meant = diffusers.DiffusionPipeline.from_pretrained(model(kind), local_files_only=True)
    for part in FAMILIES[kind].parts:
        if (kind, part.name) == ("sdxl", "text_encoder_2"):
            continue  # its width is fixed in diffusers' code; see the table of names
        assert differences(getattr(loaded, part.name), getattr(meant, part.name)) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "part", "kept"),
    [
        ("flux-schnell", "vae", "AutoencoderKL"),
        ("sd2-v", "unet", "UNet2DConditionModel"),
        ("sd2-v", "vae", "AutoencoderKL"),
    ],
)
def test_diffusers_reads_a_part_of_our_file_to_the_bit(
    model: ModelOf, tmp_path: Path, kind: str, part: str, kept: str
) -> None:
    file = convert(model(kind), tmp_path / "model.safetensors").path
    if kind.startswith("flux"):
        rows = {n.removeprefix("vae."): r for n, r in file_content(file).items() if n[:4] == "vae."}
        file = write_rows(tmp_path / "ae.safetensors", rows)
    network = getattr(diffusers, kept)
    loaded = network.from_single_file(
        str(file), config=str(model(kind)), subfolder=part, local_files_only=True
    )
    assert differences(loaded, network.from_pretrained(model(kind), subfolder=part)) == []


@pytest.mark.parametrize("kind", ["flux-dev", "flux-schnell"])
def test_the_flux_transformer_is_read_back_by_diffusers_own_rules(
    model: ModelOf, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.loaders import single_file_utils

    file = convert(model(kind), tmp_path / "f.safetensors", ConvertConfig(parts="denoiser")).path
    rows = file_content(file)
    assert len(rows) == (780 if kind == "flux-dev" else 776)
    assert "double_blocks.0.img_attn.qkv.weight" in rows
    state = {
        name: torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
        for name, (_, shape, data) in rows.items()
    }
    # The width is fixed in its code.
    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    constants = tuple(16 if value == 3072 else value for value in function.__code__.co_consts)
    assert 16 in constants
    monkeypatch.setattr(function, "__code__", function.__code__.replace(co_consts=constants))
    found = function(state)
    meant = diffusers.FluxTransformer2DModel.from_pretrained(model(kind), subfolder="transformer")
    assert found.keys() == meant.state_dict().keys()
    assert [n for n, tensor in meant.state_dict().items() if not found[n].equal(tensor)] == []


def test_the_check_against_diffusers_can_fail(model: ModelOf, tmp_path: Path) -> None:
    file = convert(model("sd1"), tmp_path / "model.safetensors").path
    rows = file_content(file)
    q, k = (f"first_stage_model.encoder.mid.attn_1.{name}.weight" for name in "qk")
    rows[q], rows[k] = rows[k], rows[q]
    network = diffusers.AutoencoderKL
    loaded = network.from_single_file(
        str(write_rows(tmp_path / "wrong.safetensors", rows)),
        config=str(model("sd1")), subfolder="vae", local_files_only=True,
    )  # fmt: skip
    at = "encoder.mid_block.attentions.0.to_"
    meant = network.from_pretrained(model("sd1"), subfolder="vae")
    assert differences(loaded, meant) == [f"{at}q.weight", f"{at}k.weight"]


def part_file(folder: Path, part: str) -> Path:
    (path,) = (folder / part).glob("*.safetensors")
    return path


def respell(folder: Path, part: str, rename: Callable[[str], str]) -> None:
    path = part_file(folder, part)
    write_rows(path, {rename(name): row for name, row in file_content(path).items()})


def old_vae(name: str) -> str:
    for new, old in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def test_every_spelling_of_the_libraries_gives_the_same_bytes(
    model: ModelOf, tmp_path: Path
) -> None:
    """transformers 4.54 and 5.23 differ in `text_model.`, diffusers 0.11 and 0.12 in the VAE."""
    for kind in ("sd1", "sd2", "sdxl"):
        results = set()
        for spelling in ("", "text_model."):
            folder = Path(shutil.copytree(model(kind), tmp_path / f"{kind}{spelling}"))
            respell(folder, "text_encoder", lambda n, s=spelling: s + n.removeprefix("text_model."))
            respell(folder, "vae", old_vae if spelling else str)
            results.add(convert(folder, tmp_path / f"{kind}.safetensors").files[0].sha256)
        assert len(results) == 1


SAVE_AGAIN = """
import sys
import transformers
folder, name, version = sys.argv[1:]
assert transformers.__version__.startswith(version), transformers.__version__
loaded = getattr(transformers, name).from_pretrained(folder)
# What was loaded is saved as it was; what was made here, as this version does.
made = type(loaded)(loaded.config)
made.load_state_dict(loaded.state_dict())
made.save_pretrained(folder, safe_serialization=True)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_folders_that_old_and_new_transformers_save_give_the_same_bytes(
    model: ModelOf, tmp_path: Path, kind: str
) -> None:
    """It installs transformers 4.54.1 with what that needs older, beside the installed rest."""
    old = tmp_path / "old"
    packages = ("transformers==4.54.1", "tokenizers==0.21.4", "huggingface_hub==0.34.4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(old)]
    subprocess.run([*pip, *packages], check=True)
    whole = convert(model(kind), tmp_path / "m.safetensors").files[0]
    digests = set()
    for version, path in (("4.54", str(old)), (transformers.__version__, "")):
        folder = tmp_path / version
        back(whole.path, folder, model(kind))
        for part, name in (("text_encoder", "CLIPTextModel"),
                           ("text_encoder_2", "CLIPTextModelWithProjection")):  # fmt: skip
            if (folder / part).is_dir():
                argv = [sys.executable, "-c", SAVE_AGAIN, str(folder / part), name, version]
                subprocess.run(argv, check=True, env={**os.environ, "PYTHONPATH": path})
        names = set(read_safetensors_header(part_file(folder, "text_encoder")).tensors)
        assert ("text_model.final_layer_norm.bias" in names) == (version == "4.54")
        digests.add(convert(folder, tmp_path / "again.safetensors").files[0].sha256)
    assert len(digests) == 1


def test_position_numbers_of_old_text_encoders_are_left_out(sd1: Path, tmp_path: Path) -> None:
    plain = convert(sd1, tmp_path / "m.safetensors").files[0].sha256
    path = part_file(sd1, "text_encoder")
    ids = np.arange(77, dtype=np.int64)
    row = ("I64", (1, 77), ids.tobytes())
    write_rows(path, {**file_content(path), "text_model.embeddings.position_ids": row})
    assert convert(sd1, tmp_path / "m.safetensors").files[0].sha256 == plain


def shard(folder: Path, part: str, variant: str = "") -> list[Path]:
    """Split a part's file into two and an index, as the libraries do with large ones."""
    path = part_file(folder, part)
    rows = list(file_content(path).items())
    path.unlink()
    mark, shards, weight_map = f".{variant}" if variant else "", [], {}
    for number, chosen in enumerate((rows[::2], rows[1::2]), 1):
        shards.append(path.with_name(f"{path.stem}{mark}-0000{number}-of-00002.safetensors"))
        write_rows(shards[-1], dict(chosen))
        weight_map |= dict.fromkeys(dict(chosen), shards[-1].name)
    index = path.with_name(f"{path.name}.index{mark}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [*shards, index]


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_a_part_in_several_files_and_variants_gives_the_same_tensors(
    sd1: Path, tmp_path: Path, variant: str
) -> None:
    whole = file_content(convert(sd1, tmp_path / "a.safetensors").path)
    shard(sd1, "unet", variant)
    shard(sd1, "text_encoder", variant)
    for settings in (ConvertConfig(), *([ConvertConfig(variant="fp16")] if variant else [])):
        if settings.variant == "fp16":
            path = part_file(sd1, "vae")
            path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
        assert file_content(convert(sd1, tmp_path / "b.safetensors", settings).path) == whole


def test_the_plain_files_are_preferred_unless_a_variant_is_asked_for(
    sd1: Path, tmp_path: Path
) -> None:
    for part in ("unet", "vae", "text_encoder"):
        path = part_file(sd1, part)
        rows = file_content(path)
        half = {
            name: ("F16", shape, np.frombuffer(data, np.float32).astype(np.float16).tobytes())
            for name, (_, shape, data) in rows.items()
        }
        write_rows(path.with_name(f"{path.stem}.fp16.safetensors"), half)
    kinds = []
    for variant in ("auto", "fp16"):
        file = convert(sd1, tmp_path / "a.safetensors", ConvertConfig(variant=variant)).path
        kinds.append({dtype for dtype, _, _ in file_content(file).values()})
    assert kinds == [{"F32"}, {"F16"}]


def lose(rows: Content) -> None:
    del rows["down_blocks.0.resnets.0.conv1.bias"]


def add(rows: Content) -> None:
    rows["conv_outer.bias"] = ("F32", (1,), b"\0\0\0\0")


def rename(rows: Content) -> None:
    rows["conv_inn.weight"] = rows.pop("conv_in.weight")


def turn(rows: Content) -> None:
    dtype, shape, data = rows["conv_in.weight"]
    rows["conv_in.weight"] = (dtype, (*shape, 1), data)


FAULTS: dict[str, tuple[Callable[[Content], None], str]] = {
    "missing": (lose, r"unet lacks down_blocks\.0\.resnets\.0\.conv1\.bias, which a model"),
    "extra": (add, r"unet has conv_outer\.bias, which a model"),
    "renamed": (rename, r"unet has conv_inn\.weight, which a model"),
    "shape": (turn, r"conv_in\.weight makes input_blocks\.0\.0\.weight of shape .* instead of"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_part_that_is_not_the_familys_stops_before_a_byte_is_written(
    sd1: Path, tmp_path: Path, fault: str, suffix: str
) -> None:
    change, message = FAULTS[fault]
    path = part_file(sd1, "unet")
    rows = file_content(path)
    change(rows)
    write_rows(path, rows)
    target = tmp_path / f"model.{suffix}"
    target.write_bytes(b"the old model")
    with pytest.raises(CheckpointError, match=message):
        convert(sd1, target)
    assert target.read_bytes() == b"the old model"
    assert sorted(tmp_path.iterdir()) == sorted([sd1, target])


@pytest.mark.parametrize("fault", ["extra", "missing", "shape"])
def test_a_file_that_is_not_the_familys_stops_as_well(
    model: ModelOf, tmp_path: Path, fault: str
) -> None:
    rows = file_content(convert(model("sd1"), tmp_path / "m.safetensors").path)
    name = "model.diffusion_model.out.2.weight"
    dtype, shape, data = rows.pop(name)
    if fault == "extra":
        rows |= {name: (dtype, shape, data), f"{name}2": (dtype, shape, data)}
    elif fault == "shape":
        rows[name] = (dtype, (*shape, 1), data)
    with pytest.raises(CheckpointError, match="out.2.weight"):
        back(write_rows(tmp_path / "m.safetensors", rows), tmp_path / "folder", model("sd1"))
    assert not (tmp_path / "folder").exists()


def test_a_shape_of_no_published_model_is_refused_in_one_of_published_width() -> None:
    from colabtools.checkpoints.headers import TensorEntry
    from colabtools.checkpoints.plan import plan_rewrite

    family = FAMILIES["sd1"]
    part = family.parts[2]
    tensors = {}
    for row in part.rows:
        shape = tuple(size[0] for size in row.shape)
        count = int(np.prod(shape)) * 2
        tensors[row.name] = TensorEntry(row.name, "F16", shape, Path("none"), 0, count)
    assert len(plan_rewrite(family, {part.name: tensors})) == 196
    name = "text_model.embeddings.position_embedding.weight"
    # Long prompts need the published 77 positions; 154 would load nowhere.
    tensors[name] = TensorEntry(name, "F16", (154, 768), Path("none"), 0, 154 * 768 * 2)
    with pytest.raises(CheckpointError, match="of shape 154x768 instead of 77x768"):
        plan_rewrite(family, {part.name: tensors})


SHARD_FAULTS: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "gone": (lambda f: f[1].unlink(), "is missing, which"),
    "cut off": (lambda f: f[0].write_bytes(f[0].read_bytes()[:-100]), "is cut off"),
    "another": (lambda f: shutil.copy(f[0], f[1]), "which .* has in"),
    "outside": (
        lambda f: f[2].write_text('{"weight_map": {"a": "../../vae/x.safetensors"}}'),
        "in another folder",
    ),
    "no index": (lambda f: f[2].write_text("[]"), "holds no table"),
    "no map": (lambda f: f[2].write_text("{}"), "no weight_map"),
    "broken index": (lambda f: f[2].write_text("{"), "no readable JSON"),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_a_broken_set_of_shards_is_named(sd1: Path, tmp_path: Path, fault: str) -> None:
    change, message = SHARD_FAULTS[fault]
    change(shard(sd1, "unet"))
    with pytest.raises(CheckpointError, match=message):
        convert(sd1, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["sd1"]


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", np.float16), ("fp32", np.float32)])
def test_every_weight_is_cast_as_numpy_casts_it(
    model: ModelOf, tmp_path: Path, dtype: str, kind: Any
) -> None:
    plain = file_content(convert(model("sd2"), tmp_path / "a.safetensors").path)
    file = convert(model("sd2"), tmp_path / "b.safetensors", ConvertConfig(dtype=dtype)).path
    for name, (_, shape, data) in file_content(file).items():
        meant = np.frombuffer(plain[name][2], np.float32).astype(kind)
        assert (data, shape) == (meant.tobytes(), plain[name][1])


@pytest.mark.parametrize("value", [70000.0, float("inf"), float("nan")])
def test_a_number_that_fp16_cannot_hold_is_named(sd1: Path, tmp_path: Path, value: float) -> None:
    path = part_file(sd1, "unet")
    rows = file_content(path)
    dtype, shape, data = rows["conv_out.bias"]
    rows["conv_out.bias"] = (dtype, shape, data[:-4] + struct.pack("<f", value))
    write_rows(path, rows)
    with pytest.raises(CheckpointError, match=r"conv_out\.bias has values that are not finite in"):
        convert(sd1, tmp_path / "a.safetensors", ConvertConfig(dtype="fp16"))
    assert [path.name for path in tmp_path.iterdir()] == ["sd1"]
    assert convert(sd1, tmp_path / "a.safetensors").files  # kept as it is, it is copied


def test_the_average_is_taken_where_it_is_asked_for(model: ModelOf, tmp_path: Path) -> None:
    rows = file_content(convert(model("sd1"), tmp_path / "m.safetensors").path)
    unet = FAMILIES["sd1"].denoiser
    averages = {}
    for name, (dtype, shape, data) in rows.items():
        if name.startswith(unet.prefix):
            average = ema_name(unet, name.removeprefix(unet.prefix))
            averages[average] = (dtype, shape, bytes(reversed(data)))
    assert "model_ema.diffusion_modelout2weight" in averages
    assert len(averages) == 686
    extra = {"model_ema.decay": ("F32", (), b"\0\0\0\0"), "betas": ("F32", (1,), b"\0\0\0\0")}
    file = write_rows(tmp_path / "full.safetensors", {**rows, **averages, **extra})
    for ema in (False, True):
        back(file, tmp_path / "folder", model("sd1"), ema=ema)
        found = folder_content(tmp_path / "folder")
        bias = found["unet"]["conv_out.bias"][2]
        meant = folder_content(model("sd1"))["unet"]["conv_out.bias"][2]
        assert bias == (bytes(reversed(meant)) if ema else meant)
    with pytest.raises(CheckpointError, match="no average of its weights"):
        back(tmp_path / "m.safetensors", tmp_path / "folder", model("sd1"), ema=True)


def test_one_file_becomes_another_of_other_precision(model: ModelOf, tmp_path: Path) -> None:
    file = convert(model("sd2"), tmp_path / "a.safetensors").path
    half = convert(file, tmp_path / "b.safetensors", ConvertConfig(dtype="fp16"))
    direct = convert(model("sd2"), tmp_path / "c.safetensors", ConvertConfig(dtype="fp16"))
    # Nothing fills what the first file lacks, and what it was given before is not asked for.
    found, meant = file_content(half.path), file_content(direct.path)
    meant.pop("cond_stage_model.model.text_projection")
    assert found == meant


def test_a_model_that_predicts_v_says_so(model: ModelOf, tmp_path: Path) -> None:
    target, yaml = tmp_path / "m.safetensors", tmp_path / "m.yaml"
    convert(model("sd2-v"), target)
    assert yaml.read_bytes() == description.sd2_yaml()
    metadata = read_safetensors_header(target).metadata
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    folder = back(target, tmp_path / "folder", model("sd2-v")).path
    assert folder_content(folder) == folder_content(model("sd2-v"))
    # What predicts noise takes the name, and the note that would make it misread goes.
    convert(model("sd2"), target)
    assert not yaml.exists()
    assert read_safetensors_header(target).metadata["modelspec.prediction_type"] == "epsilon"


def test_another_yaml_beside_the_file_is_left_alone(model: ModelOf, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("mine")
    convert(model("sd2-v"), tmp_path / "m.safetensors")
    convert(model("sd2"), tmp_path / "m.safetensors")
    assert (tmp_path / "m.yaml").read_text() == "mine"


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_a_file_of_sd2_that_says_nothing_is_judged_by_one_bias(
    model: ModelOf, tmp_path: Path, caplog: pytest.LogCaptureFixture, spread: float
) -> None:
    rows = file_content(convert(model("sd2"), tmp_path / "m.safetensors").path)
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    values = np.random.default_rng(0).normal(0, spread, rows[name][1]).astype(np.float32)
    rows[name] = ("F32", values.shape, values.tobytes())
    source = write_rows(tmp_path / "silent.safetensors", rows)
    file = convert(source, tmp_path / "m.safetensors").path
    told = read_safetensors_header(file).metadata["modelspec.prediction_type"]
    assert told == ("v" if spread > 0.09 else "epsilon")
    assert ("look like those of v-prediction" in caplog.text) == (told == "v")


def test_an_sdxl_that_predicts_v_carries_the_marks(model: ModelOf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model("sdxl"), tmp_path / "sdxl"))
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config.update(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    path.write_text(json.dumps(config))
    file = convert(folder, tmp_path / "m.safetensors").path
    rows = file_content(file)
    assert rows["v_pred"] == rows["ztsnr"] == ("F32", (0,), b"")
    assert len(rows) == 2515
    assert convert(folder, file, ConvertConfig(verify_only=True)).files
    again = back(file, tmp_path / "folder", folder)
    assert folder_content(again.path) == folder_content(folder)
    forced = convert(folder, file, ConvertConfig(prediction_type="epsilon")).path
    assert "v_pred" not in file_content(forced)


def test_the_header_says_what_the_model_is(model: ModelOf, tmp_path: Path) -> None:
    settings = ConvertConfig(hash_sources=True)
    file = convert(model("sd1"), tmp_path / "m.safetensors", settings, metadata={"a": "犬"}).path
    metadata = read_safetensors_header(file).metadata
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.title"] == "m"
    assert metadata["a"] == "犬"
    digests = json.loads(metadata["source_sha256"])
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert digests[unet] == sha256_of(model("sd1") / unet)
    assert len(digests) == 3


def test_digests_that_the_hubs_cache_knows_are_recorded_at_no_cost(
    sd1: Path, tmp_path: Path
) -> None:
    path = part_file(sd1, "unet")
    blob = tmp_path / sha256_of(path)
    path.rename(blob)
    path.symlink_to(blob)
    metadata = read_safetensors_header(convert(sd1, tmp_path / "m.safetensors").path).metadata
    assert json.loads(metadata["source_sha256"]) == {f"unet/{path.name}": blob.name}


def test_a_name_with_quotes_and_newlines_is_one(model: ModelOf, tmp_path: Path) -> None:
    path = tmp_path / 'it\'s "a"\nmodel 犬.safetensors'
    assert convert(model("sd1"), path).path == path
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError) as refusal:
        convert(tmp_path / "no\nfile.safetensors", path)
    assert "\n" not in str(refusal.value)


def test_what_is_there_is_compared_and_nothing_written(model: ModelOf, tmp_path: Path) -> None:
    only = ConvertConfig(verify_only=True)
    file = convert(model("sd1"), tmp_path / "m.safetensors").files[0]
    before = file.path.stat()
    assert convert(model("sd1"), file.path, only).files == (file,)
    assert file.path.stat().st_mtime_ns == before.st_mtime_ns
    folder = back(file.path, tmp_path / "folder", model("sd1"))
    assert back(file.path, folder.path, model("sd1"), verify_only=True).files == folder.files
    data = bytearray(file.path.read_bytes())
    data[-1] ^= 1
    file.path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has other numbers in"):
        convert(model("sd1"), file.path, only)
    with pytest.raises(CheckpointError, match="has other numbers in"):
        back(file.path, folder.path, model("sd1"), verify_only=True)
    rows = file_content(file.path)
    rows.pop("model.diffusion_model.out.2.bias")
    write_rows(file.path, rows)
    with pytest.raises(CheckpointError, match=r"has nothing as model\.diffusion_model\.out\.2\.b"):
        convert(model("sd1"), file.path, only)


def test_the_denoiser_alone_makes_a_file_and_a_folder(model: ModelOf, tmp_path: Path) -> None:
    alone = ConvertConfig(parts="denoiser")
    file = convert(model("sd1"), tmp_path / "m.safetensors", alone)
    assert file.files[0].tensor_count == 686
    with pytest.raises(CheckpointError, match="lacks its vae and text_encoder"):
        back(file.path, tmp_path / "folder", model("sd1"))
    folder = back(file.path, tmp_path / "folder", model("sd1"), parts="denoiser")
    assert folder_content(folder.path)["unet"] == folder_content(model("sd1"))["unet"]


def test_inpainting_models_keep_their_nine_channels(sd1: Path, tmp_path: Path) -> None:
    path = part_file(sd1, "unet")
    rows = file_content(path)
    dtype, (out, _, *side), data = rows["conv_in.weight"]
    rows["conv_in.weight"] = (dtype, (out, 9, *side), data[: out * 36] * 9)
    write_rows(path, rows)
    file = convert(sd1, tmp_path / "m.safetensors").path
    row = file_content(file)["model.diffusion_model.input_blocks.0.0.weight"]
    assert row[1] == (out, 9, *side)
    assert "inpainting" in read_safetensors_header(file).metadata["modelspec.architecture"]


@pytest.mark.parametrize(
    ("kind", "channels", "pipeline"),
    [
        ("sd1", 4, "StableDiffusionPipeline"),
        ("sd1", 9, "StableDiffusionInpaintPipeline"),
        ("sd1", 8, "StableDiffusionInstructPix2PixPipeline"),
        ("sdxl", 9, "StableDiffusionXLInpaintPipeline"),
        ("flux", 64, "FluxPipeline"),
        ("flux", 384, "FluxFillPipeline"),
    ],
)
def test_the_shipped_configurations_fit_the_model(kind: str, channels: int, pipeline: str) -> None:
    family = FAMILIES[kind]
    what = description.Description(family=kind, prediction_type="epsilon", channels=channels)
    parts: Any = {part.name: {} for part in family.parts}
    made: dict[str, Any] = {}
    for name in ["model_index.json", "scheduler/scheduler_config.json",
                 *(f"{part}/config.json" for part in parts)]:  # fmt: skip
        shipped = json.loads((folder_files._CONFIGS / kind / name).read_text())
        made[name] = {**shipped, **folder_files._changes(name, shipped, family, what)}
    assert made["model_index.json"]["_class_name"] == pipeline
    assert hasattr(diffusers, pipeline)
    denoiser = made[f"{family.denoiser.name}/config.json"]
    assert denoiser["in_channels"] == channels
    with torch.device("meta"):
        getattr(diffusers, denoiser["_class_name"]).from_config(denoiser)


def test_a_width_of_no_published_model_needs_a_configuration(
    model: ModelOf, tmp_path: Path
) -> None:
    file = convert(model("sd1"), tmp_path / "m.safetensors").path
    with pytest.raises(CheckpointError, match="other widths .* give config_from"):
        convert(file, tmp_path / "folder", ConvertConfig(fetch=False))
    with pytest.raises(CheckpointError, match="has no unet/config.json"):
        back(file, tmp_path / "folder", tmp_path)


def test_a_folder_that_lacks_its_tokenizer_says_so(
    sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = convert(sd1, tmp_path / "m.safetensors").path
    shutil.rmtree(sd1 / "tokenizer")
    written = back(file, tmp_path / "folder", sd1)
    assert written.missing == ("tokenizer",)
    assert "has no tokenizer" in caplog.text


def test_a_folder_takes_the_place_of_a_model_and_of_nothing_else(
    model: ModelOf, tmp_path: Path
) -> None:
    file = convert(model("sd1"), tmp_path / "m.safetensors").path
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="holds something else than a model"):
        back(file, folder, model("sd1"))
    assert [path.name for path in folder.iterdir()] == ["photo.jpg"]
    (folder / "photo.jpg").unlink()
    back(file, folder, model("sd1"))
    (folder / "model_index.json").write_text("{}")
    back(file, folder, model("sd1"))
    assert folder_content(folder) == folder_content(model("sd1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "m.safetensors"]


def test_odd_places_are_refused(model: ModelOf, tmp_path: Path) -> None:
    taken = tmp_path / "a.safetensors"
    taken.mkdir()
    for src, dst, message in (
        (tmp_path / "none", "x.safetensors", "No such file"),
        (tmp_path, "x.safetensors", "holds no weights"),
        (model("sd1"), "folder", "give a name that ends in"),
        (model("sd1"), "a.safetensors", "is a folder"),
        ("", "x.safetensors", "give a path"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(src, tmp_path / dst)
    with pytest.raises(WorkspaceError, match="check that its folder exists"):
        convert(model("sd1"), tmp_path / "gone" / "m.safetensors")
    assert list(tmp_path.iterdir()) == [taken]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "int8"),
        ("family", "sd3"),
        ("parts", "vae"),
        ("ema", "yes"),
        ("prediction_type", "x0"),
        ("variant", "../fp16"),
        ("config_from", 3),
    ],
)
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        ConvertConfig(**{field: value})
