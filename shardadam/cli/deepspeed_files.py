"""The files of a checkpoint that DeepSpeed's ZeRO-1 or ZeRO-2 wrote, read and none of them run.

    tag/mp_rank_00_model_states.pt                        the module, and the names in every group
    tag/zero_pp_rank_0_mp_rank_00_optim_states.pt         rank 0's partition of every group
    tag/zero_pp_rank_1_mp_rank_00_optim_states.pt         rank 1's; in bf16, bf16_zero_pp_rank_…

They are pickles that name a few of DeepSpeed's classes. `torch.load(weights_only=True)` gets
stand-ins for those, which hold what the file says of them and do nothing.
"""

import contextlib
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli.plain_load import load_plain
from shardadam.cli.tensors import check_dense, check_model

_MODEL = "mp_rank_00_model_states.pt"
_OPTIM = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_(\d{1,9})_mp_rank_00_optim_states\.pt")
_OTHERS = (
    (r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", "ZeRO-3, which partitions params too"),
    (r"(layer_-?\d+_)?expert_.*|expp_rank_.*", "a mixture of experts"),
    (r"layer_\d+-.*", "pipeline parallelism"),
    (r".*mp_rank_(?!00_)\d+_.*_states\.pt", "model parallelism"),
    (r"zero", "a universal checkpoint"),
)
"""By the names of files: what else DeepSpeed writes."""
_EQUAL = ("zero_stage", "partition_count", "ds_version", "param_alignment_paddings")
"""What every rank says alike."""
_MOST = 10**6
"""Values of those, in all."""


class _Inert:
    """What a file says of an object: its state, and no behaviour."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


_STAND_INS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": type("LossScaler", (_Inert,), {}),
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": type("LossScaler", (_Inert,), {}),
    "deepspeed.utils.tensor_fragment.fragment_address": type("Address", (_Inert,), {}),
    "deepspeed.runtime.zero.config.ZeroStageEnum": type("Stage", (int,), {}),
}


def plain_state(value: object) -> dict[str, Any]:
    """What a stand-in holds."""
    state = value.state if isinstance(value, _Inert) else None
    return state if isinstance(state, dict) else {}


@contextlib.contextmanager
def sound(path: Path) -> Iterator[None]:
    """Turn what unexpected values provoke into an error that names ``path``."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: unexpected values: {error!r:.200}") from error


@dataclass(frozen=True, slots=True)
class Files:
    """What they hold, in DeepSpeed's words: the model's file, and by rank the optimizer's."""

    path: Path
    names: list[str]
    model: dict[str, Any]
    ranks: list[dict[str, Any]]

    @property
    def stage(self) -> int:
        """Of ZeRO; its optimizer for bf16 alone does not say it, and is 1."""
        return int(self.ranks[0].get("zero_stage", 1))

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        config = self.model.get("ds_config")
        return config if isinstance(config, dict) else {}

    def where(self, rank: int) -> str:
        """A rank's file, for errors."""
        return f"{self.path}/{self.names[rank + 1]}"


def load(path: Path) -> Files:
    """Read the folder of one tag.

    Raises:
        CheckpointError: it is no such checkpoint, or not whole.
    """
    there = sorted(file.name for file in path.iterdir())
    for pattern, what in _OTHERS:
        found = [name for name in there if re.fullmatch(pattern, name)]
        if found:
            raise CheckpointError(f"{path}: expected ZeRO-1 or ZeRO-2, found {what} ({found[0]})")
    if _MODEL not in there:
        raise CheckpointError(f"{path}: expected {_MODEL}, found none")
    matches = sorted(filter(None, map(_OPTIM.fullmatch, there)), key=lambda m: int(m[2]))
    if not matches:
        raise CheckpointError(
            f"{path}: expected zero_pp_rank_0_mp_rank_00_optim_states.pt, found none: was it saved "
            "with ZeRO?"
        )
    names = [match[0] for match in matches]
    with sound(path):
        model = _load(path / _MODEL)
        _check_model(model, f"{path}/{_MODEL}")
        ranks = []
        for name in names:
            saved = _load(path / name).get("optimizer_state_dict")
            if not isinstance(saved, dict):
                raise CheckpointError(f"{path}/{name}: expected an optimizer_state_dict")
            _check_rank(saved, f"{path}/{name}")
            ranks.append(saved)
        _check_all(path, matches, ranks)
    return Files(path, [_MODEL, *names], model, ranks)


def _load(file: Path) -> dict[str, Any]:
    if file.is_symlink() or not file.is_file():
        raise CheckpointError(f"{file}: expected a regular file")
    value = load_plain(file, str(file), mapped=True, stand_ins=_STAND_INS)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a dict, found {type(value).__name__}")
    return value


