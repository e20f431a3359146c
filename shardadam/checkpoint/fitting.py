"""How a checkpoint fits the objects that it is loaded into: all is checked, nothing is changed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.checkpoint import plain
from shardadam.checkpoint import rng as generators
from shardadam.checkpoint.contents import dtype_name, named_params, others, param_names
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.filling import check_moments, write_whole
from shardadam.checkpoint.manifest import Entry
from shardadam.checkpoint.reading import Reader
from shardadam.optimizer import ShardedOptimizer
from shardadam.shards import ParamShard, shards_of

Write = Callable[[], object]


@dataclass(slots=True)
class Fit:
    """What is to be written once every rank can, and what does not fit but is let pass.

    ``shards``: the numbers of the saved entries, by the optimizer's params in the order of
    `shards_of`; None for what was not saved. The writes in ``writes`` come after those, before them
    ``tries``, each with what undoes it: foreign code, that may refuse.
    """

    shards: list[int | None] = field(default_factory=list)
    tries: list[tuple[Write, Write]] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Fitter:
    """Compares a checkpoint with objects; with ``strict``, what is let pass is an error."""

    def __init__(
        self, reader: Reader, documents: Mapping[str, Any], rank: int, world_size: int, strict: bool
    ) -> None:
        self.fit = Fit()
        self._reader, self._documents = reader, documents
        self._rank, self._world_size, self._strict = rank, world_size, strict
        self._ranks = _checked(documents.get("ranks"), list, "ranks")
        if len(self._ranks) != reader.world_size:
            found = len(self._ranks)
            raise CheckpointError(f"ranks: expected {reader.world_size} entries, found {found}")
        self._saved = {
            entry.name: i for i, entry in enumerate(reader.entries) if entry.kind == "param"
        }

    def _pass(self, note: str, does: str = "lets it pass") -> None:
        if self._strict:
            raise CheckpointError(f"{note} (strict=False {does})")
        self.fit.notes.append(note)

    # ---- params ---------------------------------------------------------------------------------

    def tensors(self, optimizer: ShardedOptimizer | None, model: nn.Module | None) -> None:
        """Params, buffers and the optimizer's state."""
        wholes = others(optimizer, model)
        names: dict[Tensor, str] = {}
        shards: list[ParamShard] = []
        if optimizer is not None:
            names = dict((param, name) for name, param in named_params(optimizer, model))
            shards = shards_of(optimizer._places)
        known = {shard.param for shard in shards}
        placed = [name for param, name in names.items() if param in known]
        self._compare_names([*placed, *wholes])
        if optimizer is not None:
            self._groups(optimizer, model, set(placed))
        in_groups = self._names_in_groups()
        indices = [self._saved.get(names.get(shard.param, "")) for shard in shards]
        for index, shard in zip(indices, shards, strict=True):
            if index is not None:
                self._shard(index, shard, in_groups)
        self._compare_formats(indices, shards)
        self.fit.shards += indices
        for name, tensor in wholes.items():
            if name in self._saved:
                index = self._saved[name]
                self._whole(index, tensor)
                if optimizer is not None and self._reader.entries[index].scalars is not None:
                    self.fit.notes.append(f"{name} is frozen here: its state is left out")

    def _compare_names(self, here: list[str]) -> None:
        missing = [name for name in here if name not in self._saved]
        if missing:
            self._pass(f"not in the checkpoint: {_few(missing)}")
        known = set(here)
        unexpected = [name for name in self._saved if name not in known]
        if unexpected:
            self._pass(f"in the checkpoint, but in nothing given to load(): {_few(unexpected)}")

    def _compare_formats(self, indices: list[int | None], shards: list[ParamShard]) -> None:
        """Moments of another format are converted, and masters rounded, where that is let pass."""
        entries = self._reader.entries
        pairs = [
            (index, shard)
            for index, shard in zip(indices, shards, strict=True)
            if index is not None and entries[index].numel
        ]
        converted = [
            (index, shard)
            for index, shard in pairs
            if entries[index].scalars is not None and self._reader.form(index) is not shard.form
        ]
        for saved, here in sorted({(self._reader.form(i).name, s.form.name) for i, s in converted}):
            note = f"moments are {saved} in the checkpoint, expected {here}"
            self._pass(note, "converts them")
        for index, shard in converted:
            check_moments(self._reader, index, shard)
        for index, shard in pairs:
            saved_bits, bits = self._reader.master_bits(index), shard.master_bits
            if entries[index].dtype == dtype_name(shard.param) and saved_bits > bits:
                name = entries[index].name
                note = f"{name}: master weights of {saved_bits} bits, expected {bits}"
                self._pass(note, "rounds them")
                break  # as will be others

    def _shard(self, index: int, shard: ParamShard, in_groups: set[str]) -> None:
        entry = self._reader.entries[index]
        _check_like(entry, shard.param)
        if entry.scalars is None:
            if entry.name not in in_groups:
                self._pass(f"{entry.name}: the checkpoint has no optimizer state for it")
        else:
            for scalar in shard.scalars:
                if scalar not in entry.scalars:
                    self._pass(f"{entry.name}: the checkpoint has no {scalar!r} for it")
        self._reader.open(index)

    def _whole(self, index: int, tensor: Tensor) -> None:
        _check_like(self._reader.entries[index], tensor)
        self._reader.open(index)
        self.fit.writes.append(lambda: write_whole(self._reader, index, tensor))

    # ---- param groups ---------------------------------------------------------------------------

    def _saved_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        groups = []
        for i, group in enumerate(_checked(self._documents.get("groups", []), list, "groups")):
            names = _checked(_checked(group, dict, f"group {i}").get("names"), list, f"group {i}")
            options = _checked(group.get("options"), dict, f"options of group {i}")
            decoded = {
                key: plain.decode(value, f"{key!r} of group {i}") for key, value in options.items()
            }
            groups.append(([_checked(name, str, f"group {i}") for name in names], decoded))
        return groups

    def _names_in_groups(self) -> set[str]:
        return {name for names, _ in self._saved_groups() for name in names}

    def _groups(
        self, optimizer: ShardedOptimizer, model: nn.Module | None, placed: set[str]
    ) -> None:
        kind = self._documents.get("optimizer")
        if kind is None:
            self._pass("the checkpoint was saved without an optimizer")
            return
        if kind != type(optimizer).__name__:
            self._pass(f"saved by {kind!r}, expected {type(optimizer).__name__}")
        saved, here = self._saved_groups(), param_names(optimizer, model)
        # Frozen params may be in a group or in none: DeepSpeed does not say.
        of_saved = [sorted(placed.intersection(names)) for names, _ in saved]
        if of_saved != [sorted(placed.intersection(names)) for names in here]:
            sizes = [len(names) for names, _ in saved], [len(names) for names in here]
            self._pass(
                f"expected param groups of {sizes[1]} params, found {sizes[0]}, or other params in "
                "them: the hyperparameters stay as they are"
            )
            return
        for number, (group, (_, options)) in enumerate(
            zip(optimizer.param_groups, saved, strict=True)
        ):
            for key, value in options.items():
                where = f"{key!r} of group {number}"
                if key in ("params", "param_names"):
                    raise CheckpointError(f"{where}: expected a hyperparameter")
                if key in group:
                    _check_kind(value, group[key], where)
            self.fit.writes.append(partial(_set, group, options))

    # ---- the rest -------------------------------------------------------------------------------

    def lr_scheduler(self, lr_scheduler: Any) -> None:
        """The scheduler's state."""
        if "lr_scheduler" not in self._documents:
            self._pass("the checkpoint has no lr_scheduler")
            return
        state = plain.decode(self._documents["lr_scheduler"], "lr_scheduler")
        before = lr_scheduler.state_dict()
        if not isinstance(state, dict):
            raise CheckpointError(f"lr_scheduler: expected an object, found {state!r}"[:300])
        unknown = [str(key) for key in state if key not in before]
        if unknown:
            self._pass(f"lr_scheduler: {type(lr_scheduler).__name__} has no {_few(unknown)}")
        for key, value in state.items():
            if key in before:
                _check_kind(value, before[key], f"lr_scheduler[{key!r}]")
        self.fit.tries.append(
            (
                lambda: lr_scheduler.load_state_dict(state),
                lambda: lr_scheduler.load_state_dict(before),
            )
        )

    def rng(self) -> None:
        """The generators' states, where this rank has saved any."""
        tensors: dict[str, Tensor] = {}
        for index, entry in enumerate(self._reader.entries):
            rank, _, name = entry.name.partition("/")
            if entry.kind == "rng" and rank == str(self._rank):
                if entry.numel > 2**20:
                    raise CheckpointError(f"random state {name}: {entry.numel} elements")
                dims = tuple(range(len(entry.shape)))
                tensors[name] = self._reader.range(index, "rng", 0, entry.numel, dims)
        rest = self._of_rank(self._rank).get("rng") if self._rank < len(self._ranks) else None
        if not tensors or rest is None:
            self.fit.notes.append(
                f"the checkpoint has no random state for rank {self._rank}: it stays as it is"
            )
            return
        decoded = _checked(plain.decode(rest, "rng"), dict, "rng")
        self.fit.writes += generators.plan(tensors, decoded)

    def extras(self) -> dict[str, Any]:
        """What the user saved besides."""
        values = _checked(self._documents.get("extras"), dict, "extras")
        found = {name: plain.decode(value, f"extras[{name!r}]") for name, value in values.items()}
        for index, entry in enumerate(self._reader.entries):
            if entry.kind == "extra":
                tensor = torch.empty_strided(
                    entry.shape, _strides(entry), dtype=getattr(torch, entry.dtype)
                )
                write_whole(self._reader, index, tensor)
                found[entry.name] = tensor
        return found

    def loaders(self) -> list[Any]:
        """Every rank's loader position."""
        return [
            plain.decode(self._of_rank(rank).get("loader"), "loader")
            for rank in range(len(self._ranks))
        ]

    def _of_rank(self, rank: int) -> dict[str, Any]:
        return dict(_checked(self._ranks[rank], dict, f"rank {rank}"))


