"""State in a file: the same bits as in memory however one trains, and a fixed amount of memory."""

import copy
import gc
import io
import os
import pickle
import resource
import stat
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peaks import memory, peak_growth
from torch import Tensor, nn

import shardadam
from models import RealAwkward, loss_of, mlp, same, train, values
from ranks import run_ranks
from shardadam import checkpoint, slots

pytestmark = pytest.mark.filterwarnings("ignore:gradients are equal")

FORMS = {
    "fp32": {},
    "maxima": {"amsgrad": True, "master": "fp32"},
    "lean": {"memory": "lean"},
    "leanest, maxima": {"memory": "leanest", "amsgrad": True},
}
WAYS = {
    "one bucket": {},
    "small buckets, clipped": {"bucket_bytes": 9000, "max_grad_norm": 0.02},
    "sharded gradients": {"bucket_bytes": 9000, "shard_grads": True},
    "in backward": {"bucket_bytes": 5000, "update_in_backward": True},
}


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    """Six windows and more to a bucket of `mlp`."""
    monkeypatch.setattr(slots, "SLOT_BYTES", 44_000)


def files(folder: Path) -> list[Path]:
    """What this process has open of state files in ``folder``; they have no names."""
    links = Path("/proc/self/fd").iterdir()
    return [link for link in links if f"{folder}/shardadam-state" in os.path.realpath(link)]


def trained(rank: int, folder: Path | None, form: dict, way: dict, overlapped: bool) -> tuple:
    """Two groups, a param without gradient for a while, AMSGrad switched on at the end."""
    model = mlp(torch.bfloat16)
    first, last = [*model[0].parameters(), *model[4].parameters()], [*model[2].parameters()]
    groups = [{"params": last, "weight_decay": 0.0}, {"params": first, "lr": 0.003}]
    optimizer = shardadam.AdamW(groups, lr=0.01, offload=folder, **form, **way)
    if overlapped:
        optimizer.overlap_gather(model)
    for seed in range(6):
        model[2].bias.requires_grad_(seed not in (1, 2))
        loss_of(model, seed + 10 * rank).backward()
        if seed == 4:
            for group in optimizer.param_groups:
                group["amsgrad"] = True
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    return values(model), optimizer.consolidate_state_dict()


def assert_equal_states(left: dict, right: dict) -> None:
    assert left["state"].keys() == right["state"].keys()
    for index, entry in left["state"].items():
        assert entry.keys() == right["state"][index].keys()
        for name, value in entry.items():
            assert torch.equal(value, right["state"][index][name]), (index, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_as_in_memory(form, way, tmp_path):
    options = FORMS[form], WAYS[way]
    (params, state), (expected, held) = [
        trained(0, folder, *options, False) for folder in (tmp_path, None)
    ]
    assert same(params, expected)
    assert_equal_states(state, held)


def all_ways(rank: int, folder: Path | None) -> list[tuple]:
    return [
        trained(rank, folder, form, way, overlapped)
        for form in (FORMS["fp32"], FORMS["leanest, maxima"])
        for way in WAYS.values()
        for overlapped in (False, "update_in_backward" not in way)
    ]


def test_the_same_bits_as_in_memory_on_two_ranks(tmp_path):
    results, expected = run_ranks(2, all_ways, tmp_path), run_ranks(2, all_ways, None)
    for one, other in zip(results, expected, strict=True):
        for (params, state), (theirs, held) in zip(one, other, strict=True):
            assert same(params, theirs)
            assert (state is None) == (held is None)
            if state is not None:
                assert_equal_states(state, held)


def test_awkward_params(tmp_path):
    models = [RealAwkward(), RealAwkward()]
    for model, folder in zip(models, (tmp_path, None), strict=True):
        optimizer = shardadam.NAdam(model.parameters(), lr=0.1, state="q8", offload=folder)
        for seed in range(3):
            model.train_a_step(seed)
            optimizer.step()
    assert same(values(models[0]), values(models[1]))


def test_a_scaled_step_is_skipped(tmp_path):
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), offload=tmp_path)
    train(model, optimizer, range(2))
    before = copy.deepcopy((values(model), optimizer.state_dict()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 2)).backward()
    model[0].bias.grad[0] = float("inf")
    scaler.step(optimizer)
    assert same(values(model), before[0])
    assert_equal_states(optimizer.state_dict(), before[1])


def test_a_copy_has_a_file_of_its_own(tmp_path):
    model = mlp(torch.bfloat16)
    optimizer = shardadam.AdamW(model.parameters(), memory="lean", offload=tmp_path)
    train(model, optimizer, range(3))
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    assert len({os.stat(file).st_ino for file in files(tmp_path)}) == 3
    for other in ((model, optimizer), copied, pickled):
        train(*other, range(3, 6))
    assert same(values(model), values(copied[0]))
    assert same(values(model), values(pickled[0]))


def test_a_group_is_added(tmp_path):
    results = []
    for folder in (tmp_path, None):
        model, more = mlp(seed=1), mlp(seed=2)
        optimizer = shardadam.AdamW(model.parameters(), lr=0.01, offload=folder)
        train(model, optimizer, range(2))
        optimizer.add_param_group({"params": more.parameters(), "lr": 0.003})
        loss_of(more, 5).backward()
        train(model, optimizer, range(2, 4))
        results.append((values(model) + values(more), optimizer.state_dict()))
    assert same(results[0][0], results[1][0])
    assert_equal_states(results[0][1], results[1][1])


