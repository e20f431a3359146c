"""The sharded optimizer: what Adam, AdamW and NAdam share. `step()` reads as its phases."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from shardadam import amp, clipping, placement
from shardadam.agreement import Point, Range, difference, digest, meet
from shardadam.bucket_grads import BucketGrads
from shardadam.candidates import Candidate, unplaced
from shardadam.forward import ForwardGate
from shardadam.gradients import not_the_same
from shardadam.kernels import Hyperparameters
from shardadam.phases import phase
from shardadam.sharded_params import ShardedParams
from shardadam.updates import lack_maximum, plan
from shardadam.wrapped import on_the_wrapped

_Seen = dict[str, Range]


class ShardedOptimizer(ShardedParams):
    """Adam's family, with its state sharded over the ranks of a process group.

    A mixin before the torch.optim class of the same name, which validates and keeps the
    hyperparameters. A subclass adds its constructor and `_hyperparameters`.

    Attributes:
        grad_norm: 0-dim tensor, the norm of all averaged and unscaled gradients at the last
            `step()` or `clip_grad_norm_()`, before clipping; None where neither measured it.
    """

    grad_norm: Tensor | None
    # GradScaler then leaves unscaling and skipping to step(), where all ranks decide as one.
    _step_supports_amp_scaling = True

    # ---- the step -------------------------------------------------------------------------------

    @_disable_dynamo  # traced, host arithmetic would be compiled, and round otherwise
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients, update this rank's shard, gather the params. Collective.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            ValueError: a gradient or hyperparameter that can't be used or that differs between
                ranks, a param that is no longer the view that the optimizer made it. Every rank
                raises and nothing has been changed.
            RuntimeError: another rank failed; or an earlier step was broken off.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seen = self._meet(Point.STEP)
        scaling = amp.agree(self, self._communicator, seen["scaled"])
        skips = scaling.skips(on_host=not self._backend.folds_on_device)
        if not skips:
            self._reduce(seen, scaling)
            # What the next forward pass reads first comes first.
            left = [grads for grads in reversed(self._reducer.grads) if not grads.updated]
            self._update([g for g in left if any(g.present)], self._clip(scaling), scaling.skip)
        self._settle()
        self._forget_grads()
        self._phases.count(skipped=skips)
        return loss

    @phase("meet")
    def _meet(self, point: Point, asked: str = "") -> _Seen:
        """Check this rank and meet the others: nothing below fails for a reason foreseen here."""
        error: Exception | None = None
        late: list[Candidate] = []
        replicas = 0
        try:
            self._check_usable()
            self.synchronize()
            if point is Point.STEP and not self._reducer.updated:
                replicas = self._check_memory()
            self._take_edits()
            self._check_grads()
            self._reserve_maxima()
            late = unplaced(self.param_groups, self._placed)
        except (ValueError, RuntimeError, OSError) as caught:
            error = caught
        compares = self._communicator.world_size > 1
        present = self._reducer.presence() if compares else []
        settings: list[str] = []
        if compares:
            settings = placement.hyperparameters(self.param_groups, self.defaults)
            settings += [asked, f"clipped={self._clipped is not None}", *self._edited]
            settings += self._reducer.lines()
        words = {
            "late": digest("\n".join(map(str, late))) if late else 0,
            "hyperparameters": digest("\n".join(settings)),
            "present": digest(bytes(present)),
            "unreduced": self._reducer.unreduced(),
            "scaled": amp.in_use(self),
            "gradients": self._reducer.fingerprint(),
            "replicas": replicas,
        }
        seen = meet(self._communicator, point, words, error)
        if not seen["hyperparameters"].agreed:
            raise difference(self._communicator, settings)
        self._edited.clear()
        self._replica_check.compare(seen["replicas"])
        if seen["late"].high:
            self._place()
            return self._meet(point, asked)
        self._reducer.give_hint(seen["gradients"], point)
        return seen

    @phase("reduce")
    def _reduce(self, seen: _Seen, scaling: amp.Scaling) -> None:
        """Average the gradients over the ranks, each rank getting its shard of the mean."""
        self._reducer.place()
        if self._clipped is not None:
            return  # clip_grad_norm_() has
        if seen["unreduced"].high:
            self._reducer.reduce_leftovers()
        present = self._reducer.presence()
        if not seen["present"].agreed:
            if self._options.grad_sync == "none":
                raise not_the_same()
            present = self._reducer.union(present)
        self._reducer.reduce(present, scaling.rescale)

    @phase("clip")
    def _clip(self, scaling: amp.Scaling) -> Tensor | None:
        """What the gradients are to be multiplied by: 1 / loss scale, and the clip coefficient."""
        coefficient = None
        if self._clipped is not None:
            coefficient = self._clipped.coefficient
        elif self._options.max_grad_norm is None:
            self.grad_norm = None
        else:
            norm = self._measure_norm(scaling.scale)
            coefficient = clipping.coefficient(norm, self._options.max_grad_norm)
        if scaling.scale is None:
            return coefficient
        return (1.0 if coefficient is None else coefficient) / scaling.scale

    @phase("update")
    @torch.no_grad()
    def _update(
        self,
        buckets: Sequence[BucketGrads],
        factor: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """Update bucket by bucket, each one's params being gathered while the next is updated."""
        skip = skip if self._backend.folds_on_device else None
        self._forget_whole()
        hypers = [self._hyperparameters(group) for group in self.param_groups]
        for bucket in lack_maximum((grads.bucket for grads in buckets), self.param_groups):
            bucket.add_maximum()
            self._shown.show(bucket)
        updates = [plan(g, self._steps, self.param_groups, hypers, factor) for g in buckets]
        self._backend.prepare([run for update in updates for run in update.runs])
        with self._broken_by_errors():
            self._gathers.wait(grads.bucket for grads in buckets)  # of an earlier update
            self._steps.commit([update.steps for update in updates], factor, skip)
            for update in self._updater.run(updates, skip):
                self._gathers.start(update.grads.bucket, update.grads.updated_params())
                self._state_check.record(update.grads.bucket, self._shown.views)
        for update in updates:
            update.release()

    def _check_early(self) -> tuple[list[str], int]:
        """Raise what `step()` would, before a backward pass updates; what ranks must agree on."""
        self._check_usable()
        self.synchronize()
        replicas = self._check_memory()
        self._take_edits()
        self._reserve_maxima()
        return placement.hyperparameters(self.param_groups, self.defaults), replicas

    def _check_memory(self) -> int:
        """Raise if bits have changed that nobody wrote; what the ranks' params are, if compared."""
        self._verify_state()
        return self._replica_check.word(self._phases.steps + 1)

    @phase("gather")
    def _settle(self) -> None:
        """Wait for the params that no module will wait for; learn of state that was not updated."""
        if self._gate is None or not self._gate.open:
            self.synchronize()
        else:
            with self._broken_by_errors():
                self._gathers.wait(self._gate.others())
        if self._options.directory is not None:
            with self._broken_by_errors():
                meet(self._communicator, Point.UPDATED, error=self._updater.error)

    def _hyperparameters(self, group: dict[str, Any]) -> Hyperparameters:
        """A param group's, as the rule reads them."""
        raise NotImplementedError

    @on_the_wrapped
    def overlap_gather(self, model: torch.nn.Module) -> None:
        """From now on, let `step()` return while params are still being gathered.

        Every module of ``model`` waits for its own just before its forward; so do ``state_dict()``
        and ``load_state_dict()``. The first forward pass is watched, to learn which module reads
        which params, and overlaps nothing. Whoever reads or writes params elsewhere (an EMA, a
        norm of weights, a method called past forward) calls `synchronize()` first. To be called
        again when modules have been added; after torch.compile, with what it returned.

        Raises:
            ValueError: the model was compiled in place; or ``mesh`` without ``replicate_state``.
        """
        if not self._communicator.gathers_alone:
            # Ranks may come to their modules in different orders, and each would wait for others.
            raise ValueError(
                "overlap_gather(): with mesh= params come in two stages, of which every rank has "
                "to begin the second: expected replicate_state=True, or no overlap"
            )
        self.synchronize()
        if self._gate is not None:
            self._gate.remove()
            self._gate = None
        if self._communicator.world_size > 1:
            self._gate = ForwardGate(model, self._places, self._gathers)

    @_disable_dynamo
    @torch.no_grad()
    def synchronize(self) -> None:
        """Wait until this rank has all updated params. Needed only after `overlap_gather()`."""
        if self._gathers.under_way:
            with self._broken_by_errors():
                self._gathers.wait_for_all()

    # ---- gradients ------------------------------------------------------------------------------

    @on_the_wrapped
    @_disable_dynamo
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the norm of all gradients, over all params and ranks. Collective.

        As `torch.nn.utils.clip_grad_norm_` on the averaged gradients, but exact whatever the world
        size, and applied inside the next `step()`: ``param.grad`` itself is not touched. Takes the
        place of ``max_grad_norm`` for that step.

        Returns:
            The norm before clipping, a 0-dim tensor; also in ``grad_norm``.

        Raises:
            RuntimeError: the norm is not finite, with ``error_if_nonfinite``; with
                ``update_in_backward``.
        """
        if self._options.update_in_backward:
            raise RuntimeError(
                "clip_grad_norm_() needs all gradients, and update_in_backward=True has none left "
                "after backward: expected shard_grads=True in its place"
            )
        self._clipped = None
        seen = self._meet(Point.CLIP, f"max_norm={max_norm}, {error_if_nonfinite=}")
        self._reduce(seen, amp.agree(self, self._communicator, seen["scaled"]))
        norm = self._measure_norm(None)
        assert self.grad_norm is not None
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"the total norm of the gradients is {norm.item()}, it can't be clipped"
            )
        coefficient = clipping.coefficient(norm, max_norm)
        self._clipped = clipping.Clipped(coefficient, self._reducer.versions())
        return self.grad_norm

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without exchanging them, as in DDP.

        Saves communication with ``shard_grads=True``, which otherwise reduces in every backward
        pass, and costs the memory of the full gradients. Without it nothing is exchanged before
        `step()` anyway.
        """
        before, self._backward.syncing = self._backward.syncing, False
        try:
            yield
        finally:
            self._backward.syncing = before

    def _forget_grads(self) -> None:
        self._reducer.clear()
        self._backward.forget()
        self._clipped = None

    def _measure_norm(self, scale: Tensor | None) -> Tensor:
        norm = clipping.norm(self._reducer, self._backend, self._communicator)
        norm = norm if scale is None else norm / scale
        self.grad_norm = norm.to(torch.get_default_dtype())
        return norm

    # ---- checks ---------------------------------------------------------------------------------

    def _check_grads(self) -> None:
        """Raise for gradients that can't be used, before anything is exchanged or changed."""
        self._reducer.look()
        self._reducer.check(any(group.get("differentiable") for group in self.param_groups))
        clipping.check(self._clipped, self._reducer)
        amp.check(self, self._reducer.keeps)
