"""Coded state, by its specification: error bounds, finiteness, bounded updates, blocks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coded_runs import BLOCK, BY_BLOCKS, gradients, zero_run
from kernel_runs import FP32, assert_same_bits, coefficients, copy
from shardadam.kernels import Coefficients, Hyperparameters, Run, coded_state, fold, reference
from shardadam.kernels.random_bits import PARAM, STATE, random_bits

BETA1, BETA2 = 0.9, 0.999
HYPER = Hyperparameters(1e-2, BETA1, BETA2, 1e-8, 0.0, decoupled=True, maximize=False)
CODED = ["bf16", "q16", "q8"]
BLOCKS = 1 << 13


def roots_of(generator: torch.Generator, blocks: int) -> Tensor:
    """Roots over all of their range, up to 20 orders of magnitude in a block, and zeros."""
    top = torch.rand(blocks, 1, generator=generator) * 40 - 21
    spread = torch.rand(blocks, 1, generator=generator) * 20
    exponents = top - spread * torch.rand(blocks, BLOCK, generator=generator)
    roots = 10.0 ** exponents.clamp(min=-22.4)
    zero = torch.rand(blocks, BLOCK, generator=generator) < 0.1
    roots[0] = 0
    return torch.where(zero, 0.0, roots)


def random16(generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(1 << 16, like.shape, generator=generator)


@pytest.mark.parametrize("width", [16, 8])
def test_codes_of_roots_are_within_a_step(width):
    generator = torch.Generator().manual_seed(width)
    roots = roots_of(generator, 2_000)
    codes, scale = coded_state.code_root(roots, random16(generator, roots), width)
    decoded = coded_state.decode_root(codes, scale)
    assert torch.equal(codes != 0, roots > 0)
    assert torch.equal(decoded > 0, roots > 0)
    top = scale.double()[:, None]
    assert (roots <= top).all() and (decoded <= top).all()
    if width == 16:
        least = top * 2.0**-32 * (1 + 2.0**-10)
        error, bound = (decoded - roots).abs().double(), 2.0**-11 * roots.double()
    else:
        least = top * 2.0**-16
        error = (decoded.double().sqrt() - roots.double().sqrt()).abs()
        bound = top.sqrt() / 256 * (1 + 2.0**-14)
    small = roots < least
    assert (error <= bound)[~small].all()
    assert (decoded <= 1.01 * least)[small].all()


@pytest.mark.parametrize("width", [16, 8])
def test_coding_roots_keeps_the_square_on_average(width):
    # Of 2^16 roundings of each, as many as there are random bits.
    roots = torch.cat([torch.linspace(0.02, 0.3, BLOCK - 1), torch.ones(1)]).expand(1 << 16, -1)
    random = torch.arange(1 << 16)[:, None].expand_as(roots)
    decoded = coded_state.decode_root(*coded_state.code_root(roots.contiguous(), random, width))
    square = decoded.double().square().mean(0)
    error = (square / roots[0].double().square() - 1).abs().max()
    # To first order in a step's relative width, squared: 8 bits are 2/256 * sqrt(1/0.02) wide.
    assert error < (2e-6 if width == 16 else 5e-4)


@pytest.mark.parametrize("width", [16, 8])
def test_codes_of_maxima_never_decode_to_less_and_stay(width):
    generator = torch.Generator().manual_seed(width)
    roots = roots_of(generator, 2_000)
    codes, scale = coded_state.code_maximum(roots, width)
    decoded = coded_state.decode_root(codes, scale)
    assert (decoded >= roots).all()
    assert torch.equal(codes != 0, roots > 0)
    # What has been coded stays as it is: else it would grow at every step.
    again = coded_state.decode_root(*coded_state.code_maximum(decoded, width))
    same_scale = coded_state.code_maximum(decoded, width)[1] == scale
    assert same_scale.float().mean() > 0.9
    assert torch.equal(again[same_scale], decoded[same_scale])


@pytest.mark.parametrize("stalls", [0.0, 5.0, 1e9])
def test_codes_of_ratios_are_within_a_step(stalls):
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** (torch.rand(2_000, 1, generator=generator) * 60 - 32)
    ratios = torch.randn(2_000, BLOCK, generator=generator) * sizes
    ratios[0] = 0
    codes, scale = coded_state.code_ratio(ratios, random16(generator, ratios), stalls)
    decoded = coded_state.decode_ratio(codes, scale, torch.ones_like(ratios))
    largest = ratios.abs().amax(1).double()
    kept = scale > 0
    assert torch.equal(kept, largest >= 2.0**-100)
    assert (scale.double() >= largest)[kept].all()
    assert (scale.double() <= largest * 1.0079)[kept].all()
    assert (decoded.abs() <= scale.float()[:, None]).all()
    places = (ratios.double() / scale.double()[:, None]).abs() * 127
    step = torch.where(places < stalls, 1.0, 0.5) * (1 + 2.0**-14)
    error = (decoded.double() - ratios.double()).abs() * 127 / scale.double()[:, None]
    assert (error <= step)[kept].all()


@pytest.mark.parametrize("beta1", [0.9, 0.95, 0.99])
def test_an_average_without_gradients_decays(beta1):
    # Beside an element that keeps the scale where it is; to nearest, small codes would stay.
    codes = torch.arange(BLOCK, dtype=torch.int8)[None]
    scale = torch.ones(1, dtype=torch.bfloat16)
    root = torch.ones(1, BLOCK)
    steps = int(20 / (1 - beta1))
    for step in range(steps):
        ratio = coded_state.decode_ratio(codes, scale, root) * beta1
        ratio[0, -1] = 0.99
        random = random_bits(0, step, 0, 1, STATE) & 0xFFFF
        codes, scale = coded_state.code_ratio(ratio, random, 0.5 / (1 - beta1))
    assert (codes[0, :-1] == 0).all()


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
usual = st.one_of(
    st.just(0.0),
    st.floats(2.0**-50, 2.0**56, width=32),
    st.floats(-(2.0**56), -(2.0**-50), width=32),
)


def stream(elements: st.SearchStrategy) -> st.SearchStrategy:
    """Gradients of 12 steps: a few elements' own, and a scale per step for many others."""
    return st.lists(st.lists(elements, min_size=3, max_size=3), min_size=1, max_size=12)


