"""Checkpoints of DeepSpeed's ZeRO-1 and ZeRO-2 as `RunState`.

A param group is one flat fp32 tensor, cut into equal partitions, one for each rank; so are its
moments:

    rank 0 [0,12):   | embed 10 ····· | bias …
    rank 1 [12,24):  … bias 3 | head 9 ····· | padding 2 |

Params lie there in the order of "param_shapes", which is already the one that
``round_robin_gradients`` makes. What the files say besides is compared with that: which elements of
which param a rank has, and the module, whose values have to be the masters, rounded.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli.deepspeed_files import Files, load, plain_state, sound
from shardadam.cli.run_state import (
    SCALARS,
    TORCH_OPTIONS,
    Group,
    RunState,
    as_scalar,
    number_of,
    optimizer_of,
)
from shardadam.kernels.reference import split_master

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NOT_ADAM = ("max_coeff", "min_coeff", "momentum", "nesterov", "moe", "use_muon")
"""Of param groups: LAMB's, SGD's, a mixture of experts', Muon's."""
_DROPPED = ("params", "param_names", "step", "bias_correction", "max_grad_norm", *_NOT_ADAM)
_KNOWN = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("shared_params", "frozen_param_fragments", "skipped_steps", "global_steps"),
    *("global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions"),
    *("universal_checkpoint_info", "ds_config", "ds_version"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A param's elements ``[offset, offset + numel)`` of its group's flat tensor."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


class FlatGroup:
    """A param group of all ranks."""

    def __init__(self, files: Files, number: int) -> None:
        self.files, self.number = files, number
        self.places = list(_places(files, number))
        self.options: dict[str, Any] = self._base(0)["param_groups"][number]
        self._paddings: list[int] = [saved["group_paddings"][number] for saved in files.ranks]
        self._end = self.places[-1].offset + self.places[-1].numel if self.places else 0
        self._masters = [saved["single_partition_of_fp32_groups"][number] for saved in files.ranks]
        self._states = [self._state(rank) for rank in range(len(files.ranks))]
        self._check()

    def _base(self, rank: int) -> dict[str, Any]:
        base: dict[str, Any] = self.files.ranks[rank]["base_optimizer_state"]
        return base

    def _state(self, rank: int) -> dict[str, Any]:
        ids = self._base(rank)["param_groups"][self.number].get("params")
        if not isinstance(ids, list) or len(ids) != 1 or not isinstance(ids[0], int):
            self._refuse(rank, f"expected one flat param, found {ids!r:.80}")
        return dict(self._base(rank)["state"].get(ids[0], {}))

    def _refuse(self, rank: int, what: str) -> None:
        raise CheckpointError(f"{self.files.where(rank)}: group {self.number}: {what}")

    def _check(self) -> None:
        others = [key for key in _NOT_ADAM if self.options.get(key)]
        others += [key for key in self._states[0] if key not in (*SCALARS, *_MOMENTS)]
        if others:
            self._refuse(0, f"expected Adam's, found {others[0]!r}")
        if self.options.get("bias_correction", True) is not True:
            self._refuse(0, "expected bias_correction")
        size = self._size()
        for rank, state in enumerate(self._states):
            if state.keys() != self._states[0].keys():
                self._refuse(rank, f"expected {list(self._states[0])}, found {list(state)}")
            for name in self.moments if state else ():
                moment = state.get(name)
                if not (isinstance(moment, Tensor) and moment.shape == (size,)):
                    self._refuse(rank, f"expected {size} elements of {name}")
            self._check_slices(rank, size)
        # DeepSpeed's optimizer for bf16 alone leaves the padding at its end.
        found = sum(master.numel() for master in self._masters)
        if found not in (self._end, self._end + sum(self._paddings)):
            self._refuse(0, f"expected {self._end} elements on all ranks, found {found}")

    def _size(self) -> int:
        """Of a partition."""
        size, left = divmod(self._end + sum(self._paddings), len(self._paddings))
        if left:
            self._refuse(0, f"expected equal partitions of {self._end} elements and padding")
        return size

    def _check_slices(self, rank: int, size: int) -> None:
        """Compare with the elements that the rank says it has."""
        mappings = self.files.ranks[rank].get("param_slice_mappings")
        # Older versions don't say it, and with round_robin_gradients it is the order before that.
        if mappings is None or _round_robin(self.files):
            return
        here = range(rank * size, (rank + 1) * size)
        expected = {}
        for place in self.places:
            start = max(place.offset, here.start)
            numel = min(place.offset + place.numel, here.stop) - start
            if numel > 0:
                expected[place.name] = {"numel": numel, "start": start - here.start}
        found = {name: plain_state(each) for name, each in mappings[self.number].items()}
        if found != expected:
            self._refuse(rank, f"expected {expected!r:.120}, found {found!r:.120}")

    @property
    def moments(self) -> list[str]:
        """That it has."""
        amsgrad = "max_exp_avg_sq" in self._states[0] or self.options.get("amsgrad") is True
        return [*_MOMENTS] if amsgrad else [*_MOMENTS[:2]]

    def scalars(self) -> dict[str, float]:
        """State of one number."""
        if not self._states[0]:
            return {"step": 0.0}
        names = [name for name in SCALARS if name == "step" or name in self._states[0]]
        return {name: self._number(name) for name in names}

    def _number(self, name: str) -> float:
        given = self.options.get(name)  # where some of DeepSpeed's classes count the steps
        values = [
            number_of(state.get(name, given), f"{self.files.where(rank)}: {name}")
            for rank, state in enumerate(self._states)
        ]
        if len(set(values)) > 1:
            raise CheckpointError(
                f"{self.files.path}: group {self.number}: expected one {name} on all ranks, "
                f"found {values!r:.120}: files of several saves?"
            )
        return values[0]

    def parts(self) -> dict[str, Tensor]:
        """Masters and moments, flat, of all ranks."""
        found = {"master": torch.cat([master.detach().flatten() for master in self._masters])}
        for name in self.moments:
            # Before the first step there are none.
            parts = [state[name] for state in self._states if state]
            found[name] = torch.cat(parts) if parts else torch.zeros(self._end)
        wrong = [name for name, tensor in found.items() if not tensor.dtype.is_floating_point]
        if wrong:
            self._refuse(0, f"expected {wrong[0]} to be floats")
        return {name: tensor.float() for name, tensor in found.items()}

    def given_names(self) -> list[str]:
        """The params' names in the order in which the optimizer was given them."""
        names = [place.name for place in self.places]
        if not _round_robin(self.files):
            return names
        # Of W ranks the first gets the params 0, W, 2 W, …: their order is one after another.
        count = len(self.files.ranks)
        order = [i for first in range(count) for i in range(first, len(names), count)]
        return [name for _, name in sorted(zip(order, names, strict=True))]


