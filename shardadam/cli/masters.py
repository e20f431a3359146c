"""Others' master weights in our form: what belongs to which param, and is it exact?"""

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError
from shardadam.kernels.reference import split_master

PARAMS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a param with a master can have."""


def near(param: Tensor, master: Tensor) -> bool:
    """Whether one is a rounding of the other, to bf16 or finer and of any kind.

    That much may lie between them: some cut where others round, and low-precision masters are
    rounded once more than the params. Params of a trained model are further apart.
    """
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    p, m = param.detach().to(wide).flatten(), master.detach().to(wide).flatten()
    sizes = torch.where(m.isfinite(), m.abs(), 0.0)
    largest = float(sizes.max()) if sizes.numel() else 0.0
    kind = torch.finfo(param.dtype)
    subnormal = kind.smallest_normal * kind.eps
    room = sizes * 2.0**-7 + max(subnormal, largest * 2.0**-40)
    return bool((((p - m).abs() <= room) | (p == m) | (p.isnan() & m.isnan())).all())


def settle(param: Tensor, master: Tensor, where: str) -> tuple[Tensor, dict[str, Tensor], int]:
    """The param as our rounding of ``master``, the state that makes up the rest, and changes.

    Every bit of the master is kept: by a remainder (bf16), a float32 copy (fp16), or by the param
    itself. ``changes``: the elements of ``param`` that were rounded otherwise.

    Raises:
        CheckpointError: it is another param's, or of another step.
    """
    if not near(param, master):
        raise CheckpointError(
            f"{where}: expected values that its master weights round to: the model is of another "
            "step, or the names are wrong"
        )
    state: dict[str, Tensor] = {}
    if param.dtype == torch.bfloat16:
        values, state["remainder"] = split_master(master.float())
    else:
        values = master.to(param.dtype)
    if param.dtype == torch.float16:
        state["master"] = master.float()
    changed = (values != param) & ~(values.isnan() & param.isnan())
    return values, state, int(changed.sum())
