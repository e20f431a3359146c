"""The commands, their arguments and exit codes."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli.ds_config import ConfigError
from shardadam.cli.quantities import bandwidth, count, nbytes, ranks
from shardadam.cli.telling import ERROR, CommandError, one_line
from shardadam.options import DEFAULT_BUCKET_BYTES


class _Parser(argparse.ArgumentParser):
    """One line for an error, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(ERROR, f"{self.prog}: {message} (--help says more)\n")


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; what goes wrong is one line on stderr."""
    given = _parser().parse_args(arguments)
    try:
        code = _run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would flush again as it ends.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except (CheckpointError, ConfigError, CommandError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"shardadam {given.command}: {one_line(text)}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        return 130


def _run(given: argparse.Namespace) -> int:
    # Each command imports what only it needs.
    if given.command == "deepspeed":
        from shardadam.cli.ds_translation import print_translation

        return print_translation(given.config)
    if given.command == "plan":
        return _plan(given)
    if given.command == "doctor":
        from shardadam.cli.doctor import examine

        return examine(as_json=given.json, timeout=given.timeout)
    if given.command == "ckpt inspect":
        from shardadam.cli.inspecting import inspect

        return inspect(given.path)
    if given.command == "ckpt convert":
        from shardadam.cli.converting import convert
        from shardadam.cli.recognising import Format

        to = Format(given.to)
        return convert(given.source, given.target, to, given.step, given.optimizer, given.model)
    from shardadam.cli.checking import check

    return check(given.path)


def _plan(given: argparse.Namespace) -> int:
    from shardadam.cli import modelling
    from shardadam.cli.plan_figure import check
    from shardadam.cli.planning import Hardware, Wanted, plan

    if given.png is not None:
        check()
    if (given.model is None) == (given.params is None):
        raise CommandError("expected a model or --params, one of the two")
    if given.params is not None:
        model = modelling.from_count(given.params, given.bucket_bytes)
    elif ":" in given.model:
        model = modelling.from_import(given.model, given.arguments)
    else:
        model = modelling.from_config(Path(given.model))
    hardware = Hardware(
        *(given.ranks, given.memory, given.link, given.transport),
        *(given.per_node, given.node_link),
    )
    wanted = Wanted(given.dtype, given.activations or 0, given.bucket_bytes)
    return plan(model, hardware, wanted, given.png)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m shardadam", description="Tools for shardadam.")
    areas = parser.add_subparsers(required=True, metavar="plan | doctor | ckpt | deepspeed")
    _describe_plan(
        areas.add_parser(
            "plan",
            help="what fits into a rank's memory, and what to write",
            description="Lay a model out as the optimizer would, without allocating it, and print "
            "what it takes per rank in every mode and the cheapest that fits. Exit codes: 0 "
            "something fits on all --ranks, 1 not, 2 no model.",
            epilog="examples: python -m shardadam plan config.json --ranks 8 --memory 80GB; "
            "python -m shardadam plan package.module:Model layers=4 --ranks 2 4",
        )
    )
    doctor = areas.add_parser(
        "doctor",
        help="find out what is wrong with this machine, or with these ranks",
        description="Look at versions, the backend, GPUs and the network, test the numerics on "
        "every rank, and say what is wrong and what to do. Under torchrun also what is between "
        "the ranks. Exit codes: 0 all is well, 1 something is wrong.",
        epilog="example: torchrun --nproc-per-node 2 -m shardadam doctor",
    )
    doctor.set_defaults(command="doctor")
    doctor.add_argument("--json", action="store_true", help="for a program to read")
    doctor.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long ranks wait for each other (default: 60)",
    )
    config = areas.add_parser(
        "deepspeed",
        help="translate a ds_config.json",
        description="Print the program that does without DeepSpeed what a ds_config.json sets, and "
        "what of it can't be had. Exit codes: 0 all is translated, 1 some can't be, 2 no config.",
        epilog="example: python -m shardadam deepspeed ds_config.json",
    )
    config.set_defaults(command="deepspeed")
    config.add_argument("config", type=Path, help="the file that deepspeed.initialize() is given")
    ckpt = areas.add_parser("ckpt", help="look at checkpoints, verify and convert them")
    commands = ckpt.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, does: str, more: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}. {more}",
            epilog=f"example: python -m shardadam ckpt {name} {example}",
        )
        made.set_defaults(command=f"ckpt {name}")
        return made

    inspect = command(
        "inspect",
        "show what a checkpoint holds",
        "Exit code 1: a file is missing or has another size.",
        "run/step-00001000",
    )
    inspect.add_argument(
        "path",
        type=Path,
        help="a checkpoint's folder, the directory of several (the newest is shown), a folder of "
        "torch.distributed.checkpoint, a torch file, what DeepSpeed saved with ZeRO-1 or 2 (the "
        "directory with latest, or a tag's folder), or a file of apex's DistributedFusedAdam or a "
        "folder with one for each rank",
    )
    verify = command(
        "verify",
        "check every byte of a checkpoint, or of all in a directory",
        "Exit codes: 0 whole, 1 damaged, 2 no checkpoint of shardadam.checkpoint.",
        "run",
    )
    verify.add_argument("path", type=Path, help="a folder step-…, or the directory of several")
    convert = command(
        "convert",
        "write a checkpoint in another format, bit for bit",
        "Model and optimizer are converted; what else there is, is named on stderr and left out. "
        "All of it is in memory at once.",
        "run model.pt --to torch",
    )
    convert.add_argument("source", type=Path, help="what inspect takes")
    convert.add_argument("target", type=Path, help="a new name; ours: for checkpoint.load()")
    convert.add_argument(
        "--to",
        required=True,
        choices=["ours", "dcp", "torch"],
        help="shardadam.checkpoint, torch.distributed.checkpoint, or one torch file",
    )
    convert.add_argument(
        "--step", type=int, metavar="N", help="to ours: its step, else the optimizer's"
    )
    convert.add_argument(
        "--optimizer",
        choices=["Adam", "AdamW", "NAdam"],
        help="the class whose state it is, where it can't be told",
    )
    convert.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="from apex: a torch file with the model, where the source has none",
    )
    return parser


def _describe_plan(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command="plan")
    command.add_argument(
        "model",
        nargs="?",
        help="module:callable that returns the model, or a Hugging Face config.json",
    )
    command.add_argument("arguments", nargs="*", metavar="name=value", help="for the callable")
    command.add_argument("--params", type=count, metavar="N", help="in place of a model, as 7e9")
    command.add_argument(
        "--dtype",
        nargs="+",
        choices=["own", "fp32", "bf16", "fp16"],
        default=["own", "bf16"],
        help="of the params, wanted most first (default: as built, then bf16)",
    )
    command.add_argument("--ranks", type=ranks, nargs="+", default=[1, 2, 4, 8], metavar="W")
    command.add_argument("--memory", type=nbytes, metavar="BYTES", help="of a rank, as 80GB")
    command.add_argument(
        "--link", type=bandwidth, metavar="RATE", help="what a rank sends, as 50GB/s or 400Gb/s"
    )
    command.add_argument(
        "--per-node", type=ranks, metavar="S", help="ranks of a node: plan also with mesh="
    )
    command.add_argument(
        "--node-link", type=bandwidth, metavar="RATE", help="what a node sends to others"
    )
    command.add_argument(
        "--activations", type=nbytes, metavar="BYTES", help="of a rank, as measured or estimated"
    )
    command.add_argument(
        "--transport", choices=["nccl", "gloo"], default="nccl", help="default: nccl"
    )
    command.add_argument(
        "--bucket-bytes", type=nbytes, default=DEFAULT_BUCKET_BYTES, metavar="BYTES"
    )
    command.add_argument("--png", type=Path, metavar="FILE", help="draw the table")
