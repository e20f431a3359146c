"""`python -m shardadam deepspeed`: what becomes of every setting of a ds_config.json."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import shardadam
from shardadam.cli.main import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "ds_config.json"
# As in the documentation of Hugging Face's integration, with ZeRO-3.
HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
RARE = {
    "train_batch_size": 64,
    "optimizer": {
        "type": "Adam",
        "params": {
            "adam_w_mode": False,
            "bias_correction": False,
            "fp32_optimizer_states": False,
            "amsgrad": True,
            "speed": 3,
        },
    },
    "scheduler": {"type": "Spiral", "params": {"turns": 2}},
    "fp16": {"enabled": True, "loss_scale": 128, "auto_cast": True, "min_loss_scale": 1},
    "bf16": {"enabled": False},
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.0,
    "gradient_allreduce_op": "sum",
    "prescale_gradients": True,
    "communication_data_type": "fp16",
    "data_types": {"grad_accum_dtype": "fp16", "param_dtype": "bf16"},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/disk", "ratio": 0.5},
        "zero_quantized_gradients": True,
        "zero_quantized_weights": False,
        "elastic_checkpoint": None,
        "zenflow": {"topk_ratio": 0.1},
    },
    "flops_profiler": {"enabled": True, "profile_step": 1},
    "wandb": {"enabled": False, "team": "us"},
    "elasticity": {"enabled": True, "micro_batch_sizes": [2, 4]},
    "pipeline": {},
    "nobody knows \x1b[2J": "\u2028x\n" * 1000,
}


def translated(config: object, tmp_path: Path, capsys) -> tuple[int, str]:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(config))
    code = main(["deepspeed", str(file)])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def made(program: str, **names: object) -> dict[str, object]:
    """What the program's names are when it has run."""
    names["model"] = nn.Linear(30, 5)
    exec(compile(program, "program", "exec"), names)
    return names


def leaves(config: dict, prefix: str = "") -> list[str]:
    return [
        name
        for key, value in config.items()
        for name in (
            leaves(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else [f"{prefix}{key}"]
        )
    ]


def test_the_example(capsys):
    assert main(["deepspeed", str(EXAMPLE)]) == 1  # for the check of bf16 gradients alone
    out = capsys.readouterr().out
    names = made(out)
    optimizer = names["optimizer"]
    assert type(optimizer) is shardadam.AdamW and names["model"].weight.dtype == torch.bfloat16
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.001, (0.9, 0.999), 0.01)
    assert optimizer._options.shard_grads and optimizer._options.max_grad_norm == 1.0
    (impossible,) = out.partition("Can't be translated:\n")[2].splitlines()
    assert impossible.startswith("#   bf16.check_grad_overflow (its default): ")


@pytest.mark.parametrize("config", [HUGGING_FACE, RARE, json.loads(EXAMPLE.read_text())])
def test_something_is_said_of_every_setting(config, tmp_path, capsys):
    _, out = translated(config, tmp_path, capsys)
    compile(out, "program", "exec")
    assert out.isprintable() or "\x1b" not in out
    for key in leaves(config):
        shown = key.replace("\x1b", " ")
        argument = f"{key.removeprefix('scheduler.params.')}="
        assert f"{shown} = " in out or argument in out, key


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not")
def test_what_is_said(tmp_path, capsys):
    code, out = translated(RARE, tmp_path, capsys)
    assert code == 1
    elsewhere, _, rest = out.partition("# To write elsewhere")[2].partition("# Needless here:")
    needless, _, impossible = rest.partition("# Can't be translated:")
    for where, expected in (
        (elsewhere, "(loss / 4).backward(), all but the last under optimizer.no_sync()"),
        (elsewhere, "fp16.auto_cast = True: inputs.half()"),
        (needless, "bf16.enabled = False, wandb.enabled = False, wandb.team = 'us'"),
        (needless, "zero_optimization.elastic_checkpoint = None: not set"),
        (needless, "zero_optimization.zero_quantized_weights = False: so it is here"),
        (needless, "gradient_clipping = 0.0: nothing is clipped"),
        (impossible, "optimizer.params.bias_correction = False: bias is always corrected"),
        (impossible, "gradient_allreduce_op = 'sum': gradients are averaged"),
        (impossible, "zero_optimization.stage = 2: with fp16's GradScaler"),
        (impossible, "elasticity.micro_batch_sizes = [2, 4]"),
        (impossible, "optimizer.params.speed = 3"),
        (impossible, "scheduler.type = 'Spiral'"),
    ):
        assert expected in where, (expected, where)
    names = made(out)
    assert type(names["optimizer"]) is shardadam.Adam
    assert names["optimizer"]._options.state == "bf16" and not names["optimizer"]._options.offload
    assert "    init_scale=128.0,  # " in out


