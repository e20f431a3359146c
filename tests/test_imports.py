"""Imports point one way, and importing does next to nothing."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shardadam

PACKAGE = Path(shardadam.__file__).parent
# Who may import whom: the modules of each line only those of the lines above it.
LEVELS = [
    ["boxes", "dtensors", "layout", "tree_sum", "wrapped"],
    ["kernels.exact_sum", "kernels.coefficients", "kernels.cubins"],
    ["kernels.run", "kernels.random_bits", "kernels.cuda_arguments", "kernels.cuda_driver"],
    ["kernels.coded_state"],
    ["kernels.reference", "kernels.cpu"],
    ["kernels.state_formats"],
    ["kernels.cuda"],
    ["kernels"],
    ["exchange", "lifeline", "params", "phases", "state_file", "storage"],
    ["flight"],
    ["alarm"],
    ["ranks"],
    ["buffers", "collectives", "options"],
    ["agreement", "candidates", "hierarchy", "steps"],
    ["block_sums"],
    ["amp", "replicas"],
    ["bucket_grads"],
    ["gathers", "gradients", "placement", "replica_check", "shards", "shard_tensor", "shown_state"],
    ["entry_reader", "forward", "microbatches", "state_check"],
    ["backward"],
    ["state_dict"],
    ["clipping", "consolidation", "slots", "updates"],
    ["file_slot", "host_slot", "sharded_state", "streaming"],
    ["offload"],
    ["sharded_params"],
    ["optimizer"],
    ["adam", "integrations", "integrations.ddp"],
    ["integrations.deepspeed", "integrations.huggingface", "integrations.tensorboard"],
    ["checkpoint.errors", "checkpoint.parts"],
    ["checkpoint.manifest", "checkpoint.plain", "checkpoint.progress", "checkpoint.together"],
    ["checkpoint.folders", "checkpoint.rng", "checkpoint.tensorfile"],
    ["checkpoint.contents", "checkpoint.verifying"],
    ["checkpoint.reading", "checkpoint.saving"],
    ["checkpoint.filling"],
    ["checkpoint.fitting"],
    ["checkpoint.loading"],
    ["checkpoint"],
    ["elastic.batches", "elastic.rendezvous", "elastic.requests"],
    ["elastic.run"],
    ["elastic"],
    [""],
    ["cli", "cli.links", "cli.telling"],
    [
        "cli.ds_config",
        "cli.ds_keys",
        "cli.footprint",
        "cli.hf_shapes",
        "cli.masters",
        "cli.plain_load",
        "cli.quantities",
        "cli.run_state",
        "cli.tensors",
    ],
    [
        "cli.apex_shards",
        "cli.coded",
        "cli.dcp",
        "cli.deepspeed_files",
        "cli.ds_translation",
        "cli.modelling",
        "cli.ours",
        "cli.plan_figure",
        "cli.summary",
        "cli.torchfile",
    ],
    ["cli.apex", "cli.deepspeed", "cli.findings"],
    ["cli.between", "cli.launched", "cli.machine", "cli.network", "cli.numerics"],
    ["cli.recognising"],
    ["cli.checking", "cli.converting", "cli.doctor", "cli.inspecting", "cli.planning"],
    ["cli.main"],
    ["__main__"],
]
LEVEL = {name: index for index, names in enumerate(LEVELS) for name in names}
# These know tensors and numbers, no params: no more of ours than is said here.
KNOW_ONLY = {
    "boxes": set(),
    "layout": set(),
    "shard_tensor": {"boxes"},
    **{name: {"kernels"} for name in LEVEL if name.partition(".")[0] == "kernels"},
    "storage": {"kernels"},
    "state_file": set(),
    "dtensors": set(),
    "params": {"dtensors", "kernels", "layout"},
    "buffers": {"layout", "kernels", "params", "storage"},
    "collectives": {"exchange", "kernels", "ranks"},
    "ranks": {"alarm", "exchange", "flight"},
    "alarm": {"flight", "lifeline"},
    "flight": {"phases"},
    "lifeline": set(),
    "hierarchy": {"collectives", "exchange", "kernels"},
    "exchange": set(),
    "agreement": {"collectives"},
    "amp": {"agreement", "collectives"},
    "steps": {"buffers", "kernels"},
}
CHECKPOINT_TYPES = {
    *("ChunkStorageMetadata", "MetadataIndex", "TensorProperties"),
    *("TensorWriteData", "WriteItem", "WriteItemType"),
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module) -> set[str]:
    """Our modules that a module imports, without "shardadam."."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports: write them out, as everywhere here"
            if node.module.partition(".")[0] == "shardadam":
                base = node.module.removeprefix("shardadam").removeprefix(".")
                for alias in node.names:
                    path = f"{base}.{alias.name}".strip(".")
                    names.add(path if path in LEVEL else base)
        elif isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
            names |= {
                path.removeprefix("shardadam").removeprefix(".")
                for path in paths
                if path.partition(".")[0] == "shardadam"
            }
    return names


