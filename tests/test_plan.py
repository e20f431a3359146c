"""`python -m shardadam plan`: its bytes beside an optimizer's, and beside what training takes."""

import itertools
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import shardadam
from hybrid_runs import over
from models import Awkward, mlp
from plan_peaks import CASES, GPT, MIB, WORLD_SIZES
from ranks import run_ranks
from shardadam.cli import hf_shapes, modelling, plan_figure
from shardadam.cli.footprint import Plan, Trained
from shardadam.cli.main import main
from shardadam.hierarchy import Hierarchy

pytestmark = pytest.mark.filterwarnings("ignore:gradients are equal")


# ---- beside an optimizer -------------------------------------------------------------------------


def all_real_bytes(
    rank: int, plans: list[Plan], made: Callable[[], nn.Module], bucket_bytes: int
) -> list[tuple]:
    return [real_bytes(plan, made, bucket_bytes) for plan in plans]


def real_bytes(plan: Plan, made: Callable[[], nn.Module], bucket_bytes: int) -> tuple:
    """Params, gradients, state, what is kept for transit, and what a step sends."""
    model = made()
    options = {} if plan.grads == "plain" else {plan.grads: True}
    ways = plan.ways
    if ways.spread != "flat":
        options |= over(ways.nodes, ways.places, ways.spread == "replicated")
    optimizer = shardadam.AdamW(
        model.parameters(), memory=plan.memory, bucket_bytes=bucket_bytes, **options
    )
    params = [param for param in model.parameters() if param.requires_grad]
    ranks = optimizer._communicator
    for _ in range(2):
        before = dict(ranks.sent_bytes)
        sum(param.abs().sum().float() for param in params).backward()
        grads = sum(param.grad.nbytes for param in params if param.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    if plan.grads != "plain":
        # Those that are in memory at a time, while their bucket fills.
        grads = max(sum(param.nbytes for param in b.params) for b in optimizer._buckets)
    moved = [name for name in ranks.sent_bytes if name.startswith(("reduce-scat", "all-gath"))]
    levels = [ranks, *([ranks._inside, ranks._across] if isinstance(ranks, Hierarchy) else [])]
    return (
        sum(bucket.memory.flat.nbytes for bucket in optimizer._buckets),
        grads + sum(g._memory.nbytes for g in optimizer._reducer.grads if g._memory is not None),
        sum(t.nbytes for bucket in optimizer._buckets for t in bucket.state.values()),
        sum(buffer.nbytes for level in levels for buffer in level._buffers.values()),
        sum(ranks.sent_bytes[name] - before.get(name, 0) for name in moved),
    )


def bf16() -> nn.Module:
    return mlp(torch.bfloat16)


@pytest.mark.parametrize(
    ("made", "world_size", "nodes"),
    [
        *itertools.product([mlp, bf16, lambda: mlp(torch.float16), Awkward], [1, 2, 3], [1]),
        *itertools.product([mlp, bf16], [4], [2]),
        (bf16, 3, 3),
    ],
)
def test_bytes_are_those_of_an_optimizer(made, world_size, nodes):
    for bucket_bytes in (9000, 16 * MIB):
        model = made()
        fixed = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        # Without names: which gradients come at a time is backward's, not the optimizer's.
        trained = Trained([("", param) for param in model.parameters()])
        plans = trained.plans("", world_size, "gloo", bucket_bytes, 0, nodes)
        expected = [
            (
                *(plan.footprint.params - fixed, plan.footprint.grads, plan.footprint.state),
                *(plan.footprint.transients, plan.sent),
            )
            for plan in plans
        ]
        for found in run_ranks(world_size, all_real_bytes, plans, made, bucket_bytes):
            assert found == expected, bucket_bytes


# ---- beside what training takes ------------------------------------------------------------------


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Measured in a process of its own: earlier tests have left this one a heap of free memory."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("plan_peaks.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts resident memory")
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peaks_are_those_of_training(case, world_size, peaks):
    """All modes, one a model: the bytes behind them are tested above, of every mode."""
    found, expected = peaks[f"{case.name} {world_size}"], case.plan(world_size).footprint.total
    print(f"{case.name} at {world_size}: {found / MIB:.1f} MiB, {found / expected:.3f} of the plan")
    assert abs(found - expected) <= 0.05 * expected


# ---- the command ---------------------------------------------------------------------------------

LLAMA_2_7B = {
    **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
}
MISTRAL_7B = {
    **{**LLAMA_2_7B, "model_type": "mistral", "intermediate_size": 14336},
    "num_key_value_heads": 8,
}
QWEN2_7B = {
    **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    "vocab_size": 152064,
}
GPT2 = {
    **{"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_positions": 1024},
    "vocab_size": 50257,
}


def planned(capsys, *arguments: object) -> tuple[int, str]:
    code = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert not err or (code == 2 and not out and err.count("\n") == 1), err
    return code, out or err


@pytest.mark.parametrize(
    ("config", "numel"),
    [  # as published
        (LLAMA_2_7B, 6_738_415_616),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN2_7B, 7_615_616_512),
        (GPT2, 124_439_808),
    ],
)
def test_known_configs(config, numel, tmp_path, monkeypatch):
    monkeypatch.setattr(modelling, "find_spec", lambda name: None)  # without transformers
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    model = modelling.from_config(path)
    assert model.of("bf16").numel == numel
    assert "transformers is not installed" in model.note


