"""Train the embedded Stable Diffusion from nothing and write it to colabtools/micro/sd.

    python scripts/train_micro_sd.py [--state DIR] [--minutes M] [--out DIR]

Stages: `vae` (pictures of the world, random clutter and crops of photographs that ship inside
scikit-image and scikit-learn), `decoder` (the same with the encoder frozen), `unet` (denoiser and
text encoder together, on latents cached once), `export`. `decoder` and `unet` need `vae` only, so
two machines or cores can share them. State is saved every few minutes; stop it at any time and
start it again with the same folder to go on. `--minutes` ends a sitting.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from colabtools.micro import world

SEED = 20261123
VAE_STEPS, VAE_BATCH, VAE_LR = 2600, 16, 2e-3
DECODER_STEPS, DECODER_LR = 2400, 1.5e-3
UNET_STEPS, UNET_BATCH, UNET_LR = 4600, 64, 1e-3
# Most steps see the first 16 tokens only, which hold every caption; the last ones see all 77 like
# the real thing.
SHORT_TOKENS, LONG_FROM = 16, 0.94
WORLD_PICTURES, PHOTO_CROPS, CLUTTER_PICTURES, LATENTS = 6000, 9000, 3000, 24000
SCALING_FACTOR = (
    0.18215  # Source: SD 1.5 vae/config.json; folded into the weights, see fold_latent_scale
)
EMA_DECAY = 0.998
# Words without a meaning, so that an unknown word in a prompt leaves the picture a plain one of its
# kind.
FILLERS = ("bkr", "fyx", "mjv", "ohwx", "qpz", "zwx")


def build_vae() -> AutoencoderKL:
    """SD 1.5's autoencoder, narrower: 248 tensors, 8x down, 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 24, 48, 48),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=world.IMG_SIZE,
        scaling_factor=SCALING_FACTOR,
    )


def build_unet() -> UNet2DConditionModel:
    """SD 1.5's denoiser, narrower: 686 tensors, eight heads, cross attention at three levels."""
    return UNet2DConditionModel(
        sample_size=world.IMG_SIZE // 8,
        block_out_channels=(32, 64, 80, 80),
        attention_head_dim=8,
        cross_attention_dim=64,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """SD 1.5's CLIP text encoder, narrower: 12 layers, 196 tensors, 77 positions."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=12,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's file format: all 256 bytes, and each word of the world."""
    words = {*world.COLOURS, *world.SHAPES, *world.BACKGROUNDS, *FILLERS, world.SUBJECT_TOKEN}
    words |= {"a", "an", "and", "background", "cat", "dog", "in", "of", "on", "person", "photo"}
    words |= {"picture", "shape", "the", "toy", "with"}
    trainer = BpeTrainer(
        vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.train_from_iterator(sorted(words), trainer)
    merges = [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(ByteLevel.alphabet())
    tokens = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *(merge.replace(" ", "") for merge in merges),
    ]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def photo_crops(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 64, 64, 3) uint8: random square crops of photographs that come with the libraries."""
    import skimage
    import sklearn

    folders = {
        Path(skimage.__file__).parent / "data": (
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "motorcycle_left.png",
            "motorcycle_right.png",
            "retina.jpg",
            "rocket.jpg",
            "camera.png",
        ),
        Path(sklearn.__file__).parent / "datasets" / "images": ("china.jpg", "flower.jpg"),
    }
    photos = [
        Image.open(folder / name).convert("RGB")
        for folder, names in folders.items()
        for name in names
    ]
    crops = np.empty((count, world.IMG_SIZE, world.IMG_SIZE, 3), np.uint8)
    for row in range(count):
        photo = photos[int(rng.integers(len(photos)))]
        side = int(np.exp(rng.uniform(np.log(64), np.log(min(photo.size)))))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
        crop = photo.resize(
            (world.IMG_SIZE,) * 2, Image.Resampling.BOX, (left, top, left + side, top + side)
        )
        pixels = np.asarray(crop).astype(np.float32)
        pixels = pixels[:, :: 1 if rng.random() < 0.5 else -1]
        if rng.random() < 0.5:
            pixels = pixels[..., rng.permutation(3)]
        crops[row] = (
            (pixels * rng.uniform(0.7, 1.25) + rng.uniform(-25, 25)).clip(0, 255).astype(np.uint8)
        )
    return crops


def clutter(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 64, 64, 3) uint8: overlapping figures in any colour, so that new subjects survive."""
    pictures = np.empty((count, world.IMG_SIZE, world.IMG_SIZE, 3), np.uint8)
    for row in range(count):
        image = Image.new("RGB", (256, 256), tuple(int(v) for v in rng.integers(0, 256, 3)))
        draw = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(1, 6))):
            fill = tuple(int(v) for v in rng.integers(0, 256, 3))
            x, y, r = rng.uniform(30, 226), rng.uniform(30, 226), rng.uniform(12, 90)
            if rng.random() < 0.4:
                draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            else:
                corners = rng.uniform(-r, r, (int(rng.integers(3, 8)), 2)) + (x, y)
                draw.polygon([tuple(c) for c in corners.tolist()], fill=fill)
        pictures[row] = np.asarray(image.resize((world.IMG_SIZE,) * 2, Image.Resampling.BOX))
    return pictures


