from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler

from colabtools.dreambooth.schedule import lr_factor


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_the_rate_of_every_update_is_that_of_diffusers(name: str, warmup_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(
        theirs, optimizer, num_warmup_steps=warmup_steps, num_training_steps=40
    )
    for update in range(40):
        ours = lr_factor(name, update, steps=40, warmup_steps=warmup_steps)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="no schedule 'steps'; use linear"):
        lr_factor("steps", 0, steps=1)
