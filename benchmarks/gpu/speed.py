"""Bandwidth of a step on the GPU, beside a copy's, torch's, apex's and TransformerEngine's.

Every number of a format and size comes from one run in which all take turns. Bytes are those that
the update has to move, counted below, so GB/s compare only among optimizers that keep the same.
"""

import gc
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import shardadam
from gpu.report import Clock, Report, free_memory, l2_bytes, listed, quartiles
from shardadam.kernels import Hyperparameters, Run, backend_for, fold

CLAIM_COPY = "≥ 92 % of a copy's bandwidth from 64 M elements on"
CLAIM_TORCH = "at least as fast as torch's fused AdamW in fp32"
OURS, KERNEL, COPY = "shardadam AdamW", "shardadam, the kernel alone", "copy"
FUSED, FOREACH = "torch AdamW(fused), fp32", "torch AdamW(foreach), fp32"
FUSED_BF16 = "torch AdamW(fused), bf16 moments, no master"
SIZES = tuple(1 << shift for shift in range(20, 31, 2))
NOISE = 0.02
"""Of a median, between two things that are as fast."""
LEAST_OF_COPY, LEAST_SIZE = 0.92, 1 << 26
LARGEST_COPY = 1 << 30
CYCLES_PER_SECOND = 2e9  # about


