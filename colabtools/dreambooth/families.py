"""What differs between the families of base models: prompts, noise, targets and the call itself.

Everything else of training sees latents, timesteps and a `Conditioning` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from colabtools.dreambooth.losses import prediction_target
from colabtools.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from colabtools.registry import Base

__all__ = [
    "FAMILIES",
    "Conditioning",
    "Family",
    "Models",
    "count_tokens",
    "denoising_errors",
    "heldout_loss",
    "scale_latents",
    "token_limit",
]

# Spread evenly over the whole schedule, the same for every picture.
_HELDOUT_TIMESTEPS = 16

# FLUX.1-dev takes the guidance scale as an input. At 1 its prediction is not pushed away from what
# it learns. Source: the commands of examples/dreambooth/README_flux.md in diffusers.
_FLUX_GUIDANCE = 1.0

# Source: max_sequence_length of FluxPipeline; model card of FLUX.1-schnell.
_FLUX_DEV_TOKENS = 512
_FLUX_SCHNELL_TOKENS = 256


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told of B prompts.

    Attributes:
        hidden: (B, T, D) hidden states of the tokens.
        pooled: (B, P) one vector for the whole prompt; None for SD 1 and 2.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Conditioning:
        """Return it on a device, in another dtype if one is given."""
        pooled = None if self.pooled is None else self.pooled.to(device=device, dtype=dtype)
        return Conditioning(self.hidden.to(device=device, dtype=dtype), pooled)

    def select(self, rows: Sequence[int] | torch.Tensor) -> Conditioning:
        """Return these rows, in this order."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.hidden.device)
        return Conditioning(self.hidden[index], None if self.pooled is None else self.pooled[index])

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Return all rows of several."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(
            torch.cat([part.hidden for part in parts]), torch.cat(pooled) if pooled else None
        )


@dataclass
class Models:
    """The parts of a base model on one device.

    Attributes:
        base: its record, complete.
        family: how it is called.
        pipeline: the diffusers pipeline that holds the same parts.
        tokenizers: by their names in the pipeline.
        text_encoders: by their names in the pipeline.
        vae: always float32.
        denoiser: the UNet or transformer.
        noise_scheduler: the schedule that it was trained on.
        device: where the parts are.
    """

    base: Base
    family: Family
    pipeline: Any
    tokenizers: dict[str, Any]
    text_encoders: dict[str, Any]
    vae: Any
    denoiser: Any
    noise_scheduler: Any
    device: torch.device

    def part(self, name: str) -> nn.Module:
        """Return a network by its name in the pipeline: "unet", "text_encoder_2", "vae" ...

        Raises:
            ModelError: this base model has no such part, or it was released.
        """
        known = {**self.text_encoders, "vae": self.vae, self.family.denoiser: self.denoiser}
        if known.get(name) is None:
            there = ", ".join(sorted(key for key, part in known.items() if part is not None))
            raise ModelError(
                f"base model {self.base.name!r} has no {name!r}; its parts are {there}"
            )
        network: nn.Module = known[name]
        return network


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family of base models is called.

    The functions take the `Models` first. Shapes: latents, noise and predictions (B, C, h, w),
    timesteps (B,).

    Attributes:
        name: "sd1", "sd2", "sdxl" or "flux".
        pipeline_class: its class in diffusers.
        denoiser: name of the denoiser in the pipeline.
        text_encoders: names of the text encoders in the pipeline, in the order of their tokenizers.
        trainable_text_encoders: those of them that DreamBooth trains.
        prompt_tokenizer: the tokenizer that limits the length of a prompt.
        encode_prompts: (models, prompts) -> `Conditioning`, differentiable.
        draw_timestep: (models, generator) -> the timestep of one example, a tensor ().
        timestep_at: (models, fraction in [0, 1)) -> the timestep there, a tensor ().
        add_noise: (models, latents, noise, timesteps) -> noisy latents.
        target: (models, latents, noise, timesteps) -> what should be predicted.
        predict: (models, noisy, timesteps, conditioning, *, sizes=None) -> the prediction; `sizes`
            are the (width, height) that each photo had, which only SDXL is told.
    """

    name: str
    pipeline_class: str
    denoiser: str
    text_encoders: tuple[str, ...]
    trainable_text_encoders: tuple[str, ...]
    prompt_tokenizer: str
    encode_prompts: Callable[[Models, Sequence[str]], Conditioning]
    draw_timestep: Callable[[Models, torch.Generator], torch.Tensor]
    timestep_at: Callable[[Models, float], torch.Tensor]
    add_noise: Callable[[Models, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    target: Callable[[Models, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    predict: Callable[..., torch.Tensor]


def denoising_errors(
    models: Models,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """Return the mean squared error (B,) of each picture, in float32."""
    family = models.family
    noisy_latents = family.add_noise(models, latents, noise, timesteps)
    model_pred = family.predict(models, noisy_latents, timesteps, conditioning)
    target = family.target(models, latents, noise, timesteps)
    return F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


@torch.no_grad()
def heldout_loss(
    models: Models, latents: torch.Tensor, conditioning: Conditioning, *, seed: int = 0
) -> float:
    """Return the mean denoising loss of pictures on fixed noise and evenly spaced timesteps.

    The same arguments give the same number, so that two models can be compared.

    Args:
        models: the model to judge.
        latents: (N, C, h, w) of pictures that were not trained on.
        conditioning: their captions, N of them.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for draw in range(_HELDOUT_TIMESTEPS):
        timestep = models.family.timestep_at(models, (draw + 0.5) / _HELDOUT_TIMESTEPS)
        timesteps = timestep.to(latents.device).expand(len(latents))
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        losses.append(denoising_errors(models, latents, noise, timesteps, conditioning))
    return float(torch.stack(losses).mean())