def _check_like(entry: Entry, tensor: Tensor) -> None:
    here = dtype_name(tensor)
    floats = [name for name in (entry.dtype, here) if "float" in name]
    if entry.shape != tuple(tensor.shape) or (entry.dtype != here and len(floats) < 2):
        # Complex ones have to be complex, but may be of another precision.
        if entry.shape == tuple(tensor.shape) and entry.dtype[:7] == here[:7] == "complex":
            return
        raise CheckpointError(
            f"{entry.name}: expected {tuple(tensor.shape)} {here}, "
            f"found {entry.shape} {entry.dtype} in the checkpoint"
        )


def _strides(entry: Entry) -> tuple[int, ...]:
    strides, step = [0] * len(entry.shape), 1
    for dim in reversed(entry.dims):
        strides[dim] = step
        step *= max(entry.shape[dim], 1)
    return tuple(strides)


def _checked(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"{what}: expected a {kind.__name__}, found {value!r}"[:300])
    return value


def _check_kind(value: object, here: object, where: str) -> None:
    """See that a value can stand where ``here`` stands."""

    def kind(value: object) -> object:
        if isinstance(value, bool) or value is None:
            return "a flag"
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
            return "a number"
        if isinstance(value, list | tuple):
            return "a list"
        return type(value).__name__

    expected, found = kind(here), kind(value)
    if here is not None and value is not None and expected != found:
        raise CheckpointError(f"{where}: expected {expected}, found {found}")
    if isinstance(here, Tensor) and value is not None:
        try:
            torch.empty_like(here).fill_(float(value))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"{where}: expected {here.dtype}: {error}") from error
    if isinstance(here, tuple) and isinstance(value, list | tuple):
        if len(value) != len(here) or any(map(lambda a, b: kind(a) != kind(b), value, here)):
            raise CheckpointError(f"{where}: expected something like {here}, found {value}"[:300])


def _set(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        here = group.get(key)
        if isinstance(here, Tensor) and value is not None:
            here.fill_(float(value))  # a captured graph or a scheduler may hold on to it
        else:
            group[key] = value


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:200] for name in names[:5]) + more
