"""From apex's DistributedFusedAdam: every bit arrives, in every layout, and nothing is executed."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import shardadam
from apex_layout import Trained, gathered, save, v1_ranks, v2
from models import same, values
from saved_runs import load_converted
from shardadam import checkpoint
from shardadam.cli import apex, apex_shards
from shardadam.cli.masters import near
from shardadam.kernels.reference import join_master, split_master
from test_cli import refused, run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FAMILY = {"lr": 0.25, "bias_correction": True, "betas": (0.8, 0.9), "eps": 1e-6}
STEP = 7


class Odd(nn.Module):
    """Sizes that no bucket divides, a channels_last one, one across buckets, an empty one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {"first": (3, 5), "long": (41, 17), "empty": (0, 4), "one": (1,), "last": (130,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        image = torch.zeros(4, 3, 2, 5, dtype=dtype).to(memory_format=torch.channels_last)
        self.image = nn.Parameter(image)


def random_master(shape: torch.Size, seed: int) -> Tensor:
    """fp32 values, a few just between two bf16 and two fp16 ones."""
    master = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flat = master.flatten()
    bits = flat.view(torch.int32)
    bits[::7] = (bits[::7] & -0x10000) | 0x8000
    bits[3::7] = (bits[3::7] & -0x2000) | 0x1000
    return flat.view(shape)


# By kind: the model's dtype, the optimizer's, what it keeps of the params.
KINDS = {
    "fp32": (torch.float32, torch.float32, "param"),
    "fp32 without masters": (torch.float32, torch.float32, None),
    "fp64": (torch.float64, torch.float32, "param"),
    "bf16 with remainders": (torch.bfloat16, torch.float32, "remainder"),
    "bf16 with masters": (torch.bfloat16, torch.float32, "param"),
    "bf16 alone": (torch.bfloat16, torch.bfloat16, "param"),
    "fp16 with masters": (torch.float16, torch.float32, "param"),
    "fp16 alone": (torch.float16, torch.float16, None),
}


def trained(kind: str, seed: int = 0) -> tuple[Odd, list[Trained]]:
    """A model, and what an optimizer of it has, in the model's order."""
    dtype, own, keeps = KINDS[kind]
    model, params = Odd(dtype), []
    for number, param in enumerate(model.parameters()):
        like = torch.empty_like(param, dtype=torch.float32)
        numbers = [seed * 100 + 3 * number + n for n in range(3)]
        master, exp_avg, exp_avg_sq = (
            like.copy_(random_master(like.shape, n)).clone() for n in numbers
        )
        if own != torch.float32 or keeps is None:
            master = master.to(own).to(dtype).to(own)
        with torch.no_grad():
            # apex rounds masters to even, and to remainders away from zero.
            param.copy_(split_master(master)[0] if keeps == "remainder" else master.to(dtype))
        moments = exp_avg.to(own), exp_avg_sq.square().to(own)
        params.append(Trained(param.detach(), master, *moments, keeps))
    return model, params


GROUPS = {"one group": [[0, 1, 2, 3, 4, 5]], "two groups": [[5, 1, 3], [0, 2, 4]]}


def options(groups: list[list[int]], model: nn.Module, named: bool) -> list[dict]:
    names = [name for name, _ in model.named_parameters()]
    made = []
    for number, group in enumerate(groups):
        own = {**FAMILY, "weight_decay": 0.125 * number}
        made.append({**own, "param_names": [names[id] for id in group]} if named else own)
    return made


def written(layout: str, path: Path, model: nn.Module, *arguments: object) -> None:
    """Write a checkpoint: v2, or v1 of so many ranks, gathered or a file for each."""
    whole = {"model": model.state_dict()}
    kind, _, world_size = layout.partition("/")
    if kind == "v2":
        save(whole | {"optimizer": v2(*arguments)}, path)
        return
    ranks = v1_ranks(*arguments, int(world_size), old=kind == "old")
    if kind == "files":
        path.mkdir()
        for rank, own in enumerate(ranks):
            save((whole if rank == 1 else {}) | {"optim": own | {"format": 1}}, path / f"{rank}.pt")
    else:
        save(whole | {"optimizer": gathered(ranks)}, path)


def optimizer_for(model: nn.Module, groups: list[list[int]]) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    made = [{"params": [named[id] for id in group]} for group in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shardadam.AdamW(made, lr=1.0)


def assert_arrived(
    model: nn.Module, optimizer: torch.optim.Optimizer, params: list[Trained], groups: list
) -> None:
    """To the last bit: params, moments, masters, steps, hyperparameters."""
    state = optimizer.consolidate_state_dict()["state"]
    order = [id for group in groups for id in group]
    named = dict(enumerate(model.parameters()))
    for number, id in enumerate(order):
        entry, expected, param = state[number], params[id], named[id].detach()
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        for part in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[part], getattr(expected, part).to(wide)), (id, part)
        if param.dtype == torch.bfloat16:
            master = join_master(param, entry["remainder"])
            assert (param == split_master(expected.master.float())[0]).all()
            ties = expected.keeps == "param"
            assert ties or torch.equal(param, expected.values), (
                "a remainder's param is rounded as ours is"
            )
        else:
            master = entry.get("master", param)
            assert torch.equal(param, expected.values)
        assert torch.equal(master.to(wide), expected.master.to(wide)), id
        assert entry["step"] == STEP
    for number, group in enumerate(optimizer.param_groups):
        found = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
        assert found == (0.25, (0.8, 0.9), 1e-6, 0.125 * number)
        assert "bias_correction" not in group


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("layout", ["v2", "v1/1", "v1/2", "v1/3", "old/2", "files/3"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_arrives(kind, layout, groups, tmp_path, capsys):
    model, params = trained(kind)
    order = GROUPS[groups]
    arguments = (params, order, options(order, model, named=groups == "two groups"), STEP)
    written(layout, tmp_path / "apex", model, *arguments)
    code, out, err = run(capsys, "convert", tmp_path / "apex", tmp_path / "run", "--to", "ours")
    assert code == 0 and out.startswith(f"{tmp_path}/run: 6 tensors, state of 6")
    assert "taken for AdamW's: apex does not save its adam_w_mode (--optimizer)" in err
    rounded = kind == "bf16 with masters"
    assert ("not their master weights rounded to nearest" in err) == rounded, err
    other = Odd(KINDS[kind][0])
    resumed = optimizer_for(other, order)
    checkpoint.load(tmp_path / "run", optimizer=resumed, model=other, rng=False)
    assert (tmp_path / "run" / f"step-{STEP:08d}").is_dir()
    assert_arrived(other, resumed, params, order)


@pytest.mark.parametrize("to", ["torch", "dcp"])
@pytest.mark.parametrize("kind", ["bf16 with remainders", "fp16 with masters", "fp32"])
def test_through_other_formats(kind, to, tmp_path, capsys):
    model, params = trained(kind)
    order = GROUPS["two groups"]
    arguments = (params, order, options(order, model, named=True), STEP)
    written("v1/2", tmp_path / "apex", model, *arguments)
    assert run(capsys, "convert", tmp_path / "apex", tmp_path / "new", "--to", to)[0] == 0
    other = Odd(KINDS[kind][0])
    resumed = optimizer_for(other, order)
    load_converted(tmp_path / "new", to, other, resumed)
    assert_arrived(other, resumed, params, order)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    world_size=st.integers(1, 5),
    shard_size=st.integers(1, 90),
    alignment=st.sampled_from([1, 8, 32]),
    data=st.data(),
)
def test_any_shards_go_together(sizes, world_size, shard_size, alignment, data):
    keeps = data.draw(st.lists(st.sampled_from(["param", None]), min_size=6, max_size=6))
    params = [
        Trained(torch.zeros(n), *(torch.randn(n) for _ in range(3)), keeps=keeps[number])
        for number, n in enumerate(sizes)
    ]
    everything = [list(range(len(sizes)))]
    ranks = v1_ranks(params, everything, [{}], 1, world_size, shard_size, alignment)
    opened = apex_shards.opened(gathered(ranks)["gathered_states"], "file")
    order = data.draw(st.permutations(range(world_size)))
    found = apex_shards.put_together([(f"rank {rank}", opened[rank]) for rank in order], "f")
    assert set(found) == set(range(len(sizes)))
    for id, trained in enumerate(params):
        names = {"exp_avg", "exp_avg_sq"} | ({"param"} if trained.keeps else set())
        assert set(found[id]) == (names if trained.values.numel() else set())
        for name, tensor in found[id].items():
            whole = trained.master if name == "param" else getattr(trained, name)
            assert torch.equal(tensor, whole)


def test_names_from_values(tmp_path, capsys):
    """Two groups without names: v2 has the masters, and their rounding is in the model."""
    for kind in ("bf16 with masters", "fp32"):
        model, params = trained(kind)
        model.register_buffer("running", torch.ones(130))
        model.image.requires_grad_(False)
        order = [[5, 1, 3], [4, 2, 0]]
        path = tmp_path / f"{kind}.pt"
        written("v2", path, model, params, order, options(order, model, named=False), STEP)
        assert run(capsys, "convert", path, tmp_path / f"{kind}-run", "--to", "ours")[0] == 0
        assert apex.names_of(apex.load(path)) == dict(
            enumerate(["image", "long", "one", "last", "empty", "first"])
        )
    # Another step's model is none of it, and of two equal tensors either could be meant.
    order = GROUPS["one group"]
    written_options = options(order, model, named=True)
    other, _ = trained("fp32", seed=1)
    written("v2", tmp_path / "stale", other, params, order, written_options, STEP)
    arguments = (tmp_path / "new", "--to", "ours")
    assert "the model is of another step" in refused(
        capsys, "convert", tmp_path / "stale", *arguments
    )
    written("v2", tmp_path / "stale", other, params, order, options(order, model, False), STEP)
    error = refused(capsys, "convert", tmp_path / "stale", *arguments)
    assert "expected param_names" in error and "nothing in the model" in error
    model.register_buffer("copy", model.first.detach().clone())
    written("v2", tmp_path / "twice", model, params, order, options(order, model, False), STEP)
    assert "several of the model's" in refused(capsys, "convert", tmp_path / "twice", *arguments)


def test_scaled_states(tmp_path, capsys):
    """Masters in scaled fp16, params rounded from what they were before: the masters count."""
    model, params = trained("bf16 with masters")
    for p in params:
        if p.master.numel():
            scale = p.master.abs().max() / (torch.finfo(torch.float16).max / 2)
            p.master = (p.master / scale).half().float() * scale
    order = GROUPS["two groups"]
    arguments = (params, order, options(order, model, named=False), STEP)
    written("v2", tmp_path / "apex", model, *arguments)
    arguments = ("convert", tmp_path / "apex", tmp_path / "run", "--to", "ours")
    code, _, err = run(capsys, *arguments)
    assert code == 0 and "not their master weights rounded to nearest" in err
    other = Odd(torch.bfloat16)
    resumed = optimizer_for(other, order)
    checkpoint.load(tmp_path / "run", optimizer=resumed, model=other, rng=False)
    assert_arrived(other, resumed, params, order)


def test_near():
    exact = torch.tensor([1.0, -3.0, 2.0**-130, 0.0, torch.nan, torch.inf])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert near(exact.to(dtype), exact)
    assert near(torch.tensor([2.0**-24]).half(), torch.tensor([2.0**-25]))
    for place, other in ((0, 1.01), (1, 3.0), (2, 1e-6), (3, 1e-6), (4, 0.0), (5, 1.0)):
        wrong = exact.clone()
        wrong[place] = other
        assert not near(wrong, exact)
        assert not near(exact, wrong)


def test_params_without_a_gradient_so_far(tmp_path, capsys):
    model, params = trained("bf16 with remainders")
    order = GROUPS["one group"]
    ranks = v1_ranks(params, order, options(order, model, False), STEP, 2)
    for rank in ranks:
        del rank["state"][3]
    save({"model": model.state_dict(), "optimizer": gathered(ranks)}, tmp_path / "apex")
    arguments = ("convert", tmp_path / "apex", tmp_path / "run", "--to", "ours")
    assert run(capsys, *arguments)[1] == f"{tmp_path}/run: 6 tensors, state of 5\n"
    other = Odd(torch.bfloat16)
    resumed = optimizer_for(other, order)
    checkpoint.load(tmp_path / "run", optimizer=resumed, model=other, rng=False)
    assert same(values(model), values(other))
    state = resumed.consolidate_state_dict()["state"]
    assert [entry["step"].item() for entry in state.values()] == [STEP] * 3 + [0] + [STEP] * 2
    for part in ("exp_avg", "exp_avg_sq", "remainder"):
        assert not state[3][part].any()


def test_adam_mode(tmp_path, capsys):
    model, params = trained("fp32")
    order = GROUPS["one group"]
    written("v2", tmp_path / "apex", model, params, order, options(order, model, True), STEP)
    arguments = ("convert", tmp_path / "apex", tmp_path / "run", "--to", "ours", "--optimizer")
    assert "expected an Adam or AdamW" in refused(capsys, *arguments, "NAdam")
    assert run(capsys, *arguments, "Adam")[::2] == (0, "")
    resumed = shardadam.Adam(model.named_parameters())
    checkpoint.load(tmp_path / "run", optimizer=resumed, model=model, rng=False)
    assert resumed.param_groups[0]["decoupled_weight_decay"] is False


def test_the_model_in_a_file_of_its_own(tmp_path, capsys):
    model, params = trained("bf16 with remainders")
    order = GROUPS["one group"]
    save(gathered(v1_ranks(params, order, options(order, model, False), STEP, 2)), tmp_path / "opt")
    torch.save(model.state_dict(), tmp_path / "model")
    arguments = ("convert", tmp_path / "opt", tmp_path / "run", "--to", "ours")
    assert 'found no "model" (--model FILE)' in refused(capsys, *arguments)
    code, out, _ = run(capsys, "inspect", tmp_path / "opt")
    assert code == 0 and "param 4" in out and "v1, gathered, 2 ranks" in out
    assert run(capsys, *arguments, "--model", tmp_path / "model")[0] == 0
    other = Odd(torch.bfloat16)
    resumed = optimizer_for(other, order)
    checkpoint.load(tmp_path / "run", optimizer=resumed, model=other, rng=False)
    assert same(values(model), values(other))
    assert_arrived(other, resumed, params, order)
    torch.save({"model": {}, "optim": {"state": {}, "param_groups": []}}, tmp_path / "torch")
    error = refused(
        capsys, "convert", tmp_path / "torch", tmp_path / "x", "--to", "ours", "--model", "y"
    )
    assert "expected a checkpoint of apex to go with --model" in error


@pytest.mark.parametrize("layout", ["v2", "v1/2", "files/2"])
def test_inspect(layout, tmp_path, capsys):
    model, params = trained("bf16 with masters")
    order = GROUPS["two groups"]
    arguments = (params, order, options(order, model, named=True), STEP)
    written(layout, tmp_path / "apex", model, *arguments)
    code, out, err = run(capsys, "inspect", tmp_path / "apex")
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert lines[0] == ["apex", "DistributedFusedAdam", str(tmp_path / "apex")]
    assert ["step", "7"] in lines and any(
        line[:4] == ["group", "1", "3", "params,"] for line in lines
    )
    (long,) = [line for line in lines if line[:1] == ["long"]]
    assert long[1:5] == ["41", "x", "17", "bfloat16"]
    assert {"exp_avg:float32", "exp_avg_sq:float32", "param:float32"} <= set(long)


def test_what_else_is_there_is_said(tmp_path, capsys):
    model, params = trained("fp32")
    order = GROUPS["one group"]
    optim = v2(params, order, options(order, model, True), STEP) | {"fp32_optim": {}}
    saved = {"model": model.state_dict(), "optimizer": optim, "epoch": 3}
    save(saved, tmp_path / "apex")
    _, _, err = run(capsys, "convert", tmp_path / "apex", tmp_path / "new", "--to", "torch")
    assert "left out: epoch, fp32_optim of the optimizer" in err
