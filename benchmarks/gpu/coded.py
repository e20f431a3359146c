"""Coded state and stochastic masters on the GPU: the CPU twin's bits, at a copy's speed?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpu import speed
from gpu.checkout import module
from gpu.equal import same_bits
from gpu.report import Clock, Report, free_memory, l2_bytes, listed, quartiles
from shardadam.kernels import Backend, Coefficients, Run, Slot, backend_for

kernel_runs = module("tests/kernel_runs.py")
coded_runs = module("tests/coded_runs.py")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

CLAIM_EQUAL = "coded state and stochastic masters: bitwise equal to the CPU twin"
CLAIM_GRAPH = "coded state in a CUDA graph: random bits of the step that the device counts"
CLAIM_COPY = "≥ 85 % of a copy's bandwidth from 64 M elements on, coded"
LEAST_OF_COPY = 0.85
LENGTHS = (1, 7, 8, 127, 128, 129, 257, 1_025, 8_193, 20_011)
STEPS = 3
SIZES = (1 << 26, 1 << 28)


@dataclass(frozen=True)
class Format:
    """``moved``: bytes per param that a step reads and writes, with bf16 gradients."""

    state: str
    master: str
    moved: float


FORMATS = (
    Format("q16", "split", 16 + 8 / 128),
    Format("q8", "split8", 12 + 8 / 128),
    Format("q8", "none", 10 + 8 / 128),
    Format("bf16", "split", 18),
)
JUDGED = FORMATS[:2]  # those that memory="lean" and "leanest" name


def check(report: Report, device: torch.device, clock: Clock, quick: bool) -> None:
    """Is it right, in a graph too; is it fast?"""
    backend = backend_for(device)
    check_equal(report, device, backend, clock, LENGTHS[::3] if quick else LENGTHS)
    _check_graph(report, device, backend)
    _check_speed(report, device, clock, SIZES[:1] if quick else SIZES)


# ---- equality -----------------------------------------------------------------------------------


def check_equal(
    report: Report,
    device: torch.device,
    backend: Backend,
    clock: Clock,
    lengths: Sequence[int],
) -> None:
    """Every format, kind of gradient and rule, over some steps from zero on."""
    twin = backend_for(torch.device("cpu"))
    count, wrong, late = 0, [], 0
    kinds = [
        (state, master, grad, variant)
        for state, master in coded_runs.BY_BLOCKS
        for grad in (BF16, FP32, FP16)
        for variant in kernel_runs.VARIANTS
    ]
    for kind in kinds:
        if clock.left < 0:
            late += 1
            continue
        expected = [_run(kind, numel) for numel in lengths]
        found = [_on(device, run) for run in expected]
        for step in range(1, STEPS + 1):
            for number, (run, other) in enumerate(zip(found, expected, strict=True)):
                grad = coded_runs.gradients(len(other.grad), other.grad.dtype, 100 * step + number)
                run.grad.copy_(grad)
                other.grad.copy_(grad)
                run.coefficients = other.coefficients = replace(
                    other.coefficients, step=float(step)
                )
            backend.update(found)
            twin.update(expected)
        for run, other in zip(found, expected, strict=True):
            count += 1
            wrong += [f"{name} of {kind}, {len(run.param)}" for name in _differing(run, other)]
    report.numbers["coded equal"] = {"runs": count, "kinds": len(kinds), "wrong": wrong}
    if late:
        report.skip(f"{CLAIM_EQUAL}, in {late} of {len(kinds)} kinds of run", "time was up")
    detail = f"{count} runs in {len(kinds) - late} combinations, {len(wrong)} tensors wrong"
    report.judge(
        not wrong and count > 0, CLAIM_EQUAL, ": ".join([detail, listed(wrong)][: 1 + bool(wrong)])
    )


def _run(kind: tuple[Any, ...], numel: int) -> Run:
    state, master, grad, (amsgrad, nesterov, l2) = kind
    shared = kernel_runs.coefficients(nesterov, l2)
    start = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    return coded_runs.zero_run(
        state, master, torch.zeros(numel, dtype=grad), shared, amsgrad, start
    )


def _on(device: torch.device, run: Run) -> Run:
    moved = {
        name: tensor.to(device, copy=True)
        for name in kernel_runs.TENSORS
        if (tensor := getattr(run, name)) is not None
    }
    return replace(run, **moved, prepared=None)


def _differing(found: Run, expected: Run) -> list[str]:
    return [
        name
        for name in kernel_runs.TENSORS
        if (tensor := getattr(found, name)) is not None
        and not same_bits(tensor, getattr(expected, name))
    ]


def _check_graph(report: Report, device: torch.device, backend: Backend) -> None:
    """Replays with other coefficients in the same place."""
    kind = ("q8", "split8", BF16, (False, False, False))
    expected = _run(kind, 100_003)
    expected.grad.copy_(coded_runs.gradients(100_003, BF16, 1))
    found, twin = _on(device, expected), backend_for(torch.device("cpu"))
    first = expected.coefficients
    table = _row(first).to(device)
    found.coefficients = Slot(table, 0, nesterov=False, l2=False)
    backend.update([found])
    twin.update([expected])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.update([found])
    for step in (4.0, 5.0):
        expected.coefficients = replace(first, step=step)
        table.copy_(_row(expected.coefficients))
        graph.replay()
        twin.update([expected])
    torch.cuda.synchronize(device)
    wrong = _differing(found, expected)
    report.judge(not wrong, CLAIM_GRAPH, f"two replays, different: {listed(wrong) or '-'}")


def _row(shared: Coefficients) -> Tensor:
    return torch.tensor([[getattr(shared, name) for name in Coefficients.__slots__]], dtype=FP64)


# ---- speed --------------------------------------------------------------------------------------


def _check_speed(report: Report, device: torch.device, clock: Clock, sizes: Sequence[int]) -> None:
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    report.numbers["coded speed"] = {"rows": rows, "left_out": left_out}
    cases = [(numel, format) for numel in sizes for format in FORMATS]
    flush = torch.empty(4 * l2_bytes(device), dtype=torch.uint8, device=device)
    for number, (numel, format) in enumerate(cases):
        name = f"{format.state} {format.master} at {numel:,} elements"
        needed = 16 * numel + 2 * speed.LARGEST_COPY + (1 << 29)
        if clock.left < 0:
            left_out.append(f"{name}: time was up")
        elif free_memory(device) < needed:
            left_out.append(f"{name}: needs {needed / 1e9:.0f} GB")
        else:
            seconds = 0.3 * clock.left / (len(cases) - number)
            rows.append(_measured(format, numel, device, flush, seconds))
    judge(report, rows, left_out)


def _measured(
    format: Format,
    numel: int,
    device: torch.device,
    flush: Tensor,
    seconds: float,
) -> dict[str, Any]:
    backend = backend_for(device)  # which keeps what it updates alive
    moved = int(format.moved * numel)
    source = torch.zeros(min(moved // 2, speed.LARGEST_COPY), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run = _large_run(format, numel, device)
    contenders = {
        "copy": speed.Contender(lambda: target.copy_(source), 2 * len(source)),
        "kernel": speed.Contender(lambda: backend.update([run]), moved),
    }
    times = speed.measure(contenders, flush, seconds, device)
    row: dict[str, Any] = {"state": format.state, "master": format.master, "elements": numel}
    for name, milliseconds in times.items():
        ms = quartiles(milliseconds)
        rates = [contenders[name].moved / value / 1e6 for value in reversed(ms)]
        row[name] = {"ms": ms, "GBps": rates}
    return row


def _large_run(format: Format, numel: int, device: torch.device) -> Run:
    """After the first steps of a training, as far as the values matter for the time."""
    shared = kernel_runs.coefficients(False, False)
    small = coded_runs.zero_run(
        *(format.state, format.master, torch.zeros(0, dtype=BF16), shared, False, torch.zeros(0))
    )
    tensors = {}
    for name in kernel_runs.TENSORS:
        tensor = getattr(small, name)
        if tensor is not None:
            length = -(-numel // coded_runs.BLOCK) if name.endswith("scale") else numel
            tensors[name] = torch.zeros(length, dtype=tensor.dtype, device=device)
    tensors["param"].normal_()
    tensors["grad"].normal_()
    return replace(small, **tensors, prepared=None)


def judge(report: Report, rows: Sequence[dict[str, Any]], left_out: Sequence[str]) -> None:
    """The verdicts that follow from measurements."""
    for format in JUDGED:
        shares = {
            row["elements"]: row["kernel"]["GBps"][1] / row["copy"]["GBps"][1]
            for row in rows
            if (row["state"], row["master"]) == (format.state, format.master)
        }
        claim = f"{CLAIM_COPY} ({format.state}, {format.master})"
        if shares:
            detail = ", ".join(f"{share:.1%} at {numel >> 20} M" for numel, share in shares.items())
            report.judge(min(shares.values()) >= LEAST_OF_COPY, claim, detail)
        else:
            report.skip(claim, listed(left_out) or "nothing could be measured")
