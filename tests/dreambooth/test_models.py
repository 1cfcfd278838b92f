from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from colabtools import registry
from colabtools.dreambooth import models
from colabtools.dreambooth.families import FAMILIES
from colabtools.errors import ConfigError, MissingDependencyError, ModelError

from .tiny import KINDS, make_tiny

CPU = torch.device("cpu")
MICRO = registry.BASES["micro"]


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    """Another number than any base model asks for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, registry.Base]:
    folder = tmp_path_factory.mktemp("tiny")
    return {kind: registry.find_base(str(make_tiny(kind, folder / kind))) for kind in KINDS}


def test_a_small_model_gets_few_threads_and_gives_them_back() -> None:
    with models.suitable_threads(MICRO):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_threads_come_back_after_an_error_too() -> None:
    with pytest.raises(RuntimeError), models.suitable_threads(MICRO):
        raise RuntimeError
    assert torch.get_num_threads() == 3


def test_a_large_model_gets_all_threads() -> None:
    with models.suitable_threads(replace(MICRO, cpu_threads=None)):
        assert torch.get_num_threads() == 3


def dtypes(loaded: models.Models) -> dict[str, set[torch.dtype]]:
    names = (*loaded.text_encoders, "vae", loaded.family.denoiser)
    return {name: {p.dtype for p in loaded.part(name).parameters()} for name in names}


def test_the_parts_are_float32_frozen_and_silent_about_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    loaded = models.load_models(MICRO, CPU)
    for part in (loaded.part("text_encoder"), loaded.vae, loaded.denoiser):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in part.parameters())
        assert not part.training
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_loaded_with_its_parts(
    tiny: dict[str, registry.Base], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = models.load_models(tiny[kind], CPU)
    assert loaded.family is FAMILIES[tiny[kind].family]
    assert type(loaded.pipeline).__name__ == loaded.family.pipeline_class
    assert tuple(loaded.text_encoders) == loaded.family.text_encoders
    assert len(loaded.tokenizers) == len(loaded.text_encoders)
    assert loaded.part(loaded.family.denoiser) is loaded.denoiser
    assert set().union(*dtypes(loaded).values()) == {torch.float32}
    assert loaded.base.prediction_type == tiny[kind].prediction_type
    assert capfd.readouterr().err == ""


def test_frozen_parts_are_halved_but_not_the_vae_nor_what_will_learn(
    tiny: dict[str, registry.Base],
) -> None:
    loaded = models.load_models(
        tiny["sdxl"], CPU, frozen_dtype=torch.bfloat16, trainable=("text_encoder_2",)
    )
    assert dtypes(loaded) == {
        "text_encoder": {torch.bfloat16},
        "text_encoder_2": {torch.float32},
        "vae": {torch.float32},
        "unet": {torch.bfloat16},
    }


def test_what_will_learn_has_the_bytes_of_the_file(tiny: dict[str, registry.Base]) -> None:
    exact = models.load_models(tiny["sd1"], CPU).denoiser.state_dict()
    loaded = models.load_models(
        tiny["sd1"], CPU, frozen_dtype=torch.bfloat16, trainable=("unet",)
    ).denoiser
    assert all(tensor.equal(exact[name]) for name, tensor in loaded.state_dict().items())
    models.to_trainable_fp32(loaded.bfloat16())
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.float32, True)}


# Of the Euler scheduler in diffusers.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("kind", ["sd2-v", "sdxl", "flux-schnell"])
def test_a_loaded_pipeline_draws(tiny: dict[str, registry.Base], kind: str) -> None:
    pipeline = models.load_pipeline(tiny[kind])
    picture = pipeline(
        "a star", num_inference_steps=1, height=64, width=64, generator=torch.Generator()
    ).images[0]
    assert isinstance(picture, Image.Image)
    assert picture.size == (64, 64)


def test_the_vae_computes_in_fp32_whatever_is_around_it(tiny: dict[str, registry.Base]) -> None:
    vae = models.load_pipeline(tiny["sdxl"]).vae
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, pixels = vae.decode(latents).sample, torch.rand(1, 3, 32, 32)
        mean = vae.encode(pixels).latent_dist.mean
        with torch.autocast("cpu", torch.bfloat16):
            assert vae.decode(latents).sample.equal(exact)
            assert vae.encode(pixels).latent_dist.mean.equal(mean)
            assert vae.decode(latents.bfloat16()).sample.dtype == torch.float32


def test_a_copy_of_the_vae_has_its_own_weights(tiny: dict[str, registry.Base]) -> None:
    vae = models.load_pipeline(tiny["sd1"]).vae
    other = copy.deepcopy(vae)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert vae.decode(torch.ones(1, 4, 2, 2)).sample.abs().sum() > 0
        assert other.decode(torch.ones(1, 4, 2, 2)).sample.abs().sum() == 0


def test_a_base_can_name_another_vae(tiny: dict[str, registry.Base], tmp_path: Path) -> None:
    vae = models.load_pipeline(tiny["sd1"]).vae
    with torch.no_grad():
        vae.quant_conv.weight.fill_(0.5)
    vae.save_pretrained(tmp_path / "vae")
    loaded = models.load_pipeline(replace(tiny["sd1"], vae=str(tmp_path / "vae"))).vae
    assert loaded.quant_conv.weight.eq(0.5).all()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_half_precision_files_are_taken_where_nothing_is_trained_whole(
    tiny: dict[str, registry.Base], tmp_path: Path
) -> None:
    pipeline = models.load_pipeline(tiny["sdxl"])
    pipeline.save_pretrained(tmp_path / "both")
    with torch.no_grad():
        pipeline.unet.conv_in.bias.fill_(0.5)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "both", variant="fp16")
    base = replace(registry.find_base(str(tmp_path / "both")), half_variant="fp16")
    half = models.load_models(base, CPU, frozen_dtype=torch.bfloat16)
    assert half.denoiser.conv_in.bias.eq(0.5).all()
    assert dtypes(half)["unet"] == {torch.bfloat16}
    for trainable, dtype in ((("text_encoder",), torch.bfloat16), ((), None)):
        whole = models.load_models(base, CPU, frozen_dtype=dtype, trainable=trainable)
        assert not whole.denoiser.conv_in.bias.eq(0.5).any()


def test_a_released_part_is_moved_or_gone(tiny: dict[str, registry.Base]) -> None:
    loaded = models.load_models(tiny["sdxl"], CPU)
    models.release(loaded, ["vae"])
    assert loaded.part("vae") is loaded.pipeline.vae
    models.release(loaded, ["vae", "text_encoder_2", "unet"], drop=True)
    assert loaded.pipeline.text_encoder_2 is loaded.pipeline.vae is loaded.denoiser is None
    for name in ("vae", "text_encoder_2", "unet"):
        with pytest.raises(ModelError, match=rf"has no '{name}'; its parts are text_encoder$"):
            loaded.part(name)
    assert loaded.part("text_encoder") is loaded.pipeline.text_encoder


def test_a_pipeline_in_hand_is_wrapped_without_loading_it_again(
    tiny: dict[str, registry.Base],
) -> None:
    pipeline = models.load_pipeline(tiny["sd2-v"])
    pipeline.unet.requires_grad_(True).train()
    loaded = models.wrap_pipeline(tiny["sd2-v"], pipeline, CPU)
    assert loaded.denoiser is pipeline.unet
    assert not any(p.requires_grad for p in pipeline.unet.parameters())
    assert not pipeline.unet.training
    assert isinstance(loaded.noise_scheduler, diffusers.DDPMScheduler)
    assert loaded.noise_scheduler.config.prediction_type == "v_prediction"


def test_the_files_decide_the_prediction_type(tiny: dict[str, registry.Base]) -> None:
    mistaken = replace(tiny["sd2-v"], prediction_type="epsilon")
    assert models.load_models(mistaken, CPU).base.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("quantize", "device", "error", "reason"),
    [
        ("int3", "cpu", ConfigError, "quantize is 'int3'; give nf4"),
        ("nf4", "cpu", ModelError, "needs an NVIDIA GPU, and the device is cpu"),
        ("nf4", "cuda", MissingDependencyError, "needs bitsandbytes; run pip install"),
    ],
)
def test_a_quantization_that_cannot_work_is_refused_before_loading(
    quantize: str,
    device: str,
    error: type[Exception],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    base = registry.Base(name="nothing", source="nobody/nothing", resolution=64, family="flux")
    with pytest.raises(error, match=reason):
        models.load_models(base, torch.device(device), quantize=quantize)


def test_a_pipeline_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(ModelError, match="is a PixArtAlphaPipeline; only FluxPipeline, Stable"):
        models.load_pipeline(registry.Base(name="x", source=str(tmp_path), resolution=64))


def test_weights_that_are_pickles_are_refused(tiny: dict[str, registry.Base]) -> None:
    folder = Path(tiny["sd1"].source)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    hidden = weights.rename(weights.with_suffix(".hidden"))
    torch.save({}, weights.with_suffix(".bin"))
    try:
        with pytest.raises(ModelError, match="cannot be loaded from"):
            models.load_pipeline(tiny["sd1"])
    finally:
        hidden.rename(weights)
        weights.with_suffix(".bin").unlink()


# In a process of its own: freed memory of other tests would be used again and hide the growth.
WATCHED_LOADING = """
import sys, threading, time
from pathlib import Path
import torch
from colabtools import registry
from colabtools.dreambooth import models

def anonymous_bytes():
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

def watch():
    while not done.is_set():
        seen.append(anonymous_bytes())
        time.sleep(0.001)

small, wide = (registry.find_base(folder) for folder in sys.argv[1:])
models.load_models(small, torch.device("cpu"))
seen, done = [anonymous_bytes()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
loaded = models.load_models(wide, torch.device("cpu"), frozen_dtype=torch.float16)
done.set()
watcher.join()
print(max(seen) - seen[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_loading_never_holds_the_weights_twice(
    tiny: dict[str, registry.Base], tmp_path: Path
) -> None:
    pipeline = models.load_pipeline(tiny["sd1"])
    config = dict(pipeline.unet.config) | {"block_out_channels": (64, 128, 256, 256)}
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(config)
    pipeline.save_pretrained(tmp_path / "wide")
    size_bytes = sum(p.numel() for p in pipeline.unet.parameters()) * 2
    assert size_bytes > 60e6
    done = subprocess.run(
        [sys.executable, "-c", WATCHED_LOADING, tiny["sd1"].source, str(tmp_path / "wide")],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert 0.8 * size_bytes < int(done.stdout) < 1.3 * size_bytes