def trained(state: str, grads: list[list[float]], amsgrad: bool, hyper: Hyperparameters):
    """Runs after each step, with the change of the param."""
    own = [torch.tensor(values) for values in grads]
    run = zero_run(
        state, "fp32 param", torch.zeros(130), fold(hyper, 1.0), amsgrad, torch.zeros(130)
    )
    for step, values in enumerate(own, start=1):
        run.grad = values.repeat(44)[:130] * torch.cat([torch.ones(3), torch.linspace(0, 1, 127)])
        run.coefficients = fold(hyper, float(step))
        run.param.zero_()
        reference.update(run)
        yield step, run


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("state", CODED)
@settings(max_examples=60, deadline=None)
@given(grads=stream(finite), eps=st.sampled_from([0.0, 1e-8]))
def test_any_finite_gradients_keep_everything_finite(state, amsgrad, grads, eps):
    before = None
    for _, run in trained(state, grads, amsgrad, replace(HYPER, eps=eps)):
        average, square = coded_state._decode_moments(run)
        for values in (run.param, average, square):
            assert values.isfinite().all()
        assert (run.exp_avg[run.exp_avg_sq == 0] == 0).all()
        if amsgrad:
            maximum = maxima_of(run)
            assert before is None or (maximum >= before).all()
            before = maximum


def maxima_of(run: Run) -> Tensor:
    if run.max_exp_avg_sq.dtype == torch.bfloat16:
        return run.max_exp_avg_sq.float()
    blocks = coded_state.blocks_of(run.max_exp_avg_sq)
    return coded_state.decode_root(blocks, run.max_exp_avg_sq_scale)


@pytest.mark.parametrize("state", CODED)
@settings(max_examples=60, deadline=None)
@given(grads=stream(usual))
def test_updates_are_bounded(state, grads):
    # docs/low_memory.md derives it: the ratio that is coded is rounded up by 2^-7 at most.
    kappa = 1.008
    largest = (1 - BETA1) / (1 - BETA2) ** 0.5 / (1 - kappa**2 * BETA1**2 / BETA2) ** 0.5
    hyper = replace(HYPER, eps=0.0)
    for step, run in trained(state, grads, False, hyper):
        correction = (1 - BETA2**step) ** 0.5 / (1 - BETA1**step)
        assert run.param.abs().max() <= hyper.lr * correction * largest