def _round_robin(files: Files) -> bool:
    zero = files.config.get("zero_optimization")
    return isinstance(zero, dict) and zero.get("round_robin_gradients") is True


def groups_of(files: Files) -> list[FlatGroup]:
    """All param groups.

    Raises:
        CheckpointError: they are no Adam's, or not what DeepSpeed says elsewhere.
    """
    shapes, groups = files.model["param_shapes"], files.ranks[0]["group_paddings"]
    if len(shapes) != len(groups):
        raise CheckpointError(
            f"{files.where(0)}: expected {len(shapes)} param groups, found {len(groups)}"
        )
    with sound(files.path):
        return [FlatGroup(files, number) for number in range(len(groups))]


def read(path: Path) -> RunState:
    """Read the folder of one tag.

    Raises:
        CheckpointError: it can't be read, or holds something else.
    """
    files = load(path)
    with sound(path):
        return _run_state(files)


def _run_state(files: Files) -> RunState:
    configured = _configured(files)
    found = RunState(dict(files.model["module"]), tied=_tied(files))
    for group in groups_of(files):
        parts, scalars = group.parts(), group.scalars()
        for place in group.places:
            own = {
                name: flat[place.offset : place.offset + place.numel].view(place.shape).clone()
                for name, flat in parts.items()
            }
            found.model[place.name], masters = _masters(files, place.name, own.pop("master"))
            numbers = {name: as_scalar(name, number) for name, number in scalars.items()}
            found.state[place.name] = {**numbers, **own, **masters}
        options = {k: v for k, v in group.options.items() if k not in _DROPPED}
        found.groups.append(Group(group.given_names(), {**TORCH_OPTIONS, **options}))
    for name, first in found.tied.items():
        found.model[name] = found.model[first]
    found.optimizer = optimizer_of(found.groups, found.state) or configured
    if found.optimizer:
        for options in (each.options for each in found.groups):
            options.setdefault("decoupled_weight_decay", found.optimizer == "AdamW")
    found.left_out += [k for k, v in files.model.items() if k not in _KNOWN and v is not None]
    if files.ranks[0].get("dynamic_loss_scale") is True:
        found.left_out.append("the loss scale")
    return found


