"""Ours as the optimizer that DeepSpeed shards, in DeepSpeed itself on two ranks."""

import copy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardadam
from deepspeed_training import CASES, CLASSES, LR, RUNS, STAGES, STEPS
from models import mlp, same, train, values
from ranks import run_ranks
from shardadam.integrations import deepspeed

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What every run came to, on each rank."""
    file = tmp_path_factory.mktemp("deepspeed") / "results.pt"
    script = Path(__file__).with_name("deepspeed_training.py")
    command = [sys.executable, str(script), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(file, weights_only=True)


@pytest.fixture
def results(ranks) -> dict:
    return ranks[0]


def assert_same(left: dict, right: dict) -> None:
    for what in ("losses", "masters", "params"):
        assert same(left[what], right[what]), what
    assert (left["steps"], left["skipped"]) == (right["steps"], right["skipped"])


def assert_close(left: list[Tensor], right: list[Tensor], ulps: float) -> None:
    """Within ``ulps`` of the larger of the value and lr."""
    for ours, theirs in zip(left, right, strict=True):
        ulp = 2 ** (ours.abs().clamp(min=LR).log2().floor() - 23)
        assert ((ours - theirs).abs() <= ulps * ulp).all()


@needs_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_as_the_published_rule_and_as_torch(name, ranks):
    """The same bits as the rule in float64, rounded once, has under DeepSpeed."""
    for results in ranks:
        assert_same(results[name], results[f"exact {name}"])
        assert same(results[name]["masters"], ranks[0][name]["masters"])
        if f"torch {name}" in results:
            torch_has = results[f"torch {name}"]
            # docs/numerics.md: one step of torch's is within 5.7 ulp, of ours within 1.0.
            assert_close(results[name]["first"], torch_has["first"], 6.7)
            assert results[name]["bytes"] == torch_has["bytes"]
            assert results[name]["skipped"] == torch_has["skipped"]
    norms, clip = results[name]["norms"], CASES[name].config.get("gradient_clipping")
    if clip and any(norms):  # under stage 0 DeepSpeed does not say
        assert max(norms) > clip
    if CASES[name].dtype == "fp16" and CASES[name].stage:
        assert 0 < results[name]["skipped"] < STEPS


@needs_deepspeed
@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("resumed")])
def test_resumed_is_as_uninterrupted(name, results):
    assert_same(results[name], results[name.removeprefix("resumed ")])


@needs_deepspeed
@pytest.mark.parametrize("name", ["ours on torch's", "torch on ours", "ours on FusedAdam's"])
def test_state_of_torch_and_deepspeed_and_back(name, results):
    uninterrupted = results["clipped bf16 zero2"]
    assert results[name]["steps"] == uninterrupted["steps"] == {float(STEPS)}
    for ours, other in zip(results[name]["masters"], uninterrupted["masters"], strict=True):
        # Six steps, of which torch makes three: their masters may be rounded to another bfloat16,
        # and the gradients that follow differ by 2^-8 of their size.
        torch.testing.assert_close(ours, other, rtol=2**-8, atol=STEPS * LR * 2**-8)


@needs_deepspeed
@pytest.mark.parametrize("kind", CLASSES)
def test_the_other_classes(kind, results):
    ours, theirs = results[f"our {kind}"], results[f"torch's {kind}"]
    assert_close(ours["first"], theirs["first"], 6.7)
    assert (ours["steps"], ours["bytes"]) == (theirs["steps"], theirs["bytes"])


@needs_deepspeed
def test_made_from_the_config(results):
    assert_close(results["by config"]["first"], results["torch by config"]["first"], 6.7)


def alone(rank: int) -> list[Tensor]:
    from deepspeed_training import batch, groups_of

    model = mlp()
    optimizer = shardadam.AdamW(groups_of(model))
    for step in range(STEPS):
        model(batch(step, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


@needs_deepspeed
def test_as_without_deepspeed(results):
    """Of two ranks the mean is exact but for one rounding, in any order."""
    expected = run_ranks(2, alone)[0]
    for stage in STAGES[1:]:
        assert same(results[f"fp32 zero{stage}"]["masters"], expected)
    # Under stage 0 DeepSpeed has averaged already.
    assert same(results["plain zero0"]["masters"], results["fp32 zero0"]["masters"])


@needs_deepspeed
@pytest.mark.parametrize("name", ["plain zero1", "plain zero2", "plain zero3", "plain bf16 zero0"])
def test_the_class_that_shards_itself_is_refused(name, ranks):
    for results in ranks:
        assert "its .data was replaced after construction" in results[name]["error"]
        assert "shardadam.integrations.deepspeed" in results[name]["error"]


# ---- the class alone -----------------------------------------------------------------------------


def refused(param: Tensor, error: type[Exception], match: str, **options: object) -> None:
    before = param.detach().clone()
    good = nn.Parameter(torch.ones(3))
    good.grad = torch.ones(3)
    optimizer = deepspeed.AdamW([good, param], **options)
    with pytest.raises(error, match=match):
        optimizer.step()
    assert torch.equal(param, before) and torch.equal(good, torch.ones(3))
    assert not optimizer.state[good] or optimizer.state[good]["step"] == 0


def test_bad_params_and_gradients():
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    refused(param, ValueError, "param 1 of group 0 is .* expected the float32 masters")
    param = nn.Parameter(torch.ones(4, 6)[:, ::2])
    param.grad = torch.ones_like(param)
    refused(param, ValueError, r"param 1 of group 0: expected a dense .* strides \(6, 2\)")
    param = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    refused(param, ValueError, "float32 or float64 param, found .* complex64")
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4).to_sparse()
    refused(param, RuntimeError, "param 1 of group 0: Adam does not support sparse gradients")
    param.grad = torch.ones(4)
    param.data = torch.ones(5)
    refused(param, ValueError, r"the gradient of param 1 of group 0: expected \(5,\)")
    param.grad = torch.ones(5)
    refused(param, ValueError, "differentiable=True is not supported", differentiable=True)


def test_state_of_another_shape():
    param = nn.Parameter(torch.ones(4))
    optimizer = deepspeed.Adam([param])
    param.grad = torch.ones(4)
    optimizer.step()
    optimizer.state[param]["exp_avg_sq"] = torch.zeros(2)
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"exp_avg_sq of param 0 .* \(4,\) .* found \(2,\)"):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.state[param]["step"] == 1


def test_memory_of_any_order():
    """Channels last, transposed gradients, moments of another order: element belongs to element."""
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 6, 3)
    turned = nn.Conv2d(5, 6, 3)
    turned.load_state_dict(plain.state_dict())
    turned.to(memory_format=torch.channels_last)
    optimizers = [deepspeed.AdamW(model.parameters(), lr=0.01) for model in (plain, turned)]
    images = torch.randn(2, 5, 8, 8)
    for step in range(3):
        for model in (plain, turned):
            model(images).square().mean().backward()
        for one, other in zip(plain.parameters(), turned.parameters(), strict=True):
            other.grad = one.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert same(values(plain), values(turned))
        if step == 1:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))


def test_moments_without_a_step_are_refused():
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = deepspeed.AdamW([param])
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match="moments and no step"):
        optimizer.load_state_dict(saved)
    saved["param_groups"][0]["step"] = 5
    optimizer.load_state_dict(saved)
    assert optimizer.state[param]["step"] == 5


def test_a_closure_a_scaler_and_fused():
    model, plain = mlp(), mlp()
    optimizer = deepspeed.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two
    scaler.scale(model(torch.ones(2, 30)).square().mean()).backward()
    scaler.step(optimizer)

    def closure() -> Tensor:
        loss = plain(torch.ones(2, 30)).square().mean()
        loss.backward()
        return loss

    assert deepspeed.AdamW(plain.parameters()).step(closure) > 0
    assert same(values(model), values(plain))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_param_that_is_listed_twice_counts_once():
    once, twice = (nn.Parameter(torch.ones(1000)) for _ in range(2))
    once.grad, twice.grad = torch.ones(1000), torch.ones(1000)
    deepspeed.AdamW([once]).step()
    optimizer = deepspeed.AdamW([twice, twice])
    optimizer.step()
    assert torch.equal(once, twice) and optimizer.state[twice]["step"] == 1


def test_as_ours_on_one_rank():
    model, plain = mlp(), mlp()
    train(model, deepspeed.NAdam(model.parameters()), range(4))
    train(plain, shardadam.NAdam(plain.parameters()), range(4))
    for ours, other in zip(values(model), values(plain), strict=True):
        # mu_product is a float32 here, as torch.optim's state has it.
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=2e-3 * 1e-6)
