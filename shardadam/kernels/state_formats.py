"""How moments are stored: the tensors of each format, and from one format to another.

[Note: state formats]

`docs/low_memory.md` defines what the codes mean. Tensors of different meaning have different names,
so that nothing that reads a checkpoint takes one for another:

    fp32    exp_avg          exp_avg_sq                               float64 for float64 params
    bf16    the same names, in bfloat16
    q16     exp_avg_ratio    exp_avg_sq_q16    and the *_scale of each, an element per block
    q8      exp_avg_ratio    exp_avg_sq_q8     of 128

AMSGrad's maximum is stored like exp_avg_sq.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.kernels import coded_state
from shardadam.kernels.random_bits import BLOCK
from shardadam.kernels.reference import join8_master, join_master
from shardadam.kernels.run import state_dtype

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_SCALE = "_scale"
_CONVERTED_AT_ONCE = 2**12 * BLOCK
_NEAREST = 0x8000  # in place of 16 random bits
_LARGEST = 2.0**60  # ratio: others' moments may be anything


@dataclass(frozen=True, slots=True)
class StateFormat:
    """A format; ``names`` and ``dtypes`` are those of the tensors of the three `MOMENTS`.

    ``has_scales``: each has another tensor besides, of block scales.
    """

    name: str
    names: tuple[str, str, str]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] | None = None
    has_scales: bool = False

    def tensors(self, maximum: bool) -> dict[str, str]:
        """The names of all tensors, by the field of `Run` that takes them."""
        found: dict[str, str] = {}
        for moment, name in zip(MOMENTS, self.names, strict=True):
            if maximum or moment != "max_exp_avg_sq":
                found[moment] = name
                if self.has_scales:
                    found[moment + _SCALE] = name + _SCALE
        return found

    def dtype(self, name: str, param_dtype: torch.dtype) -> torch.dtype:
        """Of the tensor ``name``, for params of ``param_dtype``."""
        if self.dtypes is None:
            return state_dtype(param_dtype)
        if name.endswith(_SCALE):
            return torch.bfloat16
        return self.dtypes[self.names.index(name)]


def _coded(width: int, code: torch.dtype) -> StateFormat:
    names = ("exp_avg_ratio", f"exp_avg_sq_q{width}", f"max_exp_avg_sq_q{width}")
    return StateFormat(f"q{width}", names, (torch.int8, code, code), has_scales=True)


FORMATS = {
    "fp32": StateFormat("fp32", MOMENTS),
    "bf16": StateFormat("bf16", MOMENTS, (torch.bfloat16,) * 3),
    "q16": _coded(16, torch.int16),
    "q8": _coded(8, torch.uint8),
}
MASTERS = {"master": torch.float32, "remainder": torch.int16, "remainder8": torch.int8}
"""The dtype of what makes up a 16-bit param's master weights, by its name."""
MASTER_BITS = {"master": 32, "remainder": 32, "remainder8": 24}
"""How many bits it makes of a master weight."""


def format_of(names: Iterable[str]) -> StateFormat | None:
    """The format that has ``names`` among its tensors ("fp32" for "bf16"), if one has."""
    given = set(names)
    for form in FORMATS.values():
        if given.issuperset(form.tensors(False).values()):
            return form
    return None


def is_scale(name: str) -> bool:
    """Whether the tensor ``name`` has an element per block."""
    return name.endswith(_SCALE)


def part_of(name: str, start: int, stop: int) -> slice:
    """Of the tensor ``name``, what belongs to elements ``[start, stop)``, a block's first on."""
    if not is_scale(name):
        return slice(start, stop)
    first, blocks = start // BLOCK, -(-(stop - start) // BLOCK)
    return slice(first, first + blocks)


def per_element(scale: Tensor, numel: int) -> Tensor:
    """The scale of each of ``numel`` elements, 1-D, given one per block."""
    return scale.repeat_interleave(BLOCK)[:numel]


def per_block(scale: Tensor) -> Tensor | None:
    """One per block, given what `per_element` made; None if elements of a block differ."""
    found = scale[::BLOCK]
    return found if torch.equal(per_element(found, scale.numel()), scale) else None


