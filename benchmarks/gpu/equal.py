"""The CUDA kernels against the CPU twin, bit by bit: every format, every variant, every size."""

import random

import torch
from torch import Tensor

from gpu.checkout import module
from gpu.report import Clock, Report, free_memory, listed
from shardadam.kernels import Backend, Run, backend_for, exact_sum

kernel_runs = module("tests/kernel_runs.py")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

CLAIM = "bitwise equal to the CPU twin"
CLAIM_LARGE = "bitwise equal to the CPU twin beyond 2^31 elements"
CLAIM_NORM = "sum of squares and its root bitwise equal to the CPU's"

TENSORS = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "grad")
# Around vectors, around parts of 8192 elements, and several parts.
LENGTHS = (*range(1, 40), 127, 128, 129, 8191, 8192, 8193, 20_011)
STARTS = (0, 3, 8)
COMPARED_WHOLE = (2**20 + 1, 2**24 + 5)
LARGE = (2**28 + 7, 2**30 + 9, 2**31 + 1_000_003)
LARGE_FORMATS = (
    (FP32, None, FP32),
    (BF16, torch.int16, BF16),
    (BF16, FP32, BF16),
    (FP16, FP32, FP16),
    (FP32, None, BF16),
    (FP64, None, FP64),
)
WINDOW = 2**17
MARGIN = 2**30


def check(report: Report, device: torch.device, clock: Clock, quick: bool) -> None:
    """Small runs of all kinds, the norm, large runs."""
    backend = backend_for(device)
    _small(report, device, backend, clock, LENGTHS[::4] if quick else LENGTHS)
    _norms(report, device, backend, 200 if quick else 2000)
    _large(report, device, backend, clock, quick)


# ---- runs of all kinds --------------------------------------------------------------------------


def _small(
    report: Report,
    device: torch.device,
    backend: Backend,
    clock: Clock,
    lengths: tuple[int, ...],
) -> None:
    count, wrong, late = 0, [], []
    for formats in kernel_runs.FORMATS:
        for variant in kernel_runs.VARIANTS:
            if clock.left < 0:
                late.append(_name(formats, variant))
                continue
            amsgrad, nesterov, l2 = variant
            shared = kernel_runs.coefficients(nesterov, l2)
            expected = [
                kernel_runs.make_run(formats, numel, amsgrad, shared, start=start)
                for numel in lengths
                for start in STARTS
            ]
            found = [_on(device, run, shift=number % 3) for number, run in enumerate(expected)]
            backend.update(found)
            backend_for(torch.device("cpu")).update(expected)
            for run, other in zip(found, expected, strict=True):
                count += 1
                names = _differing(run, other)
                if names:
                    numel, start = other.param.numel(), other.param.storage_offset()
                    wrong.append(
                        f"{names} of {_name(formats, variant)}, {numel} elements from {start} on"
                    )
    kinds = len(kernel_runs.FORMATS) * len(kernel_runs.VARIANTS)
    report.numbers["equal"] = {"runs": count, "kinds": kinds, "wrong": wrong, "late": late}
    if late:
        report.skip(f"{CLAIM} in {len(late)} of {kinds} kinds of run", "time was up")
    detail = f"{count} runs in {kinds - len(late)} combinations of formats and variants"
    report.judge(not wrong and count > 0, CLAIM, _or_wrong(detail, wrong))


