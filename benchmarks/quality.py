"""What coded moments do to Adam: its updates on one stream of gradients, and whole trainings.

python benchmarks/quality.py [--quick] [--parts …] [--steps …] [--seeds …] [--out …]

"updates": a small GPT is trained in fp32, and every contender gets the same gradients: how far its
updates are from fp32's, how large they get, and what becomes of the root of exp_avg_sq. "sweeps":
the same at other beta2 and other sizes of gradients. "trainings": whole trainings in fewer bytes,
at several seeds and learning rates, by their held-out loss.
"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from quality import report
from quality.field import FIELD, SWEPT, says, why_not
from quality.forced import SWEEPS, USUAL, run
from quality.report import Verdict
from quality.stream import Stream
from quality.trainings import CONFIGURATIONS, Digits, Lesson, Text
from quality.trainings import run as train
from stamp import stamp

PARTS = ("updates", "sweeps", "trainings")


def main() -> None:
    """Print the tables and verdicts, and write CSV and PNGs."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    where = stamp()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    verdicts: list[Verdict] = []
    if {"updates", "sweeps"} & set(args.parts):
        verdicts += _forced(args, where)
    if "trainings" in args.parts:
        verdicts += _trainings(args, where)
    print(*("", *verdicts), sep="\n")
    print(f"\n{where}\n{time.monotonic() - start:.0f} s; CSV and PNGs are in {args.out}")


def _forced(args: argparse.Namespace, where: str) -> list[Verdict]:
    from quality import figure  # needs matplotlib, which is known to be there by now

    names = _available()
    trials = {USUAL: names if "updates" in args.parts else [n for n in names if n in SWEPT]}
    if "sweeps" in args.parts:
        trials |= {setting: [n for n in names if n in SWEPT] for setting in SWEEPS}
    stream = Stream(batch=4, table_rows=1024) if args.quick else Stream()
    print(f"\n{stream.numel:,} params", flush=True)
    rows = run(stream, trials, args.steps, every=10)
    versions = ", ".join(dict.fromkeys(says(name) for name in names if FIELD[name].package))
    note = f"{stream.numel:,} params, {args.steps:,} steps. {where}; {versions or 'no peers'}"
    report.write_forced(args.out / "updates.csv", note, rows)
    usual = [row for row in rows if row.setting == USUAL]
    if "updates" in args.parts:
        print(f"\n{report.forced_table(usual)}", flush=True)
        figure.draw_forced(args.out / "updates.png", note, usual)
    if "sweeps" in args.parts:
        print(f"\nerror at step {args.steps:,} / largest update\n\n{report.sweep_table(rows)}")
        figure.draw_sweeps(args.out / "sweeps.png", note, rows)
    return list(report.forced_verdicts(usual))


def _trainings(args: argparse.Namespace, where: str) -> list[Verdict]:
    from quality import figure

    lessons: list[Lesson] = [Text(20), Digits(20)] if args.quick else [Text(), Digits()]
    trained = train(lessons, list(CONFIGURATIONS), args.seeds, args.sweep_seeds)
    note = f"{args.seeds} seeds, {args.sweep_seeds} at other lrs. {where}"
    report.write_trained(args.out / "trainings.csv", note, trained)
    print(f"\n{report.training_table(lessons, trained)}")
    for lesson in lessons:
        print(f"\n{report.lr_table(lesson, trained)}")
    figure.draw_trainings(args.out / "trainings.png", note, lessons, trained)
    return list(report.training_verdicts(lessons, trained))


def _available() -> list[str]:
    """The contenders that can be run here; says why the others can't."""
    reasons = {name: why_not(name) for name in FIELD}
    for name, reason in reasons.items():
        if reason:
            print(f"not measured: {name}: {reason}")
    return [name for name, reason in reasons.items() if not reason]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="all of it, too short to mean much")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, help="of the stream of gradients (1,600)")
    parser.add_argument("--seeds", type=int, help="of trainings at the usual lr (5)")
    parser.add_argument("--sweep-seeds", type=int, help="of trainings at other lrs (2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for CSV and PNGs")
    args = parser.parse_args()
    for package in ("matplotlib", *["sklearn"] * ("trainings" in args.parts)):
        if find_spec(package) is None:
            parser.error(f"{package} is not installed: pip install '.[bench]'")
    args.steps = args.steps or (60 if args.quick else 1600)
    args.seeds = args.seeds or (2 if args.quick else 5)
    args.sweep_seeds = args.sweep_seeds or (1 if args.quick else 2)
    return args


if __name__ == "__main__":
    main()
