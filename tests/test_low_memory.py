"""Coded state and small masters in the optimizer: same bits everywhere, few bytes, clear errors."""

import copy
import io
import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import shardadam
from models import RealAwkward, loss_of, mlp, same, values
from ranks import run_ranks
from saved_runs import step
from shardadam.kernels.state_formats import FORMATS, decode

pytestmark = pytest.mark.filterwarnings("ignore:gradients are equal")

FORMS = {
    "bf16": {"state": "bf16"},
    "lean": {"memory": "lean"},
    "leanest": {"memory": "leanest"},
    "q8, no master": {"state": "q8", "master": "none"},
}
WAYS = {
    "one bucket": {},
    "small buckets": {"bucket_bytes": 3000},
    "sharded gradients": {"bucket_bytes": 9000, "shard_grads": True},
    "in backward": {"bucket_bytes": 5000, "update_in_backward": True},
}


def two_groups(model: nn.Sequential) -> list[dict]:
    """Not in the order of registration, with a frozen param between two others."""
    model[2].bias.requires_grad_(False)
    first, last = [*model[0].parameters(), *model[4].parameters()], [*model[2].parameters()]
    return [{"params": last, "weight_decay": 0.0}, {"params": first, "lr": 0.003}]


def trains(rank: int, form: str, way: str, overlapped: bool) -> tuple[list, dict | None]:
    model = mlp(torch.bfloat16)
    optimizer = shardadam.AdamW(two_groups(model), lr=0.01, seed=5, **FORMS[form], **WAYS[way])
    if overlapped:
        optimizer.overlap_gather(model)
    for seed in range(6):
        if seed == 3:
            model[2].bias.requires_grad_(True)
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    return values(model), optimizer.consolidate_state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_results_depend_on_nothing_but_the_gradients(form):
    """Every rank has the same gradients, whose sums over 2 and 4 ranks are exact."""
    expected, state = trains(0, form, "one bucket", False)
    start = values(mlp(torch.bfloat16))
    assert not any(torch.equal(a, b) for a, b in zip(expected, start, strict=True))
    for (way, world_size), overlapped in itertools.product(
        itertools.product(WAYS, [1, 2, 4]), [False, True]
    ):
        if overlapped and (world_size != 2 or way == "in backward"):
            continue
        results = run_ranks(world_size, trains, form, way, overlapped)
        assert all(same(params, expected) for params, _ in results), (way, world_size)
        found = results[0][1]
        for index, entry in state["state"].items():
            for name, value in entry.items():
                assert torch.equal(found["state"][index][name], value), (way, world_size, name)


