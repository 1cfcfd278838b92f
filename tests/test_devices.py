from __future__ import annotations

import pytest
import torch

from colabtools import devices, env


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_the_capability_of_the_card_decides_between_fp16_and_bf16(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = env.Gpu("a card", capability, 16 << 30, 15 << 30)
    monkeypatch.setattr(env, "gpu", lambda: card)
    assert devices.half_dtype(torch.device("cuda")) is dtype
    assert devices.half_dtype(torch.device("cpu")) is None
