"""The params that are to be laid out: which, and whether each can be."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardadam import dtensors
from shardadam.kernels import supports
from shardadam.options import Options
from shardadam.params import describe, is_dense, real_dtype

_BFLOAT16_MASTERS = {
    **{"auto": "remainder", "split": "remainder", "split8": "remainder8"},
    **{"fp32": "master", "none": None},
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A param that is to be laid out, and where it stands in the param groups."""

    param: Tensor
    name: str
    group: int
    amsgrad: bool

    @property
    def distributed(self) -> bool:
        """Whether it is a DTensor."""
        return dtensors.is_dtensor(self.param)

    @property
    def local(self) -> Tensor:
        """What this rank has of it, before it is laid out."""
        return dtensors.local_of(self.param)

    def __str__(self) -> str:
        return f"{self.name} {describe(self.param)} in group {self.group}"


def single_device(param_groups: Sequence[dict[str, Any]]) -> torch.device:
    """The device of all params but those on the meta device, of which it warns.

    Raises:
        ValueError: there are several; names the first param that is elsewhere.
    """
    candidates = [
        Candidate(param, name, index, False)
        for index, group in enumerate(param_groups)
        for name, param in named(index, group)
    ]
    waiting = [candidate.name for candidate in candidates if candidate.param.is_meta]
    if waiting:
        warnings.warn(
            f"{waiting[0]} is on the meta device, and is optimized only once it is materialized "
            "in place: expected the optimizer to be made after the model is materialized",
            stacklevel=4,
        )
    candidates = [candidate for candidate in candidates if not candidate.param.is_meta]
    if not candidates:
        return torch.device("cpu")
    first = candidates[0]
    for other in candidates:
        if other.param.device != first.param.device:
            raise ValueError(
                f"all params must be on one device: {first.name} is on {first.param.device}, "
                f"{other.name} on {other.param.device}"
            )
    return first.param.device


def named(index: int, group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The params of group ``index`` with the names that errors call them by."""
    names = group.get("param_names") or [
        f"param {position} of group {index}" for position in range(len(group["params"]))
    ]
    return list(zip(names, group["params"], strict=True))


def unplaced(param_groups: Sequence[dict[str, Any]], known: set[int]) -> list[Candidate]:
    """The params that are to be optimized and have no place yet; ``known``: ids of those that do.

    Frozen ones are left out, and those on the meta device, as long as they have no gradient.

    Raises:
        RuntimeError: one on the meta device has a gradient.
    """

    def wanted(param: Tensor) -> bool:
        if id(param) in known or not (param.requires_grad or param.grad is not None):
            return False
        if param.is_meta and param.grad is not None:
            # The words of torch's fused kernels; its other ones do nothing and say nothing.
            raise RuntimeError(
                "a param is on the meta device and has a gradient: `fused=True` requires all the "
                "params to be floating point Tensors of supported devices, and so does every "
                "update here. Expected the model to be materialized first"
            )
        return not param.is_meta

    found: dict[Tensor, Candidate] = {}  # a param that is listed twice counts once
    for index, group in enumerate(param_groups):
        if not known.issuperset(map(id, group["params"])) and any(map(wanted, group["params"])):
            amsgrad = bool(group.get("amsgrad", False))
            for name, param in named(index, group):
                if wanted(param):
                    found.setdefault(param, Candidate(param, name, index, amsgrad))
    return list(found.values())


def master_of(candidate: Candidate, device: torch.device, options: Options) -> str | None:
    """Which state makes up the fp32 master weight of a param, if it is not one itself."""
    param, name = candidate.param, candidate.name
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} belongs to FullyShardedDataParallel, whose flat params differ between ranks: "
            "expected FSDP2's fully_shard"
        )
    if candidate.distributed:
        _check_distributed(candidate, options)
    if param.device != device:
        raise ValueError(f"{name} is on {param.device}, but the optimizer was made for {device}")
    if param.layout is not torch.strided or not supports(real_dtype(param)):
        raise ValueError(
            f"{name}: expected a dense float32, float64, bfloat16, float16 or complex param, "
            f"found {describe(param)} ({param.layout})"
        )
    # A planner asks on the meta device, where nothing has memory.
    if device.type != "meta" and candidate.local.numel() and not candidate.local.data_ptr():
        raise ValueError(
            f"{name} is, or has as its local tensor, a {type(candidate.local).__name__}, a wrapper "
            "of other tensors without memory of its own: expected a plain tensor"
        )
    if options.directory is not None and device.type != "cpu":
        raise ValueError(
            f"{name} is on {device}, and a file holds the state of params on the CPU: expected "
            'offload="cpu"'
        )
    if options.offload == "cpu" and device.type != "cuda":
        raise ValueError(
            f'{name} is on {device}, and offload="cpu" is for params on a GPU: expected no offload '
            "or a directory"
        )
    if options.state != "fp32" and (param.is_complex() or param.dtype == torch.float64):
        raise ValueError(
            f"{name} is {str(param.dtype).removeprefix('torch.')}, and state={options.state!r} is "
            'of float32, bfloat16 and float16 params: expected state="fp32"'
        )
    if param.dtype == torch.bfloat16:
        return _BFLOAT16_MASTERS[options.master]
    if param.dtype == torch.float16:
        if options.master not in ("auto", "fp32"):
            raise ValueError(
                f"{name} is float16: master={options.master!r} makes a float32 of a bfloat16 and "
                'more bits, and can\'t of a float16; expected master="auto" or "fp32"'
            )
        return "master"
    return None


def _check_distributed(candidate: Candidate, options: Options) -> None:
    """Raise ValueError for a DTensor that can't be updated where it is."""
    param: Any = candidate.param
    name = f"{candidate.name} ({dtensors.describe(param)})"
    for option in ("shard_grads", "update_in_backward", "exact_microbatches"):
        if value := getattr(options, option):
            raise ValueError(
                f"{name}: {option}={value}, but whoever made it a DTensor reduces its gradient: "
                f"expected an optimizer without {option}"
            )
    if dtensors.is_partial(param):
        raise ValueError(f"{name}: expected a param that is sharded or replicated, found sums")
    if not is_dense(candidate.local):
        raise ValueError(
            f"{name}: expected a dense local tensor, found strides {candidate.local.stride()} for "
            f"shape {tuple(candidate.local.shape)}"
        )


def refuse_shared_memory(candidates: Sequence[Candidate]) -> None:
    """Raise for different params on the same memory: in buffers they would come apart."""
    seen: dict[int, str] = {}
    for candidate in candidates:
        if candidate.local.numel():
            first = seen.setdefault(candidate.local.data_ptr(), candidate.name)
            if first is not candidate.name:
                raise ValueError(
                    f"{first} and {candidate.name} are different params on the same memory: "
                    "expected tied params to be one Parameter"
                )
