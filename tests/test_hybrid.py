"""`mesh=`: ranks in nodes give the bits of flat ranks, and send less from node to node."""

import os
import pickle
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import shardadam
from hybrid_runs import Uneven, everything, make, mesh, over, train
from models import mlp, same
from ranks import run_ranks
from shardadam import checkpoint
from shardadam.hierarchy import Hierarchy
from shardadam.integrations import ddp

BF16 = torch.bfloat16
MODES = {
    "plain": {"check_replicas_every": 1, "check_state": True},
    "clipped": {"max_grad_norm": 0.5},
    "sharded": {"shard_grads": True, "max_grad_norm": 0.5},
    "in backward": {"update_in_backward": True},
    "equal": {"grad_sync": "none"},
    "fp64": {"dtype": torch.float64},
    "split": {"dtype": BF16, "max_grad_norm": 0.5},
    "lean": {"dtype": BF16, "memory": "lean", "update_in_backward": True},
    "leanest": {"dtype": BF16, "memory": "leanest", "shard_grads": True},
    "file": {"offload": Path},
}
TIMEOUT_S = 3.0
MESHES = {2: [(2, 1)], 4: [(2, 2), (1, 4), (4, 1)], 6: [(2, 3)]}

# ---- the same bits as flat -----------------------------------------------------------------------


def train_all(rank: int, folder: Path) -> list[str]:
    """Which ways of which modes do not end where flat ranks do."""
    differ = []
    for mode, options in MODES.items():
        if options.get("offload"):
            options = {**options, "offload": folder}
        results = {}
        meshes = MESHES[dist.get_world_size()]
        ways = {"flat": {}}
        for shape in meshes:
            for replicate in (False, True):
                ways[f"{shape}, {replicate}"] = over(*shape, replicate)
        for way, ranks in ways.items():
            model, optimizer = make(**options, **ranks)
            train(model, optimizer, 0 if mode == "equal" else rank, range(3))
            results[way] = everything(model, optimizer)
        differ += [f"{mode}: {way}" for way, r in results.items() if not same(r, results["flat"])]
    return differ


@pytest.mark.filterwarnings("ignore:gradients are equal")
@pytest.mark.parametrize("world_size", MESHES)
def test_nodes_give_the_bits_of_flat_ranks(world_size, tmp_path):
    # In nodes of three a mean of the node's mean would round twice.
    assert run_ranks(world_size, train_all, tmp_path) == [[]] * world_size


# ---- what is kept and sent -----------------------------------------------------------------------


def sizes(rank: int, dtype: torch.dtype) -> dict[bool, tuple]:
    found = {}
    for replicate in (False, True):
        model = nn.Linear(256, 256, bias=False, dtype=dtype)
        optimizer = shardadam.AdamW(model.parameters(), **over(2, 2, replicate))
        before = {}
        for _ in range(2):
            before = dict(optimizer.stats()["sent_bytes"])
            model(torch.ones(1, 256, dtype=dtype)).sum().backward()
            optimizer.step()
        sent = optimizer.stats()["sent_bytes"]
        sent = {name: count - before.get(name, 0) for name, count in sent.items()}
        found[replicate] = optimizer.state[model.weight]["exp_avg"].numel(), sent, repr(optimizer)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_node_sends_its_sum_once(dtype):
    numel, size = 256 * 256, dtype.itemsize
    for rank, found in enumerate(run_ranks(4, sizes, dtype)):
        owned, sent, shown = found[False]
        assert owned == numel // 4
        assert sent.pop("reduce-scattering gradients in nodes") == numel * size // 2
        assert sent.pop("reduce-scattering gradients across nodes") == numel * 4 // 4
        assert sent.pop("all-gathering params across nodes") == numel * size // 4
        assert sent.pop("all-gathering params in nodes") == numel * size // 2
        assert sum(sent.values()) < 1024, sent
        assert f"rank {rank} of 4 (gloo), 2 nodes of 2, state over all ranks, " in shown
        owned, sent, shown = found[True]
        assert owned == numel // 2
        assert sent.pop("reduce-scattering gradients in nodes") == numel * size // 2
        assert sent.pop("reduce-scattering gradients across nodes") == numel * 4 // 4
        assert sent.pop("all-gathering gradients across nodes") == numel * 4 // 4
        assert sent.pop("all-gathering params in nodes") == numel * size // 2
        assert sum(sent.values()) < 1024, sent
        assert "2 nodes of 2, a copy of the state on each, " in shown


