"""Trains in DeepSpeed on two gloo ranks on the CPU: `python deepspeed_training.py FILE`.

A process of its own: DeepSpeed's import takes seconds and changes much. FILE gets what every run of
`RUNS` came to, a dict by name; test_deepspeed.py compares.
"""

import copy
import dataclasses
import functools
import importlib
import itertools
import logging
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shardadam
from deepspeed_runs import as_fused_adam_has_it
from models import mlp
from ranks import run_ranks
from shardadam.integrations import deepspeed as ours

STEPS = 6
LR = 0.01
STAGES = (0, 1, 2, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # Too large a scale for the first steps, which are skipped.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}},
}
CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
CLIPPED = {"gradient_clipping": 0.05, "gradient_accumulation_steps": 2}
WARMUP = {"warmup_min_lr": LR, "warmup_max_lr": 0.02, "warmup_num_steps": 4}
SCHEDULED = {"scheduler": {"type": "WarmupLR", "params": WARMUP}}
BY_CONFIG = {"type": "AdamW", "params": {"lr": 0.02, "betas": [0.8, 0.99], "weight_decay": 0.1}}


class Exact(torch.optim.AdamW):
    """The published rule in float64, its three results rounded once each."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            lr, decay, eps = group["lr"], group["weight_decay"], group["eps"]
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(param))
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["step"] += 1
                t, grad = float(state["step"]), param.grad.double()
                m = beta1 * state["exp_avg"].double() + (1 - beta1) * grad
                v = beta2 * state["exp_avg_sq"].double() + (1 - beta2) * grad.square()
                update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
                param.copy_(param.double() * (1 - lr * decay) - lr * update)
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(v)


MAKERS = {
    "ours": ours.AdamW,
    "exact": Exact,
    "torch": torch.optim.AdamW,
    "plain": shardadam.AdamW,
    "our Adam": ours.Adam,
    "torch's Adam": torch.optim.Adam,
    "our NAdam": ours.NAdam,
    "torch's NAdam": torch.optim.NAdam,
    "our AMSGrad": functools.partial(ours.AdamW, amsgrad=True, maximize=True),
    "torch's AMSGrad": functools.partial(torch.optim.AdamW, amsgrad=True, maximize=True),
}


@dataclass(frozen=True)
class Run:
    """``resume``: the optimizer whose checkpoint of half the steps it goes on from."""

    optimizer: str
    stage: int
    dtype: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None

    def by(self, optimizer: str, **changes: Any) -> "Run":
        return dataclasses.replace(self, optimizer=optimizer, **changes)


CASES = {
    **{f"fp32 zero{stage}": Run("ours", stage) for stage in STAGES},
    **{
        f"clipped {dtype} zero{stage}": Run("ours", stage, dtype, config=CLIPPED | SCHEDULED)
        for dtype, stage in itertools.product(DTYPES, STAGES)
    },
    **{
        f"offload {dtype} zero{stage}": Run("ours", stage, dtype, CPU_OFFLOAD, CLIPPED)
        for dtype, stage in itertools.product(("bf16", "fp16"), STAGES[1:])
    },
    "sub-groups zero3": Run("ours", 3, "bf16", {"sub_group_size": 3000}, CLIPPED),
    "fp32 sums bf16 zero1": Run(
        "ours", 1, "bf16", config={**CLIPPED, "data_types": {"grad_accum_dtype": "fp32"}}
    ),
}
CLASSES = {kind: Run(f"our {kind}", 1, config=CLIPPED) for kind in ("Adam", "NAdam", "AMSGrad")}
RUNS = {
    **CASES,
    **{f"exact {name}": case.by("exact") for name, case in CASES.items()},
    **{
        f"torch {name}": case.by("torch")
        for name, case in CASES.items()
        if "offload" not in name and "sub-groups" not in name
    },
    **{
        f"resumed {name}": case.by("ours", resume="ours")
        for name, case in CASES.items()
        if not name.startswith("fp32")
    },
    "ours on torch's": CASES["clipped bf16 zero2"].by("ours", resume="torch"),
    "torch on ours": CASES["clipped bf16 zero2"].by("torch", resume="ours"),
    "ours on FusedAdam's": CASES["clipped bf16 zero2"].by("ours", resume="like FusedAdam"),
    **{f"our {kind}": run for kind, run in CLASSES.items()},
    **{f"torch's {kind}": run.by(f"torch's {kind}") for kind, run in CLASSES.items()},
    "resumed our NAdam": CLASSES["NAdam"].by("our NAdam", resume="our NAdam"),
    **{f"plain zero{stage}": Run("plain", stage) for stage in STAGES},
    "plain bf16 zero0": Run("plain", 0, "bf16"),
    "by config": Run("by config", 2, config={"optimizer": BY_CONFIG}),
    "torch by config": Run("torch by config", 2, config={"optimizer": BY_CONFIG}),
}


def groups_of(model: nn.Module) -> list[dict]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "lr": LR, "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "lr": LR, "weight_decay": 0.0},
    ]


def engine_for(run: Run, kind: str, seed: int):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": run.stage, **run.zero},
        **PRECISION[run.dtype],
        **run.config,
    }
    config = copy.deepcopy(config)
    model = mlp(seed=seed)
    if kind == "by config":
        given = {"optimizer": functools.partial(ours.AdamW, **config["optimizer"]["params"])}
        given["model_parameters"] = list(model.parameters())
    elif kind == "torch by config":
        config["optimizer"]["params"]["torch_adam"] = True
        given = {"model_parameters": list(model.parameters())}
    else:
        given = {"optimizer": MAKERS[kind](groups_of(model))}
    return deepspeed.initialize(model=model, config=config, **given)[0]


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(16, 30, generator=torch.Generator().manual_seed(2 * step + rank))


@dataclass
class Trained:
    """``first``: the masters after the first step that was not skipped."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)


