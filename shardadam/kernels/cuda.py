"""The CUDA backend: from runs to launches.

Nothing here waits for the device, and what a launch reads it reads on the device or by value: so
all of it may be captured in a CUDA graph, once every kernel is loaded. Importing this module loads
nothing.
"""

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardadam.kernels import exact_sum, reference
from shardadam.kernels.coefficients import Coefficients
from shardadam.kernels.cuda_arguments import (
    AMSGRAD,
    L2,
    NESTEROV,
    PIECES,
    ROWS,
    THREADS,
    Batch,
    Pieces,
    Row,
    Rows,
    pointer,
    row_of,
)
from shardadam.kernels.cuda_driver import Kernel, Kernels, Launch
from shardadam.kernels.random_bits import BLOCK
from shardadam.kernels.run import CODED, GRAD_FORMATS, Run, Slot, in_memory_order

_KEPT = 256  # lists of launches: of buckets, and of what of them has gradients


@dataclass(slots=True)
class _Prepared:
    """What of a run stays from step to step: its kernel, and where it lies from where."""

    kernel: Kernel
    grad_dtype: torch.dtype
    terms: tuple[bool, bool]
    start: int
    bases: tuple[int, ...]


@dataclass(slots=True)
class _Update:
    """Runs of one kernel on one bucket, and the arguments to launch it with."""

    kernel: Kernel
    runs: list[Run]
    batch: Batch
    parts: int


@dataclass(slots=True)
class _Updates:
    """What a step launched, and for what; it keeps all of it alive."""

    runs: list[Run]
    coefficients: list[Coefficients | Slot]
    prepared: list[_Prepared]
    slots: list[Slot]
    updates: list[_Update]

    def fit(self, runs: Sequence[Run], coefficients: Sequence[Coefficients | Slot]) -> bool:
        """Whether they are right for these, too."""
        return (
            len(runs) == len(self.runs)
            and all(map(operator.is_, runs, self.runs))
            and all(map(operator.is_, coefficients, self.coefficients))
            and all(map(operator.is_, (run.prepared for run in runs), self.prepared))
        )


