"""How many steps does our training do in a second, against the training script of diffusers?

    python benchmarks/dreambooth_step.py [--model mid|sd15|sdxl] [--method full|lora]
                                         [--batch 1 4 8] [--vae scaled|real] [--threads N]

Ours is the real thing: the run that `train` starts, taken step by step in the stage that trains the
UNet. The peer is written anew here, because diffusers' wheel does not hold its examples. It
keeps what `examples/dreambooth/train_dreambooth.py` does in every step: photos decoded, cropped and
tokenized by a DataLoader, the VAE and the text encoder run each time, accelerate around the UNet,
the optimizer as the script makes it, and the loss read back. With --method lora it is
`train_dreambooth_lora.py`, and for SDXL `train_dreambooth_lora_sdxl.py`, which decodes and encodes
prompts once and runs the VAE in fp32. Bars, trackers and checkpoints are left out on both sides.

Both train the same random weights on the same photos, in turns, in one process. Peak memory is that
of a process of its own. `mid` is Stable Diffusion 1.5 at about a third of its width; its VAE and
text encoder are scaled so that they are the part of a step's arithmetic that they are in the
original at 512 px, a half. With --vae real the VAE has its true width and outweighs the UNet, which
no real model does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode

from colabtools import drive, micro, report
from colabtools.devices import half_dtype, torch_device
from colabtools.dreambooth import train
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.loop import StageLoop
from colabtools.dreambooth.lora import TARGET_MODULES, AdapterConfig, add_adapter
from colabtools.dreambooth.run import Run
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.dreambooth.world import World

PROMPT = "a photo of sks star"
NUM_PHOTOS = 8  # full batches of 1, 4 and 8
PHOTO_SIZE = (1024, 768)
LEARNING_RATE = 2e-6
LORA_RANK = 16
# Dense peak of the tensor cores in TFLOP/s, fp16 on a T4 and bf16 on the others.
# Source: NVIDIA's data sheets.
CARD_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L4": 121, "T4": 65}

_SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_VAE_WIDTHS = (128, 256, 512, 512)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model; `text` are width, layers and projection of each text encoder."""

    resolution: int
    unet: dict[str, Any]
    text: tuple[tuple[int, int, int], ...]
    vae_widths: tuple[int, ...] = _VAE_WIDTHS
    vae_groups: int = 32
    scaling_factor: float = 0.18215


