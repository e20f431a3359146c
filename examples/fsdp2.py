"""FSDP2 shards the model, shardadam updates its shards: the loop stays as it is.

torchrun --standalone --nproc-per-node 2 examples/fsdp2.py [--compile] [--memory lean]

A plain loop as large trainings have it: a GPT is made on the meta device, sharded block by block,
drawn in place, trained on Python's own sources, saved by torch.distributed.checkpoint midway, and
resumed from there. The same with torch's AdamW; prints losses, state and what a step takes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from corpus import Corpus, standard_library
from gpt import GPT
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardadam


def main() -> None:
    """Train with both optimizers, stop and resume with each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="torch.compile every block")
    parser.add_argument("--memory", choices=("full", "lean", "leanest"), default="full")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    corpus = standard_library()

    def theirs(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def ours(model: nn.Module) -> torch.optim.Optimizer:
        return shardadam.AdamW(model.named_parameters(), lr=1e-3, memory=args.memory)

    for make_optimizer in (theirs, ours):
        with tempfile.TemporaryDirectory() as own:
            folders = [own]
            dist.broadcast_object_list(folders)  # the first rank's, for all
            train(make_optimizer, mesh, corpus, args, folders[0])
            dist.barrier()
    dist.destroy_process_group()


def make_model(mesh: DeviceMesh, args: argparse.Namespace) -> nn.Module:
    """Sharded before it has any memory: no rank ever holds all of it."""
    with torch.device("meta"):
        model = GPT(layers=2, width=128, context=64)
    if args.memory != "full":
        model = model.to(torch.bfloat16)
    for block in model.blocks:
        if args.compile:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(mesh.get_rank())  # every rank draws its own shards
    model.init_weights()
    return model


def train(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    mesh: DeviceMesh,
    corpus: Corpus,
    args: argparse.Namespace,
    folder: str,
) -> None:
    """Train, save midway, and go on from there again: with the same losses."""
    model = make_model(mesh, args)
    optimizer = make_optimizer(model)
    half, times = args.steps // 2, []
    for step in range(args.steps):
        if step == half:
            dcp.save(states(model, optimizer), checkpoint_id=folder)
        loss = one_step(model, optimizer, mesh, corpus, step, times)
    again = make_model(mesh, args)
    resumed = make_optimizer(again)
    state = states(again, resumed)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        again,
        resumed,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    for step in range(half, args.steps):
        loss_again = one_step(again, resumed, mesh, corpus, step)
    if mesh.get_rank() == 0:
        held = sum(
            value.to_local().nbytes if hasattr(value, "to_local") else value.nbytes
            for entry in optimizer.state.values()
            for value in entry.values()
        )
        median = sorted(times)[len(times) // 2]
        name = type(optimizer).__module__.partition(".")[0]
        print(
            f"{name:<9} loss {loss:.4f} nats per byte after "
            f"{args.steps} steps, {loss_again:.4f} after resuming at {half}; "
            f"{held / 1e6:.1f} MB of state on rank 0, step() {1e3 * median:.1f} ms",
            flush=True,
        )


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """What torch.distributed.checkpoint saves and fills."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def one_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: DeviceMesh,
    corpus: Corpus,
    step: int,
    times: list[float] | None = None,
) -> float:
    """The mean loss over the ranks."""
    rank, ranks = mesh.get_rank(), mesh.size()
    inputs, targets = corpus.batch(0, step, 8 * ranks, 64, rank, ranks)
    loss = F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())
    loss.backward()
    if isinstance(optimizer, shardadam.AdamW):
        optimizer.clip_grad_norm_(1.0)
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    start = time.perf_counter()
    optimizer.step()
    if times is not None:
        times.append(time.perf_counter() - start)
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / ranks


if __name__ == "__main__":
    main()
