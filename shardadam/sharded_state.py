"""The optimizer's state as users see it: shown, edited, saved, loaded, copied."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardadam import consolidation
from shardadam.buffers import FlatBucket
from shardadam.candidates import Candidate
from shardadam.collectives import Communicator
from shardadam.forward import ForwardGate
from shardadam.kernels import Backend
from shardadam.options import Options
from shardadam.phases import Phases
from shardadam.shown_state import ShownState
from shardadam.state_check import StateCheck
from shardadam.state_dict import ids_of, others, pack, plan_edits, plan_load
from shardadam.steps import Steps
from shardadam.storage import StateMemory
from shardadam.wrapped import on_the_wrapped


class ShardedState(torch.optim.Optimizer):
    """What `ShardedOptimizer` does besides steps. ``_shard`` gives it the attributes below."""

    _sharded = False  # not before the end of torch's constructor
    _loading: dict[str, Any] | None = None
    _options: Options
    _communicator: Communicator
    _backend: Backend
    _memory: StateMemory
    _gate: ForwardGate | None
    _buckets: list[FlatBucket]
    _places: dict[Tensor, tuple[FlatBucket, int]]
    _rounds: list[Sequence[Candidate]]
    _steps: Steps
    _broken: str | None
    _shown: ShownState
    _state_check: StateCheck
    _phases: Phases
    grad_norm: Tensor | None
    _edited: list[str]
    _whole: consolidation.Whole | None = None  # until the next update
    _itself: weakref.ref["ShardedState"]  # for `on_the_wrapped`

    def __new__(cls, *args: Any, **kwargs: Any) -> "ShardedState":
        """Copies too are made by it, and wrappers are not."""
        made = super().__new__(cls)
        made._itself = weakref.ref(made)
        return made

    def _shard(
        self, options: Options, rounds: Sequence[Sequence[Candidate] | None] = (None,)
    ) -> None:
        raise NotImplementedError

    def _forget_grads(self) -> None:
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until this rank has all updated params."""
        raise NotImplementedError

    @torch.no_grad()
    def _take_edits(self) -> None:
        """Take what was put into ``self.state``, see [Note: state by hand]."""
        if self.state is self._shown and not self._shown.notes.written:
            return
        writes, lines = plan_edits(self.state, self._shown, self._places, self._communicator)
        if writes:
            self._verify_state()
        for write in writes:
            write()
        edited = self._edited + lines
        if lines or self.state is not self._shown:
            self._show(self.state)
        else:
            self._show_others()
        self._edited = edited  # for the next meeting: they must be the same on every rank

    def _verify_state(self) -> None:
        """Raise if bits have changed that nobody wrote, where that is checked."""
        self._state_check.verify(self._shown.views)

    def _show(self, state: Mapping[Any, Any]) -> None:
        """Let ``self.state`` show all buckets, beside what others keep in ``state``."""
        if state is not self._shown:
            self._shown = ShownState()
        self.state = self._shown
        self._show_others(state)
        for bucket in self._buckets:
            self._shown.show(bucket)
            self._steps.watch(bucket)
            self._state_check.record(bucket, self._shown.views)
        self._edited = []

    def _show_others(self, state: Mapping[Any, Any] | None = None) -> None:
        """Let ``self.state`` have an entry for every param, with what others keep in ``state``."""
        self._shown.add((c.param for candidates in self._rounds for c in candidates), state)
        self._shown.notes.written = False

    @on_the_wrapped
    def state_dict(self) -> dict[str, Any]:
        """This rank's state, in torch's form. Never communicates.

        With several ranks its tensors hold the elements that this rank owns, and know which: the
        same rank of the same world goes on bit for bit, torch.distributed.checkpoint at any size.
        Saved to a file they become whole tensors if this rank has consolidated the state since the
        last update.

        Raises:
            ValueError: what was put into ``optimizer.state`` by hand does not fit.
        """

        def pack_(_: torch.optim.Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
            whole = None if self._whole is None else self._whole.tensor
            ids = ids_of(self.param_groups)
            return pack(packed, ids, self._places, self._communicator, whole)

        # After users' hooks that may write to the state, before those that make something of it.
        with (
            self.register_state_dict_pre_hook(lambda _: self._take_edits()),
            self.register_state_dict_post_hook(pack_, prepend=True),
        ):
            return super().state_dict()

    @on_the_wrapped
    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> dict[str, Any] | None:
        """The whole state on the host of rank ``to`` of the group, None on others. Collective.

        torch.optim's class of the same name loads it, and this one at any world size: it finds
        16-bit params' masters in entries that torch ignores.

        Until the next update, what that rank saves of its `state_dict()` by torch.save is whole
        too, as programs expect that were written for torch's ZeroRedundancyOptimizer.

        Raises:
            ValueError: ``to`` is not a rank, or differs between ranks.
        """
        self._forget_whole()
        held = self.state_dict(), self.param_groups, self._buckets
        whole = consolidation.consolidate(*held, self._communicator, to, self._broken)
        if whole is not None and self._communicator.world_size > 1:
            self._whole = consolidation.Whole.of(whole["state"], self._buckets)
        return whole

    def _forget_whole(self) -> None:
        """Also in state dicts that are still around: it is large, and no longer the state."""
        if self._whole is not None:
            self._whole.state = None
            self._whole = None

    @on_the_wrapped
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's `state_dict()`, or full tensors as torch.optim's optimizers save them.

        Moments keep their precision (torch casts them to the param's dtype). Not collective.

        Raises:
            ValueError: something does not fit; names the param, and nothing has been changed.
        """

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._loading = given
            return {**given, "state": others(given)}

        try:
            # Runs after the user's hooks. torch then checks the groups and calls __setstate__.
            with self.register_load_state_dict_pre_hook(take):
                super().load_state_dict(state_dict)
        finally:
            self._loading = None

    @on_the_wrapped
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; also forgets gradients that are already sharded."""
        self._forget_grads()
        super().zero_grad(set_to_none)

    def __copy__(self) -> "ShardedState":
        raise TypeError(
            "copy.copy() would make two optimizers of the same params, and only one can hold them: "
            "expected copy.deepcopy((model, optimizer))"
        )

    def __getstate__(self) -> dict[str, Any]:
        """As in torch.optim, for pickling and copying."""
        self._take_edits()
        self.synchronize()
        ids = {param: param for param in self._places}
        packed = pack(super().__getstate__(), ids, self._places, self._communicator)
        return {**packed, "_options": self._options, "_rounds": self._rounds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch.optim: called by `load_state_dict`, by unpickling and by copying."""
        given = self._loading or state
        rounds = state.get("_rounds", ())
        state = {name: value for name, value in state.items() if name != "_rounds"}
        if not self._sharded:
            super().__setstate__({**state, "state": {}})
            self._shard(self._options, rounds)
        self.synchronize()
        self._forget_whole()
        for write in plan_load(self.param_groups, self._places, self._communicator, given):
            write()
        self._show(others(state))
        super().__setstate__({**state, "state": self.state})
        self._forget_grads()

    @on_the_wrapped
    def stats(self) -> dict[str, Any]:
        """What this rank has done since construction. Never communicates; may wait for a GPU.

        Returns:
            "steps" that returned; "skipped", of them, for a GradScaler (None on a GPU, whose
            kernels decide); "grad_norm" as the attribute, a float or None; "sent_bytes" by purpose,
            payload; "seconds" of the host by phase: "meet" (waiting for all ranks to come),
            "reduce", "clip", "update" (with the gather beside it), "gather" (what is left of it).
        """
        phases, norm = self._phases, self.grad_norm
        return {
            "steps": phases.steps,
            "skipped": None if self._backend.folds_on_device else phases.skipped,
            "grad_norm": None if norm is None else float(norm),
            "sent_bytes": dict(self._communicator.sent_bytes),
            "seconds": dict(phases.seconds),
        }

    @on_the_wrapped
    def __repr__(self) -> str:
        """Torch's, and what runs: ranks, stage, overlap, precision, memory, kernel."""
        if not self._sharded:
            return super().__repr__()
        ranks = self._communicator
        held = sum(t.nbytes for bucket in self._buckets for t in bucket.state.values())
        padding = sum(bucket.padding_bytes for bucket in self._buckets)
        beside = (
            "" if self._gate is None else f"gathered beside {self._gate.model_name}'s forward, "
        )
        kinds = " and of ".join(dict.fromkeys(bucket.describe() for bucket in self._buckets))
        distributed = sum(len(b.params) for b in self._buckets if not b.exchanged)
        if distributed:
            beside += f"{distributed} DTensors updated where they are, "
        return (
            f"{super().__repr__()}\n"
            f"sharded: {ranks.describe()}, "
            f"{self._options.describe_grads()}, {beside}{len(self._buckets)} buckets "
            f"of {kinds or 'nothing'}, state of {held:,} bytes {self._memory.where()}, "
            f"{padding:,} of them padding, update by {self._backend.name}"
        )
