"""Bad input: a clear error on every rank, that names the culprit, with nothing changed."""

import copy
import os
import re
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import shardadam
from models import loss_of, mlp, same, train, values
from ranks import run_ranks
from shardadam import checkpoint
from shardadam.candidates import single_device


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"eps": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"weight_decay": -0.1},
        {"lr": torch.tensor([1.0, 2.0])},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam"])
def test_hyperparameters_are_refused_in_torchs_words(kind, options):
    with pytest.raises(ValueError) as theirs:
        getattr(torch.optim, kind)(mlp().parameters(), **options)
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
        getattr(shardadam, kind)(mlp().parameters(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_sync": "sum"}, "Invalid grad_sync: 'sum', expected 'mean' or 'none'"),
        ({"master": "fp16"}, "Invalid master: 'fp16', expected 'auto' or 'fp32' or 'split' or"),
        ({"max_grad_norm": 0.0}, "Invalid max_grad_norm: 0.0"),
        ({"bucket_bytes": 0}, "Invalid bucket_bytes: 0"),
        ({"shard_grads": True, "grad_sync": "none"}, "expected one of the two"),
    ],
)
def test_our_own_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shardadam.AdamW(mlp().parameters(), **options)


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ([nn.Parameter(torch.ones(3, dtype=torch.float16))], {"master": "split"},
         "param 0 of group 0 is float16"),
        ([nn.Parameter(torch.ones(3).to(torch.float8_e5m2))], {},
         "param 0 of group 0: expected a dense float32"),
        ((lambda a: [a, nn.Parameter(a.data)])(nn.Parameter(torch.ones(3))), {},
         "param 0 of group 0 and param 1 of group 0 are different params on the same memory"),
    ],
)  # fmt: skip
def test_params_that_cannot_be_optimized(params, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shardadam.AdamW(params, **options)


def test_params_that_no_longer_are_views():
    for replace in (
        lambda model: model.double(),
        lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()),
    ):
        model = mlp()
        optimizer = shardadam.AdamW(model.named_parameters())
        loss_of(model, 0).backward()
        replace(model)
        state = [t.clone() for entry in optimizer.state.values() for t in entry.values()]
        with pytest.raises(ValueError, match=r"\d\.\w+ no longer is the memory that the optimizer"):
            optimizer.step()
        after = [t for entry in optimizer.state.values() for t in entry.values()]
        assert same(state, after)


def test_sparse_gradients():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = shardadam.Adam(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="weight: Adam does not support sparse gradients"):
        optimizer.step()


def test_a_gradient_of_another_dtype():
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype: it refuses such gradients itself")
    model = mlp(torch.bfloat16)
    optimizer = shardadam.AdamW(model.named_parameters())
    model[2].bias.grad_dtype = None
    model[2].bias.grad = torch.ones(65)
    expected = r"2.bias: expected a gradient like the param, \(65,\) bfloat16 .* \(65,\) float32"
    with pytest.raises(ValueError, match=expected):
        optimizer.step()
    assert optimizer.state[model[2].bias]["step"] == 0


def construct(rank: int, difference: str) -> None:
    """What one rank does otherwise, at construction."""
    params = list(mlp().named_parameters())
    options = {"lr": 0.01}
    if difference == "the order of names" and rank == 1:
        params[0], params[2] = params[2], params[0]
    if difference == "the order":
        params = [param for _, param in params] + [nn.Parameter(torch.rand(90)) for _ in range(2)]
        if rank == 1:
            params[-1], params[-2] = params[-2], params[-1]
    if difference == "a dtype" and rank == 1:
        params[4] = ("4.weight", nn.Parameter(torch.ones(5, 65, dtype=torch.float64)))
    if difference == "lr" and rank == 1:
        options["lr"] = 0.1
    if difference in OPTIONS:
        options[difference] = OPTIONS[difference][rank == 1]
    if difference == "one more" and rank == 0:
        params.append(("extra", nn.Parameter(torch.ones(3))))
    if difference == "an invalid param" and rank == 1:
        params[0] = ("0.weight", nn.Parameter(torch.ones(90, 30).to(torch.float8_e5m2)))
    shardadam.AdamW(params, **options)