def _on(device: torch.device, run: Run, shift: int) -> Run:
    """A copy of a run with all the memory around it; the gradient ``shift`` elements further on."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        around = kernel_runs.whole(tensor).to(device, copy=True)
        return around[tensor.storage_offset() :][: tensor.numel()]

    copied = Run(*(moved(getattr(run, name)) for name in TENSORS), run.coefficients)
    grad = torch.empty(run.grad.numel() + 2, dtype=run.grad.dtype, device=device)
    copied.grad = grad[shift:][: run.grad.numel()].copy_(run.grad)
    return copied


def _differing(found: Run, expected: Run) -> str:
    """The tensors that differ, also outside the runs; the gradient is nobody's to write."""
    names = []
    for name in TENSORS:
        left, right = getattr(found, name), getattr(expected, name)
        if left is None:
            continue
        if name != "grad":
            left = torch.empty(0, dtype=left.dtype, device=left.device).set_(left.untyped_storage())
            right = kernel_runs.whole(right)
        if not same_bits(left, right):
            names.append(name)
    return ", ".join(names)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors, wherever they are, are equal to the last bit; a NaN equals a NaN."""
    fresh = (tensor.detach().to("cpu", copy=True).contiguous() for tensor in (left, right))
    return torch.equal(*(kernel_runs.bits(tensor.view(-1)) for tensor in fresh))


def _name(formats: tuple[torch.dtype | None, ...], variant: tuple[bool, ...] = ()) -> str:
    words = ("param", "master", "grad")
    dtypes = [
        f"{word} {str(dtype).removeprefix('torch.')}"
        for word, dtype in zip(words, formats, strict=True)
        if dtype is not None
    ]
    flags = [flag for flag, on in zip(("amsgrad", "nesterov", "l2"), variant, strict=False) if on]
    return " ".join([*dtypes, *flags])


def _or_wrong(detail: str, wrong: list[str]) -> str:
    return f"{detail}, {len(wrong)} wrong: {listed(wrong)}" if wrong else detail


# ---- the norm -----------------------------------------------------------------------------------


def _norms(report: Report, device: torch.device, backend: Backend, roots: int) -> None:
    twin = backend_for(torch.device("cpu"))
    wrong = []
    for dtype in (FP32, FP64, BF16, FP16):
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for numel in (0, 1, 127, 128, 129, 5_000, 8_193, 40_000, 3_000_001):
            scale = 10.0 ** torch.randint(-7, 6, (numel + 1,), generator=generator)
            made = torch.randn(numel + 1, generator=generator, dtype=FP64) * scale
            tensors.append(made.to(dtype)[1:])
        infinite = torch.tensor([1.0, float("inf"), float("-inf")], dtype=dtype)
        nan = torch.full((300,), float("nan"), dtype=dtype)
        for name, given in (
            ("numbers", tensors),
            ("infinities", [*tensors, infinite]),
            ("NaNs", [*tensors, infinite, nan]),
        ):
            found, expected = exact_sum.zero(device), exact_sum.zero()
            # Not aligned, as on the CPU.
            moved = [torch.cat([t[:1], t]).to(device)[min(1, t.numel()) :] for t in given]
            backend.sum_squares(moved, found)
            twin.sum_squares(given, expected)
            if not torch.equal(found.cpu(), expected):
                wrong.append(f"the sum of {name} in {dtype}")
            if not same_bits(backend.root(found), twin.root(expected)):
                wrong.append(f"the root of {name} in {dtype}")
    rng = random.Random(0)
    for _ in range(roots):
        words = [0] * exact_sum.WORDS
        top = rng.randrange(exact_sum.LIMBS)
        for limb in range(max(0, top - rng.randrange(6)), top + 1):
            words[limb] = rng.choice(
                [0, 2**32 - 1, 1 << rng.randrange(40), rng.getrandbits(rng.choice([1, 20, 33, 62]))]
            )
        tensor = torch.tensor(words)
        if not same_bits(backend.root(tensor.to(device)), twin.root(tensor)):
            wrong.append(f"the root of {words}")
    report.numbers["norm"] = {"roots": roots, "wrong": wrong}
    report.judge(not wrong, CLAIM_NORM, _or_wrong(f"12 sums, {roots} roots", wrong))


# ---- large runs ---------------------------------------------------------------------------------


def _large(
    report: Report, device: torch.device, backend: Backend, clock: Clock, quick: bool
) -> None:
    done, wrong, left_out = [], [], []
    # The largest of every format before the others: they say most.
    for numel in (LARGE[-1], *COMPARED_WHOLE, *LARGE[:-1]):
        for formats in LARGE_FORMATS[:2] if quick else LARGE_FORMATS:
            name = f"{_name(formats)} at {numel:,} elements"
            needed = numel * _bytes_per_element(formats) + MARGIN
            free = free_memory(device)
            if clock.left < 0:
                left_out.append(f"{name}: time was up")
            elif free < needed:
                left_out.append(f"{name}: needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
            else:
                differing = _large_run(formats, numel, device, backend)
                done.append((numel, name))
                wrong += [f"{what} of {name}" for what in differing]
    report.numbers["large"] = {
        "runs": [name for _, name in done],
        "wrong": wrong,
        "left_out": left_out,
    }
    beyond = [name for numel, name in done if numel > 2**31]
    detail = (
        f"{len(done)} runs, {len(beyond)} of them beyond; left out: {listed(left_out, 2) or '-'}"
    )
    if wrong or beyond:
        report.judge(not wrong, CLAIM_LARGE, _or_wrong(detail, wrong))
    else:
        largest = max((numel for numel, _ in done), default=0)
        report.skip(CLAIM_LARGE, f"{listed(left_out, 2)} (equal up to {largest:,} elements)")


def _bytes_per_element(formats: tuple[torch.dtype | None, ...]) -> int:
    moments = 2 * (8 if formats[0] == FP64 else 4)
    return moments + sum(dtype.itemsize for dtype in formats if dtype is not None)


def _large_run(
    formats: tuple[torch.dtype | None, ...], numel: int, device: torch.device, backend: Backend
) -> list[str]:
    """One update, and the norm of its gradient; what differs in the windows that are compared."""
    param_dtype, master_dtype, grad_dtype = formats
    moment_dtype = FP64 if param_dtype == FP64 else FP32
    master = None if master_dtype is None else _filled(numel, master_dtype, device)
    if master is not None and master.is_floating_point():
        param = master.to(param_dtype)
        param[::1013] = 0.5  # written by somebody since the last step
    else:
        param = _filled(numel, param_dtype, device)
    run = Run(
        param,
        _filled(numel, moment_dtype, device),
        _filled(numel, moment_dtype, device).abs_(),
        None,
        master,
        _filled(numel, grad_dtype, device),
        kernel_runs.coefficients(False, False),
    )
    windows = _windows(numel)
    expected = [_cut(run, window) for window in windows]
    twin = backend_for(torch.device("cpu"))
    twin.update(expected)
    backend.update([run])
    wrong = [
        f"{name} in {window}"
        for window, other in zip(windows, expected, strict=True)
        for name in TENSORS
        if getattr(run, name) is not None
        and not same_bits(getattr(run, name)[window], getattr(other, name))
    ]
    # Only the windows count for the norm: zeros between them add nothing.
    last = 0
    for window in windows:
        run.grad[last : window.start] = 0
        last = window.stop
    words, summed = exact_sum.zero(device), exact_sum.zero()
    backend.sum_squares([run.grad], words)
    backend.update([])  # it keeps the tensors of its last step alive
    twin.sum_squares([other.grad for other in expected], summed)
    return wrong if torch.equal(words.cpu(), summed) else [*wrong, "the sum of squares"]


def _filled(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random values, special ones among them."""
    tensor = torch.empty(numel, dtype=dtype, device=device)
    if not tensor.is_floating_point():
        return tensor.random_(-(2**15), 2**15)
    tensor.normal_()
    for number, special in enumerate(torch.tensor(kernel_runs.SPECIAL, dtype=FP64).to(dtype)):
        tensor[61 * number :: 1009] = special.to(device)
    return tensor


def _windows(numel: int) -> list[slice]:
    """Everything if it is not too much; else around where 32 bits end, of elements or of bytes.

    They begin at multiples of 128 elements, as the blocks of the exact sum do.
    """
    if numel <= max(COMPARED_WHOLE):
        return [slice(0, numel)]
    middles = [middle for middle in (2**28, 2**29, 2**30, 2**31) if middle + WINDOW < numel]
    starts = [0, *(middle - WINDOW // 2 for middle in middles), (numel - WINDOW) // 128 * 128]
    pieces = [slice(start, start + WINDOW) for start in starts[:-1]]
    return [
        *(piece for piece in pieces if piece.stop <= starts[-1]),
        slice(starts[-1], numel),
    ]


def _cut(run: Run, window: slice) -> Run:
    """A copy of a part on the CPU."""
    tensors = (getattr(run, name) for name in TENSORS)
    cut = (None if tensor is None else tensor[window].to("cpu", copy=True) for tensor in tensors)
    return Run(*cut, run.coefficients)