class Cuda:
    """The CUDA kernels on one device, as the `Backend` of one optimizer."""

    folds_on_device = True

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._last: dict[int, _Updates] = {}  # by their first run, which they keep alive

    @property
    def name(self) -> str:
        """With the architecture compiled for, and the compiler."""
        return f"CUDA kernel ({self._kernels.arch}, NVRTC {self._kernels.compiler})"

    # ---- the update -----------------------------------------------------------------------------

    def prepare(self, runs: Sequence[Run]) -> None:
        """Have every kernel loaded that ``runs`` need.

        Raises:
            ValueError: tensors that no kernel can take.
            RuntimeError: a kernel would have to be compiled while a CUDA graph is captured.
        """
        for run in runs:
            prepared = run.prepared
            if (
                prepared is None
                or prepared.grad_dtype is not run.grad.dtype
                or prepared.terms != _terms(run.coefficients)
            ):
                run.prepared = self._prepare(run)

    def update(self, runs: Sequence[Run], skip: Tensor | None = None) -> None:
        """Update every run in place; none where ``skip`` (float32, 0-dim) is not 0."""
        self.prepare(runs)
        updates = self._updates_for(runs)
        for update in updates:
            update.batch.grads.point([run.grad for run in update.runs])
            update.batch.skip = pointer(skip)
        self._kernels.launch(
            [(update.kernel, update.parts, THREADS, (update.batch,)) for update in updates]
        )

    def _prepare(self, run: Run) -> _Prepared:
        self._check(run)
        grad_format = GRAD_FORMATS.get(run.grad.dtype)
        doubles = {
            tensor.dtype is torch.float64
            for tensor in (run.param, run.grad, run.exp_avg, run.exp_avg_sq)
        }
        if (
            run.param_format is None
            or run.state_format is None
            or grad_format is None
            or len(doubles) > 1
        ):
            raise ValueError(run.no_kernel)
        nesterov, l2 = _terms(run.coefficients)
        flags = NESTEROV * nesterov + L2 * l2 + AMSGRAD * (run.max_exp_avg_sq is not None)
        codes = {
            "SHARDADAM_PARAM": run.param_format,
            "SHARDADAM_GRAD": grad_format,
            "SHARDADAM_FLAGS": flags,
        }
        if run.by_blocks:
            codes["SHARDADAM_STATE"] = run.state_format
            kernel = self._kernels.get("coded_cuda.cu", "shardadam_update_blocks", codes)
        else:
            kernel = self._kernels.get("adam_cuda.cu", "shardadam_update", codes)
        # The bucket's tensors: they all start at the same element of the shard, scales at its
        # block.
        start = int(run.exp_avg.storage_offset())
        bases = tuple(
            0 if tensor is None else int(tensor.data_ptr()) - first * tensor.element_size()
            for first, tensors in ((start, _elements(run)), (start // BLOCK, _scales(run)))
            for tensor in tensors.values()
        )
        return _Prepared(kernel, run.grad.dtype, (nesterov, l2), start, bases)

    def _check(self, run: Run) -> None:
        numel = run.param.numel()
        for name, tensor in (*_elements(run).items(), ("grad", in_memory_order(run.grad))):
            if tensor is not None:
                self._check_tensor(name, tensor, numel)
        for name, tensor in _scales(run).items():
            if tensor is not None:
                self._check_tensor(name, tensor, -(-numel // BLOCK))
            elif run.state_format in CODED and (
                run.max_exp_avg_sq is not None or "max" not in name
            ):
                raise ValueError(f"a run with coded state has no {name}")

    def _check_tensor(self, name: str, tensor: Tensor, numel: int) -> None:
        if tensor.device != self._kernels.device:
            raise ValueError(
                f"{name} of a run is on {tensor.device}: expected {self._kernels.device}"
            )
        if not tensor.is_contiguous() or tensor.numel() != numel:
            raise ValueError(
                f"{name} of a run has shape {tuple(tensor.shape)} and strides "
                f"{tensor.stride()}: expected {numel} contiguous elements"
            )

    def _updates_for(self, runs: Sequence[Run]) -> list[_Update]:
        """The launches for ``runs``, a bucket's: the last step's, where these are the same."""
        if not runs:
            return []
        coefficients = [run.coefficients for run in runs]
        last = self._last.get(id(runs[0]))
        if last is not None and last.fit(runs, coefficients):
            return last.updates
        by_identity = {id(given): given for given in coefficients}
        shared = {key: self._slot(given) for key, given in by_identity.items()}
        slots = [shared[id(given)] for given in coefficients]
        groups: dict[tuple[Any, ...], list[tuple[Run, Slot]]] = {}
        for run, slot in zip(runs, slots, strict=True):
            if run.param.numel():
                prepared = run.prepared
                key = (id(prepared.kernel), prepared.bases, slot.table.data_ptr(), run.seed)
                groups.setdefault(key, []).append((run, slot))
        updates = [
            _update_of(group[first : first + PIECES])
            for group in groups.values()
            for first in range(0, len(group), PIECES)
        ]
        if len(self._last) >= _KEPT:
            self._last.clear()  # other params have gradients at every step
        prepared = [run.prepared for run in runs]
        self._last[id(runs[0])] = _Updates(list(runs), coefficients, prepared, slots, updates)
        return updates

    def _slot(self, coefficients: Coefficients | Slot) -> Slot:
        if isinstance(coefficients, Slot):
            return coefficients
        values = [getattr(coefficients, name) for name in Coefficients.__slots__]
        table = torch.tensor([values], dtype=torch.float64, device=self._kernels.device)
        return Slot(table, 0, *_terms(coefficients))

    # ---- steps and coefficients -----------------------------------------------------------------

    def advance(
        self, rows: Sequence[Row], factor: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        """Count a step of the spans in ``rows`` and fold their coefficients.

        ``factor`` (float64, 0-dim) multiplies gradients; where ``skip`` (float32, 0-dim) is not 0
        nothing happens.
        """
        kernel = self._kernels.get("coefficients_cuda.cu", "shardadam_advance", {})
        launches: list[Launch] = []
        for first in range(0, len(rows), ROWS):
            members = rows[first : first + ROWS]
            arguments = Rows(factor=pointer(factor), skip=pointer(skip))
            for index, row in enumerate(members):
                arguments.row[index] = row_of(row)
            launches.append((kernel, len(members), THREADS, (arguments,)))
        self._kernels.launch(launches)

    # ---- the norm -------------------------------------------------------------------------------

    def sum_squares(self, values: Sequence[Tensor], words: Tensor) -> None:
        """Add the squares of all ``values`` to the exact sum ``words``."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in values:
            if tensor.numel():
                by_dtype.setdefault(tensor.dtype, []).append(tensor)
        launches: list[Launch] = []
        for dtype, tensors in by_dtype.items():
            code = {"SHARDADAM_GRAD": GRAD_FORMATS[dtype]}
            kernel = self._kernels.get("norm_cuda.cu", "shardadam_sum_squares", code)
            for first in range(0, len(tensors), PIECES):
                members = tensors[first : first + PIECES]
                pieces = Pieces()
                parts = pieces.fill([tensor.numel() for tensor in members])
                pieces.point(members)
                # Each block adds its sum to the total once: no more blocks than keep it busy.
                blocks = min(parts, 16 * self._kernels.multiprocessors)
                total = ctypes.c_void_p(words.data_ptr())
                launches.append((kernel, blocks, THREADS, (pieces, total)))
        self._kernels.launch(launches)

    def root(self, words: Tensor) -> Tensor:
        """The square root of an exact sum, a 0-dim float64 tensor."""
        assert words.numel() == exact_sum.WORDS
        root = torch.empty((), dtype=torch.float64, device=self._kernels.device)
        kernel = self._kernels.get("norm_cuda.cu", "shardadam_root", {})
        pointers = ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(root.data_ptr())
        self._kernels.launch([(kernel, 1, 1, pointers)])
        return root

    def mean(self, shards: Sequence[Tensor], out: Tensor, divisor: int | None = None) -> None:
        """As `reference.mean`, whose operations run on the device."""
        reference.mean(shards, out, divisor)


def _terms(coefficients: Coefficients | Slot) -> tuple[bool, bool]:
    """Whether the rule's Nesterov and L2 terms are used."""
    if isinstance(coefficients, Slot):
        return coefficients.nesterov, coefficients.l2
    return coefficients.grad_to_update != 0, coefficients.l2 != 0


def _elements(run: Run) -> dict[str, Tensor | None]:
    """The tensors of a run that stay and are as long as it, in the order of `Batch`."""
    names = ("param", "master", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return {name: getattr(run, name) for name in names}


def _scales(run: Run) -> dict[str, Tensor | None]:
    """Those with a number for every block, in the order of `Batch`."""
    names = ("exp_avg_scale", "exp_avg_sq_scale", "max_exp_avg_sq_scale")
    return {name: getattr(run, name) for name in names}


def _update_of(members: Sequence[tuple[Run, Slot]]) -> _Update:
    runs = [run for run, _ in members]
    batch = Batch()
    parts = batch.grads.fill([run.param.numel() for run in runs])
    batch.start[: len(runs)] = [run.prepared.start for run in runs]
    batch.first_block[: len(runs)] = [run.first_block for run in runs]
    batch.coefficient[: len(runs)] = [slot.index for _, slot in members]
    first: _Prepared = runs[0].prepared
    for name, base in zip((*_elements(runs[0]), *_scales(runs[0])), first.bases, strict=True):
        setattr(batch, name, base)
    batch.coefficients = members[0][1].table.data_ptr()
    batch.seed = runs[0].seed
    return _Update(first.kernel, runs, batch, parts)
