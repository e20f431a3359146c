"""The CUDA kernels as NVRTC compiles them, and the cache of what it has compiled.

No GPU is needed for this, so every machine checks what a GPU will be given: whole accesses, nothing
spilled, nothing fused, registers few enough.
"""

import concurrent.futures
import contextlib
import errno
import functools
import itertools
import multiprocessing
import os
import re
import shutil
import stat
import sys

import pytest
import torch
from sass import take_apart

from cubin_checks import FUSED, Job, architectures, faults, ptx
from kernel_runs import FORMATS, VARIANTS
from shardadam.kernels import cubins, cuda_driver
from shardadam.kernels.run import GRAD_FORMATS, PARAM_FORMATS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="NVIDIA's compiler comes as a wheel for Linux"
)


def update_defines() -> list[tuple[tuple, tuple, dict[str, int]]]:
    return [
        (
            formats,
            (amsgrad, nesterov, l2),
            {
                "SHARDADAM_PARAM": PARAM_FORMATS[formats[:2]],
                "SHARDADAM_GRAD": GRAD_FORMATS[formats[2]],
                "SHARDADAM_FLAGS": amsgrad + 2 * nesterov + 4 * l2,
            },
        )
        for formats in FORMATS
        for amsgrad, nesterov, l2 in VARIANTS
    ]


def job_of(arch: str, formats: tuple, variant: tuple, defines: dict[str, int]) -> Job:
    """With the loads and stores of 16 bytes for as many elements as the kernel takes at a time."""
    param, master, grad = formats
    moment = 8 if param == torch.float64 else 4
    smallest = min(dtype.itemsize for dtype in formats if dtype is not None)
    elements = 4 if smallest == 8 else 8
    state = [param.itemsize, *([] if master is None else [master.itemsize])]
    state += [moment] * (3 if variant[0] else 2)
    stores = sum(size * elements // 16 for size in state)
    loads = stores + grad.itemsize * elements // 16
    name = f"{formats} {variant}"
    return Job(arch, name, "adam_cuda.cu", defines, {16: loads, 8: 0}, {16: stores, 8: 0})


@pytest.mark.timeout(1200)  # 624 compilations: two minutes on two idle cores
def test_every_variant_for_every_architecture(capsys):
    jobs = [job_of(arch, *job) for arch in architectures() for job in update_defines()]
    wrong = faults(jobs)
    with capsys.disabled():
        print(f"\n{len(jobs)} variants of the CUDA update compiled and checked: ", end="")
        print(f"{len(update_defines())} for each of {', '.join(architectures())}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", ["norm_cuda.cu", "coefficients_cuda.cu"])
def test_the_small_kernels(source):
    grads = GRAD_FORMATS.values() if source == "norm_cuda.cu" else [0]
    for arch, grad in itertools.product(architectures(), grads):
        cubin, log = cubins.compile_now(source, arch, {"SHARDADAM_GRAD": grad})
        parts = take_apart(cubin)
        assert not log.strip()
        assert not parts.local_bytes and not parts.count("(LDL|STL).*"), (arch, grad)
        assert parts.registers <= 64


def test_nothing_is_fused():
    for _, _, defines in update_defines():
        assert not FUSED.search(ptx("adam_cuda.cu", defines))
    for source in ("norm_cuda.cu", "coefficients_cuda.cu"):
        assert not FUSED.search(ptx(source, {"SHARDADAM_GRAD": 0}))
    assert cubins._OPTIONS["fma"] is False


def test_the_check_for_fusing_finds_it(tmp_path, monkeypatch):
    (tmp_path / "fused.cu").write_text(
        'extern "C" __global__ void f(double* x) { x[0] = __fma_rn(x[1], x[2], x[3]); }'
    )
    monkeypatch.setattr(cubins, "_SOURCES", tmp_path)
    assert FUSED.search(ptx("fused.cu", {}))


def test_the_rule_is_nowhere_else():
    # A kernel that computes with moments itself would be a second rule.
    text = (cubins._SOURCES / "adam_cuda.cu").read_text()
    code = re.sub(r"//.*", "", text)
    names = r"(masters|averages|squares|largest|exp_avg|exp_avg_sq|max_exp_avg_sq|x\.\w+)(\[\w+\])?"
    assert not re.search(rf"{names}\s*[*/-](?![*>])", code)
    assert not re.search(r"\b(sqrt|fmax|fma)\w*\(", code)


# ---- architectures ------------------------------------------------------------------------------


def test_which_architecture_is_compiled_for():
    supported = [75, 80, 86, 87, 89, 90, 100, 101, 110, 120, 121]
    for capability, expected in (
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),  # cubins run on later minors, but not those of Tegra chips
        ((10, 1), "sm_101"),
        ((8, 8), "sm_86"),
        ((12, 1), "sm_121"),
        ((7, 0), None),
        ((13, 0), None),
    ):
        assert cubins.architecture(capability, supported) == expected


