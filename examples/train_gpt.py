"""Train a byte-level GPT with shardadam.AdamW, and again with torch.optim.AdamW, and compare.

    python examples/train_gpt.py                                                    one process
    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py                  two ranks
    python examples/launch.py --standalone --nproc-per-node 2 examples/train_gpt.py    … and Ctrl-C

The text is Python's own standard library, or your files with --data. Ctrl-C saves a checkpoint, and
--resume goes on from it as if nothing had happened: on as many ranks to the last bit, on more or
fewer with the same batches, whose gradients are then summed in another order.
"""
# ruff: noqa: E402

import signal

# Ctrl-C while torch is still being imported: nothing to save, nothing to say.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import os
import shlex
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus import Corpus, from_files, standard_library
from gpt import GPT
from interruption import Interruption
from progress import StepProgress
from report import BLUE, ORANGE, Run, Zlib, draw, print_sample, print_table, state_bytes
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from shardadam import AdamW, checkpoint, elastic
from shardadam.integrations.tensorboard import StepLog

OURS, THEIRS = "shardadam.AdamW", "torch.optim.AdamW"
MAX_GRAD_NORM = 1.0
WARM_UP = 0.05
"""Part of the steps."""
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""Of torch's optimizer, whose state is the same on every rank: one dict of tensors and numbers."""
# bfloat16 is five times as fast where the CPU has instructions for it, and slow where it has none.
BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = parser.add_argument_group("model and training")
    model.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    model.add_argument("--batch-size", type=int, default=16, help="sequences per step, in all")
    model.add_argument("--context", type=int, default=128, help="bytes per sequence")
    model.add_argument("--layers", type=int, default=2, help="transformer blocks")
    model.add_argument("--width", type=int, default=128, help="of the stream; a multiple of 64")
    model.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    model.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches")
    model.add_argument("--shard-grads", action="store_true", help="shard gradients too (ZeRO-2)")
    model.add_argument(
        "--memory",
        choices=("full", "lean", "leanest"),
        default="full",
        help=f"{OURS}'s: lean and leanest train bfloat16 params with coded state",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text to learn, not the standard library",
    )
    files.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="for results")
    files.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help=f"for scalars of {OURS}'s steps"
    )
    flow = parser.add_argument_group("flow")
    flow.add_argument("--resume", action="store_true", help="go on from the checkpoints in DIR")
    flow.add_argument(
        "--checkpoint-every", type=int, default=250, metavar="N", help="steps between checkpoints"
    )
    flow.add_argument("--stop-after", type=int, metavar="N", help="as if interrupted after step N")
    flow.add_argument("--skip-baseline", action="store_true", help=f"don't train with {THEIRS}")
    return parser.parse_args()


def main() -> None:
    """Train, train the baseline, report."""
    args = parse_args()
    interruption = Interruption()
    elastic.init_process_group("gloo")
    console = Console(quiet=rank() != 0, highlight=False)
    if args.batch_size % world_size():
        console.print(f"--batch-size {args.batch_size} can't be split over {world_size()} ranks.")
        sys.exit(2)
    corpus = from_files(args.data) if args.data else standard_library()
    if rank() == 0 and not args.resume:
        for name in (OURS, THEIRS):
            shutil.rmtree(args.out / "checkpoints" / name, ignore_errors=True)
    runs = []
    for name in (OURS,) if args.skip_baseline else (OURS, THEIRS):
        torch.manual_seed(args.seed)
        model = GPT(args.layers, args.width, args.context)
        if name == OURS and args.memory != "full":
            model.to(torch.bfloat16)
        runs.append(train(name, model, args, corpus, interruption, console))
        if name == OURS:
            ours = model
    if rank() == 0:
        report(console, args, corpus, ours, runs)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def train(
    name: str,
    model: GPT,
    args: argparse.Namespace,
    corpus: Corpus,
    interruption: Interruption,
    console: Console,
) -> Run:
    """Train ``model`` to the end and measure it.

    Raises:
        Preempted: interrupted, with a checkpoint saved.
    """
    wrapped, optimizer = (with_shardadam if name == OURS else with_torch)(model, args)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, args.steps))
    directory = args.out / "checkpoints" / name
    keys = ("steps", "batch_size", "context", "layers", "width", "lr", "seed", "memory")
    settings = {**{key: getattr(args, key) for key in keys}, "text": corpus.digest}
    # Batches are drawn anew for each step, so there are no random generators to save.
    saved: dict[str, Any] = {"model": model, "lr_scheduler": scheduler, "rng": False}
    if name == OURS:
        saved["optimizer"] = optimizer
    losses: list[float] = []
    seconds_before = 0.0
    if args.resume:
        try:
            found = checkpoint.load(directory, **saved).extras
        except checkpoint.NoCheckpoint:
            pass  # from the beginning
        else:
            check_settings(found["settings"], settings)
            losses, seconds_before = found["losses"], found["seconds"]
            if name == THEIRS:
                set_optimizer_state_dict(model, optimizer, found, options=FLAT)

    log = None
    if name == OURS and args.tensorboard is not None:
        log = StepLog(optimizer, args.tensorboard, steps_before=len(losses))
    tokens_per_step = args.batch_size * args.context
    started, started_at = time.perf_counter(), len(losses)
    stopped = False
    color = BLUE if name == OURS else ORANGE
    label = name if name == THEIRS or args.memory == "full" else f"{name}, {args.memory}"
    progress = StepProgress(console, label, color, started_at, args.steps)
    with progress:
        while len(losses) < args.steps and not stopped:
            inputs, targets = corpus.batch(
                args.seed, len(losses), args.batch_size, args.context, rank(), world_size()
            )
            loss = cross_entropy(wrapped, inputs, targets)
            loss.backward()
            if name == THEIRS:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

            mean_loss, stopped = interruption.meet(loss.item())
            losses.append(mean_loss)
            stopped |= len(losses) == args.stop_after
            seconds = time.perf_counter() - started
            speed = tokens_per_step * (len(losses) - started_at) / seconds
            progress.update(len(losses), mean_loss / math.log(2), speed, state_bytes(optimizer))
            if stopped or len(losses) % args.checkpoint_every == 0 or len(losses) == args.steps:
                extras: dict[str, Any] = {"losses": losses, "settings": settings}
                extras["seconds"] = seconds_before + seconds
                if name == THEIRS:
                    extras |= get_optimizer_state_dict(model, optimizer, options=FLAT)
                path = checkpoint.save(directory, step=len(losses), **saved, extras=extras, keep=1)
    if log is not None:
        log.close()
    if stopped:
        console.print(
            f"Saved {name} after step {len(losses)} of {args.steps}. Go on, on any number of ranks "
            f"that divides {args.batch_size}, with:\n  {resume_command()}",
            soft_wrap=True,
        )
        raise elastic.Preempted(len(losses), path)
    seconds = seconds_before + time.perf_counter() - started
    return Run(
        label,
        losses,
        sum(param.nbytes for param in model.parameters()),
        every_rank(state_bytes(optimizer)),
        held_out_bits_per_byte(model, corpus, args),
        seconds,
        tokens_per_step * args.steps / seconds,
    )


