"""The parts of a param's entry: its values, its moments in any format, its master weights.

A moment's part is called as its tensor in [Note: state formats], with ".bf16" where that leaves the
dtype open. So a name says what a part holds, and how many elements of how many bits.
"""

from collections.abc import Iterable

import torch

from shardadam.kernels.state_formats import FORMATS, MASTERS, StateFormat

VALUES = "values"


def parts_of(form: StateFormat, maximum: bool) -> dict[str, str]:
    """The names of the parts of ``form``, by the names of its tensors."""
    end = ".bf16" if form.name == "bf16" else ""
    return {name: name + end for name in form.tensors(maximum).values()}


_MOMENTS = {
    part: (form, name) for form in FORMATS.values() for name, part in parts_of(form, True).items()
}
PARTS = (VALUES, *_MOMENTS, *MASTERS)
MAXIMA = frozenset(parts_of(form, True)[form.names[2]] for form in FORMATS.values())
"""What AMSGrad's maximum is called, in any format."""


def dtype_of(part: str, dtype: torch.dtype) -> torch.dtype:
    """Of the elements of ``part``, of a (real) param of ``dtype``."""
    if part in MASTERS:
        return MASTERS[part]
    if part in _MOMENTS:
        form, name = _MOMENTS[part]
        return form.dtype(name, dtype)
    return dtype


def may_have(part: str, dtype: str) -> bool:
    """Whether a param of ``dtype``, as a manifest has it, may have ``part``: masters not every."""
    if part not in MASTERS:
        return True
    return dtype == "bfloat16" or (dtype == "float16" and part == "master")


def saved_format(parts: Iterable[str]) -> StateFormat | None:
    """The format that ``parts`` has all of, if there is one."""
    given = set(parts)
    for form in FORMATS.values():
        if given.issuperset(parts_of(form, False).values()):
            return form
    return None