def test_a_missing_compiler_is_said_in_one_sentence(monkeypatch):
    for missing in ("cuda.core", "cuda.bindings"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(cubins.CompilerMissing, match=r'pip install "shardadam\[cuda\]"'):
                cubins.nvrtc()


def test_what_happens_without_a_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    load = functools.partial(cuda_driver._load, torch.device("cuda", 0))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.core", None)
        kernels, why_not = load()
        assert kernels is None and "pip install" in why_not and "\n" not in why_not
    kernels, why_not = load()  # there is a compiler here, but no driver
    assert kernels is None and "could not be loaded" in why_not
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (99, 0))
    kernels, why_not = load()
    assert kernels is None and "does not compile for compute capability 99.0" in why_not
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(ValueError, match=r"A GPU has compute capability 6\.1: expected 7\.0"):
        load()


def test_nothing_is_compiled_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cubins, "compiled", lambda *job: pytest.fail("compiled"))
    kernels = cuda_driver.Kernels(torch.device("cuda", 0), "sm_90", "13.5")
    with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured: expected a step\(\)"):
        kernels.get("coefficients_cuda.cu", "shardadam_advance", {})


def test_sources_are_ascii():
    # NVRTC 12.4 changes the locale of its process, and with it how text is read.
    for file in cubins._SOURCES.iterdir():
        if file.suffix in (".h", ".cu"):
            assert file.read_bytes().isascii(), file


# ---- the cache ----------------------------------------------------------------------------------

JOB = ("coefficients_cuda.cu", "sm_90", {})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "shardadam"


@pytest.fixture
def compilations(monkeypatch):
    """How often the compiler ran."""
    done = []
    compile_now = cubins.compile_now
    monkeypatch.setattr(cubins, "compile_now", lambda *job: done.append(job) or compile_now(*job))
    return done


def test_a_second_use_does_not_compile(cache, compilations):
    assert cubins.compiled(*JOB) == cubins.compiled(*JOB)
    assert len(compilations) == 1
    (entry,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "foreign"])
def test_a_damaged_entry_is_made_anew(damage, cache, compilations):
    good = cubins.compiled(*JOB)
    (entry,) = cache.iterdir()
    content = bytearray(entry.read_bytes())
    if damage == "torn":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "empty":
        content = bytearray()
    else:
        content = bytearray(good)
    entry.write_bytes(content)
    assert cubins.compiled(*JOB) == good
    assert cubins.compiled(*JOB) == good
    assert len(compilations) == 2


def test_what_others_could_have_written_is_not_used(cache, compilations, monkeypatch):
    good = cubins.compiled(*JOB)
    (entry,) = cache.iterdir()
    entry.chmod(0o666)
    assert cubins.compiled(*JOB) == good and len(compilations) == 2
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600  # it was replaced
    target = entry.with_name("elsewhere")
    entry.rename(target)
    entry.symlink_to(target)
    assert cubins.compiled(*JOB) == good and len(compilations) == 3
    cache.chmod(0o777)
    for count in (4, 5):  # neither read nor written
        assert cubins.compiled(*JOB) == good and len(compilations) == count
    cache.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # as for another user's files
    assert cubins.compiled(*JOB) == good and len(compilations) == 6


def test_a_changed_source_is_another_entry(cache, compilations, tmp_path, monkeypatch):
    cubins.compiled(*JOB)
    changed = tmp_path / "csrc"
    shutil.copytree(cubins._SOURCES, changed)
    header = changed / "adam_update.h"
    header.write_text(header.read_text() + "// another version\n")
    monkeypatch.setattr(cubins, "_SOURCES", changed)
    cubins.compiled(*JOB)
    assert len(compilations) == 2 and len(list(cache.iterdir())) == 2
    monkeypatch.setattr(cubins, "nvrtc", lambda: ("99.9", []))
    cubins.compiled(*JOB)
    cubins.compiled("coefficients_cuda.cu", "sm_80", {})
    cubins.compiled("coefficients_cuda.cu", "sm_80", {"UNUSED": 1})
    assert len(compilations) == 5 and len(list(cache.iterdir())) == 5


def test_a_home_that_cannot_be_written(tmp_path, compilations, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()  # root may write everywhere, but a file is no folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert cubins.compiled(*JOB) and cubins.compiled(*JOB)
    assert len(compilations) == 2


def test_a_full_disk_leaves_no_trace(cache, compilations, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert cubins.compiled(*JOB)
    assert not list(cache.iterdir())


def cold_start(_: int) -> bytes:
    return cubins.compiled(*JOB)


def test_many_cold_starts_at_once(cache):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shardadam.kernels.cubins", "cuda.core"])
    with concurrent.futures.ProcessPoolExecutor(200, mp_context=context) as pool:
        results = list(pool.map(cold_start, range(200)))
    assert set(results) == {cubins.compile_now(*JOB)[0]}
    (entry,) = cache.iterdir()
    assert entry.suffix == ".cubin"
