"""Shapes of one area, the one that suits a photo, and batches that hold only one of them."""

from __future__ import annotations

import pytest
import torch

from colabtools.dreambooth.buckets import (
    bucket_shapes,
    bucket_step,
    epoch_batches,
    nearest_bucket,
)

RESOLUTIONS = [64, 72, 128, 448, 512, 520, 640, 768, 1024]


def test_the_shapes_of_the_usual_resolution_are_these() -> None:
    shapes = ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    assert bucket_shapes(512, bucket_step(512)) == shapes


@pytest.mark.parametrize(
    ("resolution", "step"), [(64, 8), (72, 8), (128, 16), (200, 24), (256, 64), (1024, 64)]
)
def test_shapes_grow_by_what_the_networks_divide_by(resolution: int, step: int) -> None:
    assert bucket_step(resolution) == step


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_shape_keeps_the_limits_and_none_could_be_larger(resolution: int) -> None:
    step = bucket_step(resolution)
    shapes = bucket_shapes(resolution, step)

    def allowed(width: int, height: int) -> bool:
        ratio = max(width, height) / min(width, height)
        return width * height <= resolution**2 and ratio <= 2

    assert (resolution, resolution) in shapes
    assert len(set(shapes)) == len(shapes) >= 3
    for width, height in set(shapes) - {(resolution, resolution)}:
        assert (width % step, height % step) == (0, 0)
        assert allowed(width, height)
        assert not allowed(width + step, height)
        assert not allowed(width, height + step)
        assert (height, width) in shapes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 100), (512, 512)),
        ((4032, 3024), (576, 448)),
        ((3024, 4032), (448, 576)),
        ((1920, 1080), (640, 384)),
        ((9000, 300), (640, 384)),
        ((1, 5000), (384, 640)),
        ((576, 448), (576, 448)),
    ],
)
def test_a_photo_goes_to_the_shape_that_keeps_most_of_it(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert nearest_bucket(*size, bucket_shapes(512, 64)) == expected


def test_of_two_shapes_that_keep_the_same_share_the_larger_is_taken() -> None:
    assert nearest_bucket(3, 3, ((64, 64), (512, 512), (128, 128))) == (512, 512)
    assert nearest_bucket(7, 7, ((48, 96), (96, 48))) == (96, 48)


def epoch(shapes: list[tuple[int, int]], batch_size: int, seed: int) -> list[list[int]]:
    return epoch_batches(shapes, batch_size, torch.Generator().manual_seed(seed))


SHAPES = [(64, 64), (80, 48), (64, 64), (48, 80), (80, 48), (64, 64), (64, 64), (64, 64)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("seed", range(5))
def test_an_epoch_has_every_picture_once_and_in_each_batch_one_shape(
    batch_size: int, seed: int
) -> None:
    batches = epoch(SHAPES, batch_size, seed)
    assert sorted(row for batch in batches for row in batch) == list(range(len(SHAPES)))
    assert {len({SHAPES[row] for row in batch}) for batch in batches} == {1}
    for shape in set(SHAPES):
        sizes = sorted(len(batch) for batch in batches if SHAPES[batch[0]] == shape)
        full, rest = divmod(SHAPES.count(shape), batch_size)
        assert sizes == [*([rest] if rest else []), *[batch_size] * full]


def test_the_generator_alone_decides_the_order() -> None:
    assert epoch(SHAPES, 2, seed=3) == epoch(SHAPES, 2, seed=3)
    orders = {str(epoch(SHAPES, 2, seed)) for seed in range(20)}
    assert len(orders) > 15


def test_both_the_pictures_and_the_batches_are_shuffled() -> None:
    epochs = [epoch(SHAPES, 2, seed) for seed in range(40)]
    first_shapes = {SHAPES[batches[0][0]] for batches in epochs}
    partners = {frozenset(b) for batches in epochs for b in batches if SHAPES[b[0]] == (64, 64)}
    assert first_shapes == set(SHAPES)
    assert len(partners) == 15  # ten pairs of five pictures, and each of them alone


def test_no_pictures_make_no_batches() -> None:
    assert epoch([], 4, seed=0) == []
