"""Settings of a training run; a frozen record, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from colabtools.errors import ConfigError
from colabtools.fields import (
    LARGEST_SEED,
    check,
    check_choice,
    check_flag,
    check_number,
    check_text,
    check_whole,
    split_text,
    whole_from_text,
)

__all__ = ["Auto", "TrainConfig", "check_some_steps"]

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run; "auto" takes the value of the base model's reference run.

    Attributes:
        base_model: name in the registry, folder in diffusers' layout, or Hub repository.
        method: full (every weight), lora, dora, or auto.
        stages: separate (the text encoder learns through the frozen UNet, then the UNet with the
            encoder frozen), joint (both at once for unet_steps), or classic (as separate, but the
            UNet moves along in the first stage and is thrown away after it).
        text_encoder_steps: updates of the first stage.
        unet_steps: updates of the second stage, of UNet or transformer.
        text_encoder_lr: peak learning rate of the text encoder.
        unet_lr: peak learning rate of the UNet or transformer.
        lr_schedule: linear (to 0), cosine or constant.
        lr_warmup_steps: updates in which the rate of a stage rises from 0.
        optimizer: adamw, adamw8bit, prodigy, adafactor, lion, or auto.
        weight_decay: decoupled decay of the trained weights.
        max_grad_norm: gradients are shortened to this norm.
        batch_size: pictures per forward pass and process.
        gradient_accumulation_steps: passes per update.
        lora_rank: rank of the adapters.
        lora_alpha: scale of the adapters; auto is the rank.
        lora_dropout: part of the adapters' inputs that is dropped, in [0, 1).
        prior_preservation: learn pictures of the class next to the photos, so that the class stays
            what it was.
        class_prompt: prompt of the class pictures; needed with prior_preservation.
        num_class_images: how many of them to draw with the base model.
        prior_loss_weight: weight of their loss.
        caption_dropout: part of the examples trained without their caption, in [0, 1].
        shuffle_tokens: shuffle the comma-separated parts of captions anew each time.
        keep_tokens: that many first parts stay in place.
        strict_captions: refuse empty captions and captions without a picture.
        offset_noise: strength of noise that is the same all over a channel; 0 is off.
        min_snr_gamma: limit of the signal-to-noise ratio in the loss weight; 0 is off, 5 is usual.
        zero_terminal_snr: train the last timestep as pure noise (v-prediction models).
        ema: keep an exponential moving average of the weights; it becomes the result.
        ema_decay: of the average.
        crops: crops of each picture, one drawn at each step.
        heldout_images: pictures kept out of the training to measure the loss on.
        seed: of data order, noise, timesteps, crops and captions.
        allow_resolution: train at a size that the base model was not made for.
        quantize: nf4 (4-bit frozen weights, for adapters), none, or auto (for Flux on small cards).
        precision: auto (by the card's compute capability), fp32, fp16 or bf16.
        gradient_checkpointing: on, off, or auto (where memory is short).
        attention: sdpa, or xformers where it is installed.
        compile: compile the UNet; the first steps take minutes.
        checkpoint_every: updates between two states that a run can be resumed from.
        keep_last: how many of these are kept.
        save_every: keep the state for good, and write a model file, every that many updates; 0 is
            off.
        sample_every: draw sample_prompts every that many updates; 0 is off.
        sample_prompts: what to draw; "|" in a text separates two prompts; empty takes the captions
            of the first pictures.
        sample_seeds: starting noise of the samples; a text with commas is split.
        tensorboard: write events to logs/tensorboard as well.
        resume: auto (go on with an unfinished run, else begin), never (start over; what the session
            holds is replaced once the new is safe) or require (go on or fail).
        allow_changes: go on with an unfinished run although settings were changed.
    """

    METHODS: ClassVar[tuple[str, ...]] = ("auto", "full", "lora", "dora")
    STAGES: ClassVar[tuple[str, ...]] = ("separate", "classic", "joint")
    SCHEDULES: ClassVar[tuple[str, ...]] = ("linear", "cosine", "constant")
    PRECISIONS: ClassVar[tuple[str, ...]] = ("auto", "fp32", "fp16", "bf16")
    RESUMES: ClassVar[tuple[str, ...]] = ("auto", "never", "require")

    base_model: str = "micro"
    method: str = "auto"
    stages: str = "separate"
    text_encoder_steps: int | Auto = "auto"
    unet_steps: int | Auto = "auto"
    text_encoder_lr: float | Auto = "auto"
    unet_lr: float | Auto = "auto"
    lr_schedule: str = "linear"
    lr_warmup_steps: int = 0
    optimizer: str = "auto"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    batch_size: int | Auto = "auto"
    gradient_accumulation_steps: int = 1
    lora_rank: int = 16
    lora_alpha: float | Auto = "auto"
    lora_dropout: float = 0.0
    prior_preservation: bool = False
    class_prompt: str = ""
    num_class_images: int | Auto = "auto"
    prior_loss_weight: float = 1.0
    caption_dropout: float = 0.0
    shuffle_tokens: bool = False
    keep_tokens: int = 0
    strict_captions: bool = False
    offset_noise: float = 0.0
    min_snr_gamma: float = 0.0
    zero_terminal_snr: bool = False
    ema: bool = False
    ema_decay: float = 0.999
    crops: int = 1
    heldout_images: int = 0
    seed: int = 0
    allow_resolution: bool = False
    quantize: str = "auto"
    precision: str = "auto"
    gradient_checkpointing: str = "auto"
    attention: str = "sdpa"
    compile: bool = False
    checkpoint_every: int | Auto = "auto"
    keep_last: int = 2
    save_every: int = 0
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_seeds: tuple[int, ...] = (0, 1)
    tensorboard: bool = False
    resume: str = "auto"
    allow_changes: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        check_text("base_model", self.base_model, "a name, a folder or a Hub repository")
        self._check_choices()
        self._check_numbers()
        for field in fields(self):
            if field.type == "bool":
                check_flag(field.name, getattr(self, field.name))
        self._check_samples()
        check_some_steps(self.text_encoder_steps, self.unet_steps)
        if self.stages == "joint" and self.text_encoder_steps != "auto":
            raise ConfigError(
                f"text_encoder_steps is {self.text_encoder_steps!r} with stages 'joint', where "
                "both learn for unet_steps; leave it at auto"
            )
        if self.stages == "classic" and self.method not in ("auto", "full"):
            raise ConfigError(
                f"method is {self.method!r} with stages 'classic', which trains every weight; "
                "use stages separate"
            )
        check("class_prompt", self.class_prompt, isinstance(self.class_prompt, str), "a prompt")
        if self.prior_preservation and not self.class_prompt.strip():
            raise ConfigError(
                f"class_prompt is {self.class_prompt!r}; prior_preservation needs one, "
                "such as 'a star'"
            )

    def _check_choices(self) -> None:
        check_choice("method", self.method, self.METHODS)
        check_choice("stages", self.stages, self.STAGES)
        check_choice("lr_schedule", self.lr_schedule, self.SCHEDULES)
        check_choice("quantize", self.quantize, ("auto", "none", "nf4"))
        check_choice("precision", self.precision, self.PRECISIONS)
        check_choice("gradient_checkpointing", self.gradient_checkpointing, ("auto", "on", "off"))
        check_choice("attention", self.attention, ("sdpa", "xformers"))
        check_choice("resume", self.resume, self.RESUMES)
        check_text("optimizer", self.optimizer, "a name or auto")

    def _check_numbers(self) -> None:
        least = {"text_encoder_steps": 0, "unet_steps": 0, "batch_size": 1, "num_class_images": 1}
        for name, number in {**least, "checkpoint_every": 1}.items():
            if getattr(self, name) != "auto":
                check_whole(name, getattr(self, name), number, also=", or auto")
        for name in ("text_encoder_lr", "unet_lr", "lora_alpha"):
            if getattr(self, name) != "auto":
                check_number(name, getattr(self, name), also=", or auto")
        whole = {"gradient_accumulation_steps": 1, "lora_rank": 1, "crops": 1, "keep_last": 1}
        names = ("lr_warmup_steps", "keep_tokens", "heldout_images", "save_every", "sample_every")
        for name, number in {**whole, **dict.fromkeys(names, 0)}.items():
            check_whole(name, getattr(self, name), number)
        check_whole("seed", self.seed, 0, LARGEST_SEED)
        for name in ("prior_loss_weight", "max_grad_norm"):
            check_number(name, getattr(self, name))
        for name in ("weight_decay", "offset_noise", "min_snr_gamma"):
            check_number(name, getattr(self, name), least=0)
        check_number("caption_dropout", self.caption_dropout, least=0, most=1)
        for name in ("lora_dropout", "ema_decay"):
            below_one = 0 <= getattr(self, name) < 1 if _is_number(getattr(self, name)) else False
            check(name, getattr(self, name), below_one, "a number of at least 0 and below 1")

    def _check_samples(self) -> None:
        prompts = tuple(
            p for p in split_text("sample_prompts", self.sample_prompts, "|") if p != ""
        )
        for prompt in prompts:
            check_text("sample_prompts", prompt, "prompts with '|' between")
        seeds = tuple(
            whole_from_text(s) for s in split_text("sample_seeds", self.sample_seeds, ",")
        )
        check("sample_seeds", seeds, bool(seeds), "at least one seed")
        for seed in seeds:
            check_whole("sample_seeds", seed, 0, LARGEST_SEED)
        object.__setattr__(self, "sample_prompts", prompts)
        object.__setattr__(self, "sample_seeds", seeds)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_some_steps(text_encoder_steps: object, unet_steps: object) -> None:
    """Refuse a run without any step.

    Raises:
        ConfigError: both are 0.
    """
    if text_encoder_steps == 0 and unet_steps == 0:
        raise ConfigError(
            "text_encoder_steps and unet_steps are both 0; "
            "nothing would be trained, give one of them"
        )
