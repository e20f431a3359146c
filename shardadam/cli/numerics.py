"""A self-test: the backend that will run against the rule in plain torch, bit by bit."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.cli.findings import Finding
from shardadam.kernels import Backend, Hyperparameters, Run, backend_for, exact_sum, fold, reference
from shardadam.kernels.state_formats import FORMATS, MASTERS, StateFormat, part_of

_NUMEL = 128 * 37 + 5
_STEPS = 3
_HYPER = Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.1, True, False, None)


@dataclass(frozen=True, slots=True)
class _Case:
    """How a param, its state and its gradient are stored."""

    dtype: torch.dtype
    master: str | None
    form: StateFormat

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} params, {self.master or 'no'} master, {self.form.name} moments"

    def run(self) -> Run:
        """The same at every call, on the host."""
        values = torch.randn(_NUMEL, generator=torch.Generator().manual_seed(0))
        param = values.to(self.dtype)
        state = {
            field: torch.zeros(
                part_of(name, 0, _NUMEL).stop, dtype=self.form.dtype(name, self.dtype)
            )
            for field, name in self.form.tensors(False).items()
        }
        master = None
        if self.master is not None:
            master = torch.zeros(_NUMEL, dtype=MASTERS[self.master])
            if self.master == "master":
                master.copy_(param)
        moments = (state.pop("exp_avg"), state.pop("exp_avg_sq"))
        run = Run(param, *moments, None, master, torch.zeros(_NUMEL), fold(_HYPER, 1.0), seed=7)
        for field, scale in state.items():
            setattr(run, field, scale)
        return run


def _cases() -> Iterator[_Case]:
    for form in FORMATS.values():
        yield _Case(torch.float32, None, form)
        for master in ("remainder", "remainder8", "master", None):
            yield _Case(torch.bfloat16, master, form)
    yield _Case(torch.float16, "master", FORMATS["fp32"])


_FIELDS = ("param", "exp_avg", "exp_avg_sq", "master", "exp_avg_scale", "exp_avg_sq_scale")


def self_test(device: torch.device) -> list[Finding]:
    """Whether a few updates, a mean and a norm are those of the reference to the last bit."""
    backend = backend_for(device)
    cases = list(_cases())
    failed = [str(case) for case in cases if not _same(case, backend, device)]
    failed += [] if _same_norm(backend, device) else ["the gradient norm"]
    failed += [] if _same_mean(backend, device) else ["the mean of gradients"]
    if not failed:
        told = f"{len(cases)} formats, norm and mean are the reference's to the last bit"
        return [Finding("numerics", "ok", told)]
    return [
        Finding(
            "numerics",
            "wrong",
            f"{backend.name} computes something else than the reference in "
            f"{len(failed)} of {len(cases) + 2} tests: {'; '.join(failed[:3])}",
            "do not train on this rank: its results can't be trusted. Run the doctor there alone; "
            "if it fails again, reinstall shardadam, and else suspect the hardware",
        )
    ]


def _same(case: _Case, backend: Backend, device: torch.device) -> bool:
    ours, expected = case.run(), case.run()
    for field in (*_FIELDS, "grad"):
        tensor = getattr(ours, field)
        setattr(ours, field, None if tensor is None else tensor.to(device))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, _STEPS + 1):
        grad = torch.randn(_NUMEL, generator=generator) * 10.0 ** (step - 2)
        coefficients = fold(_HYPER, float(step))
        ours.grad.copy_(grad)
        ours.coefficients = expected.coefficients = coefficients
        expected.grad = grad
        backend.update([ours])
        reference.update(expected)
    return all(
        _equal(getattr(ours, field), getattr(expected, field))
        for field in _FIELDS
        if getattr(expected, field) is not None
    )


def _same_norm(backend: Backend, device: torch.device) -> bool:
    values = torch.randn(_NUMEL, generator=torch.Generator().manual_seed(2))
    words = exact_sum.zero(device)
    expected = exact_sum.zero()
    backend.sum_squares([values.to(device)], words)
    reference.sum_squares(values, expected)
    root = torch.tensor(exact_sum.root(expected), dtype=torch.float64)
    return _equal(backend.root(words), root)


def _same_mean(backend: Backend, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(3)
    shards = [torch.randn(_NUMEL, generator=generator).bfloat16() for _ in range(3)]
    found, expected = torch.empty(_NUMEL, device=device), torch.empty(_NUMEL)
    backend.mean([shard.to(device) for shard in shards], found)
    reference.mean(shards, expected)
    return _equal(found, expected)


def _equal(found: Tensor, expected: Tensor) -> bool:
    """To the last bit: no number here is a NaN, and zeros have signs."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    return torch.equal(found.cpu().view(integers), expected.view(integers))
