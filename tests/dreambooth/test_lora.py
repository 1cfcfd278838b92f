"""Adapters on every kind of part: they start silent, learn alone, travel exactly and merge away."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from colabtools.dreambooth.lora import (
    AdapterConfig,
    adapter_config,
    adapter_parameters,
    adapter_state,
    add_adapter,
    load_adapter_state,
    merge_adapter,
)
from colabtools.dreambooth.models import load_pipeline
from colabtools.errors import CheckpointError, ConfigError
from colabtools.registry import find_base

from .tiny import CLIP_VOCAB, WIDTH, make_tiny

PLAIN = AdapterConfig(rank=4, alpha=2.0)
DORA = AdapterConfig(rank=2, use_dora=True)
# part: kind of model, adapted layers. Source of the counts: 16 transformers of 2 attentions with 4
# layers each; 12 blocks of 4; 19 blocks of 12 and 38 of 3.
PARTS = {"unet": ("sd1", 128), "text_encoder": ("sd1", 48), "transformer": ("flux-dev", 342)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: make_tiny(kind, tmp_path_factory.mktemp("tiny") / kind)
        for kind in ("sd1", "flux-dev")
    }


@pytest.fixture
def load(folders: dict[str, Path]) -> Callable[[str], nn.Module]:
    def load_part(name: str) -> nn.Module:
        pipeline = load_pipeline(find_base(str(folders[PARTS[name][0]])))
        part: nn.Module = getattr(pipeline, name).eval()
        return part

    return load_part


def run(part: nn.Module, name: str) -> torch.Tensor:
    """The part's output on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 5, WIDTH, generator=generator)
    if name == "text_encoder":
        return part(torch.arange(77)[None] % CLIP_VOCAB).last_hidden_state
    if name == "unet":
        return part(torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([9]), hidden).sample
    return part(
        hidden_states=torch.randn(1, 4, 64, generator=generator),
        timestep=torch.tensor([0.5]),
        guidance=torch.ones(1),
        pooled_projections=hidden[:, 0],
        encoder_hidden_states=hidden,
        txt_ids=torch.zeros(5, 3),
        img_ids=torch.zeros(4, 3),
    ).sample