def with_shardadam(model: GPT, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """No wrapper: the optimizer averages the gradients, clips them and shards its state."""
    return model, AdamW(
        model.named_parameters(),
        **hyperparameters(args),
        max_grad_norm=MAX_GRAD_NORM,
        shard_grads=args.shard_grads,
        memory=args.memory,
    )


def with_torch(model: GPT, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The usual way: DDP averages the gradients, every rank has the whole optimizer state."""
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    return wrapped, torch.optim.AdamW(model.parameters(), **hyperparameters(args), fused=True)


def hyperparameters(args: argparse.Namespace) -> dict[str, Any]:
    """What both optimizers are given."""
    return {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm_up = max(WARM_UP * steps, 1)
    return min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1), 1.0)


def cross_entropy(
    model: nn.Module, inputs: Tensor, targets: Tensor, reduction: str = "mean"
) -> Tensor:
    """In nats; targets of -100 don't count."""
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def held_out_bits_per_byte(model: GPT, corpus: Corpus, args: argparse.Namespace) -> float:
    """The model's code length of the held-out text; the ranks share the work."""
    nats = torch.zeros((), dtype=torch.float64)
    windows = list(corpus.windows(args.context, rank(), world_size()))
    for first in range(0, len(windows), 32):
        inputs, targets = map(torch.stack, zip(*windows[first : first + 32], strict=True))
        nats += cross_entropy(model, inputs, targets, "sum")
    if dist.is_initialized():
        dist.all_reduce(nats)
    # Nothing precedes the first byte: 8 bits.
    return (nats.item() / math.log(2) + 8) / len(corpus.held_out)


def report(
    console: Console, args: argparse.Namespace, corpus: Corpus, model: GPT, runs: list[Run]
) -> None:
    """Rank 0 says how it went."""
    prompt = b"def __init__(self"
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        print_sample(console, prompt, model.generate(prompt, 500, temperature=0.6, seed=args.seed))
    started = time.perf_counter()
    compressed = len(zlib.compress(corpus.held_out.numpy(), 9))
    baseline = Zlib(8 * compressed / len(corpus.held_out), time.perf_counter() - started)
    params = sum(param.numel() for param in model.parameters())
    ranks = "1 rank" if world_size() == 1 else f"{world_size()} ranks"
    batch = f"{args.batch_size} × {args.context} bytes"
    title = f"{params / 1e6:.1f} M params on {ranks}, {args.steps} steps of {batch}"
    print_table(console, title, runs, baseline)
    figure = args.out / "loss.png"
    draw(figure, title, runs, baseline)
    console.print(f"The loss curves are in [bold]{figure}[/bold].")


def check_settings(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """A checkpoint goes on only with what it was begun with."""
    for key, value in given.items():
        if saved[key] != value:
            raise ValueError(f"the checkpoint was made with {key} {saved[key]}, not {value}")


def resume_command() -> str:
    """The command that goes on from the checkpoint, to be pasted into the shell."""
    python = Path(sys.executable)
    words = [str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python)]
    if dist.is_initialized():
        launch = os.path.join(os.path.dirname(sys.argv[0]), "launch.py")
        words += [launch, "--standalone", "--nproc-per-node", str(world_size())]
    options = [option for option in sys.argv if option != "--resume"]
    if "--stop-after" in options:
        index = options.index("--stop-after")
        del options[index : index + 2]
    return shlex.join([*words, *options, "--resume"])


def every_rank(number: int) -> list[int]:
    """What each rank gave."""
    numbers = torch.zeros(world_size(), dtype=torch.int64)
    numbers[rank()] = number
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers.tolist()


def rank() -> int:
    """0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """1 where there is one process."""
    return dist.get_world_size() if dist.is_initialized() else 1


if __name__ == "__main__":
    main()