def overlapped(rank: int) -> list[bool]:
    """Whether a module's forward waits for its params, and the params are those of no overlap."""
    results = []
    for overlaps in (False, True):
        model = mlp()
        optimizer = shardadam.AdamW(model.parameters(), bucket_bytes=4096, **over(2, 2, True))
        if overlaps:
            optimizer.overlap_gather(model)
        for seed in range(4):
            torch.manual_seed(10 * seed + rank)
            model(torch.randn(3, 30)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
        results.append([param.detach().clone() for param in model.parameters()])
    return [same(*results)]


def test_gathers_inside_nodes_go_on_beside_the_forward_pass():
    assert run_ranks(4, overlapped) == [[True]] * 4


def hooked(rank: int) -> list[torch.Tensor]:
    """DDP's hook, unused params, a group added later: beside flat ranks."""
    results = []
    for ranks in ({}, over(2, 2), over(2, 2, True)):
        model, optimizer = make(**ranks)
        optimizer.add_param_group({"params": [("later", nn.Parameter(torch.ones(500)))]})
        optimizer.param_groups[1]["params"][0].grad = torch.full((500,), float(rank))
        optimizer.step()
        wrapped = DistributedDataParallel(mlp())
        inner = shardadam.AdamW(wrapped.parameters(), bucket_bytes=8192, **ranks)
        wrapped.register_comm_hook(inner, ddp.reduce_scatter)
        for _ in range(2):
            wrapped(torch.zeros(1, 30)).sum().backward()  # the biases: of few bits
            inner.step()
            inner.zero_grad()
        results.append([*everything(model, optimizer), *everything(wrapped, inner)])
    return [same(result, results[0]) for result in results]


@pytest.mark.filterwarnings("ignore:gradients are equal")
def test_ddps_hook_and_groups_added_later():
    assert run_ranks(4, hooked) == [[True] * 3] * 4


def flipped(rank: int) -> list[str]:
    """A moment changes on one owner, two steps before the ranks are compared."""
    told = []
    for ranks in ({}, over(2, 2), over(2, 2, True)):
        model, optimizer = make(check_replicas_every=4, **ranks)
        train(model, optimizer, rank, range(2))
        if rank == 2:
            optimizer._buckets[0].state["exp_avg"].view(torch.int32)[0] ^= 1 << 30
        train(model, optimizer, rank, range(2, 3))
        try:
            train(model, optimizer, rank, range(3, 4))
        except RuntimeError as error:
            told.append(str(error))
    return told


@pytest.mark.fault("mesh: flipped bit in a moment of one node", "an error that names the param")
def test_nodes_with_state_of_their_own_come_apart_and_are_told_of_it():
    """Elsewhere the flip is spread to all, and only check_state= finds it."""
    for (text,) in run_ranks(4, flipped):
        found = r"\w+ has the digest ranks 0, 1 \w+, ranks 2, 3"
        assert re.match(f"ranks no longer have the same params: {found}", text), text


# ---- checkpoints ---------------------------------------------------------------------------------

KEPT = {"fp32": {"max_grad_norm": 0.5}, "lean": {"dtype": BF16, "memory": "lean"}}


def ways_of(world_size: int) -> dict[str, dict]:
    nodes = {1: 1, 2: 2, 4: 2}[world_size]
    return {
        "flat": {},
        "all": over(nodes, world_size // nodes),
        "copies": over(nodes, world_size // nodes, True),
    }


def save_all(rank: int, folder: Path) -> list[torch.Tensor]:
    saved = []
    for kept, options in KEPT.items():
        for way, ranks in ways_of(dist.get_world_size()).items():
            model, optimizer = make(**options, **ranks)
            train(model, optimizer, rank, range(3))
            saved = everything(model, optimizer)
            path = folder / f"{kept}-{way}"
            checkpoint.save(path, step=3, optimizer=optimizer, model=model, rng=False)
            state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
            dcp.save(state, checkpoint_id=path / "dcp")
            if rank == 0:
                torch.save(saved, path / "expected.pt")
    return saved


def load_all(rank: int, folder: Path) -> list[str]:
    """What was not loaded as it was saved."""
    wrong = []
    for kept, options in KEPT.items():
        for path in sorted(folder.glob(f"{kept}-*")):
            expected = torch.load(path / "expected.pt")
            for way, ranks in ways_of(dist.get_world_size()).items():
                for form in ("own", "dcp"):
                    options = {**options, "bucket_bytes": 20_000}
                    model, optimizer = make(**options, fill=7, **ranks)
                    if form == "own":
                        checkpoint.load(path, optimizer=optimizer, model=model)
                    else:
                        state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
                        dcp.load(state, checkpoint_id=path / "dcp")
                        model.load_state_dict(state["model"])
                        optimizer.load_state_dict(state["optim"])
                    if not same(everything(model, optimizer), expected):
                        wrong.append(f"{path.name} to {way} by {form}")
    return wrong


@pytest.mark.parametrize(("writers", "readers"), [(4, 2), (2, 4), (4, 1)])
def test_checkpoints_go_from_way_to_way_at_any_world_size(writers, readers, tmp_path):
    run_ranks(writers, save_all, tmp_path)
    sizes = {
        path.name: sum(file.stat().st_size for file in path.glob("step-*/*.safetensors"))
        for path in tmp_path.iterdir()
    }
    for kept in KEPT:  # nothing twice
        flat, *others = (sizes[f"{kept}-{way}"] for way in ("flat", "all", "copies"))
        assert all(abs(size - flat) < 8192 for size in others), sizes
    assert run_ranks(readers, load_all, tmp_path) == [[]] * readers


def turns(rank: int, folder: Path) -> int:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    optimizer = shardadam.AdamW(model.parameters(), **over(2, 2, True))
    path = checkpoint.save(folder, step=0, optimizer=optimizer, model=model, rng=False)
    return (path / f"rank-{rank:05d}-of-00004.safetensors").stat().st_size


def test_replicas_take_turns_to_write(tmp_path):
    numel = 4 * 64 * 64
    for size in run_ranks(4, turns, tmp_path):
        assert numel * 12 // 4 < size < numel * 12 // 4 + 2048


# ---- a rank that hangs ---------------------------------------------------------------------------


def freezes(rank: int) -> tuple[float, str]:
    """Rank 3 does before its gradients leave it: when this rank is told, and what."""
    model, optimizer = make(**over(2, 2))
    train(model, optimizer, rank, range(2))
    if rank == 3:
        optimizer._reduce = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        train(model, optimizer, rank, range(2, 4))  # who has what it needs learns of it in the next
    return time.monotonic() - start, str(caught.value)


@pytest.mark.fault("mesh: SIGSTOP of one rank", "an error that names it, timeout + 5 s")
def test_a_frozen_rank_is_named_within_the_timeout(record_property):
    """Not torch's half an hour, which it gives a mesh's groups."""
    *told, _ = run_ranks(4, freezes, lost=[3], peer_timeout_s=TIMEOUT_S)
    record_property("seconds", max(seconds for seconds, _ in told))
    for seconds, text in told:
        assert seconds < TIMEOUT_S + 5, text
        assert "rank 3 gives no sign of life" in text


def given_a_timeout(rank: int) -> list[float]:
    """Of a mesh's groups, the first of which has one of its own."""
    cpu, names = torch.device("cpu"), ("replicate", "shard")
    own = dist.ProcessGroupGloo._Options()
    own._timeout = timedelta(seconds=70)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=names, backend_override={0: own})
    shardadam.AdamW(mlp().parameters(), mesh=mesh)
    groups = mesh.get_group(0), mesh.get_group(1)
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in groups]


def test_a_timeout_that_a_mesh_was_given_is_kept():
    assert run_ranks(2, given_a_timeout, peer_timeout_s=50) == [[70, 50]] * 2


# ---- what can't be -------------------------------------------------------------------------------


def refusals(rank: int) -> list[str]:
    cpu, pair = torch.device("cpu"), mesh(2, 1)
    model = Uneven()
    found = []

    def refused(kind: type[Exception], make: object) -> None:
        with pytest.raises(kind) as caught:
            make()
        found.append(str(caught.value))

    def adam(params: object = None, **options: object) -> shardadam.AdamW:
        return shardadam.AdamW(params or model.named_parameters(), **options)

    refused(ValueError, lambda: adam(mesh=pair, process_group=dist.group.WORLD))
    refused(ValueError, lambda: adam(mesh=init_device_mesh("cpu", (2,))))
    refused(ValueError, lambda: adam(mesh=2))
    refused(ValueError, lambda: adam(replicate_state=True))
    refused(ValueError, lambda: adam(mesh=pair, exact_microbatches=2))
    refused(ValueError, lambda: adam(mesh=DeviceMesh("cpu", [[1], [0]])))
    part = DeviceMesh("cpu", [[0]]) if rank == 0 else DeviceMesh("cpu", [[1]])
    refused(ValueError, lambda: Hierarchy(part, cpu, replicate_state=False))
    refused(ValueError, lambda: adam(**over(2, 1, rank == 0)))
    refused(ValueError, lambda: adam(**(over(2, 1) if rank else {})))
    tensor = nn.Parameter(distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,))))
    refused(ValueError, lambda: adam([("whole", tensor)], mesh=pair))
    optimizer = adam(mesh=pair)
    refused(ValueError, lambda: optimizer.overlap_gather(model))
    refused(TypeError, lambda: pickle.dumps(optimizer))
    return found


EXPECTED = [
    "mesh= has process groups of its own, found process_group= beside it: expected one of the two",
    r"Invalid mesh: DeviceMesh\(.*\), expected a DeviceMesh of 2 dims: nodes, and the ranks of",
    "Invalid mesh: 2, expected a DeviceMesh of 2 dims",
    "replicate_state=True: expected mesh=, which says over what",
    r"exact_microbatches sums gradients over all ranks .*, in step\(\), and mesh= does otherwise",
    r"mesh: expected ascending ranks along its dims, found \[\[1\], \[0\]\]",
    r"mesh: expected all 2 ranks of the default process group, found \[[01]\]",
    "rank 0 has replicate_state=True, rank 1 has replicate_state=False",
    r"rank 0 has mesh of None, rank 1 has mesh of \[\[0\], \[1\]\]",
    "whole is a DTensor, whose own mesh says where its elements are: expected mesh=None",
    r"overlap_gather\(\): with mesh= params come in two stages.*replicate_state=True",
    r"an optimizer with mesh= can't be serialized",
]


def test_what_can_not_be_is_said():
    for found in run_ranks(2, refusals):
        for message, expected in zip(found, EXPECTED, strict=True):
            assert re.search(expected, message), (expected, message)