# Source of sd15 and sdxl: the configuration files of the published repositories.
SHAPES = {
    "mid": Shape(
        resolution=256,
        unet={
            **_SD_BLOCKS,
            "block_out_channels": (128, 256, 512, 512),
            "attention_head_dim": 8,
            "cross_attention_dim": 128,
        },
        text=((128, 12, 128),),
        vae_widths=(48, 96, 192, 192),
        vae_groups=16,
    ),
    "sd15": Shape(
        resolution=512,
        unet={
            **_SD_BLOCKS,
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        text=((768, 12, 768),),
    ),
    "sdxl": Shape(
        resolution=1024,
        unet={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        text=((768, 12, 768), (1280, 32, 1280)),
        scaling_factor=0.13025,
    ),
}


def make_unet(shape: Shape) -> Any:
    return diffusers.UNet2DConditionModel(sample_size=shape.resolution // 8, **shape.unet)


def make_vae(shape: Shape) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=shape.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=shape.vae_groups,
        sample_size=shape.resolution,
        scaling_factor=shape.scaling_factor,
    )


def make_text_encoder(size: tuple[int, int, int], tokenizer: Any, *, second: bool) -> Any:
    width, layers, projection = size
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        num_hidden_layers=layers,
        projection_dim=projection,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel)(
        config
    )


def write_model(shape: Shape, folder: Path) -> Path:
    """Write a model with random weights and the embedded model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(micro.sd_path() / "tokenizer")
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
    )
    parts = {"vae": make_vae(shape), "unet": make_unet(shape), "scheduler": scheduler}
    for size, suffix in zip(shape.text, ("", "_2"), strict=False):
        encoder = make_text_encoder(size, tokenizer, second=bool(suffix))
        parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
    if len(shape.text) == 2:
        pipeline: Any = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def write_photos(folder: Path) -> Path:
    """Write JPEG files of clouds, as large on disk and as slow to decode as photographs."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        small = Image.fromarray(chance.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        small.resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    return folder


@dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides train."""

    model: Path
    photos: Path
    resolution: int
    batch_size: int = 1
    method: str = "full"
    optimizer: str = "adamw"
    threads: int = 1


class Ready(Exception):  # noqa: N818 - not an error: everything is in place for the first step
    """A stage stands before its first update; pictures and prompts took `once_s` seconds."""

    def __init__(self, loop: StageLoop, once_s: float) -> None:
        super().__init__()
        self.loop = loop
        self.once_s = once_s


class PausedRun(Run):
    """A run that hands its loop over instead of running it."""

    _once_s = 0.0

    def _prepare_data(self, *args: Any) -> Any:
        started = time.perf_counter()
        data = super()._prepare_data(*args)
        self._once_s += time.perf_counter() - started
        return data

    def _encode_prompts(self, *args: Any) -> None:
        started = time.perf_counter()
        super()._encode_prompts(*args)
        self._once_s += time.perf_counter() - started

    def _update_all(self, loop: StageLoop, *_: Any) -> None:
        raise Ready(loop, self._once_s)


class Ours:
    """Our training of the UNet as `train` does it, one step at a time.

    Attributes:
        once_s: seconds for what the peer does again in each step: photos, latents, prompts.
        losses: of all steps.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self._world = World(rank=0, size=1, device=torch_device())
        settings = PrepareConfig(
            images=str(job.photos),
            base_model=str(job.model),
            instance_prompt=PROMPT,
            resolution=job.resolution,
            allow_resolution=True,
        )
        workspace = drive.open_local(folder)
        started = time.perf_counter()
        prepare(workspace, "step", settings)
        self.once_s = time.perf_counter() - started
        try:
            with patch.object(train, "Run", PausedRun):
                train.train(workspace, "step", config_of(job))
        except Ready as ready:
            self._loop = ready.loop
            self.once_s += ready.once_s

    def step(self) -> None:
        self._loop.step(self._world)

    @property
    def losses(self) -> list[float]:
        self._loop.health.fetch()
        return [metric.loss for metric in self._loop.health.metrics]


def config_of(job: Job) -> TrainConfig:
    return TrainConfig(
        base_model=str(job.model),
        method=job.method,
        text_encoder_steps=0,
        unet_steps=1000,
        unet_lr=LEARNING_RATE,
        lr_schedule="constant",
        optimizer=job.optimizer,
        batch_size=job.batch_size,
        lora_rank=LORA_RANK,
        allow_resolution=True,
    )


class Photos(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Photos as the script reads them: anew each time, the shorter side fitted, a random square."""

    def __init__(self, job: Job, tokenizer: Any) -> None:
        self._paths = sorted(job.photos.glob("*.*"))
        self._side = job.resolution
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixel_values (3, H, W) in [-1, 1] and input_ids (T,)."""
        photo = ImageOps.exif_transpose(Image.open(self._paths[index])).convert("RGB")
        scale = self._side / min(photo.size)
        size = tuple(round(side * scale) for side in photo.size)
        photo = photo.resize(size, Image.Resampling.BILINEAR)
        left, top = (int(torch.randint(side - self._side + 1, ())) for side in size)
        photo = photo.crop((left, top, left + self._side, top + self._side))
        pixel_values = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1
        tokens = self._tokenizer(PROMPT, truncation=True, padding="max_length", return_tensors="pt")
        return pixel_values, tokens.input_ids[0]


class Reference:
    """The step of diffusers' training scripts.

    Source: diffusers, examples/dreambooth, the three scripts that the head of this file names.
    """

    def __init__(self, job: Job) -> None:
        dtype = half_dtype(torch_device())
        names = {None: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
        self._accelerator = Accelerator(
            gradient_accumulation_steps=1,
            mixed_precision=names[dtype],
            cpu=torch_device().type == "cpu",
        )
        self._dtype = dtype or torch.float32
        keep_quiet()  # our own loading leaves the bars on
        self._pipeline = pipeline = diffusers.DiffusionPipeline.from_pretrained(job.model)
        self._scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        self._is_xl = isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
        for name in ("vae", "text_encoder", *(["text_encoder_2"] if self._is_xl else [])):
            kept = torch.float32 if name == "vae" and self._is_xl else self._dtype
            getattr(pipeline, name).requires_grad_(False).to(self._accelerator.device, kept)
        photos: Any = Photos(job, pipeline.tokenizer)
        if self._is_xl:
            photos = [photos[index] for index in range(len(photos))]
            self._prompt = self._encode_prompt_once()
        unet = self._prepare_unet(pipeline.unet, job)
        optimizer = self._make_optimizer(unet, job)
        loader = torch.utils.data.DataLoader(photos, batch_size=job.batch_size, shuffle=True)
        rate = get_scheduler("constant", optimizer=optimizer)
        self.unet, self._optimizer, self._loader, self._rate = self._accelerator.prepare(
            unet, optimizer, loader, rate
        )
        self.unet.train()
        self._batches = self._endless()
        self.losses: list[float] = []

    def _prepare_unet(self, unet: Any, job: Job) -> Any:
        if job.method == "full":
            return unet
        unet.requires_grad_(False).to(self._accelerator.device, self._dtype)
        settings = LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_RANK,
            init_lora_weights="gaussian",
            target_modules=list(TARGET_MODULES["unet"]),
        )
        unet.add_adapter(settings)
        cast_training_params(unet, torch.float32)
        return unet

    def _make_optimizer(self, unet: Any, job: Job) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW
        if job.optimizer == "adamw8bit":
            import bitsandbytes

            kind = bitsandbytes.optim.AdamW8bit
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        return kind(parameters, lr=LEARNING_RATE, weight_decay=1e-2)

    @torch.no_grad()
    def _encode_prompt_once(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._accelerator.device
        hidden, _, pooled, _ = self._pipeline.encode_prompt(
            PROMPT, device=device, do_classifier_free_guidance=False
        )
        return hidden, pooled

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self._loader

    def step(self) -> None:
        pixel_values, input_ids = next(self._batches)
        with self._accelerator.accumulate(self.unet):
            vae = self._pipeline.vae
            latents = vae.encode(pixel_values.to(vae.dtype)).latent_dist.sample()
            latents = (latents * vae.config.scaling_factor).to(self._dtype)
            noise = torch.randn_like(latents)
            count = self._scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, count, (len(latents),), device=latents.device)
            self.learn(latents, noise, timesteps, input_ids)

    def learn(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        input_ids: torch.Tensor,
    ) -> None:
        """Do the part of a step that comes after the draws."""
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        told, added = self._condition(input_ids, latents)
        prediction = self.unet(noisy, timesteps, told, added_cond_kwargs=added).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        self._accelerator.backward(loss)
        if self._accelerator.sync_gradients:
            self._accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
        self._optimizer.step()
        self._rate.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.detach().item())

    def _condition(
        self, input_ids: torch.Tensor, latents: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        if not self._is_xl:
            return self._pipeline.text_encoder(input_ids)[0], None
        batch = len(latents)
        hidden, pooled = self._prompt
        side = 8 * latents.shape[-1]
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * batch, device=latents.device)
        added = {"text_embeds": pooled.repeat(batch, 1), "time_ids": sizes.to(self._dtype)}
        return hidden.repeat(batch, 1, 1), added


def set_up(threads: int) -> None:
    report.set_quiet(True)
    torch.set_num_threads(threads)
    keep_quiet()


def keep_quiet() -> None:
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def peak_memory(job: Job, side: str) -> dict[str, float]:
    """Return the peaks of a few steps in GB; to be called in a process of its own."""
    set_up(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Ours(job, Path(folder)) if side == "ours" else Reference(job)
        for _ in range(3):
            trainer.step()
    if torch.cuda.is_available():
        return {
            "allocated": torch.cuda.max_memory_allocated() / 1e9,
            "reserved": torch.cuda.max_memory_reserved() / 1e9,
        }
    # Not getrusage's figure, which a child inherits from the process that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM:"))
    return {"resident": int(peak.split()[1]) * 1024 / 1e9}


def in_own_process(job: Job, side: str) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_memory, job, side).result()


def count_flops(job: Job) -> dict[str, float]:
    """Return the FLOPs of one picture: the UNet's step, and what the peer encodes in each step."""
    side = job.resolution
    unet_config = diffusers.UNet2DConditionModel.load_config(job.model / "unet")
    vae_config = diffusers.AutoencoderKL.load_config(job.model / "vae")
    text_config = transformers.CLIPTextConfig.from_pretrained(job.model / "text_encoder")
    is_xl = unet_config["addition_embed_type"] == "text_time"
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(unet_config)
        vae = diffusers.AutoencoderKL.from_config(vae_config)
        text_encoder = transformers.CLIPTextModel(text_config)
        tokens = torch.zeros(1, text_config.max_position_embeddings, dtype=torch.long)
        inputs = (
            torch.empty(1, 4, side // 8, side // 8),
            torch.zeros(1, dtype=torch.long),
            torch.empty(1, tokens.shape[1], unet_config["cross_attention_dim"]),
        )
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.zeros(1, 6)}
        pixel_values = torch.empty(1, 3, side, side)
    if job.method == "lora":
        add_adapter(unet, "unet", AdapterConfig(rank=LORA_RANK))

    def step() -> None:
        kwargs = {"added_cond_kwargs": added} if is_xl else {}
        unet(*inputs, **kwargs).sample.sum().backward()

    encode = flops_of(lambda: vae.encode(pixel_values))
    text = 0 if is_xl else flops_of(lambda: text_encoder(tokens))
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return {"parameters": parameters, "step": flops_of(step), "encode": encode + text}


def flops_of(call: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return int(counter.get_total_flops())


def peak_flops() -> tuple[float, str]:
    """Return what this machine can do in a second, and where that figure is from."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
        known = [name for name in CARD_TFLOPS if name in card.replace("-", " ").split()]
        if known:
            return CARD_TFLOPS[known[0]] * 1e12, f"data sheet of {known[0]}"
    side, device = 2048, torch_device()
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    seconds = min(timed(lambda: torch.mm(left, right)).wall_s for _ in range(8))
    return 2 * side**3 / seconds, f"product of two {side} x {side} fp32 matrices"


@dataclass(frozen=True)
class Seconds:
    """Of a clock on the wall, and of all processors together."""

    wall_s: float
    processor_s: float


def timed(call: Callable[[], Any], times: int = 1) -> Seconds:
    """Return the mean time of a call."""
    wait_for_device()
    started, processor = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    wait_for_device()
    wall, processor = time.perf_counter() - started, time.process_time() - processor
    return Seconds(wall / times, processor / times)


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(job: Job, rounds: int, steps: int) -> tuple[dict[str, list[Seconds]], float]:
    """Return the time of a step of each side in each round, and what ours does once."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(job, Path(folder))
        sides = {"ours": ours.step, "diffusers": Reference(job).step}
        times: dict[str, list[Seconds]] = {name: [] for name in sides}
        for step in sides.values():
            timed(step, 2)
        for number in range(rounds):
            # A machine that grows slower must not favour one side.
            order = list(sides) if number % 2 == 0 else list(sides)[::-1]
            for name in order:
                times[name].append(timed(sides[name], steps))
    return times, ours.once_s


def report_batch(job: Job, args: argparse.Namespace) -> None:
    flops = count_flops(job)
    batch = job.batch_size
    print(f"\nbatch {batch}: {flops['step'] * batch / 1e9:,.1f} GFLOP a step,", end=" ")
    print(f"{flops['encode'] / flops['step']:.0%} more where every step encodes", flush=True)
    peaks = {side: in_own_process(job, side) for side in ("ours", "diffusers")}
    times, once_s = compare(job, args.rounds, args.steps)
    peak, source = peak_flops()
    medians = {}
    for side, rounds in times.items():
        medians[side] = wall = statistics.median(seconds.wall_s for seconds in rounds)
        rate = flops["step"] * batch / wall
        each = " ".join(f"{seconds.wall_s:.3g}" for seconds in rounds)
        memory = ", ".join(f"{gb:.2f} GB {kind}" for kind, gb in peaks[side].items())
        print(
            f"  {side:9} {1 / wall:.3g} steps/s, {batch / wall:.3g} img/s (rounds: {each} s); "
            f"UNet {rate / 1e12:.3g} TFLOP/s = {rate / peak:.0%} of peak; {memory}"
        )
    processor = [
        statistics.median(seconds.processor_s for seconds in rounds) for rounds in times.values()
    ]
    ours, theirs = medians.values()
    print(
        f"  ours does {theirs / ours:.2f}x the steps; {processor[1] / processor[0]:.2f}x by", end=""
    )
    print(f" processor time; peak is {peak / 1e12:.3g} TFLOP/s ({source})")
    saved = theirs - ours
    when = f"paid back after {once_s / saved:.0f} steps" if saved > 0 else "never paid back"
    print(f"  once: {NUM_PHOTOS} photos prepared and encoded in {once_s:.1f} s, {when}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="mid")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--vae", choices=("scaled", "real"), default="scaled")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    set_up(args.threads)
    shape = SHAPES[args.model]
    if args.vae == "real":
        shape = replace(shape, vae_widths=SHAPES["sd15"].vae_widths, vae_groups=32)
    with tempfile.TemporaryDirectory() as name:
        job = Job(
            model=write_model(shape, Path(name) / "model"),
            photos=write_photos(Path(name) / "photos"),
            resolution=args.resolution or shape.resolution,
            method=args.method,
            optimizer=args.optimizer,
            threads=args.threads,
        )
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        print(
            f"{args.model}, {count_flops(job)['parameters'] / 1e6:.1f} M parameters in the UNet, "
            f"{job.resolution} px, VAE {'x'.join(map(str, shape.vae_widths))}, {job.method}, "
            f"{job.optimizer}; {device}, {args.threads} threads, torch {torch.__version__}, "
            f"diffusers {diffusers.__version__}"
        )
        for batch_size in args.batch:
            report_batch(replace(job, batch_size=batch_size), args)


if __name__ == "__main__":
    main()
