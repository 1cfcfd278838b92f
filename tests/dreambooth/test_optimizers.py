from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load, save

from colabtools.dreambooth import optimizers
from colabtools.dreambooth.optimizers import (
    OPTIMIZERS,
    can_use_8bit,
    check_optimizer,
    load_optimizer_state,
    make_optimizer,
    reference_lr,
    resolve_optimizer,
    state_bytes,
)
from colabtools.errors import CheckpointError, ConfigError, MissingDependencyError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
INSTALLED = ["adafactor", "adamw", "lion", "prodigy"]
RATES = {"adafactor": 1e-2, "adamw": 1e-2, "lion": 2e-3, "prodigy": 1.0}
# All steps, and those before the cut. Prodigy's step size is still at its floor after 20 steps, and
# grows by half every five around the 50th.
LENGTHS = {"adafactor": (20, 7), "adamw": (20, 7), "lion": (20, 7), "prodigy": (70, 53)}


@pytest.fixture(autouse=True)
def fresh_announcements() -> Iterator[None]:
    optimizers._announce_fallback.cache_clear()
    yield
    optimizers._announce_fallback.cache_clear()


class Net(torch.nn.Module):
    """Every kind of shape that is trained: a convolution, a matrix, vectors, zeros, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.linear = torch.nn.Linear(8, 4)
        self.adapter = torch.nn.Parameter(torch.zeros(4, 4))
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.conv(pixels)).relu().mean(dim=(2, 3))  # (B, 8)
        hidden = self.linear(features)  # (B, 4)
        return self.scale * (hidden + hidden @ self.adapter)


def make_net(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype)


def groups_of(net: Net, name: str) -> list[dict[str, Any]]:
    """Two groups, as when a text encoder learns beside the denoiser."""
    rate = RATES[name]
    return [
        {"params": list(net.conv.parameters()) + [net.adapter], "lr": rate},
        {
            "params": [*net.norm.parameters(), *net.linear.parameters(), net.scale],
            "lr": rate,
        },
    ]


def run(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Train on batches that depend on the step alone; return the losses."""
    dtype = net.scale.dtype
    values = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(4, 3, 6, 6, generator=generator).to(dtype)
        loss = (net(pixels) - pixels.mean(dim=(2, 3)).sum(dim=1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values.append(loss.item())
    return values


def through_bytes(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint keeps it: contiguous tensors in one file, the rest as JSON."""
    tensors: dict[str, torch.Tensor] = {}

    def flatten(path: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous()
            return {"tensor": path}
        if isinstance(value, dict):
            return {"items": [[key, flatten(f"{path}.{key}", v)] for key, v in value.items()]}
        if isinstance(value, (list, tuple)):
            kept = [flatten(f"{path}.{i}", v) for i, v in enumerate(value)]
            return {type(value).__name__: kept}
        return value

    text = json.dumps(flatten("", state))
    read = load(save(tensors))

    def rebuild(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, kept),) = value.items()
        if kind == "tensor":
            return read[kept]
        if kind == "items":
            return {key: rebuild(v) for key, v in kept}
        return (list if kind == "list" else tuple)(rebuild(v) for v in kept)

    return rebuild(json.loads(text))


def weights(net: Net) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    different = [name for name in left if not left[name].equal(right[name])]
    assert different == []


def cut_and_resume(
    name: str, prepare: Any, *, resume: Any = load_optimizer_state
) -> tuple[Net, Net, list[float], list[float]]:
    """Return the uninterrupted net, the resumed net, and the losses of both after the cut."""
    steps, cut = LENGTHS[name]
    whole = prepare(make_net())
    steady = make_optimizer(name, groups_of(whole, name), device=CPU)
    losses = run(whole, steady, range(steps))[cut:]

    first = prepare(make_net())
    early = make_optimizer(name, groups_of(first, name), device=CPU)
    run(first, early, range(cut))
    saved, kept = through_bytes(early.state_dict()), weights(first)

    second = prepare(make_net())
    second.load_state_dict(kept)
    late = make_optimizer(name, groups_of(second, name), device=CPU)
    resume(late, saved)
    return whole, second, losses, run(second, late, range(cut, steps))


def as_is(net: Net) -> Net:
    return net


def in_bf16(net: Net) -> Net:
    return net.to(torch.bfloat16)


def channels_last(net: Net) -> Net:
    return net.to(memory_format=torch.channels_last)


# Without Prodigy in bf16: its first steps of 1e-6 are rounded away, so that it never starts.
@pytest.mark.parametrize(
    ("name", "prepare"),
    [(name, prepare) for name in INSTALLED for prepare in (as_is, channels_last)]
    + [(name, in_bf16) for name in ("adafactor", "adamw", "lion")],
)
def test_a_run_that_was_cut_goes_on_bit_for_bit(name: str, prepare: Any) -> None:
    whole, resumed, expected, losses = cut_and_resume(name, prepare)
    assert losses == expected
    assert_same(weights(whole), weights(resumed))
    moved = (whole.linear.weight - prepare(make_net()).linear.weight).abs().max()
    assert moved > 1e-4


@pytest.mark.parametrize("name", INSTALLED)
def test_the_same_run_without_the_state_ends_elsewhere(name: str) -> None:
    whole, forgetful, _, _ = cut_and_resume(name, as_is, resume=lambda optimizer, state: None)
    assert not whole.linear.weight.equal(forgetful.linear.weight)


def test_the_library_alone_would_round_adafactors_state() -> None:
    plain = torch.optim.Optimizer.load_state_dict
    whole, rounded, _, _ = cut_and_resume("adafactor", in_bf16, resume=plain)
    assert not all(whole.get_parameter(n).equal(p) for n, p in rounded.named_parameters())


@pytest.mark.parametrize("name", INSTALLED)
def test_the_saved_state_is_not_written_to(name: str) -> None:
    net = make_net()
    optimizer = make_optimizer(name, groups_of(net, name), device=CPU)
    run(net, optimizer, range(2))
    saved = through_bytes(optimizer.state_dict())
    before = json.dumps(saved, default=lambda tensor: tensor.tolist())
    load_optimizer_state(optimizer, saved)
    run(net, optimizer, range(2, 4))
    assert json.dumps(saved, default=lambda tensor: tensor.tolist()) == before


def test_the_state_takes_the_memory_layout_of_its_parameter() -> None:
    net = channels_last(make_net())
    optimizer = make_optimizer("adamw", groups_of(net, "adamw"), device=CPU)
    run(net, optimizer, range(1))
    load_optimizer_state(optimizer, through_bytes(optimizer.state_dict()))
    assert not net.conv.weight.is_contiguous()
    assert optimizer.state[net.conv.weight]["exp_avg"].stride() == net.conv.weight.stride()


def test_the_kernels_are_those_of_the_machine_that_resumes() -> None:
    net = make_net()
    optimizer = make_optimizer("adamw", groups_of(net, "adamw"), device=CPU)
    run(net, optimizer, range(1))
    saved = through_bytes(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["fused"], group["foreach"] = None, True
        group["lr"] = 0.125
    load_optimizer_state(optimizer, saved)
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    assert [group["foreach"] for group in optimizer.param_groups] == [None, None]
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("name", INSTALLED)
def test_the_state_of_another_optimizer_is_refused(name: str) -> None:
    for other in INSTALLED:
        net = make_net()
        saving = make_optimizer(other, groups_of(net, other), device=CPU)
        run(net, saving, range(1))
        resuming = make_optimizer(name, groups_of(net, name), device=CPU)
        if other == name:
            load_optimizer_state(resuming, saving.state_dict())
            continue
        with pytest.raises(CheckpointError, match="resume with the optimizer that it was saved"):
            load_optimizer_state(resuming, saving.state_dict())


def test_the_state_of_other_parameters_is_refused() -> None:
    net = make_net()
    optimizer = make_optimizer("adamw", groups_of(net, "adamw"), device=CPU)
    run(net, optimizer, range(1))
    fewer = make_optimizer("adamw", groups_of(net, "adamw")[:1], device=CPU)
    with pytest.raises(CheckpointError, match="AdamW does not fit these networks"):
        load_optimizer_state(fewer, optimizer.state_dict())


@pytest.mark.parametrize("name", INSTALLED)
def test_every_optimizer_learns(name: str) -> None:
    net = make_net()
    losses = run(net, make_optimizer(name, groups_of(net, name), device=CPU), range(200))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


@pytest.mark.parametrize("name", INSTALLED)
def test_making_one_prints_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_optimizer(name, groups_of(make_net(), name), device=CPU)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["adafactor", "adamw", "lion"])
def test_weight_decay_takes_its_share_of_the_weights(name: str) -> None:
    weight = torch.nn.Parameter(torch.full((2, 2), 3.0))
    groups = [{"params": [weight], "lr": 0.1}]
    optimizer = make_optimizer(name, groups, weight_decay=0.5, device=CPU)
    # With no gradient to follow, only the decay moves it.
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 3.0 * (1 - 0.1 * 0.5)))


def test_prodigy_wants_one_learning_rate() -> None:
    groups = groups_of(make_net(), "prodigy")
    groups[0]["lr"] = 0.5
    with pytest.raises(ConfigError, match=r"for prodigy are 0\.5, 1; .* give each of them 1\.0"):
        make_optimizer("prodigy", groups, device=CPU)


def test_the_learning_rate_to_begin_with_depends_on_the_optimizer() -> None:
    rates = {name: reference_lr(name, 2e-6) for name in OPTIMIZERS}
    assert rates == {
        "adafactor": 2e-6,
        "adamw": 2e-6,
        "adamw8bit": 2e-6,
        "lion": pytest.approx(4e-7),
        "prodigy": 1.0,
    }


@pytest.mark.parametrize("call", [check_optimizer, lambda name: state_bytes(name, [])])
def test_an_unknown_optimizer_is_refused_with_the_names_that_exist(call: Any) -> None:
    with pytest.raises(
        ConfigError,
        match="optimizer is 'sgd'; give one of adafactor, adamw, adamw8bit, lion, prodigy",
    ):
        call("sgd")


@pytest.mark.parametrize("name", [*INSTALLED, "adamw8bit"])
def test_what_can_be_made_here_passes_the_check(name: str) -> None:
    check_optimizer(name)


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(MissingDependencyError, match="install it with: pip install prodigyopt"):
        check_optimizer("prodigy")


def test_8bit_adamw_without_a_gpu_is_adamw_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="colabtools"):
        assert resolve_optimizer("adamw8bit", CPU) == "adamw"
        net, twin = make_net(), make_net()
        fallback = make_optimizer("adamw8bit", groups_of(net, "adamw"), device=CPU)
    (record,) = caplog.records
    assert "AdamW with fp32 states is used in place of adamw8bit" in record.getMessage()
    assert "runs on cpu" in record.getMessage()
    assert type(fallback) is torch.optim.AdamW
    adamw = make_optimizer("adamw", groups_of(twin, "adamw"), device=CPU)
    assert run(net, fallback, range(3)) == run(twin, adamw, range(3))
    assert_same(weights(net), weights(twin))


def test_8bit_adamw_without_its_library_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with caplog.at_level(logging.WARNING, logger="colabtools"):
        assert resolve_optimizer("adamw8bit", CUDA) == "adamw"
    assert "pip install bitsandbytes" in caplog.text


@pytest.fixture
def stand_in_for_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("bitsandbytes.optim")
    library.AdamW8bit = torch.optim.AdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", library)


@pytest.mark.usefixtures("stand_in_for_bitsandbytes")
def test_8bit_adamw_stays_where_a_gpu_and_its_library_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert resolve_optimizer("adamw8bit", CUDA) == "adamw8bit"
    assert can_use_8bit(CUDA)
    assert not can_use_8bit(CPU)
    assert caplog.records == []


@pytest.mark.usefixtures("stand_in_for_bitsandbytes")
def test_8bit_adamw_gets_contiguous_weights_with_the_same_values() -> None:
    net, before = channels_last(make_net()), weights(make_net())
    assert not net.conv.weight.is_contiguous()
    make_optimizer("adamw8bit", groups_of(net, "adamw"), device=CUDA)
    assert net.conv.weight.is_contiguous()
    assert_same(weights(net), before)


SHAPES = [(16, 8, 3, 3), (16, 8, 1, 1), (32, 24), (32,), (1,), (), (2, 5, 7)]


@pytest.mark.parametrize("name", INSTALLED)
def test_the_bytes_of_the_state_are_known_before_it_exists(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    optimizer = make_optimizer(name, [{"params": parameters, "lr": RATES[name]}], device=CPU)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    real = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    assert state_bytes(name, SHAPES) == real
    assert state_bytes(name, iter(SHAPES)) == real


def test_8bit_states_are_blocks_of_256_from_4096_elements_on() -> None:
    assert state_bytes("adamw8bit", [(4095,)]) == 2 * 4 * 4095
    assert state_bytes("adamw8bit", [(64, 64)]) == 2 * 4096 + 2 * 16 * 4 + 2048
    # The maps are shared, and a block that is not full counts as one.
    assert state_bytes("adamw8bit", [(4097,), (64, 64)]) == (
        2 * 4097 + 2 * 17 * 4 + 2 * 4096 + 2 * 16 * 4 + 2048
    )


def test_the_estimate_per_parameter_is_that_of_stable_diffusions_unet() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    shapes = [tuple(parameter.shape) for parameter in unet.parameters()]
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert count == 859_520_964
    for name, info in OPTIMIZERS.items():
        exact = state_bytes(name, shapes) / count
        assert exact == pytest.approx(info.state_bytes_per_param, rel=1e-3), name