def test_config_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for config in (GPT2, {**LLAMA_2_7B, "num_hidden_layers": 2}):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        theirs = modelling.from_config(path).of("fp32").candidates
        assert [(c.name, tuple(c.param.shape)) for c in theirs] == hf_shapes.shapes(config), (
            transformers.__version__
        )


def test_what_fits(capsys):
    code, out = planned(
        *(capsys, "--params", "7e9", "--dtype", "bf16", "--ranks", 4, 64),
        *("--memory", "18GB", "--link", "400Gb/s"),
    )
    assert code == 1
    four, sixty_four = out.split("on 4 ranks: ")[1].split("\non 64 ranks")
    assert four.startswith("nothing fits; the smallest is 1.")
    assert "It would on 8 ranks, with bf16, update_in_backward, leanest." in four
    assert "shardadam.AdamW(model.parameters(), lr=lr, shard_grads=True)" in sixty_four
    assert "model.to(torch.bfloat16)" in sixty_four
    rows = [line.split() for line in out.splitlines() if line.startswith("64 ")]
    # 2 * 2 bytes * 63/64 * 7e9 / 50e9
    assert len(rows) == 9 and {row[-2] for row in rows} == {"0.551"}


def test_what_would_fit_fills_nodes(capsys):
    """4 and 8 ranks don't, on nodes of 3."""
    arguments = ("--params", "7e9", "--memory", "20GB", "--dtype", "bf16")
    code, out = planned(capsys, *arguments, "--per-node", 3, "--ranks", 2)
    assert code == 1
    assert "It would on 6 ranks, with bf16, " in out


def test_what_is_quickest_between_nodes(capsys):
    arguments = ("--params", "1e9", "--ranks", 16, "--per-node", 8, "--memory", "40GB")
    links = ("--link", "100GB/s", "--node-link", "10GB/s", "--transport", "gloo")
    code, out = planned(capsys, *arguments, *links, "--dtype", "bf16")
    assert code == 0
    plain = [line for line in out.splitlines() if line.startswith("16 ") and "plain  " in line]
    # 1e9 params of 2 bytes, half of it to the other node: flat 8 ranks x twice, else once in fp32
    # and once as params, or twice in fp32; and 7/8 of it twice in the node.
    expected = [8 * 2 * 1e9 / 10e9, 3e9 / 10e9 + 3.5e9 / 100e9, 4e9 / 10e9 + 3.5e9 / 100e9]
    for line, seconds in zip(plain[:3], expected, strict=True):
        assert float(line.split()[-2]) == pytest.approx(seconds, rel=0.01)
    assert 'mesh = init_device_mesh("cpu", (2, 8))' in out
    assert out.endswith("shardadam.AdamW(model.parameters(), lr=lr, mesh=mesh)\n")
    code, out = planned(capsys, *arguments, "--dtype", "fp32", *links[:4])
    assert code == 0 and "mesh = " in out  # NCCL's flat ring sends 15/16 where a mesh sends half
    code, told = planned(capsys, *arguments[:4], "--per-node", 5)
    assert code == 2 and "--per-node 5: expected a divisor of --ranks, found 16" in told