def disturb(part: nn.Module) -> None:
    """Give the adapter the weights of one that has learned."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(part):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("config", [PLAIN, DORA], ids=["lora", "dora"])
@torch.no_grad()
def test_a_merged_adapter_draws_what_the_unmerged_one_did(
    load: Callable[[str], nn.Module], name: str, config: AdapterConfig
) -> None:
    part = load(name)
    plain = {key: tensor.clone() for key, tensor in part.state_dict().items()}
    before = run(part, name)
    weights = add_adapter(part, name, config)
    per_layer = 3 if config.use_dora else 2
    assert len(weights) == per_layer * PARTS[name][1]
    torch.testing.assert_close(run(part, name), before, rtol=0, atol=1e-5)
    disturb(part)
    adapted = run(part, name)
    assert (adapted - before).abs().max() > 1e-2
    merge_adapter(part)
    torch.testing.assert_close(run(part, name), adapted, rtol=0, atol=1e-5)
    merged = part.state_dict()
    assert list(merged) == list(plain)
    changed = [key for key in plain if not merged[key].equal(plain[key])]
    assert len(changed) == PARTS[name][1]
    assert not hasattr(part, "peft_config")


@pytest.mark.parametrize("config", [PLAIN, DORA], ids=["lora", "dora"])
@torch.no_grad()
def test_an_adapter_travels_exactly(
    load: Callable[[str], nn.Module], config: AdapterConfig
) -> None:
    part, other = load("unet"), load("unet")
    add_adapter(part, "unet", config, seed=1)
    disturb(part)
    manifest = json.loads(json.dumps(adapter_config(part)))
    state = {name: tensor.clone() for name, tensor in adapter_state(part).items()}
    add_adapter(other, "unet", AdapterConfig.from_dict(manifest), seed=2)
    assert not run(other, "unet").equal(run(part, "unet"))
    load_adapter_state(other, state)
    assert run(other, "unet").equal(run(part, "unet"))
    assert adapter_config(other) == manifest
    loaded = adapter_state(other)
    assert all(tensor.equal(loaded[name]) for name, tensor in state.items())
    assert all(
        name.split(".")[-2] in ("lora_A", "lora_B") for name in state if "vector" not in name
    )


def test_the_manifest_names_rank_scale_and_layers(load: Callable[[str], nn.Module]) -> None:
    part = load("text_encoder")
    add_adapter(part, "text_encoder", AdapterConfig(rank=3, dropout=0.25))
    assert adapter_config(part) == {
        "rank": 3,
        "alpha": 3.0,
        "dropout": 0.25,
        "use_dora": False,
        "target_modules": ["k_proj", "out_proj", "q_proj", "v_proj"],
    }


def test_only_the_adapter_learns_and_in_fp32_on_a_half_precision_network(
    load: Callable[[str], nn.Module],
) -> None:
    part = load("unet").to(torch.bfloat16).requires_grad_(True)
    weights = add_adapter(part, "unet", DORA)
    assert {weight.dtype for weight in weights} == {torch.float32}
    frozen = [w for w in part.parameters() if not any(w is own for own in weights)]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in frozen)
    with torch.autocast("cpu", torch.bfloat16):
        run(part, "unet").float().square().mean().backward()
    assert all(weight.grad is None for weight in frozen)
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)
    assert sum(float(weight.grad.abs().sum()) for weight in weights if weight.grad is not None) > 0


def test_the_seed_decides_the_adapter_and_nothing_else_does(
    load: Callable[[str], nn.Module],
) -> None:
    states = []
    for seed, noise in ((7, 0), (7, 1), (8, 0)):
        torch.manual_seed(noise)
        part = load("text_encoder")
        before = torch.get_rng_state()
        add_adapter(part, "text_encoder", PLAIN, seed=seed)
        assert torch.get_rng_state().equal(before)
        states.append(torch.cat([tensor.flatten() for tensor in adapter_state(part).values()]))
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])


def test_weights_that_do_not_fit_are_refused_with_both_lists(
    load: Callable[[str], nn.Module],
) -> None:
    part = load("text_encoder")
    add_adapter(part, "text_encoder", PLAIN)
    state = adapter_state(part)
    first = next(iter(state))
    wrong = {name: tensor for name, tensor in state.items() if name != first}
    wrong["stranger.lora_A.weight"] = state[first]
    with pytest.raises(CheckpointError) as why:
        load_adapter_state(part, wrong)
    assert f"missing {first}; extra stranger.lora_A.weight; of another shape nothing" in str(
        why.value
    )
    with pytest.raises(CheckpointError, match=r"of another shape .* and \d+ more"):
        load_adapter_state(part, {name: tensor[:1, :1] for name, tensor in state.items()})


def test_a_network_without_an_adapter_is_told_apart(load: Callable[[str], nn.Module]) -> None:
    part = load("text_encoder")
    for call in (adapter_config, adapter_state, merge_adapter):
        with pytest.raises(CheckpointError, match="has no adapter"):
            call(part)


def test_an_adapter_that_is_not_finite_is_not_merged(load: Callable[[str], nn.Module]) -> None:
    part = load("text_encoder")
    weights = add_adapter(part, "text_encoder", PLAIN)
    weights[1].data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"adapter of encoder\.layers\.0.* is not finite"):
        merge_adapter(part)


def test_layers_that_the_part_does_not_have_are_refused(load: Callable[[str], nn.Module]) -> None:
    with pytest.raises(ConfigError, match="names of layers that the text_encoder has"):
        add_adapter(load("text_encoder"), "text_encoder", AdapterConfig(target_modules=("to_q",)))


@pytest.mark.parametrize(
    "values",
    [{"rank": 0}, {"rank": True}, {"alpha": 0.0}, {"dropout": 1.0}, {"use_dora": "no"}],
)
def test_a_shape_that_cannot_work_is_refused_by_its_field(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(values))} is "):
        AdapterConfig(**values)  # type: ignore[arg-type]


def test_a_manifest_of_another_version_is_refused() -> None:
    with pytest.raises(CheckpointError, match="written by another version"):
        AdapterConfig.from_dict({**asdict(PLAIN), "rank_dropout": 0.1})
    with pytest.raises(CheckpointError, match="rank is 0"):
        AdapterConfig.from_dict({**asdict(PLAIN), "rank": 0})