def scale_latents(
    vae: Any, mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the VAE's posterior in the denoiser's units."""
    factor = vae.config.scaling_factor
    return (mean - (vae.config.shift_factor or 0.0)) * factor, std * factor


def count_tokens(models: Models, prompt: str) -> int:
    """Return how many tokens a prompt has, those for its start and end included."""
    tokenizer = models.tokenizers[models.family.prompt_tokenizer]
    return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)


def token_limit(models: Models) -> int:
    """Return how many tokens of a prompt are read; what comes after them is cut off."""
    if models.family.name == "flux":
        return _flux_tokens(models)
    return int(models.tokenizers[models.family.prompt_tokenizer].model_max_length)


def _tokenize(
    tokenizer: Any, prompts: Sequence[str], length: int, encoder: nn.Module
) -> torch.Tensor:
    """Return token numbers (B, T), padded and cut to `length`, where the encoder is."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = tokens.input_ids.to(next(encoder.parameters()).device)
    return ids


def _clip_outputs(models: Models, prompts: Sequence[str], suffix: str, **wanted: bool) -> Any:
    tokenizer = models.tokenizers[f"tokenizer{suffix}"]
    encoder = models.part(f"text_encoder{suffix}")
    return encoder(_tokenize(tokenizer, prompts, tokenizer.model_max_length, encoder), **wanted)


def _encode_sd(models: Models, prompts: Sequence[str]) -> Conditioning:
    return Conditioning(_clip_outputs(models, prompts, "").last_hidden_state)


def _encode_sdxl(models: Models, prompts: Sequence[str]) -> Conditioning:
    """Source: Podell et al. 2023, arXiv 2307.01952, section 2.1: penultimate outputs of both."""
    first = _clip_outputs(models, prompts, "", output_hidden_states=True)
    second = _clip_outputs(models, prompts, "_2", output_hidden_states=True)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return Conditioning(hidden, second.text_embeds)


def _encode_flux(models: Models, prompts: Sequence[str]) -> Conditioning:
    pooled = _clip_outputs(models, prompts, "").pooler_output
    t5 = models.part("text_encoder_2")
    ids = _tokenize(models.tokenizers["tokenizer_2"], prompts, _flux_tokens(models), t5)
    return Conditioning(t5(ids)[0], pooled)


def _flux_tokens(models: Models) -> int:
    guided = models.denoiser.config.guidance_embeds
    limit = _FLUX_DEV_TOKENS if guided else _FLUX_SCHNELL_TOKENS
    return min(limit, int(models.tokenizers["tokenizer_2"].model_max_length))


def _draw_ddpm_timestep(models: Models, generator: torch.Generator) -> torch.Tensor:
    steps = models.noise_scheduler.config.num_train_timesteps
    return torch.randint(0, steps, (), generator=generator)


def _ddpm_timestep_at(models: Models, fraction: float) -> torch.Tensor:
    return torch.tensor(int(fraction * models.noise_scheduler.config.num_train_timesteps))


def _add_ddpm_noise(
    models: Models, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    noisy: torch.Tensor = models.noise_scheduler.add_noise(latents, noise, timesteps)
    return noisy


def _ddpm_target(
    models: Models, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    return prediction_target(models.noise_scheduler, latents, noise, timesteps)


def _draw_flow_timestep(models: Models, generator: torch.Generator) -> torch.Tensor:
    """Source: Esser et al. 2024, arXiv 2403.03206, section 3.1, logit-normal with mean 0, std 1."""
    sigma = torch.sigmoid(torch.randn((), generator=generator))
    return sigma * int(models.noise_scheduler.config.num_train_timesteps)


def _flow_timestep_at(models: Models, fraction: float) -> torch.Tensor:
    return torch.tensor(fraction * models.noise_scheduler.config.num_train_timesteps)


def _add_flow_noise(
    models: Models, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Source: Lipman et al. 2022, arXiv 2210.02747: the straight line from picture to noise."""
    sigmas = timesteps / int(models.noise_scheduler.config.num_train_timesteps)
    sigmas = sigmas.to(latents.dtype)[:, None, None, None]
    return (1 - sigmas) * latents + sigmas * noise


def _flow_target(
    models: Models, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    del models, timesteps  # the slope of a straight line is the same everywhere
    return noise - latents


def _predict_sd(
    models: Models,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    del sizes
    prediction: torch.Tensor = models.denoiser(noisy, timesteps, conditioning.hidden).sample
    return prediction


def _predict_sdxl(
    models: Models,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    added = {
        "text_embeds": conditioning.pooled,
        "time_ids": _time_ids(models, noisy, sizes),
    }
    prediction: torch.Tensor = models.denoiser(
        noisy, timesteps, conditioning.hidden, added_cond_kwargs=added
    ).sample
    return prediction


def _time_ids(
    models: Models, noisy: torch.Tensor, sizes: Sequence[tuple[int, int]] | None
) -> torch.Tensor:
    """Return (B, 6): height and width before, corner of the crop, height and width now.

    Source: Podell et al. 2023, arXiv 2307.01952, section 2.2. Crops are made to show the subject,
    so their corner is said to be that of a picture that was not cut.
    """
    scale = models.pipeline.vae_scale_factor
    height, width = noisy.shape[2] * scale, noisy.shape[3] * scale
    before = sizes or [(width, height)] * len(noisy)
    rows = [[h, w, 0, 0, height, width] for w, h in before]
    # Half precision would round sizes above 256 or 2048.
    return torch.tensor(rows, dtype=torch.float32, device=noisy.device)


def _predict_flux(
    models: Models,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    del sizes
    batch, channels, height, width = noisy.shape
    # (B, C, h, w) -> (B, h/2 * w/2, 4C): a token is a block of 2 x 2 latents.
    tokens = F.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2)
    guidance = None
    if models.denoiser.config.guidance_embeds:
        guidance = torch.full((batch,), _FLUX_GUIDANCE, device=noisy.device)
    prediction = models.denoiser(
        hidden_states=tokens,
        timestep=timesteps / models.noise_scheduler.config.num_train_timesteps,
        guidance=guidance,
        pooled_projections=conditioning.pooled,
        encoder_hidden_states=conditioning.hidden,
        txt_ids=torch.zeros(conditioning.hidden.shape[1], 3, device=noisy.device),
        img_ids=_flux_positions(height // 2, width // 2).to(noisy.device),
        return_dict=False,
    )[0]
    grid = prediction.transpose(1, 2).reshape(batch, 4 * channels, height // 2, width // 2)
    return F.pixel_shuffle(grid, 2)


def _flux_positions(rows: int, columns: int) -> torch.Tensor:
    """Return (rows * columns, 3): a zero, the row and the column of each token."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()


_DDPM: dict[str, Any] = {
    "draw_timestep": _draw_ddpm_timestep,
    "timestep_at": _ddpm_timestep_at,
    "add_noise": _add_ddpm_noise,
    "target": _ddpm_target,
}
_STABLE_DIFFUSION: dict[str, Any] = {
    **_DDPM,
    "pipeline_class": "StableDiffusionPipeline",
    "denoiser": "unet",
    "text_encoders": ("text_encoder",),
    "trainable_text_encoders": ("text_encoder",),
    "prompt_tokenizer": "tokenizer",
    "encode_prompts": _encode_sd,
    "predict": _predict_sd,
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="flux",
            pipeline_class="FluxPipeline",
            denoiser="transformer",
            text_encoders=("text_encoder", "text_encoder_2"),
            # T5 is 4.7 billion parameters that no DreamBooth needs to move.
            trainable_text_encoders=("text_encoder",),
            prompt_tokenizer="tokenizer_2",
            encode_prompts=_encode_flux,
            draw_timestep=_draw_flow_timestep,
            timestep_at=_flow_timestep_at,
            add_noise=_add_flow_noise,
            target=_flow_target,
            predict=_predict_flux,
        ),
        Family(name="sd1", **_STABLE_DIFFUSION),
        Family(name="sd2", **_STABLE_DIFFUSION),
        Family(
            name="sdxl",
            pipeline_class="StableDiffusionXLPipeline",
            denoiser="unet",
            text_encoders=("text_encoder", "text_encoder_2"),
            trainable_text_encoders=("text_encoder", "text_encoder_2"),
            prompt_tokenizer="tokenizer",
            encode_prompts=_encode_sdxl,
            predict=_predict_sdxl,
            **_DDPM,
        ),
    )
}