OPTIONS = {
    "max_grad_norm": (None, 1.0),
    "grad_sync": ("mean", "none"),
    "bucket_bytes": (4000, 8000),
    "master": ("auto", "fp32"),
    "shard_grads": (False, True),
}
CONSTRUCTION = {
    **{name: f"rank 0 has {name}=.* rank 1 has {name}=" for name in OPTIONS},
    "the order of names": "rank 0 has 0.weight .* rank 1 has 2.weight",
    "the order": "stand in another order on another rank: rank 0 has param 7 .* rank 1 has param 7",
    "a dtype": r"rank 0 has 4.weight \(5, 65\) float32 .* rank 1 has 4.weight \(5, 65\) float64",
    "lr": "rank 0 has lr=0.01 in group 0, rank 1 has lr=0.1 in group 0",
    "an invalid param": "0.weight: expected a dense float32",
    "one more": r"rank 0 has extra \(3,\) .* rank 1 has lr=0.01",
}


def fails(rank: int, function, *args) -> str:
    """The rank's error, which comes at once: a rank that waits would do so for minutes."""
    start = time.monotonic()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        function(rank, *args)
    assert time.monotonic() - start < 10
    return str(caught.value)


@pytest.mark.fault("layout skew: {difference}, W = {world_size}", "an error on every rank")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("difference", CONSTRUCTION)
def test_layouts_that_differ_between_ranks(difference, world_size):
    for message in run_ranks(world_size, fails, construct, difference, timeout_s=30):
        assert re.search(CONSTRUCTION[difference], message, re.DOTALL), message


def step(rank: int, fault: str) -> None:
    """A good step, then one in which one rank does something else; nothing may change by it."""
    model = mlp()
    sharded = fault in ("backward", "an extra backward")
    optimizer = shardadam.AdamW(model.named_parameters(), shard_grads=sharded)
    train(model, optimizer, range(rank, rank + 1))
    before = values(model)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    culprit = rank == 1
    try:
        if not (fault == "backward" and culprit):
            loss_of(model, rank).backward()
        if fault == "lr" and culprit:
            optimizer.param_groups[0]["lr"] = 0.5
        if fault == "sparse" and culprit:
            model[0].weight.grad = model[0].weight.grad.to_sparse()
        if fault == "an lr of two numbers" and culprit:
            optimizer.param_groups[0]["lr"] = torch.ones(2)
        if fault == "stale" and culprit:
            model[2].bias.data = model[2].bias.data.clone()
        if fault == "clip" and culprit:
            optimizer.clip_grad_norm_(1.0)
        if fault == "clip norms":
            optimizer.clip_grad_norm_(1.0 + rank)
        if fault == "clipped":
            optimizer.clip_grad_norm_(1.0)
            if culprit:
                optimizer.zero_grad()
        if fault == "an extra backward" and culprit:
            loss_of(model, rank).backward()
        if fault == "unfrozen" and culprit:
            model.register_parameter("late", nn.Parameter(torch.ones(3)))
            optimizer.param_groups[0]["params"].append(model.late)
            optimizer.param_groups[0]["param_names"].append("late")
        optimizer.step()
    finally:
        assert same(before, values(model)[-6:])
        for index, entry in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, entry[name]) for name, value in state[index].items())


STEP = {
    "an lr of two numbers": "lr",
    "lr": "ranks differ: rank 0 has lr=0.001 .* rank 1 has lr=0.5",
    "sparse": "0.weight: Adam does not support sparse gradients",
    "stale": "2.bias no longer is the memory",
    "clip norms": "rank 0 has max_norm=1.0.* rank 1 has max_norm=2.0",
    "clipped": "rank 0 has clipped=True, rank 1 has clipped=False",
    "clip": r"rank 0 is in step\(\), rank 1 is in clip_grad_norm_\(\)",
    "backward": r"rank 0 is in backward\(\), rank 1 is in step\(\)",
    "an extra backward": r"rank 0 is in step\(\), rank 1 is in backward\(\)",
    "unfrozen": "rank 1 has late",
}


@pytest.mark.fault("in a step: {fault}, W = {world_size}", "an error on every rank")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("fault", STEP)
def test_a_fault_on_one_rank_is_an_error_on_all(fault, world_size):
    for message in run_ranks(world_size, fails, step, fault, timeout_s=15):
        assert re.search(STEP[fault], message, re.DOTALL), message


def sparse_in_backward(rank: int) -> None:
    """A gradient that can't be reduced, found inside backward while the others reduce theirs."""
    layers = nn.ModuleDict({"in": nn.Embedding(100, 30, sparse=rank == 1), "out": nn.Linear(30, 5)})
    optimizer = shardadam.AdamW(layers.named_parameters(), shard_grads=True, bucket_bytes=1024)
    before = values(layers)
    try:
        layers["out"](layers["in"](torch.arange(8))).square().mean().backward()
        optimizer.step()
    finally:
        assert same(before, values(layers))
        assert all(not entry["step"] for entry in optimizer.state_dict()["state"].values())


