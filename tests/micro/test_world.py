from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from colabtools.images import load_upright
from colabtools.micro import subject_path, world

SCENES = [world.random_scene(np.random.default_rng(seed)) for seed in range(150)]


def degraded(picture: Image.Image, seed: int) -> Image.Image:
    """The picture as a weak model might draw it: a third of the resolution, and noise."""
    blurred = picture.resize((22, 22), Image.Resampling.BILINEAR).resize(picture.size)
    noise = np.random.default_rng(seed).normal(0, 8, (*picture.size, 3))
    return Image.fromarray((np.asarray(blurred) + noise).clip(0, 255).astype(np.uint8))


def test_there_is_one_scene_for_each_combination() -> None:
    captions = {scene.caption for scene in world.all_scenes()}
    assert len(captions) == len(world.COLOURS) * len(world.SHAPES) * len(world.BACKGROUNDS) == 240
    assert sum(scene.left_out for scene in world.all_scenes()) == 30


def test_each_colour_and_each_shape_is_left_out_at_most_once() -> None:
    """Or the model could not have learned the word."""
    for words in zip(*world.LEFT_OUT, strict=True):
        assert max(Counter(words).values()) == 1


def test_a_random_scene_is_never_a_left_out_one_and_fits_into_the_picture() -> None:
    for scene in SCENES:
        assert not scene.left_out
        for place in scene.centre:
            assert scene.radius < place < world.IMG_SIZE - scene.radius


def test_the_caption_names_colour_shape_and_background() -> None:
    scene = world.Scene(colour="orange", shape="star", background="sky")
    assert scene.caption == "an orange star on a sky background"


def test_the_judge_reads_every_combination() -> None:
    wrong = [s.caption for s in world.all_scenes() if not world.judge(world.render(s)).agrees(s)]
    assert wrong == []


@pytest.mark.parametrize("seed", range(2))
def test_the_judge_reads_blurred_and_noisy_pictures(seed: int) -> None:
    pictures = [(scene, degraded(world.render(scene), seed)) for scene in SCENES]
    wrong = [scene.caption for scene, p in pictures if not world.judge(p).agrees(scene)]
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("field", ["colour", "shape", "background"])
def test_the_judge_disagrees_with_any_other_scene(field: str) -> None:
    scene = world.Scene(colour="red", shape="star", background="white")
    other = {"colour": "pink", "shape": "cross", "background": "sky"}[field]
    assert not world.judge(world.render(scene)).agrees(
        world.Scene(**{"colour": "red", "shape": "star", "background": "white", field: other})
    )


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (64, 64), (128, 128, 128)),
        Image.effect_noise((64, 64), 3).convert("RGB"),
    ],
    ids=["plain", "faint noise"],
)
def test_the_judge_finds_no_shape_where_there_is_none(picture: Image.Image) -> None:
    verdict = world.judge(picture)
    assert (verdict.colour, verdict.shape, verdict.background) == ("?", "?", "gray")


def test_the_shipped_subject_is_what_the_script_renders() -> None:
    for seed, background in enumerate(world.BACKGROUNDS):
        shipped = load_upright(subject_path() / f"{seed + 1}.png")
        assert shipped.tobytes() == world.render_subject(background, seed=seed).tobytes()
        caption = (subject_path() / f"{seed + 1}.txt").read_text()
        assert caption.strip() == f"a sks star on a {background} background"


def test_the_subject_has_three_colours_where_a_figure_of_the_world_has_one() -> None:
    def colours(picture: Image.Image) -> set[str]:
        pixels = np.asarray(picture).reshape(-1, 3).astype(int)
        return {
            name
            for name, value in world.COLOURS.items()
            if (np.abs(pixels - value).max(axis=1) < 12).sum() > 25
        }

    assert colours(world.render_subject("white", seed=1)) == {"blue", "red", "yellow"}
    assert all(len(colours(world.render(scene))) <= 1 for scene in SCENES)