def world_pictures(rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[world.Scene]]:
    """(count, 64, 64, 3) uint8 and the scenes that they show."""
    scenes = [world.random_scene(rng) for _ in range(count)]
    return np.stack([np.asarray(world.render(scene)) for scene in scenes]), scenes


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def random_caption(scene: world.Scene, rng: np.random.Generator) -> str:
    """Mostly the full caption; sometimes less, a word without meaning, or nothing."""
    kind = rng.random()
    if kind < 0.10:
        return ""
    if kind < 0.62:
        return scene.caption
    if kind < 0.68:
        return f"a photo of {scene.caption}"
    if kind < 0.76:
        return scene.caption.split(" on ")[0]
    if kind < 0.84:
        return f"a {scene.shape} on a {scene.background} background"
    if kind < 0.90:
        return f"a {scene.shape}"
    filler = FILLERS[int(rng.integers(len(FILLERS)))]
    return f"a {filler} {scene.shape}" + (
        f" on a {scene.background} background" if kind < 0.96 else ""
    )


def save_state(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True) if path.is_file() else None


def update_ema(ema: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    averages, weights = list(ema.parameters()), list(model.parameters())
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, [w.detach() for w in weights], alpha=1 - decay)


def cosine(step: int, total: int, warmup: int, peak: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))


def trapezoid(step: int, total: int, warmup: int, peak: float) -> float:
    """Constant between a linear start and a linear end over the last quarter."""
    return peak * min(1.0, (step + 1) / warmup, (total - step) / (total / 4))


def report(step: int, total: int, loss: float, started: float, done: int) -> None:
    rate = done / (time.monotonic() - started)
    minutes = (total - step) / rate / 60
    print(
        f"{step}/{total}  loss {loss:.4f}  {rate:.2f} steps/s  {minutes:.0f} min left", flush=True
    )


def all_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return list(model.parameters())


def train_vae(folder: Path, deadline: float) -> AutoencoderKL | None:
    """Return the trained autoencoder, or None if the sitting ended first."""
    torch.manual_seed(SEED)
    return fit_autoencoder(
        folder / "vae.pt", build_vae(), all_parameters, (VAE_STEPS, VAE_LR), deadline
    )


def train_decoder(folder: Path, vae: AutoencoderKL, deadline: float) -> AutoencoderKL | None:
    """Return the autoencoder with a better decoder for the same latents; None: not done yet."""

    def decoder_side(model: AutoencoderKL) -> list[torch.nn.Parameter]:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    vae = copy.deepcopy(vae).requires_grad_(True)
    return fit_autoencoder(
        folder / "decoder.pt", vae, decoder_side, (DECODER_STEPS, DECODER_LR), deadline
    )


