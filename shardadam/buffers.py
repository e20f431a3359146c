"""A bucket: its params in memory, and flat storage for the state of this rank's shard of it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardadam.kernels import Coefficients, Run, Slot
from shardadam.kernels.run import in_memory_order
from shardadam.kernels.state_formats import MOMENTS, is_scale, part_of
from shardadam.layout import ALIGNMENT, Bucket, Piece
from shardadam.params import Params, order_name, view_like
from shardadam.storage import Storage

_is_contiguous: Callable[[Tensor], bool] = torch._C.TensorBase.is_contiguous
_is_neg: Callable[[Tensor], bool] = torch._C.TensorBase.is_neg


class FlatBucket:
    """One bucket: ``memory`` (that of its params), ``state`` (this rank's shard only).

    ``state`` maps the names of [Note: state formats] and one of `MASTERS` to tensors of
    ``bucket.shard_numel`` elements, or of one per block. ``scalars`` maps "step" (and NAdam's
    "mu_product") to tensors of one element per span. ``continues``: whether a run can go on from
    the span before to each span. ``exchanged``: whether gradients and params of its shards go
    from rank to rank; those of DTensors are exchanged by their owner.

    Args:
        bucket: which elements of which params.
        memory: the params of its spans.
        first_blocks: the numbers of the spans' first blocks, for `Run`.
        shard: which one is this rank's.
        storage: of the state.
        scalars: the initial values.
        scalars_on_device: whether they are where the params are, or on the host.
    """

    def __init__(
        self,
        bucket: Bucket,
        memory: Params,
        first_blocks: Sequence[int],
        shard: int,
        storage: Storage,
        scalars: dict[str, float],
        *,
        scalars_on_device: bool = False,
    ) -> None:
        self.bucket = bucket
        self.memory, self.params, self.names = memory, memory.params, memory.names
        self.exchanged = memory.exchanged
        self.pieces = bucket.pieces(shard)
        self.span_groups = [span.group for span in bucket.spans]
        self.groups = sorted(set(self.span_groups))
        self.dtype, self.device = storage.dtype, self.params[0].device
        # Owned whole, real and contiguous.
        self._plain = [
            piece.numel == view.numel() and view.is_contiguous() and not view.is_complex()
            for piece, view in zip(self.pieces, memory.views, strict=True)
        ]
        # And none of them empty.
        self._all_plain = all(self._plain) and all(piece.numel for piece in self.pieces)
        self._packed: tuple[int | None, list[Tensor]] = (None, [])  # the address is 0 where empty
        # torch's dtype for "step", which kernels count in float32; more for a product of many
        # factors, whose error would grow.
        doubles = torch.get_default_dtype() == torch.float64 and not scalars_on_device
        counter = torch.float64 if doubles else torch.float32
        self.scalars = {
            name: torch.full(
                (len(self.pieces),),
                initial,
                dtype=counter if name == "step" else torch.float64,
                device=self.device if scalars_on_device else "cpu",
            )
            for name, initial in scalars.items()
        }
        self.initial_scalars = dict(scalars)
        self._storage, self._seed = storage, storage.seed
        self.form, self.master = storage.form, storage.master
        self._first_blocks = list(first_blocks)
        self.continues = self._continues(storage)
        # Of a scale's blocks, nothing but the order of memory says which elements they are.
        self._order_names = [order_name(v) if self.exchanged else "" for v in memory.views]
        self.state: dict[str, Tensor] = {}
        self._runs: dict[tuple[int, int, bool], Run] = {}
        self._runs_in_place: list[Run | None] = [None] * len(self.params)
        self._amsgrad_in_place: list[bool] = []
        self._maximum: dict[str, Tensor] = {}
        self.state.update(self._allocate(storage.amsgrad))
        self.fill_masters()

    def _continues(self, storage: Storage) -> list[bool]:
        """As the attribute.

        What lies between neighbours in a flat buffer is padding; but random bits go by the number
        of a block, and a frozen param between two has numbers too.
        """
        if not self.exchanged:
            return [False] * len(self.pieces)
        offsets = [span.offset // ALIGNMENT for span in self.bucket.spans]
        ahead = [n - offset for n, offset in zip(self._first_blocks, offsets, strict=True)]
        return [False, *(not storage.draws or a == b for a, b in itertools.pairwise(ahead))]

    @property
    def views(self) -> list[Tensor]:
        """What this rank has of each param, see `Params`."""
        return self.memory.views

    def describe(self) -> str:
        """As `Storage.describe`."""
        return self._storage.describe()

    def fill_masters(self) -> None:
        """Make fp32 masters of what the params are."""
        if self.master == "master":
            for index in range(len(self.pieces)):
                self.owned_state(index)[self.master].copy_(self.shard_piece(index))

    @property
    def has_maximum(self) -> bool:
        """Whether there is a place for AMSGrad's maximum."""
        return self.form.names[2] in self.state

    def reserve_maximum(self) -> None:
        """Allocate the place that `add_maximum` makes, which then can't fail.

        Raises:
            OSError, RuntimeError: there is no room.
        """
        if not self.has_maximum and not self._maximum:
            self._maximum = self._allocate(True)

    def add_maximum(self) -> None:
        """Make a place for AMSGrad's maximum, of zeros, if there is none."""
        if self.has_maximum:
            return
        self.reserve_maximum()
        self.state.update(self._maximum)
        self._forget_runs()

    def _allocate(self, amsgrad: bool) -> dict[str, Tensor]:
        """The tensors of the state that there are not yet; all or none."""
        storage, numel = self._storage, self.bucket.shard_numel
        missing = {n: d for n, d in storage.tensors(amsgrad).items() if n not in self.state}
        storage.memory.reserve(storage.sizes(missing, numel))
        return {
            name: storage.memory.zeros(part_of(name, 0, numel).stop, dtype)
            for name, dtype in missing.items()
        }

    @property
    def padding_bytes(self) -> int:
        """Of the state, what belongs to no element of a param: the rest of blocks and of shards."""
        owned = sum(piece.numel for piece in self.pieces)
        blocks = sum(-(-piece.numel // ALIGNMENT) for piece in self.pieces)
        return sum(
            (tensor.numel() - (blocks if is_scale(name) else owned)) * tensor.itemsize
            for name, tensor in self.state.items()
        )

    def shown_name(self, index: int, name: str) -> str:
        """What ``optimizer.state`` and its state dicts call tensor ``name`` of span ``index``.

        Scales of params that are not row-major have the order of their dims in it: blocks are of
        memory, and codes of another order must not be read by them.
        """
        return name + self._order_names[index] if is_scale(name) else name

    def refresh(self) -> None:
        """Look where the params are now; raises as `Params.refresh`."""
        if self.memory.refresh():
            self._forget_runs()

    def _forget_runs(self) -> None:
        self._runs.clear()
        self._runs_in_place = [None] * len(self.params)

    def pack(self, grads: Sequence[Tensor | None], flat: Tensor) -> None:
        """Copy ``grads``, one per span, into ``flat``; what has no gradient is zero."""
        if self._packed[0] != flat.data_ptr():
            views = [
                view_like(param, flat[span.offset : span.offset + span.numel])
                for span, param in zip(self.bucket.spans, self.params, strict=True)
            ]
            self._packed = (flat.data_ptr(), views)
        if self.bucket.padding or any(grad is None for grad in grads):
            flat.zero_()
        pairs = [
            (view, grad)
            for view, grad in zip(self._packed[1], grads, strict=True)
            if grad is not None
        ]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [grad for _, grad in pairs])

    def piece_of(self, piece: Piece, tensor: Tensor) -> Tensor:
        """The elements of ``piece`` in ``tensor``, which is like the piece's param.

        1-D, or of any dense shape where the piece is all of the param.
        """
        view = self.views[piece.span]
        tensor = tensor.resolve_conj().resolve_neg()  # the kernel reads memory
        if tensor.stride() != view.stride():
            tensor = torch.empty_like(view, dtype=tensor.dtype).copy_(tensor)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if piece.numel == tensor.numel():
            return tensor
        return in_memory_order(tensor)[piece.param_offset : piece.param_offset + piece.numel]

    def owned_part(self, index: int, grad: Tensor) -> Tensor:
        """The owned elements of a gradient of the param of span ``index``, as `piece_of`."""
        if self._plain[index] and grad.is_contiguous() and not grad.is_neg():
            return grad  # nearly always, and several times as quick
        return self.piece_of(self.pieces[index], grad)

    def shard_piece(self, index: int) -> Tensor:
        """The owned elements of the param of span ``index``."""
        return self.memory.owned(self.owned_range(index, index), index)

    def state_of(self, index: int) -> dict[str, Tensor]:
        """What ``optimizer.state`` shows for the param of span ``index``: views, no copies.

        Shaped like the param where this rank owns all of it, else the owned elements in the order
        of memory (1-D, possibly empty), as scales always are.
        """
        piece, view = self.pieces[index], self.views[index]
        shown = {name: values[index] for name, values in self.scalars.items()}
        for name, owned in self.owned_state(index).items():
            if piece.numel == self.bucket.spans[index].numel and not is_scale(name):
                owned = self.memory.shown(index, view_like(view, owned))
            shown[self.shown_name(index, name)] = owned
        return shown

    def owned_state(self, index: int) -> dict[str, Tensor]:
        """The state of the owned elements of span ``index``, 1-D views."""
        part = self.owned_range(index, index)
        return {n: tensor[part_of(n, part.start, part.stop)] for n, tensor in self.state.items()}

    def owned_range(self, first: int, last: int) -> slice:
        """Where in the shard the owned elements of spans ``first`` to ``last`` are."""
        end = self.pieces[last]
        return slice(self.pieces[first].shard_offset, end.shard_offset + end.numel)

    def run(
        self,
        first: int,
        last: int,
        grad: Tensor,
        coefficients: Coefficients | Slot,
        amsgrad: bool,
    ) -> Run:
        """The run of the owned elements of spans ``first`` to ``last``, whose gradient is ``grad``.

        Kept: the next step's call changes it.
        """
        part = self.owned_range(first, last)
        start, stop = part.start, part.stop
        run = self._runs.get((start, stop, amsgrad))
        if run is None:
            if len(self._runs) > 4 * len(self.pieces):
                self._runs.clear()  # other params have gradients at every step
            number = self._first_blocks[first] + self.pieces[first].param_offset // ALIGNMENT
            run = self._runs[start, stop, amsgrad] = Run(
                param=self.memory.owned(part, first),
                grad=grad,
                coefficients=coefficients,
                first_block=number,
                seed=self._seed,
                **self._fields(self.state, start, stop, amsgrad),
            )
        run.grad, run.coefficients = grad, coefficients
        return run

    def _fields(
        self, state: Mapping[str, Tensor], start: int, stop: int, amsgrad: bool
    ) -> dict[str, Any]:
        """The master and moments of a `Run`: elements ``[start, stop)`` of ``state``."""
        fields: dict[str, Any] = dict.fromkeys(MOMENTS)
        for field, name in self.form.tensors(amsgrad).items():
            fields[field] = state[name][part_of(name, start, stop)]
        fields["master"] = None if self.master is None else state[self.master][start:stop]
        return fields

    def first_of(self, run: Run) -> int:
        """Where in the shard the first element of ``run`` is."""
        shard = self.state[self.form.names[0]]
        return int(run.exp_avg.storage_offset()) - int(shard.storage_offset())

    def part_of_run(
        self,
        run: Run,
        start: int,
        stop: int,
        *,
        state: Mapping[str, Tensor] | None = None,
        origin: int = 0,
        param: Tensor | None = None,
    ) -> Run:
        """Elements ``[start, stop)`` of ``run``, ``start`` beginning a block; the same gradient.

        ``state``: where their state is in place of the bucket's, from the shard's element
        ``origin`` on. ``param``: where they themselves are, in place of the shard.
        """
        here = self.first_of(run) - origin
        state = self.state if state is None else state
        return Run(
            param=run.param[start:stop] if param is None else param,
            grad=run.grad,
            coefficients=run.coefficients,
            first_block=run.first_block + start // ALIGNMENT,
            seed=run.seed,
            **self._fields(state, here + start, here + stop, run.max_exp_avg_sq is not None),
        )

    def runs_in_place(
        self,
        grads: Sequence[Tensor | None],
        coefficients: Sequence[Coefficients | Slot | None],
        amsgrad: Sequence[bool],
    ) -> list[Run]:
        """The runs of the spans that have ``coefficients``, reading ``grads``. Kept, as of `run`.

        ``amsgrad``: of every param group.
        """
        if amsgrad != self._amsgrad_in_place:
            self._runs_in_place = [None] * len(self.params)
            self._amsgrad_in_place = list(amsgrad)
        runs = [run for run in self._runs_in_place if run is not None]
        present = [grad for grad in grads if grad is not None]
        shares = [shared for shared in coefficients if shared is not None]
        if (
            self._all_plain
            and len(runs) == len(present) == len(shares) == len(self.params)
            and all(map(_is_contiguous, present))
            and not any(map(_is_neg, present))
        ):
            # Nearly always; what is done for every one of many small params adds up.
            for kept, own_grad, own in zip(runs, present, shares, strict=True):
                kept.grad, kept.coefficients = own_grad, own
            return runs
        runs.clear()
        for index, (run, grad, shared, plain) in enumerate(
            zip(self._runs_in_place, grads, coefficients, self._plain, strict=True)
        ):
            if shared is None or not self.pieces[index].numel:
                continue
            assert grad is not None
            if not (plain and grad.is_contiguous() and not grad.is_neg()):
                grad = self.owned_part(index, grad)
            if run is None:
                switched_on = amsgrad[self.bucket.spans[index].group]
                run = self.run(index, index, grad, shared, switched_on)
                self._runs_in_place[index] = run
            run.grad, run.coefficients = grad, shared
            runs.append(run)
        return runs