def test_the_seed_counts_and_torch_s_does_not():
    found = []
    for seed, torchs in ((1, 1), (1, 2), (2, 1)):
        model = mlp(torch.bfloat16)
        optimizer = shardadam.AdamW(model.parameters(), memory="leanest", seed=seed)
        torch.manual_seed(torchs)
        step(optimizer, range(3))
        found.append(values(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def bytes_per_param(rank: int, memory: str) -> float:
    model = nn.Linear(1000, 4000, bias=False).bfloat16()
    optimizer = shardadam.AdamW(model.parameters(), memory=memory)
    tensors = optimizer.state[model.weight].values()
    return sum(t.nbytes for t in tensors if t.dim()) / model.weight.numel()


@pytest.mark.parametrize(("memory", "most"), [("lean", 5.05), ("leanest", 3.05)])
def test_bytes(memory, most):
    # 5 or 3 bytes per param, and 2 scales of 2 bytes per 128 of them.
    assert bytes_per_param(0, memory) == pytest.approx(int(most) + 4 / 128, abs=1e-4)
    assert bytes_per_param(0, memory) <= most
    for share in run_ranks(4, bytes_per_param, memory):
        assert share <= most / 4


def test_a_step_needs_no_memory_that_grows_with_the_model():
    """2 bytes per param would be 32 MiB."""
    run_ranks(1, steps_in_place)


def steps_in_place(rank: int) -> None:
    def kib(name: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(name))

    for memory in ("lean", "leanest"):
        param = nn.Parameter(torch.randn(4096, 4096).bfloat16())
        optimizer = shardadam.AdamW([param], memory=memory)
        param.grad = torch.randn_like(param)
        optimizer.step()
        param.grad = torch.randn_like(param)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        before = kib("VmRSS")
        optimizer.step()
        assert kib("VmHWM") - before < 2 * 1024


def test_a_bias_of_one_element():
    model = nn.Linear(3, 1).bfloat16()
    optimizer = shardadam.AdamW(model.parameters(), state="q8")
    # 2 blocks, of 1 and 3 elements: 252 * (1 + 1 + 2) bytes of codes and remainders unused.
    assert "1,032 bytes on this rank, 1,008 of them padding" in repr(optimizer)
    whole = nn.Linear(3, 1).bfloat16()
    whole.load_state_dict(model.state_dict())
    reference = shardadam.AdamW(whole.parameters())
    for each in (optimizer, reference):
        step(each, range(20))
    # A block of one element has an exact ratio, and its root is the scale, rounded up to 8 bits.
    torch.testing.assert_close(model.bias, whole.bias, rtol=2.0**-8, atol=20 * 1e-3 * 2.0**-7)


# ---- state dicts ---------------------------------------------------------------------------------


def trained(options: dict, module: Callable = RealAwkward) -> tuple:
    model = module(torch.bfloat16)
    optimizer = shardadam.AdamW(model.parameters(), **options)
    step(optimizer, range(4))
    return model, optimizer


def moments(optimizer: torch.optim.Optimizer) -> dict:
    """Decoded, by param and name."""
    state = optimizer.consolidate_state_dict()["state"]
    names = ("exp_avg", "exp_avg_sq")
    return {(i, name): entry[name].float() for i, entry in state.items() for name in names}


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_pickles_go_on(form):
    model, optimizer = trained(FORMS[form])
    made = [copy.deepcopy((model, optimizer))]
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    made.append(torch.load(file, weights_only=False))
    step(optimizer, range(4, 7))
    for other, resumed in made:
        step(resumed, range(4, 7))
        assert same(values(other), values(model))


@pytest.mark.parametrize("after", FORMATS)
@pytest.mark.parametrize("before", FORMATS)
def test_full_state_is_converted(before, after):
    model, optimizer = trained({"state": before})
    saved = copy.deepcopy(optimizer.consolidate_state_dict())
    other = RealAwkward(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    resumed = shardadam.AdamW(other.parameters(), state=after, bucket_bytes=4096)
    resumed.load_state_dict(saved)
    expected, found = moments(optimizer), moments(resumed)
    for key, value in expected.items():
        if before == after or after == "fp32":
            assert torch.equal(found[key], value)
        else:
            check_rounded(found[key], value, after, key[1])
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        if left in optimizer.state:
            remainders = [o.state[p]["remainder"] for o, p in ((optimizer, left), (resumed, right))]
            assert torch.equal(*remainders)


def check_rounded(found: torch.Tensor, value: torch.Tensor, form: str, moment: str) -> None:
    """What nearest rounding allows: see docs/low_memory.md; scales are the largest of a tensor."""
    assert torch.equal(found == 0, value == 0) or moment == "exp_avg"
    if form == "bf16":
        torch.testing.assert_close(found, value, rtol=2.0**-8, atol=0)
    elif moment == "exp_avg_sq" and form == "q16":
        # Half a code is 2**-12 of the root; its square twice that.
        torch.testing.assert_close(found, value, rtol=2.0**-10, atol=0)
    elif moment == "exp_avg_sq" and value.numel():
        fourth = float(value.max()) ** 0.25 * (1 + 2.0**-6)
        torch.testing.assert_close(found**0.25, value**0.25, rtol=1e-6, atol=fourth / 256)


def test_codes_that_torch_has_had_are_not_taken():
    """torch.optim casts all tensors that it loads, and updates what it knows."""
    _, optimizer = trained({"memory": "lean"}, mlp)
    other = mlp(torch.bfloat16)
    theirs = torch.optim.AdamW(other.parameters())
    theirs.load_state_dict(copy.deepcopy(optimizer.consolidate_state_dict()))
    step(theirs, range(4, 6))
    resumed = shardadam.AdamW(other.parameters(), memory="lean")
    resumed.load_state_dict(theirs.state_dict())
    for param in other.parameters():
        square = theirs.state[param]["exp_avg_sq"].float()
        names = FORMATS["q16"].tensors(False).values()
        stored = {name: resumed.state[param][name].flatten() for name in names}
        decoded = decode(FORMATS["q16"], stored)["exp_avg_sq"]
        torch.testing.assert_close(decoded, square.flatten(), rtol=2.0**-10, atol=0)


def test_blocks_of_another_order_are_refused():
    weight = torch.randn(70, 5, 3, 3).bfloat16()
    last = nn.Parameter(weight.to(memory_format=torch.channels_last))
    plain = nn.Parameter(weight.clone())
    made = [shardadam.AdamW([("weight", param)], state="q16") for param in (last, plain)]
    step(made[0], range(2))
    before = {name: t.clone() for name, t in made[1].state[plain].items()}
    with pytest.raises(ValueError, match="weight: its moments are coded in blocks of another"):
        made[1].load_state_dict(made[0].state_dict())
    assert all(torch.equal(made[1].state[plain][name], t) for name, t in before.items())
    # Whole moments are in no order.
    made[1].load_state_dict(made[0].consolidate_state_dict())
    left, right = (moments(optimizer)[0, "exp_avg_sq"] for optimizer in made)
    assert torch.equal(left, right)  # 16-bit codes lie on one grid


def test_moments_without_a_code_are_refused():
    _, optimizer = trained({"state": "fp32"})
    saved = copy.deepcopy(optimizer.state_dict())
    _, resumed = trained({"state": "q8"})
    before = resumed.consolidate_state_dict()
    saved["state"][0]["exp_avg"][3] = float("nan")
    with pytest.raises(ValueError, match="param 0 of group 0: exp_avg has values that q8 has no"):
        resumed.load_state_dict(saved)
    assert all(
        map(
            torch.equal,
            moments(resumed).values(),
            (
                entry[name]
                for entry in before["state"].values()
                for name in ("exp_avg", "exp_avg_sq")
            ),
        )
    )


def test_state_set_by_hand():
    model, optimizer = trained({"state": "q16"})
    first, second = [p for p in model.parameters() if p in optimizer.state][:2]
    kept = moments(optimizer)
    optimizer.state[first]["exp_avg_ratio"] = torch.zeros_like(
        optimizer.state[first]["exp_avg_ratio"]
    )
    entry = optimizer.state[second]
    for name in [name for name in entry if name.startswith("exp_avg")]:
        del entry[name]
    entry["exp_avg"], entry["exp_avg_sq"] = torch.zeros(second.shape), torch.ones(second.shape)
    found = moments(optimizer)
    assert not found[0, "exp_avg"].any()
    assert torch.equal(found[0, "exp_avg_sq"], kept[0, "exp_avg_sq"])
    assert torch.equal(found[1, "exp_avg_sq"], torch.ones(second.shape))


# ---- what can't be -------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["bf16", "q16", "q8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_params_without_coded_state(state, dtype):
    param = nn.Parameter(torch.zeros(300, dtype=dtype))
    error = f"weight is {str(dtype)[6:]}, and state={state!r} is of float32, bfloat16 and float16"
    with pytest.raises(ValueError, match=re.escape(error)):
        shardadam.AdamW([("weight", param)], state=state)
    assert param.untyped_storage().nbytes() == 300 * dtype.itemsize  # it was not taken over


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"state": "q4"}, "Invalid state: 'q4', expected 'fp32' or 'bf16' or 'q16' or 'q8'"),
        ({"master": "split4"}, "Invalid master: 'split4', expected 'auto' or"),
        ({"memory": "small"}, "Invalid memory: 'small', expected 'full' or 'lean' or 'leanest'"),
        ({"memory": "lean", "state": "q8"}, "found state='q8' and master='auto' beside it"),
        ({"seed": 1.5}, "Invalid seed: 1.5, expected an int of 64 bits"),
        ({"seed": 2**63}, "Invalid seed: 9223372036854775808"),
    ],
)
def test_unknown_options(options, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        shardadam.AdamW(mlp().parameters(), **options)


@pytest.mark.parametrize("options", [{"master": "split8"}, {"master": "none"}, {"memory": "lean"}])
def test_float16_has_no_split(options):
    with pytest.raises(ValueError, match="is float16: master="):
        shardadam.AdamW(mlp(torch.float16).parameters(), **options)


@pytest.mark.parametrize("state", ["q16", "q8"])
def test_betas_that_bound_no_ratio_are_refused(state):
    """An element without gradients would take the scale of its block for itself."""
    param = torch.nn.Parameter(torch.ones(300))
    optimizer = shardadam.AdamW([param], state=state, betas=(0.9, 0.8))
    param.grad = torch.ones(300)
    with pytest.raises(ValueError, match=r"betas of group 0 are \(0.9, 0.8\): state='q"):
        optimizer.step()
    assert (param == 1).all()
    assert optimizer.state[param]["step"] == 0
    optimizer.param_groups[0]["betas"] = (0.9, 0.82)
    for number in range(2000):
        param.grad = torch.ones(300)
        param.grad[::16] = 1.0 if number == 0 else 0.0
        optimizer.step()
    assert param.isfinite().all()


def test_moments_that_are_put_beside_codes_are_refused():
    """Put in their place they are taken, and not saved beside them for ever."""
    param = torch.nn.Parameter(torch.ones(300))
    optimizer = shardadam.AdamW([("w", param)], state="q16")
    optimizer.state[param]["exp_avg"] = torch.zeros(300)
    with pytest.raises(ValueError, match="w: 'exp_avg' was put into .* beside 'exp_avg_ratio'"):
        optimizer.state_dict()
    moments = {"exp_avg": torch.full((300,), 0.5), "exp_avg_sq": torch.ones(300)}
    optimizer.state[param] = {"step": torch.tensor(1.0), **moments}
    assert "exp_avg" not in optimizer.state_dict()["state"][0]
    saved = optimizer.consolidate_state_dict()["state"][0]
    torch.testing.assert_close(saved["exp_avg"], moments["exp_avg"], rtol=2**-7, atol=0)
