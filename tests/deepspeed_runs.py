"""Makes real checkpoints with DeepSpeed, on gloo ranks on the CPU: `python deepspeed_runs.py DIR`.

A process of its own: DeepSpeed's import takes seconds and changes much. Beside every checkpoint is
``truth.pt``: what DeepSpeed's own interfaces say of each param then, and after one more step.
"""

import copy
import importlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ranks import run_ranks

BASE = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 0.0,
}
OWN = {"optimizer": {"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}}}
RUNS = {
    **{
        f"{dtype}-zero{stage}-{ranks}": (ranks, dtype, {"stage": stage}, {})
        for dtype in ("fp32", "bf16")
        for stage in (1, 2)
        for ranks in (1, 2, 3)
    },
    "fp16-zero2-2": (2, "fp16", {"stage": 2}, {}),
    "aligned-3": (3, "fp32", {"stage": 2, "parameter_alignment": True}, {}),
    "robin-2": (2, "bf16", {"stage": 2, "round_robin_gradients": True}, {}),
    "bf16-alone-2": (2, "bf16", {"stage": 1}, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "own-2": (2, "fp32", {"stage": 2}, OWN),
    "fused-2": (2, "fp32", {"stage": 2}, {}),
    "fresh-2": (2, "fp32", {"stage": 1}, {}),
    "elastic-2": (2, "fp32", {"stage": 1, "elastic_checkpoint": True}, {}),
    "stage3-2": (2, "fp32", {"stage": 3}, {}),
}
"""Ranks, dtype, options of ZeRO, and others of DeepSpeed."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TIE = 1 + 2**-8
"""A master half-way between two bf16 values: the first element of "bf16-zero1-1"."""


class Tied(nn.Module):
    """Odd sizes, a tied embedding, a frozen param and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 5)
        self.hidden = nn.Linear(5, 7)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.back = nn.Linear(7, 5)
        self.register_buffer("offset", torch.randn(5))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.back(self.hidden(self.embed(ids)).tanh())
        return self.head(inner + self.offset.to(inner.dtype))


def groups_of(model: nn.Module) -> list[dict]:
    """Two param groups; the frozen param is in the second."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "lr": 0.02, "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "lr": 0.01, "weight_decay": 0.0},
    ]


def train(engine, steps: range, rank: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + rank)
        logits = engine(torch.randint(11, (6,), generator=generator)).float()
        engine.backward(logits.logsumexp(-1).mean() + logits.square().mean())
        if step < steps.stop - 1:
            engine.step()


def seen(engine, read) -> dict[str, Tensor]:
    return {
        name: read(param).detach().clone().float()
        for name, param in engine.module.named_parameters()
        if param.requires_grad
    }


def as_fused_adam_has_it(optimizer: torch.optim.Optimizer) -> None:
    """DeepSpeed's FusedAdam would be compiled for a GPU: its groups and state look like this."""
    for group in optimizer.param_groups:
        (state,) = (optimizer.state[param] for param in group["params"])
        kept = ("params", "lr", "betas", "eps", "weight_decay")
        for key in [key for key in group if key not in kept]:
            del group[key]
        group.update(bias_correction=True, step=int(state.pop("step")))


def save(rank: int, name: str, folder: str) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
    from deepspeed.utils import safe_get_full_optimizer_state as state_of

    ranks, dtype, zero, more = RUNS[name]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    model = Tied()
    config = copy.deepcopy({**BASE, **more, "zero_optimization": zero})
    if dtype != "fp32":
        # A loss scale that no step is skipped for, and that is not in the gradients.
        config[dtype] = {"enabled": True, **({"initial_scale_power": 0} if dtype == "fp16" else {})}
    groups = groups_of(model)
    for group in groups:
        group["params"] = [param for _, param in group["params"]]
    given = {"optimizer": torch.optim.AdamW(groups)} if "optimizer" not in more else {}
    given = given or {"model_parameters": groups}
    engine, *_ = deepspeed.initialize(model=model, config=config, **given)
    if name != "fresh-2":
        train(engine, range(4), rank)
        engine.step()
    if name == "bf16-zero1-1":
        engine.optimizer.single_partition_of_fp32_groups[0].data[0] = TIE
        engine.module.embed.weight.data[0, 0] = 1.0
    if name == "fused-2":
        as_fused_adam_has_it(engine.optimizer.optimizer)
    path = Path(folder) / name
    engine.save_checkpoint(path, tag="last", client_state={"epoch": 7})
    truth = {"module": copy.deepcopy(engine.module.state_dict())}
    if name in ("stage3-2", "robin-2", "fresh-2", "fused-2"):
        # With round_robin_gradients, DeepSpeed's own interfaces read the wrong elements.
        return torch.save(truth, path / "truth.pt") if rank == 0 else None
    # It looks for the moments after the first group's first step, when the others have none.
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    truth["master"] = seen(engine, safe_get_full_fp32_param)
    for part in ("exp_avg", "exp_avg_sq"):
        truth[part] = seen(engine, lambda param, part=part: state_of(param, part))
    train(engine, range(4, 5), rank)
    truth["grad"] = seen(engine, safe_get_full_grad)
    engine.step()
    truth["next"] = seen(engine, safe_get_full_fp32_param)
    if rank == 0:
        torch.save(truth, path / "truth.pt")


def save_all(rank: int, names: list[str], folder: str) -> None:
    from deepspeed.accelerator import get_accelerator

    # It is only said not to be supported on processors.
    get_accelerator().is_fp16_supported = lambda: True
    for name in names:
        save(rank, name, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Before the forks, what it imports late too.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    # Its own collectives in shared memory would be compiled first: a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    for size in (1, 2, 3):
        run_ranks(size, save_all, [n for n, run in RUNS.items() if run[0] == size], sys.argv[1])