def train(engine, run: Run, steps: range, rank: int, trained: Trained) -> None:
    parts = engine.gradient_accumulation_steps()
    for step in range(steps.start * parts, steps.stop * parts):
        loss = engine(batch(step, rank).to(DTYPES[run.dtype])).float().square().mean()
        engine.backward(loss)
        engine.step()
        trained.losses.append(loss.detach())
        trained.norms.append(float(engine.get_global_grad_norm() or 0))
        if not trained.first and engine.global_steps == engine.skipped_steps + 1:
            trained.first = masters(engine, run)


def masters(engine, run: Run) -> list[Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    if run.stage:
        found = map(safe_get_full_fp32_param, engine.module.parameters())
    else:
        found = (param for group in base(engine).param_groups for param in group["params"])
    return [tensor.detach().clone() for tensor in found]


def base(engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def come_to(rank: int, run: Run, folder: Path) -> dict[str, Any]:
    trained, first = Trained(), 0
    if run.resume is not None:
        kind = "torch" if run.resume == "like FusedAdam" else run.resume
        engine = engine_for(run, kind, seed=0)
        first = STEPS // 2
        train(engine, run, range(first), rank, trained)
        if run.resume == "like FusedAdam":
            as_fused_adam_has_it(base(engine))
        engine.save_checkpoint(folder)
    engine = engine_for(run, run.optimizer, seed=int(run.resume is not None))
    if run.resume is not None:
        engine.load_checkpoint(folder)
    train(engine, run, range(first, STEPS), rank, trained)
    state = base(engine).state
    return {
        **vars(trained),
        "masters": masters(engine, run),
        "params": [param.detach().clone() for param in engine.module.parameters() if run.stage < 3],
        "steps": {float(entry["step"]) for entry in state.values() if entry},
        "bytes": sum(
            value.nbytes
            for entry in state.values()
            for value in entry.values()
            if isinstance(value, Tensor)
        ),
        "skipped": engine.skipped_steps,
    }


def all_runs(rank: int, folder: str) -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    # It is only said not to be supported on processors.
    get_accelerator().is_fp16_supported = lambda: True
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    results = {}
    for number, (name, run) in enumerate(RUNS.items()):
        try:
            results[name] = come_to(rank, run, Path(folder) / str(number))
        except Exception as error:
            if run.optimizer != "plain":
                raise AssertionError(f"in the run {name!r}") from error
            results[name] = {"error": str(error)}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Before the forks, what it imports late too.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    # Its own collectives in shared memory would be compiled first: a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as saved:
        torch.save(run_ranks(2, all_runs, saved), sys.argv[1])
