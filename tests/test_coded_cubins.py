"""The CUDA kernel for coded state and stochastic masters as NVRTC compiles it, without a GPU."""

import collections
import itertools
import re
import sys

import pytest
import torch
from sass_path import instructions_of_a_turn

from coded_runs import BLOCK, BY_BLOCKS, MASTERS, STATES
from cubin_checks import FUSED, Job, architectures, faults, needed_under_way, ptx
from kernel_runs import BF16, FP16, FP32, VARIANTS
from shardadam.kernels import cubins
from shardadam.kernels.run import GRAD_FORMATS, PARAM_FORMATS, STATE_FORMATS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="NVIDIA's compiler comes as a wheel for Linux"
)

PLAIN = (False, False, False)
KINDS = list(itertools.product((FP32, BF16, FP16), VARIANTS))  # of gradients and rules
OWN = 8  # elements of a lane


def defines_of(state: str, master: str, grad: torch.dtype, variant: tuple) -> dict[str, int]:
    amsgrad, nesterov, l2 = variant
    return {
        "SHARDADAM_PARAM": PARAM_FORMATS[MASTERS[master]],
        "SHARDADAM_STATE": STATE_FORMATS[STATES[state]],
        "SHARDADAM_GRAD": GRAD_FORMATS[grad],
        "SHARDADAM_FLAGS": amsgrad + 2 * nesterov + 4 * l2,
    }


def kept(state: str, master: str, amsgrad: bool) -> list[int]:
    """Bytes of an element in each tensor that is loaded and stored."""
    average, square = STATES[state]
    dtypes = [*MASTERS[master], average, *([square] * (2 if amsgrad else 1))]
    return [dtype.itemsize for dtype in dtypes if dtype is not None]


def accesses(operands: list[int], scales: int) -> dict[int, int]:
    """Of a lane, by bytes: its elements whole, and again one by one for the end of a run."""
    counts = collections.Counter({size: 0 for size in (16, 8, 2, 1)})
    for size in operands:
        whole = min(16, OWN * size)
        counts[whole] += OWN * size // whole
        if size < 4:  # 4 bytes are also what coefficients are loaded in
            counts[size] += OWN
    counts[2] += scales
    return dict(counts)


def job_of(arch: str, state: str, master: str, grad: torch.dtype, variant: tuple) -> Job:
    amsgrad = variant[0]
    stored = kept(state, master, amsgrad)
    scales = (3 if amsgrad else 2) if state in ("q16", "q8") else 0
    return Job(
        arch,
        f"{state}, {master}, gradients in {grad}, {variant}",
        "coded_cuda.cu",
        defines_of(state, master, grad, variant),
        accesses([*stored, grad.itemsize], scales),
        accesses(stored, scales),
        counts_instructions=True,
    )


def selected() -> list[Job]:
    """A part of all 360 variants for every architecture, since all would take half an hour.

    Every state and master for every architecture, in kinds of gradient and rule that go round, so
    that each architecture has every kind; and the two sets that have names.
    """
    jobs = []
    for place, arch in enumerate(architectures()):
        for number, (state, master) in enumerate(BY_BLOCKS):
            jobs.append(job_of(arch, state, master, *KINDS[(number + 7 * place) % len(KINDS)]))
        jobs.append(job_of(arch, "q16", "split", BF16, PLAIN))
        jobs.append(job_of(arch, "q8", "split8", BF16, PLAIN))
    return jobs


@pytest.mark.timeout(1200)  # 176 compilations: less than a minute on two idle cores
def test_variants_for_every_architecture(capsys):
    jobs = selected()
    wrong = faults(jobs)
    with capsys.disabled():
        print(f"\n{len(jobs)} variants of the coded CUDA update compiled and checked")
    assert not wrong, "\n".join(wrong)


def test_the_selection_has_every_kind_on_every_architecture():
    seen = collections.defaultdict(set)
    for job in selected():
        seen[job.arch].add((job.defines["SHARDADAM_GRAD"], job.defines["SHARDADAM_FLAGS"]))
    assert {len(kinds) for kinds in seen.values()} == {len(KINDS)}


@pytest.mark.parametrize(
    ("state", "master", "expected"), [("q16", "split", 16.06), ("q8", "split8", 12.06)]
)
def test_traffic(state, master, expected):
    # Of the accesses that test_variants_for_every_architecture finds in the kernel's text: those of
    # a lane that are whole, and a block's two scales, read and written.
    job = job_of("sm_90", state, master, BF16, PLAIN)
    of_a_lane = sum(size * way[size] for way in (job.loads, job.stores) for size in (16, 8))
    of_a_block = 2 * 2 * 2
    assert round(of_a_lane / OWN + of_a_block / BLOCK, 2) == expected


def test_nothing_is_fused():
    # Every state and master, and every rule.
    for number, (state, master) in enumerate(BY_BLOCKS):
        variant = VARIANTS[number % len(VARIANTS)]
        assert not FUSED.search(ptx("coded_cuda.cu", defines_of(state, master, BF16, variant)))


def test_instructions_are_counted_on_the_usual_way():
    text = """
.L_x_1:
        /*0010*/   LDG.E.EF.128 R1 ;
        /*0020*/   @!P0 BRA `(.L_x_2) ;
        /*0030*/   MOV R1, R2 ;
        /*0040*/   CALL.REL.NOINC `(slow) ;
.L_x_2:
        /*0050*/   @P1 BRA P2, `(.L_x_3) ;
        /*0060*/   STG.E.U16 R1 ;
        /*0070*/   STG.E.U16 R1 ;
        /*0080*/   BRA `(.L_x_4) ;
.L_x_3:
        /*0090*/   FADD R1, R1, R1 ;
        /*00a0*/   STG.E.EF.128 R1 ;
.L_x_4:
        /*00b0*/   @!P0 BRA `(.L_x_1) ;
        /*00c0*/   EXIT ;
"""
    assert instructions_of_a_turn(text) == 6
    with pytest.raises(ValueError, match="no loop"):
        instructions_of_a_turn(text.replace("@!P0 BRA `(.L_x_1)", "EXIT"))


def test_the_rule_is_nowhere_else():
    # Arithmetic on moments belongs into coded_state.h. A square and a root are taken here: they are
    # what is decoded, and what is coded.
    code = re.sub(r"//.*", "", (cubins._SOURCES / "moments_cuda.h").read_text())
    assert code.count("square = before * before;") == 1 and code.count("sqrtf(") == 2
    code = code.replace("square = before * before;", "")
    names = r"(average|square|largest|divisor|(roots|ratios|maxima|params|grads)\[i\]|grad)"
    assert not re.search(rf"{names}\s*[*/+-](?![*>])", code)
    assert not re.search(r"\b(fmax|fma|exp|log|pow)\w*\(", code.replace("exp_avg", ""))


def test_enough_under_way_is_asked_for():
    assert 24e3 < needed_under_way(16 / 28) < 25e3