# ---- saved and loaded ----------------------------------------------------------------------------


def saves_and_loads(rank: int, folder: Path) -> None:
    for source, target in ((folder, None), (None, folder)):
        torch.manual_seed(rank)
        model = mlp(torch.bfloat16)
        optimizer = shardadam.AdamW(model.parameters(), memory="lean", offload=source)
        train(model, optimizer, range(3))
        checkpoint.save(folder / "ours", step=3, optimizer=optimizer, model=model)
        dcp.save({"optim": optimizer.state_dict()}, checkpoint_id=folder / "dcp")
        local = io.BytesIO()
        torch.save(optimizer.state_dict(), local)

        others = [mlp(torch.bfloat16, seed=9) for _ in range(3)]
        made = [
            shardadam.AdamW(other.parameters(), memory="lean", offload=target) for other in others
        ]
        checkpoint.load(folder / "ours", optimizer=made[0], model=others[0])
        for other in others[1:]:
            other.load_state_dict(model.state_dict())
        state = {"optim": made[1].state_dict()}
        dcp.load(state, checkpoint_id=folder / "dcp")
        made[1].load_state_dict(state["optim"])
        local.seek(0)
        made[2].load_state_dict(torch.load(local, weights_only=False))
        train(model, optimizer, range(3, 5))
        for other, resumed in zip(others, made, strict=True):
            train(other, resumed, range(3, 5))
            assert same(values(other), values(model))


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoints_go_from_file_to_memory_and_back(world_size, tmp_path):
    run_ranks(world_size, saves_and_loads, tmp_path)


def test_state_by_hand_reaches_the_file(tmp_path):
    results = []
    for folder in (tmp_path, None):
        model = mlp()
        optimizer = shardadam.AdamW(model.parameters(), lr=0.01, offload=folder)
        train(model, optimizer, range(2))
        optimizer.state[model[0].weight]["exp_avg"].mul_(0.5)  # a view
        optimizer.state[model[2].weight] = {}
        train(model, optimizer, range(2, 4))
        results.append(values(model))
    assert same(*results)


# ---- the file ------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_goes_with_the_optimizer(tmp_path):
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), offload=tmp_path)
    (file,) = {os.stat(file).st_ino: file for file in files(tmp_path)}.values()
    assert not any(tmp_path.iterdir())
    made = os.stat(file)
    assert (stat.S_IMODE(made.st_mode), made.st_nlink, made.st_uid) == (0o600, 0, os.getuid())
    held = sum(t.nbytes for b in optimizer._buckets for t in b.state.values())
    assert held <= made.st_size <= held + 2 * 4096
    assert made.st_blocks * 512 >= held  # it is not sparse
    assert f"{held:,} bytes of this rank in a file in {tmp_path}" in repr(optimizer)
    train(model, optimizer, range(1))
    del optimizer, file
    gc.collect()
    assert not files(tmp_path)


# ---- memory --------------------------------------------------------------------------------------

NUMEL = 12_000_000  # of one param, in bf16: 24 MB, as is its gradient; its state is 144 MB


def bounded(rank: int, folder: Path | None, bound: bool) -> Tensor | str:
    """Train one large param where little more than params and gradients fits into memory."""
    torch.manual_seed(0)
    model = nn.Embedding(NUMEL // 100, 100, dtype=torch.bfloat16)
    if bound:
        # Private memory that can be written to, of the interpreter up to now included.
        limit = memory("VmData") * 1024 + 140 * 10**6
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        optimizer = shardadam.AdamW(
            model.parameters(), lr=0.1, master="fp32", offload=folder, grad_sync="none"
        )
    except RuntimeError as error:
        return str(error)
    rows = torch.arange(0, NUMEL // 100, 7)
    for _ in range(3):
        model(rows).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return model.weight.detach()


def test_trains_where_its_state_does_not_fit_into_memory(tmp_path, monkeypatch):
    monkeypatch.undo()  # slots as everybody has them
    ((unbounded,), (offloaded,), (refused,)) = (
        run_ranks(1, bounded, *how) for how in ((None, False), (tmp_path, True), (None, True))
    )
    assert torch.equal(offloaded, unbounded)
    assert "can't allocate memory" in str(refused)


def steps_peak(rank: int, folder: Path, layers: int) -> float:
    model = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(layers)])
    optimizer = shardadam.AdamW(model.parameters(), offload=folder)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return peak_growth(optimizer.step)


def test_a_step_takes_no_memory_that_grows_with_the_model(tmp_path, monkeypatch):
    monkeypatch.undo()
    peaks = [run_ranks(1, steps_peak, tmp_path, layers)[0] for layers in (8, 32)]
    # Of 61 and 244 MiB of state; a MiB or two are what code is run for the first time.
    held = 2 * slots.SLOT_BYTES / 2**20  # for one thread
    assert all(peak < held + 4 for peak in peaks), peaks
