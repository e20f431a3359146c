"""Checkpoints of coded state: converted where that is let pass, refused where not, decoded."""

import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import shardadam
from checkpointed import CODED, advance, make
from models import RealAwkward, mlp, same, values
from ranks import run_ranks
from saved_runs import load_converted, step
from shardadam import checkpoint
from shardadam.checkpoint import CheckpointError
from shardadam.kernels.state_formats import FORMATS
from test_checkpoint_hostile import reason, rewritten
from test_cli import refused, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:gradients are equal"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*random state"),
]
OTHERS = [(a, b) for a, b in itertools.product(FORMATS, repeat=2) if a != b]


def save(rank: int, folder: str, options: dict) -> dict:
    model = RealAwkward(torch.bfloat16)
    optimizer = shardadam.AdamW(model.named_parameters(), bucket_bytes=3000, **options)
    step(optimizer, range(4))
    checkpoint.save(folder, step=4, optimizer=optimizer, model=model)
    return optimizer.consolidate_state_dict()


def load(rank: int, folder: str, options: dict, plain: bool = False) -> tuple:
    model = RealAwkward(torch.bfloat16)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7)
            if plain:
                param.data = param.data.clone(memory_format=torch.contiguous_format)
    optimizer = shardadam.AdamW(model.named_parameters(), bucket_bytes=9000, **options)
    checkpoint.load(folder, optimizer=optimizer, model=model, strict=False)
    return optimizer.consolidate_state_dict(), values(model)


@pytest.mark.filterwarnings("ignore:.*moments are")
@pytest.mark.parametrize(("before", "after"), OTHERS)
def test_moments_are_converted_at_any_world_size(before, after, tmp_path):
    """As `load_state_dict` converts what another world consolidated."""
    saved = run_ranks(3, save, str(tmp_path), {"state": before})[0]
    model = RealAwkward(torch.bfloat16)
    optimizer = shardadam.AdamW(model.parameters(), state=after)
    optimizer.load_state_dict(saved)
    expected = optimizer.consolidate_state_dict()["state"]
    for world_size in (1, 2):
        found, params = run_ranks(world_size, load, str(tmp_path), {"state": after})[0]
        assert not any((param == 7).all() for param in params if param.numel())
        for index, entry in expected.items():
            for name, value in entry.items():
                if name != "remainder":
                    assert torch.equal(found["state"][index][name], value), (index, name)


@pytest.mark.filterwarnings("ignore:.*moments are")
@pytest.mark.parametrize("form", ["q16", "q8"])
def test_other_strides_are_other_blocks(form, tmp_path):
    """Decoded, put in the other order, and coded again: 16-bit codes of roots lie on one grid."""
    saved = save(0, str(tmp_path), {"state": form})
    found, _ = load(0, str(tmp_path), {"state": form}, plain=True)
    for index, entry in saved["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            value, other = entry[name], found["state"][index][name]
            if name == "exp_avg_sq" and form == "q16":
                assert torch.equal(other, value)
            elif value.numel():
                # A few codes of 8 bits of a scale that is the largest of any block.
                torch.testing.assert_close(
                    other, value, rtol=0.1, atol=float(value.abs().max()) / 60
                )


@pytest.mark.parametrize(("before", "after"), OTHERS)
def test_another_format_is_an_error_and_changes_nothing(before, after, tmp_path):
    save(0, str(tmp_path), {"state": before})
    model = RealAwkward(torch.bfloat16)
    optimizer = shardadam.AdamW(model.named_parameters(), state=after)
    step(optimizer, range(2))
    kept, state = values(model), optimizer.consolidate_state_dict()
    with pytest.raises(CheckpointError, match=f"moments are {before} in the .*, expected {after}"):
        checkpoint.load(tmp_path, optimizer=optimizer, model=model)
    assert same(values(model), kept)
    for index, entry in optimizer.consolidate_state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][index][n]) for n, value in entry.items())


def test_moments_without_a_code_are_refused_before_anything_is_changed(tmp_path):
    model, other = mlp(), mlp(seed=1)
    optimizer = shardadam.AdamW(model.named_parameters())
    step(optimizer, range(2))
    optimizer.state[model[2].weight]["exp_avg"][3, 4] = float("inf")
    checkpoint.save(tmp_path, step=2, optimizer=optimizer, model=model)
    resumed = shardadam.AdamW(other.named_parameters(), state="q8")
    kept = values(other)
    with pytest.raises(CheckpointError, match=r"2.weight: exp_avg has values that q8 has no code"):
        checkpoint.load(tmp_path, optimizer=resumed, model=other, strict=False)
    assert same(values(other), kept)
    step(resumed, range(1))


