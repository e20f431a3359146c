"""Who is compared. A new one is a function with `@contender`: model in, `Training` out."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import shardadam

LR = 1e-4  # at ten times as much the wide MLPs diverge, and losses tell nothing
Units = Sequence[nn.Module]


@dataclass
class Training:
    """A model and its optimizer, ready to train; torch's way, where a peer has no other."""

    module: nn.Module
    optimizer: Any

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def state(self) -> Iterator[Tensor]:
        """Moments and master weights on this rank."""
        for entry in self.optimizer.state.values():
            for value in entry.values():
                if isinstance(value, Tensor):
                    yield getattr(value, "_local_tensor", value)

    def sent(self) -> dict[str, int]:
        """Bytes that this rank has sent so far, by what for; empty where nobody counts."""
        return {}


@dataclass(frozen=True)
class Contender:
    """``prepare`` builds what is built on first use, in a process that isn't measured."""

    build: Callable[[nn.Module, Units, torch.dtype], Training]
    needs: str | None = None
    prepare: str | None = None
    masters: bool = True
    """16-bit params have fp32 masters; without them every update is rounded to 16 bits."""

    def missing(self) -> str | None:
        """Why it can't run here."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed: pip install '.[bench]'"
        return None


CONTENDERS: dict[str, Contender] = {}
Build = Callable[[nn.Module, Units, torch.dtype], Training]


def contender(name: str, **options: Any) -> Callable[[Build], Build]:
    """Enter the function under this name."""

    def enter(build: Build) -> Build:
        CONTENDERS[name] = Contender(build, **options)
        return build

    return enter


# ---- ours -------------------------------------------------------------------------------------


class Sharded(Training):
    """Knows more of itself than torch's interface tells."""

    def state(self) -> Iterator[Tensor]:
        for bucket in self.optimizer._buckets:
            yield from bucket.state.values()

    def sent(self) -> dict[str, int]:
        return dict(self.optimizer._communicator.sent_bytes)


OURS, OURS_ZERO2 = "shardadam", "shardadam, shard_grads"
OURS_OVERLAP = "shardadam, shard_grads, overlap_gather"
OURS_EARLY = "shardadam, update_in_backward, overlap_gather"
OURS_LEAN, OURS_LEANEST = "shardadam, memory=lean", "shardadam, memory=leanest"


@contender(OURS)
def _ours(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    model.to(dtype)
    return Sharded(model, shardadam.AdamW(model.parameters(), lr=LR))


@contender(OURS_ZERO2)
def _ours_zero2(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    model.to(dtype)
    return Sharded(model, shardadam.AdamW(model.parameters(), lr=LR, shard_grads=True))


@contender(OURS_OVERLAP)
def _ours_overlap(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    model.to(dtype)
    optimizer = shardadam.AdamW(model.parameters(), lr=LR, shard_grads=True)
    optimizer.overlap_gather(model)
    return Sharded(model, optimizer)


@contender(OURS_EARLY)
def _ours_early(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    model.to(dtype)
    optimizer = shardadam.AdamW(model.parameters(), lr=LR, update_in_backward=True)
    optimizer.overlap_gather(model)
    return Sharded(model, optimizer)


@contender(OURS_LEAN)
def _ours_lean(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    model.to(dtype)
    return Sharded(model, shardadam.AdamW(model.parameters(), lr=LR, memory="lean"))


@contender(OURS_LEANEST)
def _ours_leanest(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    model.to(dtype)
    return Sharded(model, shardadam.AdamW(model.parameters(), lr=LR, memory="leanest"))


# ---- torch's ----------------------------------------------------------------------------------

LOCAL, DDP, ZERO = (
    "AdamW(fused), no exchange",
    "DDP + AdamW(fused)",
    "DDP + ZeroRedundancyOptimizer",
)
FSDP2 = "FSDP2 + AdamW(fused)"


@contender(LOCAL, masters=False)
def _local(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    model.to(dtype)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True))


@contender(DDP, masters=False)
def _ddp(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    wrapped = nn.parallel.DistributedDataParallel(model.to(dtype))
    return Training(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=LR, fused=True))


class ZeroRedundancy(Training):
    """Its state is in the optimizer inside."""

    def state(self) -> Iterator[Tensor]:
        return Training(self.module, self.optimizer.optim).state()


@contender(ZERO, masters=False)
def _zero(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = nn.parallel.DistributedDataParallel(model.to(dtype))
    optimizer = ZeroRedundancyOptimizer(
        wrapped.parameters(), optimizer_class=torch.optim.AdamW, lr=LR, fused=True
    )
    return ZeroRedundancy(wrapped, optimizer)


class FullySharded(Training):
    """In bf16 its own params are fp32: the master weights."""

    masters = False

    def state(self) -> Iterator[Tensor]:
        yield from super().state()
        if self.masters:
            for param in self.module.parameters():
                yield param._local_tensor


@contender(FSDP2)
def _fsdp2(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    masters = dtype != torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype) if masters else MixedPrecisionPolicy()
    for unit in units:
        fully_shard(unit, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    training = FullySharded(model, optimizer)
    training.masters = masters
    return training


# ---- DeepSpeed's ------------------------------------------------------------------------------


class Engine(Training):
    """The module is an engine, which steps; it keeps a flat fp32 copy of the params it owns."""

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)

    def step(self) -> None:
        self.module.step()

    def zero_grad(self) -> None:
        """The engine's step has done it."""

    def state(self) -> Iterator[Tensor]:
        yield from Training(self.module, self.optimizer.optimizer).state()
        yield from self.optimizer.single_partition_of_fp32_groups


def _deepspeed(model: nn.Module, dtype: torch.dtype, stage: int, optimizer: Any) -> Training:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 1 << 30,
    }
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return Engine(engine, wrapped)


ZERO1, ZERO2 = "DeepSpeed ZeRO-1 + AdamW(fused)", "DeepSpeed ZeRO-2 + AdamW(fused)"
ZERO2_CPU = "DeepSpeed ZeRO-2 + DeepSpeedCPUAdam"
_BUILD = "from deepspeed.ops.op_builder import {0} as builder; builder().load()"
_SHM = _BUILD.format("ShareMemCommBuilder")  # whatever the optimizer
_CPU_ADAM = f"{_SHM}; {_BUILD.format('CPUAdamBuilder')}"


@contender(ZERO1, needs="deepspeed", prepare=_SHM)
def _zero1(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    return _deepspeed(model, dtype, 1, torch.optim.AdamW(model.parameters(), lr=LR, fused=True))


@contender(ZERO2, needs="deepspeed", prepare=_SHM)
def _zero2(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    return _deepspeed(model, dtype, 2, torch.optim.AdamW(model.parameters(), lr=LR, fused=True))


@contender(ZERO2_CPU, needs="deepspeed", prepare=_CPU_ADAM)
def _zero2_cpu(model: nn.Module, units: Units, dtype: torch.dtype) -> Training:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # torch's AdamW default, which is not its.
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=LR, weight_decay=1e-2, adamw_mode=True)
    return _deepspeed(model, dtype, 2, optimizer)