@pytest.mark.parametrize(("state", "master"), BY_BLOCKS)
def test_a_cut_between_blocks_changes_nothing(state, master):
    numel = 7 * BLOCK + 5
    shared = replace(coefficients(False, False), step=9.0)
    whole = zero_run(state, master, gradients(numel, FP32, 1), shared, True, torch.ones(numel))
    parts = [cut(copy(whole), 0, 3 * BLOCK), cut(copy(whole), 3 * BLOCK, numel)]
    reference.update(whole)
    for run, start in zip(parts, (0, 3 * BLOCK), strict=True):
        reference.update(run)
        assert_same_bits(copy_of(run), copy_of(cut(copy(whole), start, start + len(run.param))))


def cut(run: Run, start: int, stop: int) -> Run:
    """Part of a run, which starts with a block."""
    blocks = slice(start // BLOCK, -(-stop // BLOCK))
    names = {
        "exp_avg_scale": blocks,
        "exp_avg_sq_scale": blocks,
        "max_exp_avg_sq_scale": blocks,
        **dict.fromkeys(
            ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "grad"),
            slice(start, stop),
        ),
    }
    parts = {
        name: None if (tensor := getattr(run, name)) is None else tensor[part]
        for name, part in names.items()
    }
    return replace(run, **parts, first_block=run.first_block + start // BLOCK)


def copy_of(run: Run) -> Run:
    """With storages that hold nothing else."""
    names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "grad")
    scales = ("exp_avg_scale", "exp_avg_sq_scale", "max_exp_avg_sq_scale")
    return replace(
        run,
        **{
            name: None if (tensor := getattr(run, name)) is None else tensor.clone()
            for name in (*names, *scales)
        },
    )


@pytest.mark.parametrize("state", CODED)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_param_and_no_other(state, wrong):
    numel = 2 * BLOCK
    grad = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    shared = fold(HYPER, 1.0)
    runs = []
    for value in (0.0, wrong):
        given_grad = grad.clone()
        given_grad[5] = value
        runs.append(zero_run(state, "split", given_grad, shared, True, torch.ones(numel)))
        reference.update(runs[-1])
    others = torch.arange(numel) != 5
    assert runs[1].param[5].isnan()
    assert torch.equal(runs[0].param[others], runs[1].param[others])
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name))


def test_random_bits_look_random():
    bits = random_bits(0, 1.0, 0, BLOCKS, STATE)
    assert bits.min() >= 0 and bits.max() < 1 << 32
    other_step, other_seed = (
        random_bits(0, 2.0, 0, BLOCKS, STATE),
        random_bits(1, 1.0, 0, BLOCKS, STATE),
    )
    params = random_bits(0, 1.0, 0, BLOCKS, PARAM)
    # The bits that are used: of the root, of the ratio, of params.
    uses = [bits >> 16, bits & 0xFFFF, params >> 16, other_step >> 16, other_seed >> 16]
    fields = [(use + 0.5) / 2.0**16 for use in uses] + [((params >> 24) + 0.5) / 2.0**8]
    limit = 5 / bits.numel() ** 0.5
    for field in fields:
        assert abs(field.mean() - 0.5) < 12**-0.5 * limit
        assert abs(field.std() - 12**-0.5) < limit
    centred = [(field - field.mean()) / field.std() for field in fields]
    for index, field in enumerate(centred):
        for later in centred[index + 1 :]:
            same_bits = later is centred[-1] and index == 2
            assert same_bits or abs((field * later).mean()) < limit
        # Neighbours: in a block, and from block to block.
        for distance in (1, 2, 3, 64):
            assert abs((field[:, distance:] * field[:, :-distance]).mean()) < 1.5 * limit
        assert abs((field[1:] * field[:-1]).mean()) < limit


def test_steps_beyond_2_to_the_31_have_bits_of_their_own():
    shared = replace(Coefficients(0, 0, 0, 0, 0, 0, 1, 1, 0, 1), step=2.0**40)
    assert not torch.equal(
        random_bits(0, shared.step, 0, 1, STATE), random_bits(0, shared.step + 1, 0, 1, STATE)
    )
