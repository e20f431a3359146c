"""Checkpoints go on bit for bit, at any world size, buckets, strides and master weights."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import shardadam
from models import mlp, same, train, values
from ranks import run_ranks
from saved_runs import Mixed, full_state, step, stored
from shardadam import checkpoint
from shardadam.checkpoint.progress import Bar


def groups(worlds: list[int]) -> dict:
    """The first ranks, as many as each of ``worlds``, as process groups."""
    return {world_size: dist.new_group(range(world_size)) for world_size in worlds}


EXACT = {
    "fp32": (torch.float32, {}),
    "split": (torch.bfloat16, {}),
    "lean": (torch.bfloat16, {"memory": "lean"}),
    "leanest": (torch.bfloat16, {"memory": "leanest"}),
}


def train_and_save(rank: int, folder: str, form: str, worlds: list[int]) -> dict:
    dtype, options = EXACT[form]
    through = {}
    for world_size, group in groups(worlds).items():
        if rank >= world_size:
            continue
        model = mlp(dtype)
        optimizer = shardadam.AdamW(
            model.parameters(), bucket_bytes=8192, process_group=group, **options
        )
        scheduler = OneCycleLR(optimizer, 0.1, total_steps=30)
        for seed in range(20):
            if seed == 10:
                torch.manual_seed(1000 + rank)
                checkpoint.save(
                    f"{folder}/{world_size}",
                    step=10,
                    optimizer=optimizer,
                    model=model,
                    lr_scheduler=scheduler,
                    loader={"rank": rank, "at": 10},
                )
            step(optimizer, range(seed, seed + 1))
            scheduler.step()
        through[world_size] = values(model)
    return through


def load_and_train(rank: int, folder: str, form: str, worlds: list[int]) -> dict:
    dtype, options = EXACT[form]
    resumed = {}
    for world_size, group in groups(worlds).items():
        for saved_by in worlds:
            if rank >= world_size:
                continue
            model = mlp(dtype, seed=5)
            optimizer = shardadam.AdamW(
                model.parameters(), bucket_bytes=20_000, process_group=group, **options
            )
            scheduler = OneCycleLR(optimizer, 0.5, total_steps=30)
            torch.manual_seed(0)
            found = checkpoint.load(
                f"{folder}/{saved_by}", optimizer=optimizer, model=model, lr_scheduler=scheduler
            )
            assert (found.step, found.skipped) == (10, [])
            assert found.loaders == [{"rank": rank, "at": 10} for rank in range(saved_by)]
            if saved_by == world_size:
                assert found.loader == {"rank": rank, "at": 10}
            if rank < saved_by:
                expected = torch.rand(5, generator=torch.Generator().manual_seed(1000 + rank))
                assert torch.equal(torch.rand(5), expected)
            for seed in range(10, 20):
                step(optimizer, range(seed, seed + 1))
                scheduler.step()
            resumed[saved_by, world_size] = values(model)
    return resumed


@pytest.mark.filterwarnings("ignore:gradients are equal")
@pytest.mark.filterwarnings("ignore:.*has no random state for rank")
@pytest.mark.fault("other numbers of ranks after a checkpoint, {form}", "the same bits")
@pytest.mark.parametrize("form", EXACT)
def test_resumes_bit_for_bit_at_any_world_size(form, tmp_path, times):
    worlds = times([1, 2, 3, 4], [1, 2, 3, 4, 8])
    through = run_ranks(worlds[-1], train_and_save, str(tmp_path), form, worlds)
    expected = through[0][1]
    assert all(same(found, expected) for rank in through for found in rank.values())
    resumed = run_ranks(worlds[-1], load_and_train, str(tmp_path), form, worlds)
    assert sum(map(len, resumed)) == len(worlds) * sum(worlds)
    for rank in resumed:
        for before_and_after, found in rank.items():
            assert same(found, expected), before_and_after


def save_mixed(rank: int, folder: str, channels_last: bool, amsgrad: bool) -> list:
    model = Mixed(channels_last=channels_last)
    optimizer = shardadam.NAdam(model.named_parameters(), bucket_bytes=4096)
    if amsgrad:
        optimizer = shardadam.Adam(model.named_parameters(), amsgrad=True, bucket_bytes=4096)
    model.norm.running_mean.fill_(3.0)
    step(optimizer, range(3))
    checkpoint.save(folder, step=3, optimizer=optimizer, model=model)
    return stored(model)


@pytest.mark.filterwarnings("ignore:gradients are equal")
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_everything_at_once_and_other_strides(channels_last, amsgrad, tmp_path):
    saved = run_ranks(3, save_mixed, str(tmp_path / "three"), channels_last, amsgrad)
    alone = save_mixed(0, str(tmp_path / "one"), False, amsgrad)
    assert same(saved[0], alone)
    kind = shardadam.Adam if amsgrad else shardadam.NAdam
    states = []
    for folder, strides in (("three", False), ("three", True), ("one", True)):
        model = Mixed(seed=1, channels_last=strides)
        optimizer = kind(model.named_parameters(), lr=0.7)
        checkpoint.load(tmp_path / folder, optimizer=optimizer, model=model, rng=False)
        assert model.conv.weight.is_contiguous() is not strides
        assert same(stored(model), alone)
        states.append(full_state(optimizer))
        assert optimizer.param_groups[0]["lr"] != 0.7
        step(optimizer, range(3, 5))
    parts = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq" if amsgrad else "mu_product", "step"]
    assert sorted(optimizer.state[model.scale]) == parts
    for left, right in zip(states[0], states[1], strict=True):
        assert same(left, right)
    for left, right in zip(states[0], states[2], strict=True):
        assert same(left, right)
    # The model alone, without an optimizer.
    model = Mixed(seed=2, channels_last=True)
    checkpoint.load(tmp_path / "three", model=model)
    assert same(stored(model), alone)


FORMS = {
    "fp32": (torch.float32, {}),
    "split": (torch.bfloat16, {}),
    "bf16 + master": (torch.bfloat16, {"master": "fp32"}),
    "fp16 + master": (torch.float16, {}),
}


def masters(optimizer: torch.optim.Optimizer, model: nn.Module) -> list:
    found = []
    for param in model.parameters():
        state = optimizer.state[param]
        if "remainder" in state:
            bits = (param.detach().view(torch.int16).int() << 16) + state["remainder"].int()
            found.append(bits.view(torch.float32))
        else:
            found.append(state.get("master", param.detach()).clone())
    return found


@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("before", FORMS)
def test_masters_are_converted(before, after, tmp_path):
    dtype, options = FORMS[before]
    model = mlp(dtype)
    optimizer = shardadam.AdamW(model.parameters(), **options)
    train(model, optimizer, range(5))
    checkpoint.save(tmp_path, step=5, optimizer=optimizer, model=model)
    dtype, options = FORMS[after]
    other = mlp(dtype, seed=1)
    resumed = shardadam.AdamW(other.parameters(), **options)
    checkpoint.load(tmp_path, optimizer=resumed, model=other)
    assert same(masters(resumed, other), masters(optimizer, model))
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[left][name], resumed.state[right][name])
        if before == after:
            assert torch.equal(left, right)
    if after != "split":  # which rounds ties away from zero
        assert same(values(other), [m.to(dtype) for m in masters(resumed, other)])
    train(other, resumed, range(5, 7))


def test_extras_generators_and_plain_values(tmp_path):
    numpy = pytest.importorskip("numpy")
    extras = {
        "ema": torch.arange(12.0).view(3, 4).t(),
        "phase": torch.randn(3, dtype=torch.complex128),
        "mask": torch.tensor([True, False]),
        "best": float("-inf"),
        "history": [1, 2.5, None, ("a", {"b": True, 3: "int key"})],
        "snow ☃": "☃",
    }
    random.seed(1)
    numpy.random.seed(2)
    torch.manual_seed(3)
    path = checkpoint.save(tmp_path, step=7, extras=extras, loader=[1, (2, 3)])
    assert path == tmp_path / "step-00000007"
    expected = [random.gauss(0, 1), numpy.random.rand(), torch.rand(())]
    random.seed(4)
    found = checkpoint.load(tmp_path)
    assert [random.gauss(0, 1), numpy.random.rand(), torch.rand(())] == expected
    assert (found.path, found.step, found.loader) == (path, 7, [1, (2, 3)])
    assert set(found.extras) == set(extras)
    for name, value in extras.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found.extras[name], value)
            assert found.extras[name].stride() == value.stride()
        else:
            assert found.extras[name] == value


def grows(rank: int, folder: str) -> list[float]:
    """MiB by which memory grows at most while 96 MiB of state are saved and loaded."""

    def kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    params = [nn.Parameter(torch.randn(1024, 1024)) for _ in range(8)]
    optimizer = shardadam.AdamW(params)
    step(optimizer, range(1))
    grown = []
    for function in (
        lambda: checkpoint.save(folder, step=1, optimizer=optimizer),
        lambda: checkpoint.load(folder, optimizer=optimizer),
    ):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = kib("VmRSS")
        function()
        grown.append((kib("VmHWM") - before) / 1024)
    return grown


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read as on Linux")
def test_memory_stays_where_it_was(tmp_path):
    (grown,) = run_ranks(1, grows, str(tmp_path))
    # A block for each thread, the manifest; a param has 4 MiB, the bucket 32.
    assert max(grown) < 16, grown


def test_the_safetensors_library_reads_the_files(tmp_path):
    model = mlp(torch.bfloat16)
    optimizer = shardadam.AdamW(model.named_parameters())
    train(model, optimizer, range(2))
    path = checkpoint.save(tmp_path, step=2, optimizer=optimizer)
    read = safetensors.torch.load_file(path / "rank-00000-of-00001.safetensors")
    for name, param in model.named_parameters():
        assert torch.equal(read[f"values/{name}"], param.detach().flatten())
        for part in ("exp_avg", "exp_avg_sq", "remainder"):
            assert torch.equal(read[f"{part}/{name}"], optimizer.state[param][part].flatten())
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    assert (manifest["version"], manifest["step"], manifest["world_size"]) == (1, 2, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 3]),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.ConstantLR(o),
                torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            ],
            milestones=[3],
        ),
    ],
    ids=["MultiStepLR", "ReduceLROnPlateau", "CosineAnnealingWarmRestarts", "SequentialLR"],
)
@pytest.mark.filterwarnings("ignore:.*epoch parameter")
def test_schedulers(make, tmp_path):
    def run(optimizer, scheduler, seeds):
        rates = []
        for seed in seeds:
            step(optimizer, range(seed, seed + 1))
            scheduler.step(*([1.0] if "Plateau" in type(scheduler).__name__ else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer = shardadam.AdamW(mlp().parameters(), lr=0.1)
    scheduler = make(optimizer)
    run(optimizer, scheduler, range(2))
    checkpoint.save(tmp_path, step=2, optimizer=optimizer, lr_scheduler=scheduler)
    expected = run(optimizer, scheduler, range(2, 15))
    resumed = shardadam.AdamW(mlp().parameters(), lr=0.3)
    other = make(resumed)
    checkpoint.load(tmp_path, optimizer=resumed, lr_scheduler=other)
    assert run(resumed, other, range(2, 15)) == expected


def test_names_come_from_the_groups_the_model_or_positions(tmp_path):
    model = mlp()
    for index, params in enumerate(
        [model.parameters(), [(f"my {n}", p) for n, p in model.named_parameters()]]
    ):
        optimizer = shardadam.AdamW(params)
        given = {"model": model} if index == 0 else {}
        checkpoint.save(tmp_path / str(index), step=1, optimizer=optimizer, **given)
    optimizer = shardadam.AdamW(model.parameters())
    checkpoint.save(tmp_path / "2", step=1, optimizer=optimizer)
    first = []
    for index in range(3):
        text = (tmp_path / str(index) / "step-00000001" / "manifest.json").read_text()
        entries = json.loads(text)["manifest"]["entries"]
        first.append(sorted(name for kind, name, *_ in entries if kind == "param")[0])
    assert first == ["0.bias", "my 0.bias", "param 0 of group 0"]
    with pytest.raises(checkpoint.CheckpointError, match="not in the checkpoint: 0.weight, 0.bias"):
        checkpoint.load(tmp_path / "2", optimizer=optimizer, model=model)


@pytest.mark.filterwarnings("ignore:.*gradients are equal")
def test_unfrozen_and_frozen_since(tmp_path):
    def build(frozen: bool):
        model = mlp()
        model[0].weight.requires_grad_(not frozen)
        return model, shardadam.AdamW(model.parameters())

    model, optimizer = build(frozen=True)
    step(optimizer, range(3))
    checkpoint.save(tmp_path / "frozen", step=3, optimizer=optimizer, model=model)
    other, resumed = build(frozen=False)
    step(resumed, range(5, 7))
    checkpoint.load(tmp_path / "frozen", optimizer=resumed, model=other)
    assert same(values(model), values(other))
    assert resumed.state[other[0].weight]["step"] == 0
    assert not resumed.state[other[0].weight]["exp_avg"].any()
    assert resumed.state[other[0].bias]["step"] == 3
    step(resumed, range(1))
    checkpoint.save(tmp_path / "unfrozen", step=4, optimizer=resumed, model=other)
    with pytest.warns(UserWarning, match="0.weight is frozen here: its state is left out"):
        checkpoint.load(tmp_path / "unfrozen", optimizer=optimizer, model=model)
    assert same(values(model), values(other))


def test_lr_tensors_stay_the_same_object(tmp_path):
    optimizer = shardadam.AdamW(mlp().parameters(), lr=torch.tensor(0.25))
    checkpoint.save(tmp_path, step=1, optimizer=optimizer)
    lr = optimizer.param_groups[0]["lr"]
    lr.fill_(0.5)
    checkpoint.load(tmp_path, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.25
    optimizer.param_groups[0]["lr"] = 1e300
    checkpoint.save(tmp_path, step=2, optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(checkpoint.CheckpointError, match="'lr' of group 0: expected torch.float32"):
        checkpoint.load(tmp_path, optimizer=optimizer)
    assert lr == 0.25


@pytest.mark.filterwarnings("ignore:.*the hyperparameters stay as they are")
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    step(optimizer, range(2))
    checkpoint.save(tmp_path, step=2, optimizer=optimizer, model=model)

    def refused(expected: str, kind=shardadam.AdamW, model=None, **given) -> None:
        model = model or mlp(seed=1)
        other = kind(model.parameters())
        before = (values(model), full_state(other), other.state_dict()["param_groups"])
        with pytest.raises(checkpoint.CheckpointError, match=expected):
            checkpoint.load(tmp_path, optimizer=other, model=model, **given)
        assert same(before[0], values(model))
        assert before[2] == other.state_dict()["param_groups"]
        for left, right in zip(before[1], full_state(other), strict=True):
            assert same(left, right)
        step(other, range(1))

    wide = mlp()
    wide[2].bias = nn.Parameter(torch.zeros(66))
    refused(re.escape("2.bias: expected (66,) float32, found (65,) float32"), model=wide)
    refused("in the checkpoint, but in nothing given to load.*4.bias", model=mlp()[:4])
    refused("not in the checkpoint: 5.weight", model=nn.Sequential(*mlp(), nn.Linear(5, 5)))
    refused("saved by 'AdamW', expected Adam", kind=shardadam.Adam)
    refused("the checkpoint has no 'mu_product'|saved by", kind=shardadam.NAdam)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    refused("the checkpoint has no lr_scheduler", lr_scheduler=scheduler)
    with pytest.raises(checkpoint.CheckpointError, match="expected an optimizer of shardadam's"):
        checkpoint.load(tmp_path, optimizer=torch.optim.AdamW(mlp().parameters()))
    longer = nn.Sequential(*mlp(seed=1), nn.Linear(5, 5))
    other = shardadam.AdamW(longer.parameters())
    with pytest.warns(UserWarning, match="not in the checkpoint: 5.weight, 5.bias"):
        checkpoint.load(tmp_path, optimizer=other, model=longer, strict=False)
    assert same(values(longer)[:6], values(model))


def test_what_cannot_be_saved_is_named(tmp_path):
    optimizer = shardadam.AdamW(mlp().parameters())
    with pytest.raises(
        checkpoint.CheckpointError, match=re.escape("extras['f'][1]: expected what")
    ):
        checkpoint.save(tmp_path, step=1, extras={"f": [1, lambda: 1]})
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    scheduler.hook = object()
    with pytest.raises(checkpoint.CheckpointError, match=r"lr_scheduler.state_dict\(\)\['hook'\]"):
        checkpoint.save(tmp_path, step=1, lr_scheduler=scheduler)
    optimizer.param_groups[0]["note"] = {1, 2}
    with pytest.raises(checkpoint.CheckpointError, match="'note' in group 0: .* found set"):
        checkpoint.save(tmp_path, step=1, optimizer=optimizer)
    for wrong in (-1, 1.0, True, 10**18):
        with pytest.raises(checkpoint.CheckpointError, match="step: expected an int from 0"):
            checkpoint.save(tmp_path, step=wrong)
    with pytest.raises(checkpoint.CheckpointError, match="keep: expected an int from 1"):
        checkpoint.save(tmp_path, step=1, keep=0)
    named = [("same", nn.Parameter(torch.ones(3))), ("same", nn.Parameter(torch.ones(4)))]
    with pytest.raises(checkpoint.CheckpointError, match="two tensors are called same"):
        checkpoint.save(tmp_path, step=1, optimizer=shardadam.AdamW(named))
    assert not list(tmp_path.iterdir())


def test_a_bar_only_where_somebody_looks(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for rank, shown in ((0, True), (1, False)):
        with Bar("saving", 100, rank) as bar:
            assert (bar._bar is not None) is shown
            bar(50)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with Bar("saving", 100, 0) as bar:
        assert bar._bar is None


def test_nothing_here_can_execute_a_file():
    package = Path(checkpoint.__file__).parent
    for path in package.glob("*.py"):
        text = path.read_text()
        for word in ("pickle", "torch.load", "torch.save", "eval(", "exec(", "marshal"):
            assert word not in text.replace(".eval()", ""), (path, word)
