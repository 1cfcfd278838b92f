"""What a step is fed: latents, noise, timesteps and prompts of each example."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colabtools.dreambooth.captions import CaptionRules, every_form, vary
from colabtools.dreambooth.families import Conditioning
from colabtools.dreambooth.noise import offset_noise

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from colabtools.dreambooth.cache import LatentCache
    from colabtools.dreambooth.families import Models
    from colabtools.dreambooth.order import Slot
    from colabtools.dreambooth.plan import TrainPlan

__all__ = ["Batch", "PromptEncoder", "TrainingData", "rules_of"]


@dataclass(frozen=True)
class Batch:
    """Examples of one shape: latents and noise (B, C, h, w), timesteps (B,), prompts."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompts: list[str]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        latents, noise, timesteps = (
            # Fetched from pinned memory, a copy runs beside what the device does.
            (part.pin_memory() if device.type == "cuda" else part).to(device, non_blocking=True)
            for part in (self.latents, self.noise, self.timesteps)
        )
        return Batch(latents, noise, timesteps, self.prompts)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Latents and captions of the photos, and of the class pictures if there are any."""

    instances: LatentCache
    captions: tuple[str, ...]
    classes: LatentCache | None
    class_prompt: str
    rules: CaptionRules
    offset_noise: float

    def prompts(self) -> set[str] | None:
        """Return every prompt that can occur, or None where shuffling makes too many."""
        forms = every_form(self.captions, self.rules)
        if forms is None or self.classes is None:
            return forms
        return {*forms, self.class_prompt}

    def batch(self, slots: Sequence[Slot], seeds: Iterable[int], models: Models) -> Batch:
        """Return the examples of slots of one shape, each drawn from its own seed.

        Each seed drives, in this order: crop and posterior noise, noise, offset, timestep; a
        generator of its own makes the caption.
        """
        latents, noise, timesteps, prompts = [], [], [], []
        for slot, seed in zip(slots, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            cache = self._cache(slot)
            latent = cache.sample(slot.row, generator)  # (C, h, w)
            latents.append(latent)
            white = torch.randn(latent.shape, generator=generator)
            noise.append(offset_noise(white, self.offset_noise, generator))
            timesteps.append(models.family.draw_timestep(models, generator))
            prompts.append(self._prompt(slot, seed))
        return Batch(torch.stack(latents), torch.stack(noise), torch.stack(timesteps), prompts)

    def shape(self, slot: Slot) -> tuple[int, ...]:
        """Return the shape (C, h, w) of an example's latents."""
        return self._cache(slot).shape(slot.row)

    def largest_shape(self) -> tuple[int, ...]:
        """Return the shape (C, h, w) of the example with most pixels."""
        caches = [cache for cache in (self.instances, self.classes) if cache is not None]
        shapes = [cache.shape(row) for cache in caches for row in range(len(cache))]
        return max(shapes, key=lambda shape: shape[-1] * shape[-2])

    def is_finite(self, slot: Slot) -> bool:
        """Return whether an example's latents are finite."""
        latent = self._cache(slot).sample(slot.row, torch.Generator(), mode=True)
        return bool(latent.isfinite().all())

    def file_name(self, slot: Slot) -> str:
        """Return what to call an example in a message."""
        return f"{'class' if slot.kind == 'class' else 'training'} picture {slot.row + 1}"

    def _cache(self, slot: Slot) -> LatentCache:
        if slot.kind == "class" and self.classes is not None:
            return self.classes
        return self.instances

    def _prompt(self, slot: Slot, seed: int) -> str:
        if slot.kind == "class":
            return self.class_prompt
        return vary(self.captions[slot.row], self.rules, random.Random(seed))


class PromptEncoder:
    """Prompts to conditioning; computed once each unless a text encoder learns."""

    # Prompts of which the encoder's answer is kept: 77 tokens of 768 floats are 0.24 MB each.
    _MOST_KEPT = 2048

    def __init__(self, models: Models, *, learning: bool) -> None:
        self._models = models
        self._learning = learning
        self._kept: dict[str, Conditioning] = {}
        self._most_kept = self._MOST_KEPT

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode prompts that will be asked for, so that the encoders may go."""
        # None of them may be dropped: they cannot be computed again once the encoders are gone.
        wanted = sorted(prompts)
        self._most_kept = max(self._most_kept, len(self._kept) + len(wanted))
        for prompt in wanted:
            self._encode_once(prompt)

    def __call__(self, prompts: list[str]) -> Conditioning:
        """Return the conditioning of B prompts."""
        if self._learning:
            return self._models.family.encode_prompts(self._models, prompts)
        return Conditioning.cat([self._encode_once(prompt) for prompt in prompts])

    @torch.no_grad()
    def _encode_once(self, prompt: str) -> Conditioning:
        if prompt not in self._kept:
            if len(self._kept) >= self._most_kept:
                self._kept.pop(next(iter(self._kept)))
            self._kept[prompt] = self._models.family.encode_prompts(self._models, [prompt])
        return self._kept[prompt]


def rules_of(plan: TrainPlan) -> CaptionRules:
    """Return how the plan varies captions."""
    config = plan.config
    return CaptionRules(
        dropout=config.caption_dropout,
        shuffle_tokens=config.shuffle_tokens,
        keep_tokens=config.keep_tokens,
    )
