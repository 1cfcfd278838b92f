"""How well does the embedded Stable Diffusion draw what it is asked for?

    python benchmarks/micro_sd.py [--prompts 200] [--photos DIR] [--out PICTURE] [--model DIR]

Prints the share of pictures in which a judge that sees only pixels finds colour, shape and
background as asked, for combinations seen in training and for those left out, each with its 95 %
interval (Wilson 1927); the judge's own ceiling, on rendered pictures through the autoencoder; and
with --photos the autoencoder's PSNR on real photographs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from colabtools import images
from colabtools.micro import sd_path, world
from colabtools.report import save_grid

STEPS, GUIDANCE = 25, 3.5


def chosen_scenes(count: int, *, left_out: bool) -> list[world.Scene]:
    """The same number of every combination, as far as it goes."""
    scenes = [scene for scene in world.all_scenes() if scene.left_out == left_out]
    order = np.random.default_rng(0).permutation(len(scenes))
    return [scenes[order[i % len(scenes)]] for i in range(count)]


def wilson(hits: int, count: int) -> tuple[float, float]:
    z, share = 1.96, hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return centre - half, centre + half


def report(name: str, scenes: list[world.Scene], pictures: list[Image.Image]) -> None:
    verdicts = [world.judge(picture) for picture in pictures]
    hits = sum(verdict.agrees(scene) for verdict, scene in zip(verdicts, scenes, strict=True))
    low, high = wilson(hits, len(scenes))
    print(f"{name}: {hits}/{len(scenes)} = {hits / len(scenes):.1%} ({low:.1%} to {high:.1%})")
    for field in ("colour", "shape", "background"):
        pairs = [
            (getattr(s, field), getattr(v, field)) for s, v in zip(scenes, verdicts, strict=True)
        ]
        wrong = Counter(f"{asked} as {seen}" for asked, seen in pairs if asked != seen)
        print(
            f"  {field} right {1 - sum(wrong.values()) / len(pairs):.1%}",
            dict(wrong.most_common(4)),
        )


def roundtrip(pipeline: StableDiffusionPipeline, pictures: list[Image.Image]) -> list[Image.Image]:
    pixels = (
        torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    restored = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in restored]


def psnr(left: Image.Image, right: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit RGB pictures."""
    return 10 * math.log10(
        255**2 / float(((np.asarray(left, float) - np.asarray(right, float)) ** 2).mean())
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, default=sd_path())
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None).to(
        torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for name, left_out in (("seen in training", False), ("left out of training", True)):
        scenes = chosen_scenes(args.prompts, left_out=left_out)
        started = time.monotonic()
        pictures = world.draw_scenes(
            pipeline, scenes, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )
        report(name, scenes, pictures)
        print(f"  {(time.monotonic() - started) / len(scenes):.2f} s a picture")
        drawn += list(zip(scenes, pictures, strict=True))[: 48 if not left_out else 16]
    scenes = chosen_scenes(args.prompts, left_out=False)
    report(
        "ceiling: rendered, through the autoencoder",
        scenes,
        roundtrip(pipeline, [world.render(s) for s in scenes]),
    )
    if args.photos:
        found = sorted(
            p for p in args.photos.rglob("*") if p.suffix.lower() in images.PHOTO_SUFFIXES
        )
        photos = [images.square(images.load_upright(p), world.IMG_SIZE) for p in found]
        values = [psnr(p, r) for p, r in zip(photos, roundtrip(pipeline, photos), strict=True)]
        print(
            f"photos through the autoencoder: {len(values)}, "
            f"PSNR mean {np.mean(values):.2f} dB, least {min(values):.2f}"
        )
    if args.out:
        rows = [[picture for _, picture in drawn[i : i + 8]] for i in range(0, len(drawn), 8)]
        print("wrote", save_grid(rows, args.out, cell_size=96))


if __name__ == "__main__":
    main()