def fit_autoencoder(
    path: Path,
    vae: AutoencoderKL,
    trainable: Callable[[AutoencoderKL], list[torch.nn.Parameter]],
    schedule: tuple[int, float],
    deadline: float,
) -> AutoencoderKL | None:
    """Train from the state file on and return averaged weights, or None at the deadline."""
    steps, peak = schedule
    weights = trainable(vae)
    ema = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.Adam(weights, lr=peak, betas=(0.9, 0.99))
    first = 0
    if state := load_state(path):
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    if first >= steps:
        return ema.eval()
    rng = np.random.default_rng(SEED)
    pools = [
        photo_crops(rng, PHOTO_CROPS),
        world_pictures(rng, WORLD_PICTURES)[0],
        clutter(rng, CLUTTER_PICTURES),
    ]
    shares = (8, 5, 3)
    started = time.monotonic()
    for step in range(first, steps):
        draw = np.random.default_rng((SEED, step))
        batch = np.concatenate(
            [p[draw.integers(len(p), size=n)] for p, n in zip(pools, shares, strict=True)]
        )
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, 100, peak)
        loss, mse = autoencoder_loss(vae, to_tensor(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        update_ema(ema, vae, step)
        if (step + 1) % 50 == 0:
            report(step + 1, steps, mse.item(), started, step + 1 - first)
        stop = time.monotonic() > deadline
        if (step + 1) % 200 == 0 or step + 1 == steps or stop:
            state = {
                "vae": vae.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_state(path, {**state, "step": step + 1})
        if stop:
            return None
    return ema.eval()


def autoencoder_loss(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and the squared error in it. pixels: (B, 3, H, W) in [-1, 1]."""
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    mse = F.mse_loss(decoded, pixels)
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return mse + 0.1 * F.l1_loss(decoded, pixels) + 3e-4 * kl, mse


def fold_latent_scale(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Make each latent channel zero-mean with a standard deviation of 1 / 0.18215, in place.

    The two 1x1 convolutions around the latents are linear, so an affine change of each channel
    folds into them exactly and the scaling factor can be SD 1.5's own.
    """
    latents = encode(vae, pictures) / SCALING_FACTOR
    mean = latents.mean(dim=(0, 2, 3))
    scale = 1 / (SCALING_FACTOR * latents.std(dim=(0, 2, 3)))
    with torch.no_grad():
        into, out_of = vae.quant_conv, vae.post_quant_conv
        into.bias[:4] = (into.bias[:4] - mean) * scale
        into.weight[:4] *= scale[:, None, None, None]
        into.bias[4:] += 2 * scale.log()
        out_of.bias += out_of.weight[:, :, 0, 0] @ mean
        out_of.weight /= scale[None, :, None, None]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """(N, 64, 64, 3) uint8 -> scaled latent means (N, 4, 8, 8)."""
    batches = [pictures[i : i + 64] for i in range(0, len(pictures), 64)]
    return torch.cat([vae.encode(to_tensor(b)).latent_dist.mean for b in batches]) * SCALING_FACTOR


@dataclass(frozen=True)
class Examples:
    """Latents (N, 4, 8, 8), the scenes that they show, and the tokenizer of their captions."""

    latents: torch.Tensor
    scenes: list[world.Scene]
    tokenizer: CLIPTokenizer


def cached_examples(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> Examples:
    """Return the training set of the denoiser; the same one at every sitting."""
    pictures, scenes = world_pictures(np.random.default_rng(SEED + 1), LATENTS)
    path = folder / "latents.pt"
    if (state := load_state(path)) is None:
        state = {"latents": encode(vae, pictures)}
        save_state(path, state)
    return Examples(state["latents"], scenes, tokenizer)


class Denoiser(torch.nn.Module):
    """The two networks that learn together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(tokenizer)

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        distinct, rows = torch.unique(input_ids, dim=0, return_inverse=True)
        hidden = self.text_encoder(distinct).last_hidden_state[rows]  # (B, T, D)
        return self.unet(latents, timesteps, hidden).sample


def train_unet(
    folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, deadline: float
) -> Denoiser | None:
    """Return the trained denoiser and text encoder, or None if the sitting ended first."""
    path = folder / "unet.pt"
    torch.manual_seed(SEED)
    model = Denoiser(tokenizer).to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=UNET_LR, weight_decay=1e-3, fused=True)
    first = 0
    if state := load_state(path):
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    if first >= UNET_STEPS:
        return ema.eval()
    examples = cached_examples(folder, vae, tokenizer)
    alphas_cumprod = build_noise_scheduler().alphas_cumprod
    started = time.monotonic()
    running = None
    for step in range(first, UNET_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = trapezoid(step, UNET_STEPS, 200, UNET_LR)
        loss = denoising_loss(model, examples, alphas_cumprod, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, step)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            report(step + 1, UNET_STEPS, running, started, step + 1 - first)
        stop = time.monotonic() > deadline
        if (step + 1) % 200 == 0 or step + 1 == UNET_STEPS or stop:
            save_state(
                path,
                {
                    "model": model.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
        if stop:
            return None
    return ema.eval()


def denoising_loss(
    model: Denoiser, examples: Examples, alphas_cumprod: torch.Tensor, step: int
) -> torch.Tensor:
    """Epsilon loss of one batch, weighted by 1 / sqrt(SNR), at most 8.

    That lies between the weight of an epsilon loss (1) and of a velocity loss (1 + 1 / SNR, from
    Salimans & Ho 2022, arXiv 2202.00512): at high noise only the caption tells what to draw, and
    with weight 1 that is learnt last. All randomness comes from the step number.
    """
    rng = np.random.default_rng((SEED, 7, step))
    generator = torch.Generator().manual_seed(SEED + step)
    rows = rng.integers(len(examples.latents), size=UNET_BATCH)
    captions = [random_caption(examples.scenes[row], rng) for row in rows]
    length = SHORT_TOKENS if step < LONG_FROM * UNET_STEPS else 77
    input_ids = examples.tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    clean = examples.latents[torch.from_numpy(rows)]
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(0, len(alphas_cumprod), (UNET_BATCH,), generator=generator)
    alpha_bar = alphas_cumprod[timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    error = (model(noisy, timesteps, input_ids.input_ids) - noise).square().mean(dim=(1, 2, 3))
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    return (error * snr.rsqrt().clamp(max=8.0)).mean()


def build_noise_scheduler() -> DDPMScheduler:
    """SD 1.5's noise schedule. Source: its scheduler/scheduler_config.json."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
    )


def export(out: Path, vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer) -> None:
    """Write the pipeline in diffusers' layout, fp16 safetensors."""
    scheduler = PNDMScheduler.from_config(
        build_noise_scheduler().config, skip_prk_steps=True, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    # Readers older than the one-file form know these two.
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(Path(tokenizer.name_or_path) / name, out / "tokenizer" / name)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    print(
        f"wrote {out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.2f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).resolve().parents[1]
    stages = ("vae", "decoder", "unet", "export")
    parser.add_argument("--state", type=Path, default=root / ".cache" / "micro_sd")
    parser.add_argument("--out", type=Path, default=root / "colabtools" / "micro" / "sd")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    deadline = time.monotonic() + 60 * args.minutes
    tokenizer = build_tokenizer(args.state / "tokenizer")
    if (vae := train_vae(args.state, deadline)) is None:
        return
    if "decoder" in args.stages:
        vae = train_decoder(args.state, vae, deadline)
    if vae is None or args.stages == ["decoder"]:
        return
    fold_latent_scale(vae, world_pictures(np.random.default_rng(SEED + 2), 1000)[0])
    denoiser = train_unet(args.state, vae, tokenizer, deadline)
    if denoiser is not None and "export" in args.stages:
        export(args.out, vae, denoiser, tokenizer)


if __name__ == "__main__":
    main()
