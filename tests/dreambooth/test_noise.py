from __future__ import annotations

import math

import pytest
import torch

from colabtools.dreambooth.noise import offset_noise

SAMPLES = 200_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_two_pixels_of_a_channel_vary_together_and_two_channels_do_not(strength: float) -> None:
    white = torch.randn(SAMPLES, 2, 1, 2, generator=generator())
    noise = offset_noise(white, strength, generator(1)).double()
    pixels = noise.reshape(SAMPLES, 4)  # two pixels of channel 0, two of channel 1
    covariance = pixels.T.cov()
    inside = strength**2
    variance = 1 + inside
    expected = torch.tensor(
        [
            [variance, inside, 0, 0],
            [inside, variance, 0, 0],
            [0, 0, variance, inside],
            [0, 0, inside, variance],
        ],
        dtype=torch.float64,
    )
    # Of a sample covariance of Gaussians: sqrt((v_i v_j + c_ij^2) / n).
    error = ((variance**2 + expected**2) / SAMPLES).sqrt()
    assert ((covariance - expected).abs() < 5 * error).all()
    assert (pixels.mean(dim=0).abs() < 5 * math.sqrt(variance / SAMPLES)).all()


def test_the_offset_is_one_number_for_each_channel_of_each_example() -> None:
    noise = torch.randn(2, 4, 8, 8, generator=generator())
    offset = offset_noise(noise, 0.1, generator(1)) - noise
    flat = offset.flatten(2)
    torch.testing.assert_close(flat, flat[..., :1].expand_as(flat), rtol=0, atol=1e-6)
    assert len(flat[..., 0].unique()) == 8


def test_one_example_without_a_batch_is_taken_as_it_is() -> None:
    noise = torch.randn(4, 8, 8, generator=generator())
    single = offset_noise(noise, 0.1, generator(1))
    assert single.equal(offset_noise(noise[None], 0.1, generator(1))[0])


def test_strength_zero_changes_neither_the_noise_nor_the_generator() -> None:
    noise = torch.randn(4, 8, 8, generator=generator())
    source = generator(1)
    assert offset_noise(noise, 0.0, source) is noise
    assert source.get_state().equal(generator(1).get_state())


def test_the_type_of_the_noise_stays() -> None:
    noise = torch.randn(4, 8, 8, generator=generator()).to(torch.bfloat16)
    assert offset_noise(noise, 0.1, generator(1)).dtype is torch.bfloat16
