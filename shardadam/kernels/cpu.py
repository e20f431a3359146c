"""The compiled CPU twin: finds the library, passes it raw pointers. No torch ABI, no compiler."""

import ctypes
import functools
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shardadam.kernels import exact_sum
from shardadam.kernels.coefficients import Coefficients
from shardadam.kernels.run import GRAD_FORMATS, Run

_ABI_VERSION = 2
_FILE = "libshardadam_cpu.dylib" if sys.platform == "darwin" else "libshardadam_cpu.so"


class _Coefficients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in Coefficients.__slots__]


class _Run(ctypes.Structure):
    _fields_ = [
        ("param", ctypes.c_void_p),
        ("master", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("max_exp_avg_sq", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("param_format", ctypes.c_int32),
        ("grad_format", ctypes.c_int32),
    ]


class _Prepared:
    """A `Run` as the library takes it: what stays, made once."""

    __slots__ = ("address", "grad_dtype", "struct")

    def __init__(self, run: Run) -> None:
        master, maximum = run.master, run.max_exp_avg_sq
        self.grad_dtype = run.grad.dtype
        self.struct = _Run(
            param=run.param.data_ptr(),
            master=None if master is None else master.data_ptr(),
            exp_avg=run.exp_avg.data_ptr(),
            exp_avg_sq=run.exp_avg_sq.data_ptr(),
            max_exp_avg_sq=None if maximum is None else maximum.data_ptr(),
            numel=run.param.numel(),
            param_format=-1 if run.param_format is None else run.param_format,
            grad_format=GRAD_FORMATS.get(run.grad.dtype, -1),
        )
        self.address = ctypes.addressof(self.struct)


class Twin:
    """The compiled twin as a `Backend`. Threads follow ``torch.get_num_threads()``."""

    folds_on_device = False

    def __init__(self, library: ctypes.CDLL) -> None:
        library.shardadam_isa.restype = ctypes.c_char_p
        library.shardadam_update.restype = ctypes.c_int64
        library.shardadam_sum_squares.restype = ctypes.c_int64
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
        shared: dict[int, _Coefficients] = {}  # by identity: `runs` keeps them alive
        for run in runs:
            if run.prepared is None or run.prepared.grad_dtype is not run.grad.dtype:
                run.prepared = _Prepared(run)
            if id(run.coefficients) not in shared:
                shared[id(run.coefficients)] = _Coefficients(
                    *(getattr(run.coefficients, name) for name in Coefficients.__slots__)
                )
        addresses = {key: ctypes.addressof(struct) for key, struct in shared.items()}
        pointers = ctypes.c_void_p * len(runs)
        failed = self._library.shardadam_update(
            pointers(*[run.prepared.address for run in runs]),
            pointers(*[run.grad.data_ptr() for run in runs]),
            pointers(*[addresses[id(run.coefficients)] for run in runs]),
            ctypes.c_int64(len(runs)),
            ctypes.c_int32(torch.get_num_threads()),
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
