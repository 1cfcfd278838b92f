"""Does DreamBooth on the embedded model learn the subject, and does the prior protect the class?

    python benchmarks/dreambooth_learning.py [--seeds 5] [--text-encoder-steps N] [--unet-steps N]
                                             [--out PICTURE]

For each seed: five pictures of the subject are trained with and without prior preservation. Then,
on pictures that no training saw: the subject's denoising loss before and after, the distance of
generated pictures to the subject before and after, and the denoising loss of the class before,
after, and after with the prior.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from colabtools import drive, registry
from colabtools.dreambooth.cache import LatentCache, crop_sets
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.drawing import draw
from colabtools.dreambooth.families import heldout_loss
from colabtools.dreambooth.generate import load_trained_pipeline
from colabtools.dreambooth.models import load_pipeline, wrap_pipeline
from colabtools.dreambooth.train import train
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.micro import world
from colabtools.report import save_grid

SESSION = "learning"
DRAWN_SEEDS = range(3)
RENDERED, BLOCK = 8, 6


@dataclass(frozen=True)
class Heldout:
    """Pictures that no training sees, with their captions."""

    pictures: list[Image.Image]
    captions: list[str]

    def loss(self, pipeline: StableDiffusionPipeline, folder: Path) -> float:
        paths = []
        for i, picture in enumerate(self.pictures):
            paths.append(folder / f"heldout-{i}.png")
            picture.save(paths[-1])
        models = wrap_pipeline(registry.BASES["micro"], pipeline, torch.device("cpu"))
        cache = LatentCache.encode(models.vae, crop_sets(paths), desc="encoding held-out pictures")
        latents = torch.cat([mean[:1] for mean in cache.means])
        with torch.no_grad():
            conditioning = models.family.encode_prompts(models, self.captions)
        return heldout_loss(models, latents, conditioning)


def heldout_subject() -> Heldout:
    """Ten pictures of the subject: each background twice, at places that training never shows."""
    backgrounds = [*world.BACKGROUNDS] * 2
    pictures = [world.render_subject(b, seed=100 + i) for i, b in enumerate(backgrounds)]
    return Heldout(pictures, [f"a sks star on a {b} background" for b in backgrounds])


def heldout_class() -> Heldout:
    """Stars of the world, in every colour that training of the base model showed."""
    scenes = [s for s in world.all_scenes() if s.shape == "star" and not s.left_out][::2]
    captions = [f"a star on a {s.background} background" for s in scenes]
    return Heldout([world.render(scene) for scene in scenes], captions)


def subject_distance(background: str, pictures: list[Image.Image]) -> float:
    """Return how far pictures on one background are from the subject, in L*a*b* units.

    Foregrounds are cut out, scaled to one size and averaged over 4 x 4 blocks, so that what counts
    is which colour is where, not the edges; each is compared with several renderings of the subject
    on that background, and the nearest one counts (mean Euclidean distance of the blocks).
    """
    subjects = [world.render_subject(background, seed=200 + i) for i in range(RENDERED)]
    targets = np.stack([blocks(picture) for picture in subjects])
    distances = (np.linalg.norm(targets - blocks(p), axis=-1).mean(axis=(1, 2)) for p in pictures)
    return float(np.mean([distance.min() for distance in distances]))


def blocks(picture: Image.Image) -> np.ndarray:
    """Return the foreground's mean L*a*b* in 4 x 4 blocks, (4, 4, 3)."""
    crop = world.foreground_crop(picture, 4 * BLOCK)
    return crop.reshape(4, BLOCK, 4, BLOCK, 3).mean(axis=(1, 3))


def drawn_subject(
    pipeline: StableDiffusionPipeline, backgrounds: Iterable[str] = world.BACKGROUNDS
) -> dict[str, list[Image.Image]]:
    return {
        background: [
            draw(pipeline, f"a sks star on a {background} background", seed=seed)
            for seed in DRAWN_SEEDS
        ]
        for background in backgrounds
    }


def run_seed(seed: int, args: argparse.Namespace) -> tuple[dict[str, float], list[Image.Image]]:
    subject, stars = heldout_subject(), heldout_class()
    base = load_pipeline(registry.BASES["micro"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipelines = {"before": base}
        for variant in ("after", "after_prior"):
            workspace = drive.open_local(folder / variant)
            prepare(workspace, SESSION, PrepareConfig(images="demo"))
            config = TrainConfig(
                text_encoder_steps=args.text_encoder_steps,
                unet_steps=args.unet_steps,
                prior_preservation=variant == "after_prior",
                class_prompt="a star",
                seed=seed,
            )
            trained = train(workspace, SESSION, config)
            pipelines[variant] = load_trained_pipeline(trained.weights)
        figures = {}
        for variant, pipeline in pipelines.items():
            figures[f"subject_{variant}"] = subject.loss(pipeline, folder)
            figures[f"class_{variant}"] = stars.loss(pipeline, folder)
    pictures = {variant: drawn_subject(pipeline) for variant, pipeline in pipelines.items()}
    for variant, drawn in pictures.items():
        distances = [subject_distance(b, group) for b, group in drawn.items()]
        figures[f"distance_{variant}"] = float(np.mean(distances))
    return figures, [group[0] for drawn in pictures.values() for group in drawn.values()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    base = registry.BASES["micro"]
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--text-encoder-steps", type=int, default=base.text_encoder_steps)
    parser.add_argument("--unet-steps", type=int, default=base.unet_steps)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows, pictures = [], []
    torch.set_num_threads(args.threads)
    for seed in range(args.seeds):
        figures, drawn = run_seed(seed, args)
        rows.append(figures)
        pictures.append(drawn)
        print(
            f"seed {seed}", {name: round(value, 4) for name, value in figures.items()}, flush=True
        )
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for variant in ("after", "after_prior"):
        falls = [1 - row[f"subject_{variant}"] / row["subject_before"] for row in rows]
        print(f"{variant}: subject loss falls by {np.mean(falls):.1%}, least {min(falls):.1%}")
        closer = [row[f"distance_{variant}"] / row["distance_before"] for row in rows]
        print(
            f"{variant}: distance to the subject x{np.mean(closer):.2f}, worst x{max(closer):.2f}"
        )
    rises = [mean[f"class_{v}"] / mean["class_before"] - 1 for v in ("after", "after_prior")]
    print(f"class loss rises by {rises[0]:.1%} without the prior, {rises[1]:.1%} with it")
    print("mean", {name: round(value, 4) for name, value in mean.items()})
    if args.out:
        print("wrote", save_grid(pictures, args.out, cell_size=80))


if __name__ == "__main__":
    main()