def _places(files: Files, number: int) -> Iterator[Place]:
    shapes = files.model["param_shapes"][number]
    paddings = files.ranks[0].get("param_alignment_paddings")
    after = paddings[number] if isinstance(paddings, list) and paddings else [0] * len(shapes)
    if len(after) != len(shapes) or not all(type(n) is int and n >= 0 for n in after):
        raise CheckpointError(f"{files.where(0)}: expected param_alignment_paddings of all params")
    offset = 0
    for (name, shape), padding in zip(shapes.items(), after, strict=True):
        yield Place(name, tuple(shape), offset, math.prod(shape))
        offset += math.prod(shape) + padding


def _masters(files: Files, name: str, master: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A param's values and what is state beside them."""
    value = files.model["module"][name]
    if value.dtype not in _DTYPES:
        raise CheckpointError(
            f"{files.path}: {name}: expected fp32, bf16 or fp16, found {value.dtype}"
        )
    rounded = master.to(value.dtype)
    number = torch.int32 if value.dtype == torch.float32 else torch.int16
    same = rounded.view(number) == value.contiguous().view(number)
    wrong = int((~(same | (rounded.isnan() & value.isnan()))).sum())
    if wrong:
        raise CheckpointError(
            f"{files.path}: {name}: expected the module to have the fp32 masters, rounded; "
            f"{wrong} of {value.numel()} elements differ: changed since the last step?"
        )
    if value.dtype == torch.float32:
        return master, {}
    if value.dtype == torch.float16:
        return value.clone(), {"master": master}
    values, remainder = split_master(master)
    return values, {"remainder": remainder}


def _tied(files: Files) -> dict[str, str]:
    """Further names of params, and their first."""
    module, shared = files.model["module"], files.model.get("shared_params") or {}
    # All empty params are at one address, by which DeepSpeed tells what is shared.
    return {
        name: first
        for name, first in dict(shared).items()
        if name in module and first in module and module[name].numel()
    }


def _configured(files: Files) -> str | None:
    """The class of DeepSpeed's own optimizer, if its configuration names one of Adam's.

    Raises:
        CheckpointError: it is one of the 1-bit optimizers.
    """
    optimizer = files.config.get("optimizer")
    if not isinstance(optimizer, dict):
        return None
    kind, params = str(optimizer.get("type")), optimizer.get("params")
    if kind.lower() in ("onebitadam", "zerooneadam", "onebitlamb"):
        raise CheckpointError(f"{files.path}: expected Adam or AdamW, found the 1-bit {kind}")
    # Its Adam is AdamW, unless it is told otherwise.
    coupled = isinstance(params, dict) and not params.get("adam_w_mode", True)
    return {"adamw": "AdamW", "adam": "Adam" if coupled else "AdamW"}.get(kind.lower())
