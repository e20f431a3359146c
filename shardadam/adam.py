"""Adam, AdamW and NAdam: torch.optim's constructors, and the rule's hyperparameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardadam.kernels import Hyperparameters
from shardadam.optimizer import ShardedOptimizer
from shardadam.options import (
    DEFAULT_BUCKET_BYTES,
    GradSync,
    Master,
    Memory,
    Offload,
    Options,
    State,
    formats,
)

_ARGUMENTS = """

    Hyperparameters, their order and their checks are those of the torch.optim class of the same
    name. ``foreach``, ``fused`` and ``capturable`` are accepted and change nothing: there is one
    fused implementation. Every rank constructs the optimizer with the same params in the same order
    and then has the first rank's values, as under DDP. ``param.data`` becomes a view of a flat
    buffer: move and wrap the model first. Pass ``model.named_parameters()`` and errors name them.

    Args:
        params: params, named params or param groups, as in torch.optim.
        process_group: the ranks to shard over; None: the default group, or this process alone
            where torch.distributed is not initialized.
        mesh: in its place, for nodes joined by links that are slower than those inside: a 2-D
            DeviceMesh of all ranks, nodes by the ranks of each. Gradients are summed inside nodes
            before they cross to others, see docs/hybrid.md.
        replicate_state: with ``mesh``: shard the state over the ranks of a node, each node having a
            copy, so that params are gathered inside nodes only. False: shard it over all ranks.
        grad_sync: "mean": gradients are averaged over the ranks by `step()`; right without a
            wrapper, and around DDP too, where it is redundant. "none": they are equal on all ranks
            already, and are only read.
        shard_grads: reduce gradients during backward, bucket by bucket, and free the full ones
            (ZeRO-2): on several ranks ``param.grad`` is None after backward, and `step()` consumes
            the shards.
        update_in_backward: update a bucket as soon as backward has all its gradients and they are
            reduced, and free them, so that never more than a few buckets of them exist. Backward
            then goes by the hyperparameters of its time; `step()` only ends what it began. No
            clipping by a global norm, no GradScaler; accumulate under `no_sync()`.
        max_grad_norm: clip the global norm of the averaged gradients inside `step()`; the norm
            measured is then in ``grad_norm``. float("inf") measures and does not clip.
        state: how exp_avg and exp_avg_sq are kept, see docs/low_memory.md. "fp32": 8 bytes per
            param. "bf16": 4. "q16": 3.03, in blocks of 128 elements. "q8": 2.03.
        master: the fp32 master weights of 16-bit params. "auto": "split" for bfloat16, "fp32" for
            float16. "split": bfloat16 and a 16-bit remainder that together are the fp32 master,
            exactly (2 more bytes per param). "fp32": a copy beside the param (4 more bytes).
            "split8": a remainder of 8 bits, stochastically rounded (1 more byte). "none": the
            bfloat16 param alone, stochastically rounded.
        memory: names for a state and a master: "full" is the default, "lean" is "q16" and "split",
            "leanest" is "q8" and "split8".
        offload: where the state is, if not on the params' device, see docs/offload.md. The same
            bits. A directory (a pathlib.Path, which may be another on each rank): in a file there,
            for params on the CPU. The file goes with the process; what is to be kept is saved as
            ever, in checkpoints. "cpu": in the host's memory, for params on a GPU, and updated by
            the host's processor. Not yet run on a GPU.
        bucket_bytes: params are packed into buckets of about this many bytes: the unit of
            communication, and of the memory in transit.
        seed: of the random bits of stochastic rounding, which depend on it, the step and the place
            of an element, and on nothing else: not on the world size, nor on torch's generators.
        check_replicas_every: compare a digest of the params over the ranks before every so many
            steps. A difference is an error on every rank, see docs/corruption.md.
        check_state: keep a digest of this rank's params and state after each update, and see before
            the next that no bit has changed which nobody wrote. Writes by operations of torch are
            seen, but those through ``.data``. Takes time in every step, see docs/corruption.md.
        exact_microbatches: the number M of microbatches of a step over all ranks, for results that
            have the same bits at every world size, see docs/exact.md. Rank r of W has numbers r M/W
            to (r+1) M/W, in order, and a backward pass for each; their mean is taken, so losses
            are not divided. Takes the memory of several sets of fp32 gradients.

    Raises:
        ValueError: a hyperparameter out of range, in torch's words; params that can't be optimized,
            or that differ between ranks, by name.
        OSError: ``offload`` has no room for the state; on other ranks RuntimeError.
    """


class _AdamRule(ShardedOptimizer):
    """Adam's hyperparameters, with either weight decay."""

    def _hyperparameters(self, group: dict[str, Any]) -> Hyperparameters:
        decoupled = isinstance(self, AdamW) or group.get("decoupled_weight_decay", False)
        return hyperparameters(group, decoupled, None)