@dataclass(frozen=True)
class Format:
    """``moved``: bytes per param that a step reads and writes; ``held``: of all contenders."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    moved: int
    held: int


FORMATS = (
    # param 4 + 4, gradient 4, moments 2 * (4 + 4)
    Format("fp32", torch.float32, {}, 28, 24),
    # param 2 + 2, remainder 2 + 2, gradient 2, moments 2 * (4 + 4)
    Format("bf16 + 16-bit remainder", torch.bfloat16, {}, 26, 27),
    # param 2 + 2, master 4 + 4, gradient 2, moments 2 * (4 + 4)
    Format("bf16 + fp32 master", torch.bfloat16, {"master": "fp32"}, 30, 29),
)


@dataclass(frozen=True)
class Contender:
    """What is called, and the bytes that it moves."""

    function: Callable[[], object]
    moved: int


def check(report: Report, device: torch.device, clock: Clock, quick: bool) -> None:
    """All formats and sizes that fit, with the L2 cache cold and warm; then the claims."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    report.numbers["speed"] = {"rows": rows, "left_out": left_out}
    sizes = (*SIZES[::2], LEAST_SIZE) if quick else SIZES
    flush = torch.empty(4 * l2_bytes(device), dtype=torch.uint8, device=device)
    cases = [(numel, format) for numel in sorted(set(sizes)) for format in FORMATS]
    for number, (numel, format) in enumerate(cases):
        name = f"{format.name} at {numel:,} elements"
        needed = format.held * numel + 2 * LARGEST_COPY + (1 << 29)
        free = free_memory(device)
        if clock.left < 0:
            left_out.append(f"{name}: time was up")
        elif free < needed:
            left_out.append(f"{name}: needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
        else:
            seconds = 0.3 * clock.left / (len(cases) - number)
            try:
                measured, dropped = _case(format, numel, device, flush, seconds)
                rows += measured
                left_out += [f"{name}: {what}" for what in dropped]
            except torch.OutOfMemoryError:
                left_out.append(f"{name}: out of memory")
    judge(report, rows, left_out)


def judge(report: Report, rows: Sequence[dict[str, Any]], left_out: Sequence[str]) -> None:
    """The verdicts that follow from measurements."""
    cold = {
        (row["format"], row["elements"], row["name"]): row for row in rows if row["l2"] == "cold"
    }
    for format in FORMATS[:2]:
        shares = {
            numel: row["GBps"][1] / cold[format.name, numel, COPY]["GBps"][1]
            for (name, numel, contender), row in cold.items()
            if (name, contender) == (format.name, OURS)
            and numel >= LEAST_SIZE
            and (name, numel, COPY) in cold
        }
        claim = f"{CLAIM_COPY} ({format.name})"
        if shares:
            detail = ", ".join(f"{share:.1%} at {_si(n)}" for n, share in shares.items())
            report.judge(min(shares.values()) >= LEAST_OF_COPY, claim, detail)
        else:
            report.skip(claim, listed([what for what in left_out if format.name in what]) or "-")
    medians = {
        (row["format"], row["elements"], row["l2"], row["name"]): row["ms"][1] for row in rows
    }
    for format in FORMATS[:2]:
        ratios = [
            (milliseconds / ours, f"{_si(numel)} {l2}")
            for (name, numel, l2, contender), milliseconds in medians.items()
            if (name, contender) == (format.name, FUSED)
            and (ours := medians.get((name, numel, l2, OURS)))
        ]
        claim = f"{CLAIM_TORCH}, at every size, {NOISE:.0%} of noise allowed ({format.name})"
        if ratios:
            detail = ", ".join(f"{ratio:.2f}x at {where}" for ratio, where in ratios)
            report.judge(min(ratios)[0] >= 1 - NOISE, claim, detail)
        else:
            report.skip(claim, "nothing could be measured")


def _si(numel: int) -> str:
    return f"{numel >> 30} G" if numel >= 1 << 30 else f"{numel >> 20} M"


def _case(
    format: Format, numel: int, device: torch.device, flush: Tensor, seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one format and size, and who had to be left out."""
    contenders: dict[str, Contender] = {}
    dropped = []
    for name, contender in _contenders(format, numel, device):
        try:
            if isinstance(contender, Exception):
                raise contender
            contender.function()
            _synchronize(device)
            contenders[name] = contender
        except Exception as error:  # out of memory, or another version of the library
            dropped.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    rows = []
    for l2 in ("cold", "warm"):
        times = measure(contenders, flush if l2 == "cold" else None, seconds / 2, device)
        for name, milliseconds in times.items():
            low, middle, high = quartiles(milliseconds)
            moved = contenders[name].moved
            rows.append(
                {
                    "format": format.name,
                    "elements": numel,
                    "l2": l2,
                    "name": name,
                    "bytes": moved,
                    "repeats": len(milliseconds),
                    "ms": [low, middle, high],
                    "GBps": [moved / value / 1e6 for value in (high, middle, low)],
                }
            )
    contenders.clear()
    gc.collect()
    return rows, dropped


def _contenders(
    format: Format, numel: int, device: torch.device
) -> Iterator[tuple[str, Contender | Exception]]:
    """All of them work on one param, gradient and pair of moments, to fit into the memory."""
    param = nn.Parameter(torch.randn(numel, device=device, dtype=format.dtype))
    param.grad = torch.randn_like(param)
    moved = format.moved * numel
    half = min(moved // 2, LARGEST_COPY)
    source = torch.zeros(half, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield COPY, Contender(lambda: target.copy_(source), 2 * half)

    ours = shardadam.AdamW([param], **format.options)
    yield OURS, Contender(ours.step, moved)
    state = ours.state[param]
    hyper = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.01, True, False)
    run = Run(
        param.detach(),
        state["exp_avg"],
        state["exp_avg_sq"],
        None,
        state.get("remainder", state.get("master")),
        param.grad,
        fold(hyper, 100.0),
    )
    backend = backend_for(device)
    yield KERNEL, Contender(lambda: backend.update([run]), moved)

    full = param
    if format.dtype is not torch.float32:
        full = nn.Parameter(param.detach().float())
        full.grad = param.grad.float()
    yield FUSED, Contender(_torch_step(full, state, fused=True), 28 * numel)
    if format.dtype is torch.float32:
        yield FOREACH, Contender(_torch_step(full, state, foreach=True), 28 * numel)
    else:
        yield FUSED_BF16, Contender(torch.optim.AdamW([param], fused=True).step, 14 * numel)
    yield from _others(format, param, moved)


def _torch_step(
    param: nn.Parameter, state: dict[str, Tensor], **options: bool
) -> Callable[[], object]:
    """torch's own AdamW on moments that are there already."""
    optimizer = torch.optim.AdamW([param], **options)
    step = torch.zeros((), device=param.device if options.get("fused") else "cpu")
    moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param] = {"step": step, **moments}
    return optimizer.step


def _others(
    format: Format, param: nn.Parameter, moved: int
) -> Iterator[tuple[str, Contender | Exception]]:
    """FusedAdam of other libraries, with the same state, where they are installed."""
    options: dict[str, dict[str, Any]] = {"apex": {}, "TransformerEngine": {}}
    if format.dtype is not torch.float32:
        options["apex"] = {"master_weights": True, "capturable": True}
        options["TransformerEngine"] = {
            "master_weights": True,
            "store_param_remainders": "master" not in format.options,
        }
    modules = {"apex": "apex.optimizers", "TransformerEngine": "transformer_engine.pytorch"}
    for library, module in modules.items():
        name = f"{library} FusedAdam"
        try:
            found = importlib.import_module(module)
            fused_adam = getattr(found, "FusedAdam", None) or found.optimizers.FusedAdam
            optimizer = fused_adam([param], weight_decay=0.01, **options[library])
        except ModuleNotFoundError:
            continue
        except Exception as error:  # what doesn't fit this torch fails in its own way
            yield name, error
            continue
        yield name, Contender(optimizer.step, moved)


def measure(
    contenders: dict[str, Contender], flush: Tensor | None, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds on the device of every call; the contenders take turns."""
    cycles = {}
    started = time.perf_counter()
    for name, contender in contenders.items():
        called = time.perf_counter()
        contender.function()
        cycles[name] = int(CYCLES_PER_SECOND * (1.5 * (time.perf_counter() - called) + 5e-5))
        _synchronize(device)
    # With the flush, the pause and a warming call a round takes about three times as long.
    rounds = int(seconds / (3 * (time.perf_counter() - started)))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
    events = {name: [] for name in contenders}
    for _ in range(min(max(rounds, 7), 40)):
        for name, contender in contenders.items():
            if flush is None:
                contender.function()
            else:
                flush.fill_(1)
            # While the device is busy here the host gets ahead, so that no launch is waited for.
            torch.cuda._sleep(cycles[name])
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contender.function()
            end.record()
            events[name].append((start, end))
        _synchronize(device)
    return {
        name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
