"""The compiled CPU twin: finds the library, passes it raw pointers. No torch ABI, no compiler."""

import ctypes
import functools
import importlib.metadata
import itertools
import operator
import sys
from array import array
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from shardadam.kernels import exact_sum
from shardadam.kernels.coefficients import Coefficients
from shardadam.kernels.run import GRAD_FORMATS, Run, state_dtype

_ABI_VERSION = 5
_FILE = "libshardadam_cpu.dylib" if sys.platform == "darwin" else "libshardadam_cpu.so"

_address = torch._C.TensorBase.data_ptr
_dtype, _grad = attrgetter("dtype"), attrgetter("grad")
_coefficients, _prepared = attrgetter("coefficients"), attrgetter("prepared")
_numbers = attrgetter(*Coefficients.__slots__)


class _Coefficients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in Coefficients.__slots__]


class _Run(ctypes.Structure):
    _fields_ = [
        ("param", ctypes.c_void_p),
        ("master", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("max_exp_avg_sq", ctypes.c_void_p),
        ("exp_avg_scale", ctypes.c_void_p),
        ("exp_avg_sq_scale", ctypes.c_void_p),
        ("max_exp_avg_sq_scale", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("first_block", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("param_format", ctypes.c_int32),
        ("state_format", ctypes.c_int32),
        ("grad_format", ctypes.c_int32),
    ]


class _Prepared:
    """A `Run` as the library takes it: what stays, made once."""

    __slots__ = ("address", "batch", "grad_dtype", "struct")

    def __init__(self, run: Run) -> None:
        self.grad_dtype = run.grad.dtype
        self.struct = _Run(
            param=run.param.data_ptr(),
            master=_pointer(run.master),
            exp_avg=run.exp_avg.data_ptr(),
            exp_avg_sq=run.exp_avg_sq.data_ptr(),
            max_exp_avg_sq=_pointer(run.max_exp_avg_sq),
            exp_avg_scale=_pointer(run.exp_avg_scale),
            exp_avg_sq_scale=_pointer(run.exp_avg_sq_scale),
            max_exp_avg_sq_scale=_pointer(run.max_exp_avg_sq_scale),
            numel=run.param.numel(),
            first_block=run.first_block,
            seed=run.seed,
            param_format=-1 if run.param_format is None else run.param_format,
            state_format=-1 if run.state_format is None else run.state_format,
            grad_format=GRAD_FORMATS.get(run.grad.dtype, -1),
        )
        self.address = ctypes.addressof(self.struct)
        self.batch: _Batch | None = None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Batch:
    """Runs that are updated together: as long as they are the same, one list of addresses.

    The first one's `_Prepared` keeps it. It knows the others', not the runs, so that no cycle keeps
    tensors alive.
    """

    __slots__ = ("addresses", "grad_dtypes", "members")

    def __init__(self, members: list[_Prepared]) -> None:
        self.members = members
        self.grad_dtypes = [member.grad_dtype for member in members]
        self.addresses = array("Q", [member.address for member in members])


def _batch_of(runs: Sequence[Run], grad_dtypes: list[torch.dtype]) -> _Batch:
    prepared: list[_Prepared | None] = list(map(_prepared, runs))
    batch = None if prepared[0] is None else prepared[0].batch
    if batch is None or batch.members != prepared or batch.grad_dtypes != grad_dtypes:
        for run in runs:
            if run.prepared is None or run.prepared.grad_dtype is not run.grad.dtype:
                run.prepared = _Prepared(run)
        batch = runs[0].prepared.batch = _Batch([run.prepared for run in runs])
    return batch


def _addresses_of(coefficients: list[Coefficients]) -> tuple["array[int]", list[_Coefficients]]:
    """Where the library finds each of ``coefficients``, and what is to be kept until it has."""
    if all(map(operator.is_, coefficients, itertools.repeat(coefficients[0]))):
        struct = _Coefficients(*_numbers(coefficients[0]))
        return array("Q", [ctypes.addressof(struct)]) * len(coefficients), [struct]
    shared = {id(c): c for c in coefficients}
    structs = {key: _Coefficients(*_numbers(c)) for key, c in shared.items()}
    addresses = {key: ctypes.addressof(struct) for key, struct in structs.items()}
    return array("Q", [addresses[id(c)] for c in coefficients]), list(structs.values())


def _pointers(addresses: "array[int]") -> ctypes.c_void_p:
    """An array of pointers, which the caller keeps alive."""
    return ctypes.c_void_p(addresses.buffer_info()[0])


class Twin:
    """The compiled twin as a `Backend`.

    ``threads``: how many `update` may use; None: ``torch.get_num_threads()``.
    """

    folds_on_device = False

    def __init__(self, library: ctypes.CDLL, threads: int | None = None) -> None:
        self._threads = threads
        library.shardadam_isa.restype = ctypes.c_char_p
        library.shardadam_update.restype = ctypes.c_int64
        library.shardadam_sum_squares.restype = ctypes.c_int64
        library.shardadam_mean.restype = ctypes.c_int64
        self._library = library
        openmp = _loaded_openmp()
        if openmp is not None:
            library.shardadam_use_openmp(
                openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads
            )

    @property
    def name(self) -> str:
        """With the instruction set in use."""
        return f"compiled CPU twin ({self.isa})"

    @property
    def isa(self) -> str:
        """The instruction set in use: "baseline", "avx2" or "avx512"."""
        return str(self._library.shardadam_isa().decode())

    def use_isa(self, isa: str) -> bool:
        """For tests: use another instruction set from now on; False if it can't run here."""
        return not self._library.shardadam_use_isa(ctypes.c_char_p(isa.encode()))

    def prepare(self, runs: Sequence[Run]) -> None:
        """Nothing: every kernel is there."""

    def update(self, runs: Sequence[Run], skip: Tensor | None = None) -> None:
        """Update every run in place, in one call.

        Raises:
            ValueError: a combination of dtypes that no kernel exists for; nothing was changed.
        """
        assert skip is None, "the host knows, and calls this or not"
        if not runs:
            return
        grads, coefficients = list(map(_grad, runs)), list(map(_coefficients, runs))
        batch = _batch_of(runs, list(map(_dtype, grads)))
        coefficient_addresses, _kept_alive = _addresses_of(coefficients)
        grad_addresses = array("Q", list(map(_address, grads)))
        failed = self._library.shardadam_update(
            _pointers(batch.addresses),
            _pointers(grad_addresses),
            _pointers(coefficient_addresses),
            ctypes.c_int64(len(runs)),
            ctypes.c_int32(self._threads or torch.get_num_threads()),
        )
        if failed:
            raise ValueError(runs[failed - 1].no_kernel)

    def sum_squares(self, values: Sequence[Tensor], words: Tensor) -> None:
        """Add the squares of all ``values`` to the exact sum ``words``."""
        assert words.numel() == exact_sum.WORDS
        for tensor in values:
            failed = self._library.shardadam_sum_squares(
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_int64(tensor.numel()),
                ctypes.c_int32(GRAD_FORMATS[tensor.dtype]),
                ctypes.c_void_p(words.data_ptr()),
                ctypes.c_int32(torch.get_num_threads()),
            )
            assert not failed

    def root(self, words: Tensor) -> Tensor:
        """The square root of an exact sum, a 0-dim float64 tensor."""
        return torch.tensor(exact_sum.root(words), dtype=torch.float64)

    def mean(self, shards: Sequence[Tensor], out: Tensor, divisor: int | None = None) -> None:
        """As `reference.mean`, in one pass over memory."""
        assert out.dtype == state_dtype(shards[0].dtype)
        assert all(tensor.is_contiguous() for tensor in (*shards, out))
        assert all(shard.numel() == out.numel() for shard in shards)
        failed = self._library.shardadam_mean(
            (ctypes.c_void_p * len(shards))(*[shard.data_ptr() for shard in shards]),
            ctypes.c_int64(len(shards)),
            ctypes.c_int64(divisor or len(shards)),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(out.numel()),
            ctypes.c_int32(GRAD_FORMATS[shards[0].dtype]),
            ctypes.c_int32(torch.get_num_threads()),
        )
        assert not failed

    def split(self, master: Tensor) -> tuple[Tensor, Tensor]:
        """As `reference.split_master`."""
        param = torch.empty_like(master, dtype=torch.bfloat16)
        remainder = torch.empty_like(master, dtype=torch.int16)
        self._codec(self._library.shardadam_split, master, param, remainder)
        return param, remainder

    def join(self, param: Tensor, remainder: Tensor) -> Tensor:
        """As `reference.join_master`."""
        master = torch.empty_like(param, dtype=torch.float32)
        self._codec(self._library.shardadam_join, param, remainder, master)
        return master

    def _codec(self, function: "ctypes._NamedFuncPointer", *tensors: Tensor) -> None:
        function(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
            ctypes.c_int64(tensors[0].numel()),
            ctypes.c_int32(torch.get_num_threads()),
        )


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and a short reason."""
    for path in _candidates():
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            return None, f"{path.name} could not be loaded: {error}"
        version = library.shardadam_abi_version()
        if version != _ABI_VERSION:
            return None, f"{path} is of another version ({version}, not {_ABI_VERSION}): reinstall"
        return library, ""
    return None, "shardadam was installed without a C++ compiler"


def _candidates() -> Iterator[Path]:
    yield Path(__file__).with_name(_FILE)
    # An editable install, or a checkout in the current folder, imports these sources while the
    # library lies where the installer put it.
    try:
        distribution = importlib.metadata.distribution("shardadam")
    except importlib.metadata.PackageNotFoundError:
        return
    yield Path(str(distribution.locate_file(f"shardadam/kernels/{_FILE}")))


def _loaded_openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP that torch has brought along and loaded; other platforms use plain threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    loaded = sorted(path for path in paths if Path(path).name.startswith("libgomp"))
    # With two of them loaded, which one torch uses can't be told.
    return ctypes.CDLL(loaded[0]) if len(loaded) == 1 else None
