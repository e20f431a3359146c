"""Ranks are forked from the test's process, which must not have started OpenMP threads by then."""

from pathlib import Path, PurePath

import pytest
import torch
import torch._dynamo  # a second, which otherwise the first optimizer of every forked rank pays

from shardadam.kernels import backend_for, cpu
from shimmed_cuda import shimmed_cuda

pytest_plugins = ["fault_table"]

torch.set_num_threads(1)

BEST_ISA = getattr(backend_for(torch.device("cpu")), "isa", None)


def pytest_addoption(parser):
    text = "test this build of the compiled twin, not the installed one"
    parser.addoption("--twin", type=Path, metavar="LIBRARY", help=text)


def pytest_configure(config):
    given = config.getoption("twin")
    if given is not None:
        cpu._candidates = lambda: iter([given])
        cpu.load.cache_clear()
        library, why_not = cpu.load()
        assert library is not None, f"--twin {given}: {why_not}"


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def twin(request):
    """The compiled twin, with each instruction set that this machine has."""
    backend = backend_for(torch.device("cpu"))
    assert isinstance(backend, cpu.Twin), "the tests are about the compiled twin: build it"
    if not backend.use_isa(request.param):
        pytest.skip(f"this build or processor has no {request.param}")
    yield backend
    backend.use_isa(BEST_ISA)


def pytest_terminal_summary(terminalreporter):
    """How many of torch's behaviours were tested, and how many of them hold, in all classes."""
    seen = {1: {}, 2: {}}  # world size: behaviour: whether it holds
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            path, _, test = report.nodeid.partition("::")
            if PurePath(path).name.startswith("test_torch_conformance"):
                name, _, parameter = test.partition("[")
                holds = seen[2 if parameter == "on two ranks]" else 1]
                holds[name] = holds.get(name, True) and outcome == "passed"
    if any(seen.values()):
        counts = [
            f"{len(holds)} behaviours at W = {world_size} ({sum(holds.values())} hold)"
            for world_size, holds in seen.items()
        ]
        terminalreporter.write_line(f"torch.optim conformance: {', '.join(counts)}")


@pytest.fixture
def shim():
    """The CUDA backend on the CPU, and what it launches on."""
    return shimmed_cuda()


@pytest.fixture
def kernels(shim):
    return shim[0]


@pytest.fixture
def device(shim):
    return shim[1]