def test_what_hugging_face_fills_in(tmp_path, capsys):
    code, out = translated(HUGGING_FACE, tmp_path, capsys)
    for line in (
        "    lr=args.learning_rate,  # optimizer.params.lr = 'auto'",
        "    betas=(args.adam_beta1, args.adam_beta2),  # optimizer.params.betas = 'auto'",
        "    max_grad_norm=args.max_grad_norm,  # gradient_clipping = 'auto'",
        "    shard_grads=True,  # zero_optimization.stage = 3",
    ):
        assert line in out.splitlines()
    assert code == 1 and "GradScaler(" not in out.replace("a torch.amp.GradScaler,", "")
    (text,) = [line for line in out.splitlines() if "zero_optimization.reduce_bucket_size" in line]
    assert text in out.partition('where it is "auto"')[2]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"type": "Adam"}, ("AdamW", 0.0)),
        ({"type": "ADAM", "params": {"adam_w_mode": False}}, ("Adam", 0)),
        ({"type": "AdamW", "params": {"torch_adam": True}}, ("AdamW", 0.01)),
        ({"type": "AdamW", "params": {"weight_decay": 0.3}}, ("AdamW", 0.3)),
        ({"type": "NAdam", "params": {"momentum_decay": 0.1}}, ("NAdam", 0)),
    ],
)
def test_deepspeeds_defaults(optimizer, expected, tmp_path, capsys):
    code, out = translated({"optimizer": optimizer}, tmp_path, capsys)
    found = made(out)["optimizer"]
    assert (type(found).__name__, found.param_groups[0]["weight_decay"]) == expected
    assert code == 0


def test_all_translated(tmp_path, capsys):
    config = {"zero_optimization": {"stage": 1}, "gradient_clipping": 1, "train_batch_size": 8}
    code, out = translated(config, tmp_path, capsys)
    assert code == 0 and "Can't be translated" not in out
    assert "optimizer (its default): the program makes it" in out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "expected JSON, line 1, column 1"),
        (b'{"a": 1,}', "comments and trailing commas"),
        (b'{"a": 1 // one\n}', "comments and trailing commas"),
        (b"[1, 2]", "expected an object {…}, found list"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"gradient_clipping": NaN}', "NaN is no finite number"),
        (b'{"gradient_clipping": 1e999}', "1e999 is no finite number"),
        (b'{"a": "\xff"}', "expected JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b" " * 2**21, "more than 1048576 bytes"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b'{"optimizer": {"type": "Lamb"}}', "expected Adam, AdamW or NAdam, found 'Lamb'"),
        (b'{"optimizer": {"type": 5}}', "optimizer.type: expected a string, found 5"),
        (b'{"optimizer": {"type": "Adam", "params": {"lr": "fast"}}}', "expected a number"),
        (b'{"optimizer": {"type": "Adam", "params": {"lr": true}}}', "expected a number"),
        (b'{"optimizer": {"type": "Adam", "params": {"betas": [1]}}}', "expected two numbers"),
        (b'{"zero_optimization": {"stage": 4}}', "expected 0, 1, 2 or 3, found 4"),
        (b'{"zero_optimization": {"stage": "auto"}}', "expected 0, 1, 2 or 3, found 'auto'"),
        (b'{"fp16": {"enabled": "yes"}}', "expected true or false"),
        (b'{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "expected one of the two"),
        (
            b'{"scheduler": {"type": "WarmupLR", "params": {"x=print()": 1}}}',
            "expected arguments of WarmupLR, found 'x=print()'",
        ),
    ],
)
def test_what_is_no_config(text, expected, tmp_path, capsys):
    file = tmp_path / "ds_config.json"
    file.write_bytes(text)
    assert main(["deepspeed", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("shardadam deepspeed: ") and err.count("\n") == 1
    assert expected in err and len(err) < 400


def test_no_file(tmp_path, capsys):
    assert main(["deepspeed", str(tmp_path / "none.json")]) == 2
    assert "none.json: No such file" in capsys.readouterr().err


# In a process of its own: importing DeepSpeed changes much.
DEEPSPEED_SAYS = """
import json, sys
from deepspeed.runtime import constants
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
sections = {
    "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
}
keys = [
    f"{section}.{field.alias or name}"
    for section, model in sections.items() for name, field in model.model_fields.items()
]
json.dump(keys, open(sys.argv[1], "w"))

program = sys.argv[2]
import torch
model = torch.nn.Linear(3, 4)
exec(program)
for _ in range(6):
    optimizer.step()
    scheduler.step()
    print("lr", optimizer.param_groups[0]["lr"])
"""


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeeds_own_names_and_schedule(tmp_path, capsys):
    params = {"warmup_max_lr": 0.5, "warmup_num_steps": 4, "warmup_type": "linear"}
    config = {"scheduler": {"type": "WarmupLR", "params": params}}
    _, program = translated(config, tmp_path, capsys)
    file = tmp_path / "keys.json"
    done = subprocess.run(
        [sys.executable, "-c", DEEPSPEED_SAYS, str(file), program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lrs = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("lr ")]
    assert lrs == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]  # its first step stays where it began
    keys = json.loads(file.read_text())
    assert len(keys) > 50
    unknown = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        inner: dict = {name: None if name in ("stage", "enabled") else 17}
        for part in reversed(section.split(".")):
            inner = {part: inner}
        unknown[key] = inner
    for key, config in unknown.items():
        try:
            out = translated(config, tmp_path, capsys)[1]
        except AssertionError:
            continue  # 17 is none of its values: known
        assert "not known: misspelt" not in out, key
