"""`convert`: from one format to another, bit for bit."""

import contextlib
import os
import secrets
import shutil
import sys
from pathlib import Path

from shardadam.checkpoint import folders
from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli import apex, dcp, deepspeed, ours, torchfile
from shardadam.cli.coded import decode_moments
from shardadam.cli.recognising import Format, recognise
from shardadam.cli.run_state import RunState
from shardadam.cli.telling import WHOLE, one_line


def convert(
    source: Path,
    target: Path,
    to: Format,
    step: int | None,
    optimizer: str | None,
    model: Path | None = None,
) -> int:
    """Write ``source`` again as ``target`` and return the exit code.

    ``model``: of a source that is an optimizer's state alone.

    Raises:
        CheckpointError: ``target`` is there, ``source`` is none, or it does not fit the format.
        OSError: it could not be written; nothing is left of it.
    """
    _refuse_existing(target)
    found = recognise(source)
    if found.format is to:
        raise CheckpointError(f"{source}: expected another format than {to.value}")
    if found.format is Format.APEX:
        state = apex.read(found.path, model, optimizer)
    elif model is not None:
        raise CheckpointError(f"{source}: expected a checkpoint of apex to go with --model")
    else:
        state = _READ[found.format](found.path)
        decode_moments(state)
    notes = state.notes
    if optimizer is not None:
        _check_optimizer(optimizer, state, source)
        state.optimizer = optimizer
    elif state.optimizer is None and state.groups:
        state.optimizer = "AdamW"
        if to is Format.OURS:
            notes.append("taken for AdamW's, as it says nothing else (--optimizer)")
    named = folders.step_of(target.name) if to is Format.OURS else None
    if step is None:
        step = named if named is not None else state.steps
    elif named not in (None, step):
        raise CheckpointError(f"{target}: expected a name for step {step}")
    if not 0 <= step < 10**18:
        raise CheckpointError(f"step: expected an int from 0, found {step}")
    temporary = target.with_name(f".converting-{target.name}-{secrets.token_hex(4)}")
    try:
        written = _write(temporary, to, state, step)
        if named is None:
            written = temporary
        _refuse_existing(target)
        os.rename(written, target)
        folders.sync(target.parent)
    except OSError as error:
        if error.filename is not None:  # in the words of whoever asked
            error.filename = str(error.filename).replace(temporary.name, target.name)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    if state.left_out:
        more = f" and {len(state.left_out) - 6} more" if len(state.left_out) > 6 else ""
        notes.append(f"left out: {', '.join(state.left_out[:6])}{more}")
    for note in notes:
        print(one_line(f"shardadam ckpt convert: {note}"), file=sys.stderr)
    print(one_line(f"{target}: {len(state.model)} tensors, state of {len(state.state)}"))
    return WHOLE


_READ = {
    Format.OURS: ours.read,
    Format.DCP: dcp.read,
    Format.TORCH: torchfile.read,
    Format.DEEPSPEED: deepspeed.read,
}


def _write(temporary: Path, to: Format, state: RunState, step: int) -> Path:
    if to is Format.OURS:
        return ours.write(temporary, step, state)
    if to is Format.DCP:
        dcp.write(temporary, state)
    else:
        torchfile.write(temporary, state)
    return temporary


def _check_optimizer(optimizer: str, state: RunState, source: Path) -> None:
    """Refuse what would start a product anew that has run for many steps, or leave it out."""
    for name, entry in state.state.items():
        if ("mu_product" in entry) != (optimizer == "NAdam"):
            raise CheckpointError(
                f"{source}: {name}: expected the state of {optimizer}, found "
                f"{'a' if 'mu_product' in entry else 'no'} mu_product, which NAdam alone has"
            )


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: expected a new name, it is there already")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: expected a folder to write into")