def test_a_model_by_its_import_path(capsys, tmp_path):
    code, out = planned(
        *(capsys, "gpt:GPT", "layers=2", "width=128", "context=128", "--ranks", 2),
        *("--memory", "1GB", "--activations", "5MiB", "--png", tmp_path / "plan.png"),
    )
    assert code == 0
    assert "plan for gpt:GPT(layers=2, width=128, context=128)" in out
    assert "4,670,080 params, built in fp32" in out and "5.0 MiB" in out
    assert out.endswith("  optimizer = shardadam.AdamW(model.parameters(), lr=lr)\n")
    data = (tmp_path / "plan.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width > 600 and height > 600


def test_the_call_that_is_printed_can_be_written(capsys):
    _, out = planned(
        *(capsys, "gpt:GPT", "layers=1", "width=64", "context=64", "--ranks", 1, "--dtype", "bf16"),
        *("--memory", "21MiB", "--bucket-bytes", "1MiB"),
    )
    lines = out.split("leaves ")[1].splitlines()[1:]
    model = GPT(1, 64, 64)
    names = {"model": model, "torch": torch, "shardadam": shardadam, "lr": 1e-3}
    for line in lines:
        exec(line.strip(), names)
    assert "bucket_bytes=1048576" in lines[-1] and "memory=" in lines[-1], lines
    assert isinstance(names["optimizer"], shardadam.AdamW)


def test_more_ranks_do_not_make_params_smaller(capsys):
    code, out = planned(capsys, "--params", "1e9", "--dtype", "fp32", "--memory", "3GB")
    assert code == 1
    assert "Nor on more ranks: params" in out and "FSDP2" in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "expected a model or --params, one of the two"),
        (["gpt:GPT", "--params", "7e9"], "expected a model or --params"),
        (["nowhere:Model"], "nowhere:Model can't be imported: ModuleNotFoundError"),
        (["gpt:Model"], "gpt:Model can't be imported: AttributeError"),
        (["gpt:GPT", "layers"], "expected an argument as name=value, found 'layers'"),
        (["gpt:GPT", "layers=2"], "could not be built on the meta device"),
        (["gpt:VOCABULARY"], "TypeError: 'int' object is not callable"),
        (["builtins:dict"], "returned dict: expected a torch.nn.Module"),
        (["torch.nn:ReLU"], "has no params that are trained"),
        (["no.json"], "no.json: No such file or directory"),
    ],
)
def test_no_model(capsys, arguments, error):
    code, told = planned(capsys, *arguments)
    assert code == 2 and error in told, told


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "expected a Hugging Face config in JSON"),
        ("{}", 'expected a Hugging Face config, found none with "model_type"'),
        ('{"model_type": "t5"}', "model_type 't5' takes transformers: pip install transformers"),
        ('{"model_type": "llama"}', "its fields are not those of a llama: KeyError('hidden_size')"),
    ],
)
def test_no_config(capsys, monkeypatch, tmp_path, text, error):
    monkeypatch.setattr(modelling, "find_spec", lambda name: None)
    path = tmp_path / "config.json"
    path.write_text(text)
    code, told = planned(capsys, path)
    assert code == 2 and error in told, told


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--memory", "80 apples"], "expected bytes, such as 80GB or 24GiB, found '80 apples'"),
        (["--memory", "80Gb"], "expected bytes"),
        (["--link", "50"], "expected bytes or bits per second, such as 50GB/s or 400Gb/s"),
        (["--params", "-7"], "expected a number, such as 7e9 or 7B"),
        (["--ranks", "0"], "expected 1 or more, found '0'"),
    ],
)
def test_quantities(capsys, arguments, error):
    with pytest.raises(SystemExit) as left:
        main(["plan", *arguments])
    assert left.value.code == 2
    assert error in capsys.readouterr().err


def test_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setattr(plan_figure, "find_spec", lambda name: None)
    code, told = planned(capsys, "--params", "7B", "--png", "plan.png")
    assert code == 2
    assert told.endswith('--png draws with matplotlib: pip install "shardadam[demo]"\n')
