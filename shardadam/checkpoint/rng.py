"""The states of the random number generators of this process."""

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError

Restore = Callable[[], object]


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States as tensors by generator, and what of them is no tensor.

    Python's, torch's, the current CUDA device's where CUDA is in use, numpy's global one where
    numpy is imported.
    """
    version, words, gauss = random.getstate()
    tensors = {"python": torch.tensor(words, dtype=torch.int64), "torch": torch.get_rng_state()}
    rest: dict[str, Any] = {"python": [version, gauss]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tensors["cuda"] = torch.cuda.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        if kind == "MT19937":
            tensors["numpy"] = torch.tensor(keys.tolist(), dtype=torch.int64)
            rest["numpy"] = [int(position), int(has_gauss), float(cached)]
    return tensors, rest


def plan(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> list[Restore]:
    """What is to be called to restore the states; each has been tried on another generator.

    Raises:
        CheckpointError: a state that no generator has.
    """
    restores: list[Restore] = []
    name = ""
    try:
        for name in tensors:
            restores += _PLANS[name](tensors[name], rest.get(name)) if name in _PLANS else []
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the random state of {name} is not one: {error}") from error
    return restores


def _python(words: Tensor, rest: Any) -> list[Restore]:
    version, gauss = rest
    if gauss is not None and not isinstance(gauss, float):
        raise ValueError("expected a number or null")
    state = (version, tuple(words.tolist()), gauss)
    random.Random().setstate(state)
    return [lambda: random.setstate(state)]


def _torch(state: Tensor, _: Any) -> list[Restore]:
    torch.Generator().set_state(state)
    return [lambda: torch.set_rng_state(state)]


def _cuda(state: Tensor, _: Any) -> list[Restore]:
    if not torch.cuda.is_available():
        return []
    torch.Generator(device="cuda").set_state(state)
    return [lambda: torch.cuda.set_rng_state(state)]


def _numpy(keys: Tensor, rest: Any) -> list[Restore]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return []
    position, has_gauss, cached = rest
    if keys.numel() != 624 or not 0 <= position <= 624 or not isinstance(cached, float):
        raise ValueError("expected 624 words and a position among them")
    words = numpy.array(keys.tolist(), dtype=numpy.uint32)
    state = ("MT19937", words, position, has_gauss, cached)
    numpy.random.RandomState().set_state(state)
    return [lambda: numpy.random.set_state(state)]


_PLANS: dict[str, Callable[[Tensor, Any], list[Restore]]] = {
    "python": _python,
    "torch": _torch,
    "cuda": _cuda,
    "numpy": _numpy,
}