@pytest.mark.fault("a sparse gradient on one rank, W = {world_size}", "an error on every rank")
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_sparse_gradient_on_one_rank_while_others_reduce(world_size):
    for message in run_ranks(world_size, fails, sparse_in_backward, timeout_s=15):
        assert "in.weight: Adam does not support sparse gradients" in message


def lose_a_peer(rank: int, when: str) -> str:
    """Rank 1 dies; the message of rank 0's error, and of its next step."""
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), shard_grads=when == "in backward")
    train(model, optimizer, range(1))
    if when == "in backward":
        if rank == 1:
            # Here the meeting is over, and the first bucket's reduction is not.
            model[0].bias.register_hook(lambda grad: os._exit(0))
        with pytest.raises(RuntimeError) as caught:
            loss_of(model, 1).backward()
        return str(caught.value)
    loss_of(model, 1).backward()
    if rank == 1:
        if when == "before the step":
            os._exit(0)
        # In the step, when everybody has agreed and reduced: in the kernel's place.
        optimizer._steps.commit = lambda *_: os._exit(0)
    with pytest.raises(RuntimeError) as first:
        optimizer.step()
    with pytest.raises(RuntimeError) as second:
        optimizer.step()
    return f"{first.value}\n{second.value}"


@pytest.mark.filterwarnings("ignore:gradients are equal")
def test_a_peer_that_dies():
    for when, doing in (
        ("before the step", "failed while agreeing on what comes next over gloo"),
        ("in backward", "failed while reduce-scattering gradients over gloo"),
        ("in the step", "failed while all-gathering params over gloo"),
    ):
        with pytest.raises(AssertionError) as caught:  # rank 1 answers nothing
            run_ranks(2, report_then_leave, lose_a_peer, when, timeout_s=30)
        message = str(caught.value)
        assert doing in message
        broken = "an earlier step() was broken off by RuntimeError"
        assert (broken in message) == (when == "in the step")


def report_then_leave(rank: int, function, *args) -> None:
    """Fail with what the function returned: the other rank's end hides a mere result."""
    raise AssertionError(function(rank, *args))


def test_a_hyperparameter_that_is_no_number_changes_nothing():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    loss_of(model, 0).backward()
    before = values(model)
    for name, value in (("eps", "small"), ("lr", None), ("betas", (1.0, 0.999))):
        good = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = value
        with pytest.raises((TypeError, ValueError, ZeroDivisionError)):
            optimizer.step()
        optimizer.param_groups[0][name] = good
    assert same(before, values(model))
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"] == 1


@pytest.mark.parametrize(("first", "other"), [("cpu", "cuda:0"), ("cuda:0", "cuda:1")])
def test_params_on_several_devices(first, other):
    # No device is needed to refuse them: only where they are is looked at.
    a, b = (SimpleNamespace(is_meta=False, device=torch.device(name)) for name in (first, other))
    groups = [{"params": [a], "param_names": ["a"]}, {"params": [b], "param_names": ["b"]}]
    with pytest.raises(ValueError, match=f"on one device: a is on {first}, b on {other}"):
        single_device(groups)


def hint_as_error(rank: int) -> None:
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters())
    before = values(model)
    loss_of(model, 0).backward()
    expected = "gradients are equal" if rank == 0 else "rank 0: UserWarning: gradients are equal"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning if rank == 0 else RuntimeError, match=expected):
            optimizer.step()
    assert same(values(model), before)
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"] == 1


def test_a_hint_that_is_an_error_is_one_on_every_rank():
    run_ranks(2, hint_as_error, timeout_s=30)


def skips_as_error(rank: int, root: str) -> None:
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters())
    for step in (1, 2):
        folder = checkpoint.save(root, step=step, optimizer=optimizer)
    if rank == 0:
        (folder / "manifest.json").unlink()
    torch.distributed.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="rank 0 of 2: UserWarning: .* is not whole"):
            checkpoint.load(root, optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert checkpoint.load(root, optimizer=optimizer).step == 1


def test_a_skipped_checkpoint_that_is_an_error_is_one_on_every_rank(tmp_path):
    run_ranks(2, skips_as_error, str(tmp_path), timeout_s=30)


def test_a_shallow_copy_is_refused():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    with pytest.raises(TypeError, match="only one can hold them: expected copy.deepcopy"):
        copy.copy(optimizer)
    train(model, optimizer, range(1))
