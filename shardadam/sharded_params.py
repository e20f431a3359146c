"""The optimizer's params: laid out over the ranks at construction, checked before each step."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from shardadam import clipping, placement
from shardadam.backward import Backward, EarlyUpdate
from shardadam.bucket_grads import BucketGrads
from shardadam.buffers import FlatBucket
from shardadam.candidates import Candidate, single_device, unplaced
from shardadam.collectives import Communicator
from shardadam.forward import ForwardGate
from shardadam.gathers import Gathers
from shardadam.gradients import GradReducer
from shardadam.hierarchy import Hierarchy
from shardadam.kernels import backend_for
from shardadam.microbatches import MicrobatchReducer
from shardadam.offload import place_for_state
from shardadam.options import Options
from shardadam.replica_check import ReplicaCheck
from shardadam.sharded_state import ShardedState
from shardadam.shown_state import ShownState
from shardadam.state_check import StateCheck
from shardadam.steps import DeviceSteps, HostSteps, Steps
from shardadam.updates import lack_maximum


class ShardedParams(ShardedState):
    """What `ShardedOptimizer` does before its steps: takes params over, and checks them."""

    _scalars: dict[str, float] = {"step": 0.0}  # noqa: RUF012  (torch.optim is no dataclass)

    def _shard(
        self, options: Options, rounds: Sequence[Sequence[Candidate] | None] = (None,)
    ) -> None:
        """Take over the params: the last act of construction. A copy's ``rounds`` are given."""
        device = single_device(self.param_groups)
        self._options = options
        self._backend, self._memory, self._updater = place_for_state(
            options, device, backend_for(device)
        )
        mean, mesh = self._backend.mean, options.mesh
        self._communicator = (
            Communicator(options.process_group, device, mean)
            if mesh is None
            else Hierarchy(mesh, device, mean, replicate_state=options.replicate_state)
        )
        self._steps: Steps = (
            DeviceSteps(self._backend) if self._backend.folds_on_device else HostSteps()
        )
        early = options.update_in_backward
        shard_grads = options.shard_grads or early
        self._reducer = (
            GradReducer(self._communicator, options.grad_sync, shard_grads)
            if options.exact_microbatches is None
            else MicrobatchReducer(self._communicator, options.exact_microbatches)
        )
        self._replica_check = ReplicaCheck(options.check_replicas_every, self._communicator)
        self._backward = Backward(
            self._reducer,
            self._communicator,
            EarlyUpdate.of(
                self._check_early, self._replica_check.compare, self._update, self._settle
            )
            if early
            else None,
        )
        self._state_check = StateCheck(options.check_state, self._communicator.rank)
        self._gathers = Gathers(self._communicator, self._state_check.note_params)
        self._gate: ForwardGate | None = None
        self._buckets: list[FlatBucket] = []
        self._clipped: clipping.Clipped | None = None
        self._broken, self._phases = None, self._communicator.flight.phases
        self.grad_norm = None
        self._sharded = True
        self._places: dict[Tensor, tuple[FlatBucket, int]] = {}
        self._placed: set[int] = set()
        self._rounds: list[Sequence[Candidate]] = []
        self.state = self._shown = ShownState()
        self._edited: list[str] = []
        for candidates in rounds:
            self._place(candidates)

    def _place(self, candidates: Sequence[Candidate] | None = None) -> None:
        """Lay out the params that have no place yet: new ones, unfrozen ones. Collective."""
        if candidates is None:
            candidates = unplaced(self.param_groups, self._placed)
        settings = placement.hyperparameters(self.param_groups, self.defaults)
        settings += [type(self).__name__, *self._options.lines()]
        placed = placement.place(
            candidates,
            placement.block_numbers(self.param_groups),
            settings,
            self._scalars,
            self._communicator,
            self._options,
            self._memory,
            scalars_on_device=self._backend.folds_on_device,
        )
        self._rounds.append(candidates)
        self._buckets += placed
        self._reducer.add(placed)
        self._replica_check.add(placed)
        self._backward.watch(list(placed))
        if self._gate is not None:
            self._gate.forget_places()
        self._shown.add(c.param for c in candidates)  # in torch's order, which is not the buckets'
        for bucket in placed:
            self._places.update((param, (bucket, i)) for i, param in enumerate(bucket.params))
            self._placed.update(map(id, bucket.params))
            self._shown.show(bucket)
            self._steps.watch(bucket)
            self._state_check.record(bucket, self._shown.views)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim, on every rank alike."""
        super().add_param_group(param_group)
        if self._sharded:
            try:
                single_device(self.param_groups)
                self._place()
            except Exception:
                self.param_groups.pop()
                raise

    def _check_early(self) -> tuple[list[str], int]:
        raise NotImplementedError

    def _update(self, buckets: Sequence[BucketGrads]) -> None:
        raise NotImplementedError

    def _settle(self) -> None:
        raise NotImplementedError

    def _reserve_maxima(self) -> None:
        """Make sure that there is room for what AMSGrad, if it was switched on, needs."""
        for bucket in lack_maximum(self._buckets, self.param_groups):
            bucket.reserve_maximum()

    def _check_usable(self) -> None:
        """Raise if an earlier step failed midway, params are elsewhere, or betas no good."""
        if self._broken is not None:
            raise RuntimeError(
                f"an earlier step() was broken off by {self._broken}: params and state of the "
                "ranks may not belong together. Load a checkpoint into a new optimizer"
            )
        self._backward.check()
        placement.check_betas(self.param_groups, self._options.state)
        for bucket in self._buckets:
            bucket.refresh()

    @contextlib.contextmanager
    def _broken_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise
