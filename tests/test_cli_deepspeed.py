"""`python -m shardadam ckpt` of real DeepSpeed checkpoints, and of what only looks like one."""

import os
import random
import shutil
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import shardadam
from checkpointed import assert_same_state
from deepspeed_runs import DTYPES, RUNS, TIE, Tied, groups_of
from models import same, values
from ranks import run_ranks
from saved_runs import full_state
from shardadam import checkpoint
from shardadam.kernels.reference import join_master, split_master
from test_cli import refused, run
from test_cli_convert import Evil, assert_same_content, content, converted_or_refused, damaged

pytestmark = [
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
REFUSED = ("elastic-2", "stage3-2")
UNSEEN = ("robin-2", "fresh-2", "fused-2")
LOST = "shardadam ckpt convert: left out: epoch"
MODEL = "mp_rank_00_model_states.pt"
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    script = Path(__file__).with_name("deepspeed_runs.py")
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs / "fp32-zero2-2" / "last", tmp_path / "copied"))


def made(name: str, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As a user of DeepSpeed would go on; only params are cast, as DeepSpeed does."""
    model = Tied()
    for param in model.parameters():
        param.data = param.data.to(DTYPES[RUNS[name][1]])
        param.data.zero_()
    cls = shardadam.Adam if name == "own-2" else shardadam.AdamW
    groups = groups_of(model)
    if options.pop("frozen", True) is False:
        for group in groups:
            group["params"] = [(n, p) for n, p in group["params"] if p.requires_grad]
    for group in groups:
        del group["lr"], group["weight_decay"]
    return model, cls(groups, **options)


def converted(capsys, source: Path, target: Path, to: str = "ours") -> Path:
    code, _, err = run(capsys, "convert", source, target, "--to", to)
    assert code == 0 and err.startswith(LOST) and err.count("\n") == 1, err
    return target


def masters(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            state = optimizer.state.get(param, {})
            if "remainder" in state:
                found[name] = join_master(param.detach(), state["remainder"])
            elif state:
                found[name] = state.get("master", param.detach()).clone()
    return found


def given_directly(name: str, truth: dict, **options: object) -> tuple:
    """Made of what DeepSpeed said, without its files."""
    model, optimizer = made(name, **options)
    state = {}
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    for number, key in enumerate(names):
        if key not in truth["master"]:
            continue
        param, master = model.get_parameter(key), truth["master"][key]
        entry = {part: truth[part][key] for part in ("exp_avg", "exp_avg_sq")}
        state[number] = {"step": torch.tensor(4.0), **entry}
        param.data.copy_(master)
        if "remainder" in optimizer.state[param]:
            value, state[number]["remainder"] = split_master(master)
            param.data.copy_(value)
        elif "master" in optimizer.state[param]:
            state[number]["master"] = master
    saved = optimizer.state_dict()
    for group, lr, decay in zip(saved["param_groups"], (0.02, 0.01), (0.1, 0.0), strict=True):
        group.update(lr=lr, weight_decay=decay)
    optimizer.load_state_dict({**saved, "state": state})
    return model, optimizer


CASES = [
    *((name, "auto") for name in RUNS if name not in (*REFUSED, *UNSEEN)),
    *((name, "fp32") for name in ("bf16-zero1-1", "bf16-zero2-3")),
]


@pytest.mark.parametrize("name, master", CASES)
def test_goes_on_as_deepspeed_had_it(name, master, runs, tmp_path, capsys):
    _, dtype, _, _ = RUNS[name]
    truth = torch.load(runs / name / "truth.pt", weights_only=True)
    converted(capsys, runs / name, tmp_path / "new")
    model, optimizer = made(name, master=master)
    found = checkpoint.load(tmp_path / "new", optimizer=optimizer, model=model, rng=False)
    assert found.step == 4
    for key, expected in masters(optimizer).items():
        assert torch.equal(expected, truth["master"][key]), key
        state = optimizer.state[model.get_parameter(key)]
        assert state["step"] == 4
        for part in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[part], truth[part][key]), (key, part)
            assert state[part].count_nonzero()
    for key, value in truth["module"].items():
        here = model.state_dict()[key].clone()
        if name == "bf16-zero1-1" and key in ("embed.weight", "head.weight"):
            # Half-way between two: a remainder wants it rounded away from zero.
            assert here[0, 0] == (1 if master == "fp32" else 2 * TIE - 1)
            here[0, 0] = value[0, 0]
        assert torch.equal(here, value), key
    assert model.head.weight is model.embed.weight
    first, second = optimizer.param_groups
    if name != "own-2":
        assert first["decoupled_weight_decay"] is True
    assert (first["lr"], first["weight_decay"]) == (0.02, 0.1)
    assert (second["lr"], second["weight_decay"]) == (0.01, 0.0)
    # One more step, beside one that has seen no file, and beside DeepSpeed's own.
    other, direct = given_directly(name, truth, master=master)
    with torch.no_grad():
        other.frozen.copy_(model.frozen)
    for each in (model, other):
        for key, grad in truth["grad"].items():
            each.get_parameter(key).grad = grad.to(DTYPES[dtype])
    optimizer.step()
    direct.step()
    assert same(values(model), values(other))
    assert all(map(same, full_state(optimizer), full_state(direct)))
    for grad in truth["grad"].values():
        assert torch.equal(grad.to(DTYPES[dtype]).float(), grad)
    for key, here in masters(optimizer).items():
        # docs/numerics.md: DeepSpeed ran torch.optim's arithmetic, of up to 5.7 ulp.
        lr = next(g["lr"] for g in optimizer.param_groups if key in g["param_names"])
        ulp = truth["next"][key].abs().clamp(min=lr) * 2**-23
        assert ((here - truth["next"][key]).abs() <= 8 * ulp).all()
        assert not torch.equal(here, truth["master"][key])


def load_on_ranks(rank: int, folder: str) -> tuple:
    model, optimizer = made("bf16-zero2-3", frozen=False)
    checkpoint.load(folder, optimizer=optimizer, model=model, rng=False)
    return optimizer.consolidate_state_dict(), model.state_dict()


def test_others_read_what_was_written(runs, tmp_path, capsys):
    name = "bf16-zero2-3"
    for to in ("ours", "torch", "dcp"):
        # The directory, and the folder of one tag.
        converted(capsys, runs / name / ("last" if to == "dcp" else ""), tmp_path / to, to)
    (expected, params), _ = run_ranks(2, load_on_ranks, str(tmp_path / "ours"))
    saved = torch.load(tmp_path / "torch", weights_only=True)
    for to in ("torch", "dcp"):
        model, optimizer = made(name, frozen=False)
        if to == "torch":
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optim"])
        else:
            state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
            dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
            set_state_dict(
                model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
            )
        assert_same_state(optimizer.state_dict(), expected)
        assert same(list(model.state_dict().values()), list(params.values()))


def test_round_robin_is_the_same_in_another_order(runs, tmp_path, capsys):
    names = ("robin-2", "bf16-zero2-2")
    stored = [
        torch.load(runs / name / "last" / MODEL, weights_only=True)["param_shapes"][0]
        for name in names
    ]
    assert list(stored[0]) != list(stored[1])
    both = [converted(capsys, runs / name, tmp_path / name) for name in names]
    assert_same_content(*(folder / "step-00000004" for folder in both))


def test_before_the_first_step(runs, tmp_path, capsys):
    converted(capsys, runs / "fresh-2", tmp_path / "new")
    model, optimizer = made("fresh-2")
    assert checkpoint.load(tmp_path / "new", optimizer=optimizer, model=model, rng=False).step == 0
    truth = torch.load(runs / "fresh-2" / "truth.pt", weights_only=True)["module"]
    assert same(list(model.state_dict().values()), list(truth.values()))
    for state in optimizer.state.values():
        assert not any(state[part].any() for part in ("step", "exp_avg", "exp_avg_sq"))


def test_own_optimizer_says_its_class(runs, tmp_path, capsys):
    converted(capsys, runs / "own-2", tmp_path / "new")
    code, out, _ = run(capsys, "inspect", tmp_path / "new")
    assert code == 0 and ["optimizer", "Adam"] in [line.split() for line in out.splitlines()]


def test_fused_adam_does_not_say_its_class(runs, tmp_path, capsys):
    source, same_run = runs / "fused-2", runs / "fp32-zero2-2"
    code, _, err = run(capsys, "convert", source, tmp_path / "new", "--to", "ours")
    assert code == 0 and "taken for AdamW's, as it says nothing else (--optimizer)" in err
    expected = content(converted(capsys, same_run, tmp_path / "other") / "step-00000004")
    found = content(tmp_path / "new" / "step-00000004")
    kind, groups = found.pop("documents")
    assert kind == "AdamW" and len(groups) == 2
    assert all("decoupled_weight_decay" not in group["options"] for group in groups)
    assert found.keys() == expected.keys() - {"documents"}
    for name in found.keys() - {"step"}:
        assert found[name][:3] == expected[name][:3]
        assert same(list(found[name][3].values()), list(expected[name][3].values()))
    arguments = ("convert", source, tmp_path / "adam", "--to", "ours", "--optimizer", "Adam")
    assert run(capsys, *arguments)[0] == 0
    assert content(tmp_path / "adam" / "step-00000004")["documents"][0] == "Adam"


def test_inspect(runs, capsys):
    code, out, err = run(capsys, "inspect", runs / "bf16-zero2-3")
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert out.startswith(f"DeepSpeed ZeRO-2 checkpoint {runs}/bf16-zero2-3/last\n")
    for expected in (
        "world size 3",
        "embed.weight 11 x 5 bfloat16 step=4 exp_avg exp_avg_sq master 770 B",
        "frozen 3 bfloat16 6 B",
        "offset 5 float32 20 B",
    ):
        assert expected.split() in lines, expected
    assert "group 1     2 params, lr 0.01" in out
    assert sum(line[0].endswith("_states.pt") and line[-1] == "ok" for line in lines if line) == 4
    assert "deepspeed" not in sys.modules


# ---- what is refused ----------------------------------------------------------------------------


def resave(file: Path, **changed: object) -> None:
    torch.save({**torch.load(file, weights_only=True), **changed}, file)


def change_a_value(folder: Path) -> None:
    module = torch.load(folder / MODEL, weights_only=True)["module"]
    module["hidden.bias"][3] += 1
    resave(folder / MODEL, module=module)


DAMAGES = {
    "missing": (lambda f: (f / OPTIM.format(1)).unlink(), "of ranks 0 to 1, found those of 0"),
    "extra": (
        lambda f: shutil.copy(f / OPTIM.format(1), f / OPTIM.format(2)),
        "of ranks 0 to 1, found those of 0, 1, 2",
    ),
    "twice": (lambda f: shutil.copy(f / OPTIM.format(1), f / OPTIM.format(0)), "group 0: expected"),
    "cut model": (lambda f: os.truncate(f / MODEL, 999), f"{MODEL}: expected tensors"),
    "cut state": (lambda f: os.truncate(f / OPTIM.format(1), 3000), "rank_1_mp_rank_00_optim"),
    "no model": (lambda f: (f / MODEL).unlink(), f"expected {MODEL}, found none"),
    "no state": (
        lambda f: [(f / OPTIM.format(rank)).unlink() for rank in (0, 1)],
        "was it saved with ZeRO?",
    ),
    "model parallel": (
        lambda f: (f / MODEL.replace("00", "01")).touch(),
        "found model parallelism (mp_rank_01_model_states.pt)",
    ),
    "sizes": (lambda f: resave(f / MODEL, mp_world_size=2), "model or pipeline parallelism"),
    "experts": (
        lambda f: (f / "layer_0_expert_1_mp_rank_00_model_states.pt").touch(),
        "found a mixture of experts",
    ),
    "pipeline": (
        lambda f: (f / "layer_00-model_states.pt").touch(),
        "found pipeline parallelism (layer_00-model_states.pt)",
    ),
    "universal": (lambda f: (f / "zero").mkdir(), "found a universal checkpoint"),
    "without": (lambda f: resave(f / MODEL, optimizer={}), "found an optimizer without"),
    "1-bit": (
        lambda f: resave(f / MODEL, ds_config={"optimizer": {"type": "OneBitAdam"}}),
        "found the 1-bit OneBitAdam",
    ),
    "value": (
        change_a_value,
        "hidden.bias: expected the module to have the fp32 masters, rounded; 1",
    ),
    "shapes": (
        lambda f: resave(f / MODEL, param_shapes=[{"hidden.bias": torch.Size([7])}] * 2),
        "expected every param in one group",
    ),
    "odd": (lambda f: resave(f / MODEL, shared_params=7), "unexpected values"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_not_whole_is_refused(what, copied, tmp_path, capsys):
    damage, expected = DAMAGES[what]
    damage(copied)
    arguments = ("convert", copied, tmp_path / "new", "--to", "ours")
    assert expected in refused(capsys, *arguments)
    assert not (tmp_path / "new").exists()


def test_files_of_several_saves_are_refused(runs, copied, tmp_path, capsys):
    shutil.copy(runs / "fresh-2" / "last" / OPTIM.format(1), copied)
    error = refused(capsys, "convert", copied, tmp_path / "new", "--to", "ours")
    assert "expected zero_stage as rank 0 has it: 2, found 1" in error
    source = runs / "fp32-zero1-2" / "last" / OPTIM.format(0)
    shutil.copy(source, copied)
    error = refused(capsys, "convert", copied, tmp_path / "new", "--to", "ours")
    assert f"{OPTIM.format(1)}: group 0: expected ['step', 'exp_avg', 'exp_avg_sq']" in error


@pytest.mark.parametrize(
    "name, expected", [("elastic-2", "found an elastic checkpoint"), ("stage3-2", "found ZeRO-3")]
)
def test_what_others_of_deepspeed_wrote_is_refused(name, expected, runs, tmp_path, capsys):
    for arguments in (("inspect",), ("convert",)):
        more = (tmp_path / "new", "--to", "torch") if arguments == ("convert",) else ()
        assert expected in refused(capsys, *arguments, runs / name, *more)


@pytest.mark.parametrize("tag", ["../copied", "", "gone", ".."])
def test_latest_names_a_folder_beside_it(tag, copied, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text(tag)
    assert "run/latest: expected the" in refused(capsys, "inspect", tmp_path / "run")


@pytest.mark.parametrize("file", [MODEL, OPTIM.format(0), OPTIM.format(1)])
def test_nothing_is_executed(file, copied, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.engine"):
        foreign = types.ModuleType(name)  # so that it can be written, without importing DeepSpeed
        monkeypatch.setitem(sys.modules, name, foreign)
    foreign.Engine = type("Engine", (), {"__module__": foreign.__name__})
    for value, named in (
        (Evil(), "posix.mkdir"),
        (foreign.Engine(), "deepspeed.runtime.engine.Eng"),
    ):
        for saved in (value, {"module": {}, "optimizer_state_dict": {"loss_scaler": value}}):
            for zipped in (True, False):
                torch.save(saved, copied / file, _use_new_zipfile_serialization=zipped)
                for to in ("ours", "torch"):
                    arguments = ("convert", copied, tmp_path / "new", "--to", to)
                    assert f"{file}: expected tensors and plain" in (
                        error := refused(capsys, *arguments)
                    )
                    assert f"it names {named}" in error
                assert f"it names {named}" in refused(capsys, "inspect", copied)
    assert not (tmp_path / "evil").exists()


def test_any_bytes_are_refused_in_one_line(copied, tmp_path, capsys):
    generator = random.Random(0)
    for file in sorted(copied.iterdir()):
        for _ in damaged(file, generator, 40):
            converted_or_refused(capsys, copied, tmp_path / "new")
            assert run(capsys, "inspect", copied)[0] in (0, 2)
