"""A training run from its session's pictures to trained weights, resumed where it was stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from colabtools.dreambooth.byproducts import ensure_step_files, spared
from colabtools.dreambooth.dataset import check_examples, fingerprint, load_examples
from colabtools.dreambooth.guard import Metric, Setback
from colabtools.dreambooth.models import suitable_threads
from colabtools.dreambooth.monitor import Monitor
from colabtools.dreambooth.plan import plan_training
from colabtools.dreambooth.randomness import kept_rng
from colabtools.dreambooth.resume import choose_beginning
from colabtools.dreambooth.run import Run, Surroundings, check_run
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import CheckpointStore, latest_trained, local_checkpoints_dir
from colabtools.dreambooth.world import join_world
from colabtools.drive import is_remote
from colabtools.errors import TrainingError
from colabtools.registry import weights_digest
from colabtools.report import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from colabtools.dreambooth.dataset import Example
    from colabtools.dreambooth.plan import TrainPlan
    from colabtools.dreambooth.saved import Saved
    from colabtools.dreambooth.session import Session
    from colabtools.dreambooth.train_config import TrainConfig
    from colabtools.dreambooth.world import World
    from colabtools.drive import Workspace

__all__ = ["Metric", "Trained", "train"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run left behind; `metrics` is empty if an earlier run had done it already."""

    weights: Saved
    metrics: tuple[Metric, ...]
    loss_curve: Path


def train(workspace: Workspace, session_name: str, config: TrainConfig) -> Trained:
    """Train the session's pictures in stages and save the trained weights.

    A run that was stopped goes on from its last state, to the same weights bit for bit (on a CPU).
    A session that holds the result of the same settings and pictures already is left alone.

    Raises:
        CheckpointError: a state to go on from is required or found, and there is none or it does
            not fit.
        ConfigError: the settings contradict each other, the base model, or the session's own run.
        DatasetError: the session has no training pictures, or their captions are wrong.
        ModelError: the base model cannot be loaded.
        SessionBusyError: another runtime is writing to the session, or took it over.
        SessionError: there is no such session.
        TrainingError: numbers or memory fail even after going back once.
        WorkspaceError: there is no room for the states and the result.
    """
    session = open_session(workspace, session_name)
    plan = plan_training(config)
    world = join_world()
    with session.writing("train", lead=world.is_main):
        return _train(session, plan, world)


def _train(session: Session, plan: TrainPlan, world: World) -> Trained:
    config = plan.config
    # The first process may have unpacked the pictures of an older session just now.
    world.wait()
    examples = load_examples(session)
    check_examples(session, examples, strict=config.strict_captions)
    check_run(plan, examples)
    monitor = Monitor(session, plan)
    description = _describe(plan, examples, world)
    # Starting over must be possible where every state is damaged.
    newest = CheckpointStore(session).newest() if config.resume != "never" else None
    beginning = choose_beginning(newest, description, config)
    if beginning.done:
        return Trained(
            weights=_complete(session, plan, world), metrics=(), loss_curve=monitor.curve
        )
    if beginning.saved is None and world.is_main:
        _name_former_models(session)
    with (
        _open_store(session, plan, fresh=beginning.saved is None) as store,
        kept_rng(),
        suitable_threads(plan.base),
    ):
        if beginning.saved is not None and world.is_main:
            store.send_stranded()
        around = Surroundings(world=world, store=store, monitor=monitor)
        run = Run(session, plan, examples, description, around)
        try:
            _go_on(run, world, store, beginning.saved)
        finally:
            monitor.close()
    if world.is_main:
        _name_stranded(store)
        with spared("the session's record"):
            _record(session, config, monitor)
    world.wait()
    return Trained(
        weights=latest_trained(session), metrics=tuple(monitor.metrics), loss_curve=monitor.curve
    )


def _name_former_models(session: Session) -> None:
    """Say which model files are of a former run; they are the user's, so they stay."""
    suffixes = (".safetensors", ".ckpt")
    names = sorted(path.name for path in session.folder.iterdir() if path.suffix in suffixes)
    if names:
        get_logger(__name__).warning(
            "%s of session %s hold what was trained before, until export writes them anew",
            ", ".join(names),
            session.name,
        )


def _complete(session: Session, plan: TrainPlan, world: World) -> Saved:
    """Return the result of a run that is done, with what a kill at its very end left undone."""
    weights = latest_trained(session)
    get_logger(__name__).info(
        "%s is trained with these settings already; set resume to never to do it again",
        weights.folder,
    )
    if not world.is_main:
        return weights
    with _open_store(session, plan, fresh=False) as store:
        store.send_stranded()
        store.wait()
        _name_stranded(store)
        if plan.config.save_every:
            with spared("the model file of a saved step"):
                ensure_step_files(session, store.of_run(), plan.config.save_every)
    with spared("the session's record"):
        runs = session.read_record()["runs"]
        if not any((run.get("verb"), run.get("step")) == ("train", weights.step) for run in runs):
            session.add_run({"verb": "train", "step": weights.step, **asdict(plan.config)})
    return weights


def _name_stranded(store: CheckpointStore) -> None:
    if store.stranded is not None:
        get_logger(__name__).warning(
            "the workspace could not be written, so the result is only on this machine, in %s: "
            "mount it again and run train once more to bring it there",
            store.stranded,
        )


def _record(session: Session, config: TrainConfig, monitor: Monitor) -> None:
    """Write the run into the session's history."""
    session.add_run(
        {
            "verb": "train",
            "step": monitor.metrics[-1].step,
            **asdict(config),
            "final_loss": monitor.metrics[-1].as_json()["loss"],
            "skipped_updates": sum(metric.skipped for metric in monitor.metrics),
        }
    )


def _open_store(session: Session, plan: TrainPlan, *, fresh: bool) -> CheckpointStore:
    # A step must not wait for a network; what is on this machine is sent while training goes on.
    staging = local_checkpoints_dir(session) if is_remote(session.folder) else None
    return CheckpointStore(
        session,
        keep_last=plan.config.keep_last,
        keep_every=plan.config.save_every,
        staging=staging,
        fresh=fresh,
    )


def _describe(plan: TrainPlan, examples: tuple[Example, ...], world: World) -> dict[str, Any]:
    # With another number of processes the same batch size is another batch.
    return {
        "base_model": plan.base.name,
        "base_weights": weights_digest(plan.base),
        "settings": {**plan.settings(), "processes": world.size},
        "pictures": fingerprint(examples),
    }


def _go_on(run: Run, world: World, store: CheckpointStore, saved: Saved | None) -> None:
    """Train to the end, going back to the last state once for numbers and once for each rung."""
    while True:
        try:
            run.attempt(saved)
            return
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(
                f"out of memory before the first update ({reason}); use a lower resolution, method "
                "lora, quantize nf4, or a larger card"
            ) from error
        except Setback as setback:
            if setback.memory is None:
                if run.lr_scale < 1:
                    raise TrainingError(
                        f"{setback.cause}; it happened again with half the learning rate, the last "
                        "good state is kept: lower the rates, or look at the picture named"
                    ) from setback
                run.lr_scale = 0.5
            run.memory = setback.memory or run.memory
            saved = world.agree(store.newest() if world.is_main else None)
            get_logger(__name__).warning(
                "%s; going back to step %d%s",
                setback.cause,
                saved.step if saved else 0,
                " with half the learning rate" if setback.memory is None else "",
            )