class Adam(_AdamRule, torch.optim.Adam):
    """Adam (Kingma & Ba 2015) and AMSGrad (Reddi et al. 2018), sharded."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        replicate_state: bool = False,
        grad_sync: GradSync = "mean",
        shard_grads: bool = False,
        update_in_backward: bool = False,
        max_grad_norm: float | None = None,
        state: State = "fp32",
        master: Master = "auto",
        memory: Memory | None = None,
        offload: Offload | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        seed: int = 0,
        check_replicas_every: int | None = None,
        check_state: bool = False,
        exact_microbatches: int | None = None,
    ) -> None:
        options = Options(
            process_group,
            mesh,
            replicate_state,
            grad_sync,
            shard_grads,
            update_in_backward,
            max_grad_norm,
            *formats(memory, state, master),
            offload,
            bucket_bytes,
            seed,
            check_replicas_every,
            check_state,
            exact_microbatches,
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            # torch < 2.7 does not know it.
            **({"decoupled_weight_decay": True} if decoupled_weight_decay else {}),
        )
        self._shard(options)


class AdamW(_AdamRule, torch.optim.AdamW):
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019), sharded."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        replicate_state: bool = False,
        grad_sync: GradSync = "mean",
        shard_grads: bool = False,
        update_in_backward: bool = False,
        max_grad_norm: float | None = None,
        state: State = "fp32",
        master: Master = "auto",
        memory: Memory | None = None,
        offload: Offload | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        seed: int = 0,
        check_replicas_every: int | None = None,
        check_state: bool = False,
        exact_microbatches: int | None = None,
    ) -> None:
        options = Options(
            process_group,
            mesh,
            replicate_state,
            grad_sync,
            shard_grads,
            update_in_backward,
            max_grad_norm,
            *formats(memory, state, master),
            offload,
            bucket_bytes,
            seed,
            check_replicas_every,
            check_state,
            exact_microbatches,
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._shard(options)


class NAdam(ShardedOptimizer, torch.optim.NAdam):
    """NAdam: Adam with Nesterov momentum (Dozat 2016), sharded."""

    _scalars = {"step": 0.0, "mu_product": 1.0}  # noqa: RUF012  (as in the base class)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        replicate_state: bool = False,
        grad_sync: GradSync = "mean",
        shard_grads: bool = False,
        update_in_backward: bool = False,
        max_grad_norm: float | None = None,
        state: State = "fp32",
        master: Master = "auto",
        memory: Memory | None = None,
        offload: Offload | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        seed: int = 0,
        check_replicas_every: int | None = None,
        check_state: bool = False,
        exact_microbatches: int | None = None,
    ) -> None:
        options = Options(
            process_group,
            mesh,
            replicate_state,
            grad_sync,
            shard_grads,
            update_in_backward,
            max_grad_norm,
            *formats(memory, state, master),
            offload,
            bucket_bytes,
            seed,
            check_replicas_every,
            check_state,
            exact_microbatches,
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._shard(options)

    def _hyperparameters(self, group: dict[str, Any]) -> Hyperparameters:
        return hyperparameters(group, group["decoupled_weight_decay"], group["momentum_decay"])


def hyperparameters(
    group: dict[str, Any], decoupled: bool, momentum_decay: float | None
) -> Hyperparameters:
    """A param group's, as the rule reads them."""
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    return Hyperparameters(
        # Here and not where it is read, per bucket: it may take a kernel.
        lr=lr.detach().to(torch.float64).reshape(()) if on_device else float(lr),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=decoupled,
        maximize=group["maximize"],
        momentum_decay=momentum_decay,
    )


for _class in (Adam, AdamW, NAdam):
    _class.__doc__ = f"{_class.__doc__}{_ARGUMENTS}"