def test_every_module_has_its_level():
    assert set(modules()) == set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_one_way(name):
    upward = {other for other in imported(modules()[name]) if LEVEL[other] >= LEVEL[name]}
    assert not upward, f"{name or 'shardadam'} imports {upward}"


@pytest.mark.parametrize("name", sorted(KNOW_ONLY))
def test_rooms_that_know_little(name):
    others = {other.partition(".")[0] for other in imported(modules()[name])}
    assert others <= KNOW_ONLY[name], f"{name} imports {others - KNOW_ONLY[name]}"


def test_only_ranks_alarm_and_collectives_call_torch_distributed():
    for name, tree in modules().items():
        called, aliases = set(), {"torch.distributed"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                aliases |= {
                    alias.asname
                    for alias in node.names
                    if alias.name.startswith("torch.distributed") and alias.asname
                }
            elif isinstance(node, ast.ImportFrom):
                if node.module == "torch":
                    aliases |= {a.asname or a.name for a in node.names if a.name == "distributed"}
                elif node.module.startswith("torch.distributed"):
                    called |= {alias.name for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                function = ast.unparse(node.func)
                if any(function.startswith(f"{alias}.") for alias in aliases):
                    called.add(function)
        called -= {"DeviceMesh"}  # the type of an argument
        if name == "options":
            called -= {"dist.is_available"}  # is the default group there to be compared with?
        if name == "shard_tensor":
            called -= CHECKPOINT_TYPES  # plain data, in which a planner is told what there is
        if name == "elastic.rendezvous":
            called -= {"dist.init_process_group", "dist.TCPStore"}  # what it is for
        if name == "elastic.batches":
            called -= {f"dist.{ask}" for ask in ("is_available", "is_initialized", "get_rank")}
            called -= {"dist.get_world_size"}  # defaults, of the default group
        if name == "integrations.ddp":
            called -= {"Joinable", "JoinHook"}  # by which torch calls back
        if name == "cli.dcp":
            called -= {
                "CheckpointException",
                "Metadata",
                "save",
            }  # of one process, without process groups
        if name == "cli.launched":
            # A command's own ranks meet, and part.
            called -= {"PrefixStore", "TCPStore"}
            called -= {"dist.init_process_group", "dist.destroy_process_group"}
        assert not called or name in ("alarm", "collectives", "ranks"), f"{name} uses {called}"


SCRIPT = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import shardadam
print(time.process_time() - start)
new = set(sys.modules) - before
optional = {'accelerate', 'cuda', 'deepspeed', 'lightning', 'rich', 'tensorboard', 'transformers'}
assert not any(name.split('.')[0] in optional for name in new), new
assert 'libshardadam' not in open('/proc/self/maps').read() if sys.platform == 'linux' else True
"""


def test_importing_is_quick_and_loads_nothing(tmp_path):
    # Compiled, as for users after the first time, also where the tests' environment forbids it.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # The best of five: what else the machine does is not to be measured.
    seconds = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
        if seconds[-1] < 0.1:
            return
    raise AssertionError(f"importing took {seconds} s")