MASTERS = {"fp32": 32, "split": 32, "split8": 24, "none": 16}


@pytest.mark.filterwarnings("ignore:.*master weights of")
@pytest.mark.parametrize("after", MASTERS)
@pytest.mark.parametrize("before", MASTERS)
def test_masters_are_rounded_where_that_is_let_pass(before, after, tmp_path):
    model, other = mlp(torch.bfloat16), mlp(torch.bfloat16, seed=1)
    optimizer = shardadam.AdamW(model.named_parameters(), master=before)
    step(optimizer, range(4))
    checkpoint.save(tmp_path, step=4, optimizer=optimizer, model=model)
    resumed = shardadam.AdamW(other.named_parameters(), master=after)
    if MASTERS[after] < MASTERS[before]:
        kept = values(other)
        error = f"master weights of {MASTERS[before]} bits, expected {MASTERS[after]}"
        with pytest.raises(CheckpointError, match=error):
            checkpoint.load(tmp_path, optimizer=resumed, model=other)
        assert same(values(other), kept)
        checkpoint.load(tmp_path, optimizer=resumed, model=other, strict=False)
    else:
        checkpoint.load(tmp_path, optimizer=resumed, model=other)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        exact, found = masters(optimizer, left), masters(resumed, right)
        bits = min(MASTERS[before], MASTERS[after])
        # Half a unit of the last bit that is left; bf16 has 8, split8 16 bits of significand.
        rtol = {32: 0.0, 24: 2.0**-16, 16: 2.0**-8}[bits]
        torch.testing.assert_close(found, exact, rtol=rtol, atol=0)


def reordered(dims: str):
    """Renames the scales to those of another order of dims."""

    def spoil(entry: dict) -> None:
        for name in [name for name in entry if name.endswith("_scale")]:
            entry[f"{name}@{dims}"] = entry.pop(name)

    return spoil


def masters(optimizer: shardadam.AdamW, param: nn.Parameter) -> torch.Tensor:
    state = optimizer.state[param]
    if "master" in state:
        return state["master"]
    bits = param.detach().view(torch.int16).int() << 16
    if "remainder" in state:
        bits += state["remainder"].int()
    elif "remainder8" in state:
        bits += state["remainder8"].int() << 8
    return bits.view(torch.float32)


