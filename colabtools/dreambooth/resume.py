"""Whether a run begins, goes on or is done already; never started over without being told to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colabtools.errors import CheckpointError, ConfigError
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from colabtools.dreambooth.saved import Saved
    from colabtools.dreambooth.train_config import TrainConfig

__all__ = ["Beginning", "choose_beginning", "differences"]

# With another value of these a saved state has other tensors, or means something else.
_BINDING = frozenset(
    {
        "base_model",
        "base_weights",
        "ema",
        "lora_alpha",
        "lora_rank",
        "method",
        "optimizer",
        "stages",
        "text_encoder_steps",
        "zero_terminal_snr",
    }
)
_MISSING = "nothing"


@dataclass(frozen=True)
class Beginning:
    """Where a run starts: from the base model, from a saved state, or not at all."""

    saved: Saved | None
    done: bool = False


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each setting that differs as (value of the saved run, value asked for)."""
    before = {**saved.get("settings", {}), **_top(saved)}
    after = {**asked.get("settings", {}), **_top(asked)}
    if "base_weights" not in before.keys() & after.keys():
        for side in (before, after):
            side.pop("base_weights", None)
    return {
        name: (before.get(name, _MISSING), after.get(name, _MISSING))
        for name in sorted({*before, *after})
        if before.get(name, _MISSING) != after.get(name, _MISSING)
    }


def _top(description: Mapping[str, Any]) -> dict[str, Any]:
    # Older states and repositories of the Hub have no digest of their weights.
    names = ("base_model", "base_weights", "pictures")
    return {name: description[name] for name in names if description.get(name)}


def choose_beginning(
    saved: Saved | None, asked: Mapping[str, Any], config: TrainConfig
) -> Beginning:
    """Return where the run starts.

    Args:
        saved: the newest valid state of the session.
        asked: description of the run that is wanted.
        config: says whether to resume, and whether settings may have changed.

    Raises:
        CheckpointError: resume is "require" and there is nothing to go on from.
        ConfigError: the session holds a run with other settings; the message lists them.
    """
    if config.resume == "never":
        return Beginning(None)
    if saved is None:
        if config.resume == "require":
            raise CheckpointError(
                "resume is 'require' and the session holds no state to go on from; "
                "set resume to auto to begin"
            )
        return Beginning(None)
    changed = differences(saved.description, asked)
    if saved.finished and not changed:
        return Beginning(saved, done=True)
    if changed:
        _accept(saved, changed, asked, config)
    return Beginning(saved)


def _accept(
    saved: Saved,
    changed: dict[str, tuple[Any, Any]],
    asked: Mapping[str, Any],
    config: TrainConfig,
) -> None:
    """Return if a run may go on with these changes."""
    listing = ", ".join(f"{name} {_short(a)} -> {_short(b)}" for name, (a, b) in changed.items())
    over = "set resume to never to start over, or use another session"
    if saved.finished:
        raise ConfigError(f"the session is trained already with other settings: {listing}; {over}")
    where = (
        f"the session holds an unfinished run (step {saved.step}) with other settings: {listing}"
    )
    if binding := sorted(_BINDING & changed.keys()):
        raise ConfigError(
            f"{where}; its state does not fit another {binding[0]}: put it back, or {over}"
        )
    steps = asked.get("settings", {})
    total = sum(steps.get(name, 0) for name in ("text_encoder_steps", "unet_steps"))
    if "unet_steps" in changed and saved.step >= total:
        raise ConfigError(
            f"{where}; step {saved.step} is done and the run would end at {total}: give more "
            f"unet_steps, or {over}"
        )
    if not config.allow_changes:
        raise ConfigError(
            f"{where}; put them back, set allow_changes to go on with them, or {over}"
        )
    get_logger(__name__).warning("going on from step %d with changes: %s", saved.step, listing)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
