"""Imports point one way, and importing does next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shardadam

PACKAGE = Path(shardadam.__file__).parent
# Who may import whom: the modules of each line only those of the lines above it.
LEVELS = [
    ["layout", "kernels.exact_sum", "kernels.run"],
    ["kernels.reference", "kernels.cpu"],
    ["kernels"],
    ["buffers", "collectives", "options", "amp"],
    ["agreement"],
    ["gradients", "placement", "state_dict"],
    ["clipping", "runs"],
    ["optimizer"],
    ["adam"],
    [""],
]


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardadam"):
            base = node.module.removeprefix("shardadam").removeprefix(".")
            for alias in node.names:
                path = f"{base}.{alias.name}".strip(".")
                names.add(path if path in LEVEL else base)
        elif isinstance(node, ast.Import):
            names |= {
                a.name.removeprefix("shardadam.") for a in node.names if "shardadam" in a.name
            }
    return names


LEVEL = {name: index for index, names in enumerate(LEVELS) for name in names}


def test_every_module_has_its_level():
    assert set(modules()) == set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_one_way(name):
    upward = {other for other in imported(modules()[name]) if LEVEL[other] >= LEVEL[name]}
    assert not upward, f"{name or 'shardadam'} imports {upward}"


def test_only_collectives_calls_torch_distributed():
    for name, tree in modules().items():
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] == "dist"
        }
        calls -= {"dist.is_available"}
        assert not calls or name == "collectives", f"{name} calls {calls}"


SCRIPT = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import shardadam
print(time.perf_counter() - start)
new = set(sys.modules) - before
assert not any(name.split('.')[0] in ('cuda', 'deepspeed', 'rich') for name in new), new
assert 'libshardadam' not in open('/proc/self/maps').read() if sys.platform == 'linux' else True
"""


def test_importing_is_quick_and_loads_nothing():
    seconds = [
        float(
            subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True).stdout
        )
        for _ in range(3)
    ]
    assert min(seconds) < 0.1