@pytest.mark.parametrize("to", ["torch", "dcp"])
@pytest.mark.parametrize("kind", CODED)
def test_convert_decodes(kind, to, tmp_path, capsys):
    model, optimizer = make(kind, 4096)
    advance(model, optimizer, range(3))
    checkpoint.save(tmp_path / "run", step=3, optimizer=optimizer, model=model)
    code, _, notes = run(capsys, "convert", tmp_path / "run", tmp_path / "new", "--to", to)
    form = next(iter(optimizer._places.values()))[0].form.name
    assert code == 0 and f"moments are decoded, they are {form} there" in notes
    expected = optimizer.consolidate_state_dict()["state"]
    module, dtype, name, options = CODED[kind]
    like = {name: options[name] for name in ("amsgrad", "master") if name in options}
    if options.get("memory") == "leanest":
        like["master"] = "split8"
    other = module(dtype)
    plain = getattr(shardadam, name)(other.named_parameters(), **like)
    load_converted(tmp_path / "new", to, other, plain)
    assert same(values(other), values(model))
    for index, entry in plain.consolidate_state_dict()["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[moment], expected[index][moment].float()), (index, moment)


@pytest.mark.parametrize("source", ["torch", "whole", "dcp"])
def test_convert_reads_codes(source, tmp_path, capsys):
    """One rank's state dict, a consolidated one, and the files of torch.distributed.checkpoint."""
    model, optimizer = make("awkward-q16", 4096)
    advance(model, optimizer, range(3))
    whole = optimizer.consolidate_state_dict()
    if source == "dcp":
        state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=tmp_path / source, no_dist=True)
    else:
        optim = optimizer.state_dict() if source == "torch" else whole
        torch.save({"model": model.state_dict(), "optim": optim}, tmp_path / source)
    made = tmp_path / "run" / "step-00000003"
    made.parent.mkdir()
    code, _, _ = run(capsys, "convert", tmp_path / source, made, "--to", "ours")
    assert code == 0
    other = RealAwkward(torch.bfloat16)
    plain = shardadam.NAdam(other.named_parameters(), master="none")
    checkpoint.load(made.parent, optimizer=plain, model=other)
    for index, entry in plain.consolidate_state_dict()["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[moment], whole["state"][index][moment]), (index, moment)


def test_codes_without_their_scales_are_refused(tmp_path, capsys):
    model, optimizer = make("lean", 4096)
    advance(model, optimizer, range(3))
    optim = optimizer.state_dict()
    del optim["state"][2]["exp_avg_ratio_scale"]
    torch.save({"model": model.state_dict(), "optim": optim}, tmp_path / "torch")
    error = refused(capsys, "convert", tmp_path / "torch", tmp_path / "new", "--to", "ours")
    assert "2.weight: expected whole coded moments, found ['exp_avg_ratio'" in error


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda entry: entry.pop("max_exp_avg_sq_q16_scale"),
            "expected whole coded moments, found",
        ),
        (
            lambda entry: entry.update(exp_avg_sq_q8=entry["exp_avg_ratio"].byte()),
            "expected whole coded moments, found",
        ),
        (
            lambda entry: entry.update({"exp_avg_ratio_scale@1-0": entry["exp_avg_ratio_scale"]}),
            "expected whole coded moments, found",
        ),
        (reordered("0-x"), "expected an order of its dims, found '0-x'"),
        (reordered("0-0"), "expected an order of its dims, found '0-0'"),
    ],
)
def test_codes_that_do_not_belong_together_are_refused(spoil, message, tmp_path, capsys):
    model, optimizer = make("lean", 4096)
    advance(model, optimizer, range(3))
    optimizer.param_groups[0]["amsgrad"] = True
    advance(model, optimizer, range(3, 4))
    optim = optimizer.state_dict()
    spoil(optim["state"][2])
    torch.save({"model": model.state_dict(), "optim": optim}, tmp_path / "torch")
    error = refused(capsys, "convert", tmp_path / "torch", tmp_path / "new", "--to", "ours")
    assert f"2.weight: {message}" in error


@pytest.mark.parametrize("missing", ["max_exp_avg_sq_q16", "max_exp_avg_sq_q16_scale"])
def test_a_checkpoint_with_half_a_maximum_is_refused(missing, tmp_path):
    param = nn.Parameter(torch.ones(300))
    optimizer = shardadam.AdamW([param], state="q16", amsgrad=True)
    checkpoint.save(tmp_path, step=1, optimizer=optimizer)

    def change(value: dict) -> None:
        (shards,) = value["files"]
        shards[:] = [shard for shard in shards if shard[1] != missing]

    rewritten(tmp_path / "step-00000001", change)
    assert f"{missing} of 'param 0 of group 0': expected" in reason(tmp_path / "step-00000001")


@pytest.mark.parametrize("part", ["master", "remainder", "remainder8"])
def test_masters_of_params_that_have_none_are_refused(part, tmp_path):
    param = nn.Parameter(torch.ones(300))
    optimizer = shardadam.AdamW([param])
    checkpoint.save(tmp_path, step=1, optimizer=optimizer)
    rewritten(
        tmp_path / "step-00000001", lambda m: m["files"][0].append([0, part, 0, 300, "0" * 32])
    )
    assert f"expected no {part} of float32 params" in reason(tmp_path / "step-00000001")


@pytest.mark.parametrize("state", FORMATS)
def test_convert_gives_an_empty_param_a_maximum(state, tmp_path, capsys):
    """torch's AMSGrad looks for it."""
    params = [nn.Parameter(torch.ones(numel)) for numel in (300, 0)]
    optimizer = shardadam.AdamW(params, state=state, amsgrad=True)
    checkpoint.save(tmp_path, step=1, optimizer=optimizer)
    code, _, _ = run(
        capsys, "convert", tmp_path / "step-00000001", tmp_path / "new", "--to", "torch"
    )
    assert code == 0
    plain = torch.optim.AdamW(params, amsgrad=True)
    plain.load_state_dict(torch.load(tmp_path / "new")["optim"])
    for param in params:
        param.grad = torch.ones_like(param)
    plain.step()
