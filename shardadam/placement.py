"""From param groups to buckets: which params, checked alone and against the other ranks."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardadam.agreement import Point, digest, first_difference, meet
from shardadam.buffers import FlatBucket, describe, real_dtype, real_numel
from shardadam.collectives import Communicator
from shardadam.kernels import supports
from shardadam.kernels.state_formats import FORMATS
from shardadam.layout import ALIGNMENT, Bucket, Entry, plan_buckets
from shardadam.options import Options
from shardadam.storage import StateMemory, Storage

_BFLOAT16_MASTERS = {
    **{"auto": "remainder", "split": "remainder", "split8": "remainder8"},
    **{"fp32": "master", "none": None},
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A param that is to be laid out, and where it stands in the param groups."""

    param: Tensor
    name: str
    group: int
    amsgrad: bool

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


def block_numbers(param_groups: Sequence[dict[str, Any]]) -> dict[Tensor, int]:
    """The number of every param's first block of ALIGNMENT elements: random bits go by it.

    Group by group and dtype by dtype, last registered first as in the buckets, so that what lies
    side by side in one is numbered on. Frozen params have numbers too: a param has the same
    whenever it is unfrozen, whatever the world size and the buckets.
    """
    numbers: dict[Tensor, int] = {}
    first = 0
    for group in param_groups:
        dtypes = dict.fromkeys(param.dtype for param in group["params"])
        for dtype in dtypes:
            for param in reversed(group["params"]):
                if param.dtype == dtype and param not in numbers:
                    numbers[param] = first
                    first += -(-real_numel(param) // ALIGNMENT)
    return numbers


def check_betas(param_groups: Sequence[dict[str, Any]], state: str) -> None:
    """Raise ValueError for betas with which no ratio of moments is bounded, if they are coded.

    A block's scale would be that of an element without gradients, and all others' codes 0.
    """
    if not FORMATS[state].has_scales:
        return
    for index, group in enumerate(param_groups):
        beta1, beta2 = map(float, group["betas"])
        if beta1 and beta1 * beta1 >= beta2:
            raise ValueError(
                f"betas of group {index} are ({beta1}, {beta2}): state={state!r} needs beta1 "
                'squared to be less than beta2, expected such betas or state="bf16"'
            )


def hyperparameters(param_groups: Sequence[dict[str, Any]], names: Iterable[str]) -> list[str]:
    """What of every group must be equal on every rank, a line each.

    Only ``names``: a group may hold whatever else its owner put there.
    """
    return [
        f"{name}={_plain(group.get(name))} in group {index}"
        for index, group in enumerate(param_groups)
        for name in names
    ]


def _plain(value: object) -> object:
    """A hyperparameter as something that ranks can compare without waiting for a device."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))  # a tensor's own repr is rounded
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return f"a tensor of shape {tuple(value.shape)}"
        return value.item() if value.device.type == "cpu" else "a tensor on the device"
    return value


@torch.no_grad()
def place(
    candidates: Sequence[Candidate],
    numbers: Mapping[Tensor, int],
    settings: Sequence[str],
    scalars: dict[str, float],
    communicator: Communicator,
    options: Options,
    memory: StateMemory,
    *,
    scalars_on_device: bool,
) -> list[FlatBucket]:
    """Lay out ``candidates`` and take their storage over. Collective.

    Every rank then has the first rank's values, as under DDP.

    Args:
        candidates: what to lay out; the same on every rank.
        numbers: those of `block_numbers`.
        settings: hyperparameters and options, a line each; the same on every rank.
        scalars: the per-param scalars of the state and their initial values.
        communicator: the ranks.
        options: the optimizer's.
        memory: where the state is to be.
        scalars_on_device: whether the scalars are where the params are, or on the host.

    Raises:
        ValueError: a param that can't be optimized, or one that differs between ranks; every rank
            raises.
        OSError: there is no room for the state; other ranks raise RuntimeError. Nothing has been
            taken over.
    """
    buckets: list[tuple[Bucket, Storage]] = []
    error: Exception | None = None
    try:
        masters = [_master(candidate, communicator.device, options) for candidate in candidates]
        _refuse_shared_memory(candidates)
        buckets = _plan(candidates, masters, communicator.world_size, options, memory)
        memory.reserve(
            [
                size
                for bucket, how in buckets
                for size in how.sizes(how.tensors(how.amsgrad), bucket.shard_numel)
            ]
        )
    except (ValueError, OSError) as caught:
        error = caught
    lines = [*map(str, candidates), *settings]
    words = {"layout": digest("\n".join(lines)), "ordinal": communicator.next_ordinal()}
    seen = meet(communicator, Point.CONSTRUCTION, words, error)
    communicator.take_ordinal(seen["ordinal"].high)
    if not seen["layout"].agreed:
        difference = first_difference(communicator.exchange(lines))
        raise ValueError(
            f"expected the same params and hyperparameters on every rank: {difference}"
        )

    flat_buckets = []
    for bucket, storage in buckets:
        indices = [span.param for span in bucket.spans]
        flat_buckets.append(
            FlatBucket(
                bucket,
                [candidates[index].param for index in indices],
                [candidates[index].name for index in indices],
                [numbers[candidates[index].param] for index in indices],
                communicator.rank,
                storage,
                scalars,
                scalars_on_device=scalars_on_device,
            )
        )
    _share_values(flat_buckets, communicator)
    return flat_buckets


def _plan(
    candidates: Sequence[Candidate],
    masters: Sequence[str | None],
    world_size: int,
    options: Options,
    memory: StateMemory,
) -> list[tuple[Bucket, Storage]]:
    """The buckets of ``candidates``, and how the state of each is stored."""
    buckets: list[tuple[Bucket, Storage]] = []
    keys = [
        (real_dtype(candidate.param), candidate.amsgrad, master)
        for candidate, master in zip(candidates, masters, strict=True)
    ]
    for key in dict.fromkeys(keys):
        dtype, amsgrad, master = key
        entries = [
            Entry(index, candidate.group, real_numel(candidate.param))
            for index, candidate in enumerate(candidates)
            if keys[index] == key
        ]
        form = FORMATS[options.state]
        storage = Storage(dtype, form, master, amsgrad, options.seed, memory)
        planned = plan_buckets(entries, options.bucket_bytes // dtype.itemsize, world_size)
        buckets += [(bucket, storage) for bucket in planned]
    # In the order in which backward completes them, also across dtypes.
    buckets.sort(key=lambda planned: -min(span.param for span in planned[0].spans))
    return buckets


def _master(candidate: Candidate, device: torch.device, options: Options) -> str | None:
    """Which state makes up the fp32 master weight of a param, if it is not one itself."""
    param, name = candidate.param, candidate.name
    if hasattr(param, "device_mesh"):
        raise ValueError(f"{name} is a DTensor (FSDP2, tensor parallel): not supported yet")
    if param.device != device:
        raise ValueError(f"{name} is on {param.device}, but the optimizer was made for {device}")
    if param.layout is not torch.strided or not supports(real_dtype(param)):
        raise ValueError(
            f"{name}: expected a dense float32, float64, bfloat16, float16 or complex param, "
            f"found {describe(param)} ({param.layout})"
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


def _refuse_shared_memory(candidates: Sequence[Candidate]) -> None:
    """Raise for different params on the same memory: in buffers they would come apart."""
    seen: dict[int, str] = {}
    for candidate in candidates:
        if candidate.param.numel():
            first = seen.setdefault(candidate.param.data_ptr(), candidate.name)
            if first is not candidate.name:
                raise ValueError(
                    f"{first} and {candidate.name} are different params on the same memory: "
                    "expected tied params to be one Parameter"
                )


def _share_values(buckets: Sequence[FlatBucket], communicator: Communicator) -> None:
    """Give every rank the first rank's values, unless that would hide a difference in order."""
    if communicator.world_size == 1:
        return
    sums = []
    names = []
    for bucket in buckets:
        for name, span in zip(bucket.names, bucket.bucket.spans, strict=True):
            values = bucket.flat[span.offset : span.offset + span.numel]
            sums.append(int(values.view(_BITS[values.itemsize]).sum(dtype=torch.int64)))
            names.append(name)
    words = {"values": digest(str(sums)), "sorted values": digest(str(sorted(sums)))}
    seen = meet(communicator, Point.CONSTRUCTION, words)
    if seen["sorted values"].agreed and not seen["values"].agreed:
        lines = [f"{name} (sum of bits {value})" for name, value in zip(names, sums, strict=True)]
        difference = first_difference(communicator.exchange(lines))
        raise ValueError(
            "the same params stand in another order on another rank: "
            f"{difference}. Expected one order on every rank"
        )
    for bucket in buckets:
        communicator.broadcast(bucket.flat)
        if bucket.master == "master":
            bucket.state["master"].copy_(bucket.shard)
