"""Ranks are forked from the test's process, which must not have started OpenMP threads by then."""

import pytest
import torch

from shardadam.kernels import backend_for, cpu

torch.set_num_threads(1)

BEST_ISA = getattr(backend_for(torch.device("cpu")), "isa", None)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def twin(request):
    """The compiled twin, with each instruction set that this machine has."""
    backend = backend_for(torch.device("cpu"))
    assert isinstance(backend, cpu.Twin), "the tests are about the compiled twin: build it"
    if not backend.use_isa(request.param):
        pytest.skip(f"this build or processor has no {request.param}")
    yield backend
    backend.use_isa(BEST_ISA)