def decode_elements(form: StateFormat, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `decode`, where every element has a scale of its own."""
    maximum = form.names[2] in stored
    fields = {field: stored[name] for field, name in form.tensors(maximum).items()}
    rows = {field: t if field.endswith(_SCALE) else t[:, None] for field, t in fields.items()}
    roots = {
        moment: coded_state.decode_root(rows[moment], rows[moment + _SCALE])
        for moment in MOMENTS[1:]
        if moment in rows
    }
    first = coded_state.decode_ratio(rows["exp_avg"], rows["exp_avg_scale"], roots["exp_avg_sq"])
    squares = {moment: (root * root)[:, 0] for moment, root in roots.items()}
    return {"exp_avg": first[:, 0], **squares}


def decode(form: StateFormat, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments that ``stored`` stands for, 1-D, in float32 (float64 stays).

    Args:
        form: the format of ``stored``.
        stored: its tensors by name, 1-D; those of the maximum may be missing.
    """
    maximum = form.names[2] in stored
    moments = MOMENTS if maximum else MOMENTS[:2]
    if not form.has_scales:
        tensors = {name: stored[name] for name in moments}
        return {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}
    numel = stored[form.names[0]].numel()
    device = stored[form.names[0]].device
    found = {m: torch.empty(numel, dtype=torch.float32, device=device) for m in moments}
    for start in range(0, numel, _CONVERTED_AT_ONCE):
        stop = min(start + _CONVERTED_AT_ONCE, numel)
        fields = {
            field: stored[name][part_of(name, start, stop)]
            for field, name in form.tensors(maximum).items()
        }
        root = _root(fields, "exp_avg_sq")
        codes = coded_state.blocks_of(fields["exp_avg"])
        exp_avg = coded_state.decode_ratio(codes, fields["exp_avg_scale"], root)
        coded_state.put(found["exp_avg"][start:stop], exp_avg)
        coded_state.put(found["exp_avg_sq"][start:stop], root * root)
        if maximum:
            root = _root(fields, "max_exp_avg_sq")
            coded_state.put(found["max_exp_avg_sq"][start:stop], root * root)
    return found


def encode(
    form: StateFormat, moments: Mapping[str, Tensor], param_dtype: torch.dtype
) -> dict[str, Tensor]:
    """What stands for ``moments`` in ``form``, rounded to nearest: one result for one input.

    Args:
        form: the format.
        moments: 1-D, by name, a block's first element first.
        param_dtype: which "fp32" depends on.

    Raises:
        ValueError: a moment that has no code: not finite, or a negative square.
    """
    for name, values in moments.items():
        if form.dtypes is not None and not _has_code(name, values):
            raise ValueError(f"{name} has values that {form.name} has no code for (NaN, inf, < 0)")
    maximum = "max_exp_avg_sq" in moments
    numel, device = moments["exp_avg"].numel(), moments["exp_avg"].device
    found = {
        name: torch.empty(
            -(-numel // BLOCK) if is_scale(name) else numel,
            dtype=form.dtype(name, param_dtype),
            device=device,
        )
        for name in form.tensors(maximum).values()
    }
    for start in range(0, numel, _CONVERTED_AT_ONCE):
        stop = min(start + _CONVERTED_AT_ONCE, numel)
        given = {moment: values[start:stop] for moment, values in moments.items()}
        fields = {
            field: found[name][part_of(name, start, stop)]
            for field, name in form.tensors(maximum).items()
        }
        _encode(form, given, fields)
    return found


def _has_code(name: str, values: Tensor) -> bool:
    if not values.numel():
        return True
    low, high = values.aminmax()
    return bool(low.isfinite() & high.isfinite()) and (name == "exp_avg" or bool(low >= 0))


def _root(fields: Mapping[str, Tensor], moment: str) -> Tensor:
    codes = coded_state.blocks_of(fields[moment])
    return coded_state.decode_root(codes, fields[f"{moment}{_SCALE}"])


def _encode(form: StateFormat, given: Mapping[str, Tensor], fields: Mapping[str, Tensor]) -> None:
    if form.dtypes is None:
        for moment, values in given.items():
            fields[moment].copy_(values)
        return
    blocks = {moment: coded_state.blocks_of(values.float()) for moment, values in given.items()}
    nearest = torch.full_like(blocks["exp_avg"], _NEAREST, dtype=torch.int64)
    largest = blocks.get("max_exp_avg_sq")
    if not form.has_scales:
        coded_state.put(fields["exp_avg"], blocks["exp_avg"].bfloat16())
        square = coded_state.stochastic_bf16(blocks["exp_avg_sq"], nearest)
        coded_state.put(fields["exp_avg_sq"], square)
        if largest is not None:
            coded_state.put(fields["max_exp_avg_sq"], coded_state.bf16_up(largest))
        return
    width = coded_state.BITS[fields["exp_avg_sq"].dtype]
    root = coded_state.sqrt(blocks["exp_avg_sq"])
    _put(fields, "exp_avg_sq", *coded_state.code_root(root, nearest, width))
    # A moment that belongs to no square would take the block's scale for itself.
    ratio = torch.where(root > 0, blocks["exp_avg"] / root, 0.0).clamp(-_LARGEST, _LARGEST)
    _put(fields, "exp_avg", *coded_state.code_ratio(ratio, nearest, 0.0))
    if largest is not None:
        _put(fields, "max_exp_avg_sq", *coded_state.code_maximum(coded_state.sqrt(largest), width))


def _put(fields: Mapping[str, Tensor], moment: str, codes: Tensor, scale: Tensor) -> None:
    coded_state.put(fields[moment], codes)
    fields[f"{moment}{_SCALE}"].copy_(scale)


def master_between(param: Tensor, given: Tensor, wanted: str) -> Tensor:
    """What makes up the master weights of ``param`` (bfloat16) in one form, from another.

    Args:
        param: the params, which stay.
        given: float32 masters, or int16 or int8 remainders.
        wanted: one of `MASTERS`. In "remainder8", bits that have no place are cut off.
    """
    if wanted == "master":
        join = join_master if given.dtype == torch.int16 else join8_master
        return join(param, given)
    if given.dtype == torch.float32:
        bits = given.view(torch.int32) - (param.view(torch.int16).to(torch.int32) << 16)
        # Where somebody wrote the param since the last step, the param is right.
        bits = torch.where((bits >= -0x8000) & (bits < 0x8000), bits, 0)
    else:
        bits = given.to(torch.int32) << (0 if given.dtype == torch.int16 else 8)
    return (bits >> (0 if wanted == "remainder" else 8)).to(MASTERS[wanted])