def _check_model(model: dict[str, Any], where: str) -> None:
    if model.get("optimizer") is not None:
        raise CheckpointError(f"{where}: expected ZeRO-1 or ZeRO-2, found an optimizer without")
    dims = model.get("checkpoint_parallel_dimensions")
    sizes = [model.get("mp_world_size", 1), *(dims.values() if isinstance(dims, dict) else [])]
    if sizes != [1] * len(sizes):
        raise CheckpointError(f"{where}: expected no model or pipeline parallelism, found {sizes}")
    module, shapes = model.get("module"), model.get("param_shapes")
    module = check_model(module, f"{where}: module")
    if not (
        isinstance(shapes, list)
        and shapes
        and all(isinstance(group, dict) for group in shapes)
        and all(isinstance(shape, tuple) for group in shapes for shape in group.values())
    ):
        raise CheckpointError(f'{where}: expected "param_shapes", a dict of shapes for every group')
    for name, shape in (item for group in shapes for item in group.items()):
        here = tuple(module[name].shape) if name in module else "none"
        if here != tuple(shape):
            raise CheckpointError(f"{where}: {name}: expected {tuple(shape)}, found {here}")
    if sum(map(len, shapes)) != len({name for group in shapes for name in group}):
        raise CheckpointError(f"{where}: expected every param in one group")


def _check_rank(saved: dict[str, Any], where: str) -> None:
    stage = saved.get("zero_stage", 1)
    if not isinstance(stage, int) or stage not in (1, 2):
        raise CheckpointError(f"{where}: expected ZeRO-1 or ZeRO-2, found stage {stage!r}"[:300])
    base, masters = saved.get("base_optimizer_state"), saved.get("single_partition_of_fp32_groups")
    if isinstance(base, list):
        raise CheckpointError(
            f"{where}: expected the optimizer's state dict, found an elastic checkpoint: save "
            'with "elastic_checkpoint": false'
        )
    if not (
        isinstance(base, dict)
        and isinstance(base.get("state"), dict)
        and isinstance(base.get("param_groups"), list)
        and all(isinstance(entry, dict) for entry in base["state"].values())
        and all(isinstance(group, dict) for group in base["param_groups"])
    ):
        raise CheckpointError(f'{where}: expected the optimizer\'s "state" and "param_groups"')
    count = len(base["param_groups"])
    if not (
        isinstance(masters, list)
        and len(masters) == count
        and all(isinstance(tensor, Tensor) for tensor in masters)
    ):
        raise CheckpointError(f"{where}: expected single_partition_of_fp32_groups, {count} tensors")
    check_dense(enumerate(masters), f"{where}: masters")
    paddings = saved.get("group_paddings")
    if not (
        isinstance(paddings, list)
        and len(paddings) == count
        and all(type(padding) is int and padding >= 0 for padding in paddings)
    ):
        raise CheckpointError(f"{where}: expected group_paddings, {count} numbers")


def _check_all(path: Path, matches: list[re.Match[str]], ranks: list[dict[str, Any]]) -> None:
    """See that the ranks' files are those of one save."""
    numbers, prefixes = [int(match[2]) for match in matches], {match[1] for match in matches}
    counts = ranks[0].get("partition_count")
    counts = counts if isinstance(counts, list) else [counts]
    size = counts[0] if counts else None
    if not isinstance(size, int) or any(count != size for count in counts):
        raise CheckpointError(f"{path}: expected one number of ranks, found {counts}"[:300])
    if len(numbers) != size or numbers != list(range(len(numbers))) or len(prefixes) != 1:
        raise CheckpointError(
            f"{path}: expected the optim_states.pt of ranks 0 to {size - 1}, found those of "
            f"{', '.join(match[1] + match[2] for match in matches)}"[:300]
        )
    for match, saved in zip(matches, ranks, strict=True):
        groups, first = (each["base_optimizer_state"]["param_groups"] for each in (saved, ranks[0]))
        pairs = {key: (saved.get(key), ranks[0].get(key)) for key in _EQUAL}
        for key, (found, expected) in {**pairs, "param_groups": (groups, first)}.items():
            if not _plain(found) or found != expected:
                raise CheckpointError(
                    f"{path}/{match[0]}: expected {key} as rank 0 has it: "
                    f"{reprlib.repr(expected):.80}, found {reprlib.repr(found):.80}"
                )


def _plain(value: object) -> bool:
    """Whether it is made of numbers and text, and can be compared."""
    # A pickle can hold one list at many places, and so be endless to those who follow all of them.
    rest, seen = [value], 0
    while rest and seen < _MOST:
        each, seen = rest.pop(), seen + 1
        if isinstance(each, dict) and all(isinstance(key, str) for key in each):
            rest += each.values()
        elif isinstance(each, list | tuple):
            rest += each
        elif not (
            each is None
            or isinstance(each, bool | int | float | str)
            or (isinstance(each, Tensor) and each.numel() == 1)
        ):
            return False
    return not rest
