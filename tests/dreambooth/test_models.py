from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from colabtools import env, registry
from colabtools.dreambooth import models

MICRO = registry.BASES["micro"]


@pytest.fixture(autouse=True)
def _three_threads() -> None:
    """Another number than any base model asks for; the folder's fixture restores it."""
    torch.set_num_threads(3)


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


def test_the_parts_are_float32_frozen_and_silent_about_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    loaded = models.load_models(MICRO, torch.device("cpu"))
    for part in (loaded.text_encoder, loaded.vae, loaded.unet):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in part.parameters())
        assert not part.training
    assert capfd.readouterr().err == ""


def test_a_prompt_becomes_77_hidden_states() -> None:
    loaded = models.load_models(MICRO, torch.device("cpu"))
    long = "a star " * 100
    hidden = models.encode_prompts(loaded.tokenizer, loaded.text_encoder, ["a star", long])
    assert hidden.shape == (2, 77, 64)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_the_capability_of_the_card_decides_between_fp16_and_bf16(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = env.Gpu("a card", capability, 16 << 30, 15 << 30)
    monkeypatch.setattr(env, "gpu", lambda: card)
    assert models.half_dtype(torch.device("cuda")) is dtype
    assert models.half_dtype(torch.device("cpu")) is None
