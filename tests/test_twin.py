"""The compiled twin gives the reference's bits: every format, variant, instruction set, length."""

import pytest
import torch

from kernel_runs import (
    BF16,
    FORMATS,
    FP16,
    FP32,
    FP64,
    SPECIAL,
    VARIANTS,
    assert_same_bits,
    bits,
    coefficients,
    copy,
    make_run,
)
from shardadam.kernels import reference


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_equals_reference_for_every_length_and_start(formats, twin):
    for amsgrad, nesterov, l2 in VARIANTS:
        shared = coefficients(nesterov, l2)
        runs = [make_run(formats, numel, amsgrad, shared, start=numel % 5) for numel in range(301)]
        expected = [copy(run) for run in runs]
        for run in expected:
            reference.update(run)
        twin.update(runs)
        for run, other in zip(runs, expected, strict=True):
            assert_same_bits(run, other)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_threads_and_neighbours_change_nothing(formats, twin):
    # Together enough for two threads; the cut, at half of them, lies in the middle of a run.
    plain, nesterov = coefficients(False, False), coefficients(True, True)
    runs = [
        make_run(formats, numel, amsgrad, shared, start)
        for numel, amsgrad, shared, start in (
            (0, False, plain, 0),
            (1, True, plain, 1),
            (70_001, False, nesterov, 2),
            (0, True, plain, 0),
            (129, True, plain, 0),
            (140_003, False, plain, 3),
        )
    ]
    expected, threaded = [copy(run) for run in runs], [copy(run) for run in runs]
    for run in expected:
        reference.update(run)
    twin.update(runs)
    torch.set_num_threads(2)
    twin.update(threaded)
    torch.set_num_threads(1)
    for run, other, oracle in zip(runs, threaded, expected, strict=True):
        assert_same_bits(run, oracle)
        assert_same_bits(other, oracle)


def test_no_runs(twin):
    twin.update([])


def test_an_unknown_combination_changes_nothing(twin):
    shared = coefficients(False, False)
    good = make_run((FP32, None, FP32), 10, False, shared)
    bad = make_run((FP32, None, FP64), 10, False, shared)
    before = copy(good)
    with pytest.raises(ValueError, match=r"no kernel for torch\.float32 params with no master and"):
        twin.update([good, bad])
    assert_same_bits(good, before)


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=str)
def test_means_equal_reference(dtype, twin):
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(SPECIAL, dtype=FP64)
    for numel in [*range(40), 511, 512, 513, 5_003, 150_001]:
        for ranks in range(1, 9) if numel < 10_000 else (2, 3):
            start = (numel + ranks) % 5  # also where no vector is aligned
            shards = torch.randn(ranks, start + numel, generator=generator, dtype=FP64)
            shards *= 10.0 ** torch.randint(-8, 39, shards.shape, generator=generator)
            chosen = torch.rand(shards.shape, generator=generator) < 0.2
            which = torch.randint(len(SPECIAL), shards.shape, generator=generator)
            shards = torch.where(chosen, special[which], shards).to(dtype)
            expected, found, threaded = torch.full(
                (3, start + numel + 3), -1.0, dtype=torch.promote_types(dtype, FP32)
            )
            given = [shard[start:] for shard in shards]
            reference.mean(given, expected[start : start + numel])
            twin.mean(given, found[start : start + numel])
            torch.set_num_threads(2)
            twin.mean(given, threaded[start : start + numel])
            torch.set_num_threads(1)
            # The slices' neighbours too.
            assert torch.equal(bits(found), bits(expected))
            assert torch.equal(bits(threaded), bits(expected))
