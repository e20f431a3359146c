"""Everything about shardadam that only a GPU can show, in five minutes: is it right, is it fast?

python benchmarks/gpu_check.py [--out gpu_check] [--quick]

Prints a verdict for every claim; writes all numbers as JSON and a figure. Exits with 0 if no claim
failed, 1 if one did, 77 where there is no CUDA device. Needs torch and cuda-core, and no network.
"""

import argparse
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu import coded, equal, figure, graph, launches, ranks, speed, steps, training
from gpu.report import Clock, Report, environment

from shardadam.kernels import backend_for, cuda

NO_DEVICE = 77
LIMIT_S = 290
"""A section that hangs ends here."""


@dataclass(frozen=True)
class Section:
    """One question, and how many seconds there are to answer it."""

    name: str
    check: Callable[[Report, torch.device, Clock, bool], None]
    seconds: float


SECTIONS = (
    Section("kernels", equal.check, 65),
    Section("coded kernels", coded.check, 40),
    Section("optimizers", steps.check, 25),
    Section("graph", graph.check, 15),
    Section("training", training.check, 20),
    Section("ranks", ranks.check, 50),
    Section("launches", launches.check, 10),
    Section("speed", speed.check, 55),
)


def main() -> int:
    """Run every section, whatever becomes of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="for the results")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, half the time")
    args = parser.parse_args()
    if torch.version.hip is not None or not torch.cuda.is_available():
        print(f"no CUDA device is available to torch {torch.__version__}: nothing was measured")
        return NO_DEVICE
    device = torch.device("cuda", torch.cuda.current_device())
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out / "gpu_check.json", environment(device))
    for name, value in report.environment.items():
        print(f"{name}: {value}")
    run(report, device, SECTIONS, args.quick)
    picture = args.out / "gpu_check.png"
    title = f"Bandwidth of one step() on {report.environment['gpu']}, torch {torch.__version__}"
    rows = report.numbers.get("speed", {}).get("rows", [])
    why_not = figure.draw(picture, title, rows)
    print(f"no figure: {why_not}" if why_not else f"figure: {picture}")
    print(f"numbers: {report.file}")
    return int(report.failed)


def run(
    report: Report, device: torch.device, sections: tuple[Section, ...], quick: bool = False
) -> None:
    """Answer every question; a section's failure is a verdict of its own."""
    runs = "the CUDA kernel runs"
    backend = backend_for(device)
    report.judge(isinstance(backend, cuda.Cuda), runs, backend.name)
    if report.failed:
        report.write()
        return
    current = [sections[0]]

    def give_up() -> None:
        report.judge(False, f"section {current[0].name}", f"still running after {LIMIT_S} s")
        report.write()
        os._exit(1)

    watchdog = threading.Timer(LIMIT_S, give_up)
    watchdog.daemon = True
    watchdog.start()
    lost = ""
    for section in sections:
        current[0] = section
        if lost:
            report.skip(f"section {section.name}", lost)
            continue
        clock = Clock(section.seconds / 2 if quick else section.seconds)
        try:
            section.check(report, device, clock, quick)
            torch.cuda.synchronize(device)
        except Exception as error:
            report.numbers[f"{section.name}, traceback"] = traceback.format_exc()
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            report.judge(False, f"section {section.name}", message)
            lost = _lost(section.name, device)
        report.write()
    watchdog.cancel()


def _lost(section: str, device: torch.device) -> str:
    """Why nothing more can run on the device, if that is so."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"section {section} has left CUDA in an error: {str(error).splitlines()[0]}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
