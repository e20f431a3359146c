"""Training beside its peers: time, CPU time, memory and bytes on the wire, in one run.

python benchmarks/peers.py [--quick] [--models …] [--ranks …] [--dtypes …] [--contenders …] [--list]

Without models, ranks or dtypes it makes the tables that the goals are about, and others at more
sizes. It needs Linux, and says what it can't measure here and why.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from stamp import stamp
from training import contenders as c
from training.figure import draw
from training.goals import Found, found
from training.models import MODELS
from training.network import Unavailable, loopback, shaped_link
from training.rank import DTYPES
from training.report import Table, table, unlike, verdicts
from training.results import Row, row_of
from training.rounds import Outcome, Setting, prepare, run

OVERLAPS = (c.OURS_OVERLAP, c.OURS_EARLY)
ALL = (c.DDP, c.ZERO, c.FSDP2, c.ZERO1, c.ZERO2, c.ZERO2_CPU, c.OURS, c.OURS_ZERO2, *OVERLAPS)
MOST = (c.DDP, c.ZERO, c.FSDP2, c.ZERO2, c.OURS, c.OURS_ZERO2)
FEW = (c.DDP, c.FSDP2, c.OURS, c.OURS_ZERO2)
SIXTEEN = (*FEW, c.OURS_LEAN, c.OURS_LEANEST)
ALONE = (c.LOCAL, c.FSDP2, c.OURS)
LINK, LINK_MODEL, LINK_ROWS = "1gbit", "mlp-35M", 96

DEFAULT = (
    Setting("mlp-35M", 2, "fp32", ALL),
    Setting("mlp-35M", 2, "bf16", SIXTEEN),
    Setting("mlp-29M", 2, "fp32", FEW),
    Setting("mlp-8M", 4, "fp32", MOST),
    Setting("mlp-2M", 2, "fp32", MOST),
    Setting("large-2", 4, "fp32", FEW),
    Setting("gpt", 2, "bf16", SIXTEEN),
    Setting("small-300", 1, "fp32", ALONE),
    Setting("small-300", 2, "fp32", FEW),
    Setting(
        LINK_MODEL,
        2,
        "fp32",
        (c.LOCAL, c.DDP, c.OURS, c.OURS_ZERO2, *OVERLAPS),
        link=LINK,
        rows=LINK_ROWS,
    ),
)
QUICK = (
    Setting("mlp-2M", 2, "fp32", MOST),
    Setting("small-300", 1, "fp32", ALONE),
)


def main() -> None:
    """Print the tables and write CSV and PNGs."""
    args = _arguments()
    if args.list:
        print("models:", *(f"  {name}: {model.says}" for name, model in MODELS.items()), sep="\n")
        print("contenders:", *(f"  {name}" for name in c.CONTENDERS), sep="\n")
        return
    torch.set_num_threads(args.threads)  # for the stamp
    where = f"{stamp()}, {_deepspeed()}; {args.threads} thread{'s' * (args.threads > 1)} per rank"
    args.out.mkdir(parents=True, exist_ok=True)
    written = Table(args.out / "peers.csv", where)
    settings = _settings(args)
    namespaces = _can("bytes on the wire", lambda: loopback(1))
    if any(setting.link for setting in settings) and not _can(
        "a shaped link", lambda: shaped_link(LINK)
    ):
        settings = [setting for setting in settings if not setting.link]
    print("Building what is built on first use (DeepSpeed's takes a minute or two) …", flush=True)
    prepare([name for setting in settings for name in setting.contenders])
    goals: list[Found] = []
    start = time.monotonic()
    for setting in settings:
        print(f"\n{setting}, {where}\n", flush=True)
        outcomes: dict[str, Outcome] = {}
        for outcome in run(setting, args.rounds, args.iterations, args.threads, namespaces):
            outcomes[outcome.contender] = outcome
            written.add(outcome)
        ordered = [outcomes[name] for name in setting.contenders]
        rows = [row_of(outcome) for outcome in ordered if not outcome.failure]
        failures = [outcome for outcome in ordered if outcome.failure]
        print(table(setting, rows, failures))
        for line in unlike(setting, rows):
            print(f"\nnot the same training: {line}")
        reached = list(found(setting, rows))
        goals += reached
        if reached:
            print(f"\n{verdicts(reached)}", flush=True)
        _draw(args.out, setting, where, rows)
    missed = sum(not goal.met for goal in goals)
    print(
        f"\n{len(goals) - missed} of {len(goals)} goals met, {missed} missed; "
        f"{time.monotonic() - start:.0f} s; {args.out}/peers.csv and PNGs written"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small tables, two rounds")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--contenders", nargs="+", choices=c.CONTENDERS, metavar="NAME")
    parser.add_argument("--link", help="the rate of a link between two ranks, as 1gbit")
    parser.add_argument("--rows", type=int, help="of the batch")
    parser.add_argument("--rounds", type=int, help="fresh processes for each contender (3)")
    parser.add_argument("--iterations", type=int, help="in a round; by model")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for CSV and PNGs")
    parser.add_argument("--list", action="store_true", help="list models and contenders")
    args = parser.parse_args()
    if args.link and args.ranks not in (None, [2]):
        parser.error("--link joins two ranks: expected --ranks 2")
    if args.iterations is not None and args.iterations < 2:
        parser.error(f"--iterations {args.iterations}: expected 2 or more, for quartiles")
    args.rounds = args.rounds or (2 if args.quick else 3)
    return args


def _settings(args: argparse.Namespace) -> list[Setting]:
    """The default's or the quick tables, or those of every combination that was asked for."""
    asked = (args.models, args.ranks, args.dtypes, args.contenders, args.link, args.rows)
    if not any(asked):
        return list(QUICK if args.quick else DEFAULT)
    combinations = itertools.product(
        args.models or ["mlp-35M"], args.ranks or [2], args.dtypes or ["fp32"]
    )
    names = tuple(args.contenders or ([c.LOCAL, *ALL] if args.link else ALL))
    return [
        Setting(model, ranks, dtype, names, args.link, args.rows)
        for model, ranks, dtype in combinations
    ]


def _can(what: str, places: object) -> bool:
    """Whether the system has it; says why not."""
    try:
        with places():
            return True
    except Unavailable as error:
        print(f"no {what}: {error}")
        return False


def _deepspeed() -> str:
    try:
        return f"DeepSpeed {version('deepspeed')}"
    except PackageNotFoundError:
        return "no DeepSpeed"


def _draw(folder: Path, setting: Setting, where: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    name = f"{setting.model}-{setting.dtype}-{setting.world_size}"
    reason = draw(folder / f"{name}{'-link' * bool(setting.link)}.png", setting, where, rows)
    if reason:
        print(f"no PNG: {reason}")


if __name__ == "__main__":
    main()
