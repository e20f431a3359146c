"""`verify`: is it whole?"""

import sys
from pathlib import Path

from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.verifying import verify
from shardadam.cli.recognising import all_of_ours
from shardadam.cli.telling import DAMAGED, WHOLE, one_line


def check(path: Path) -> int:
    """Verify one checkpoint or several and return the exit code.

    Raises:
        CheckpointError: there is none.
    """
    paths = all_of_ours(path)
    if not paths:
        raise CheckpointError(
            f"{path}: expected a checkpoint of shardadam.checkpoint, as only those have digests, "
            f"found {'none' if path.exists() else 'nothing'}"
        )
    code = WHOLE
    for each in paths:
        found = verify(each)
        for whole in found.whole:
            print(one_line(f"whole    {whole}"), flush=True)
        for broken, reason in found.broken:
            code = DAMAGED
            reason = reason.removeprefix(f"{broken}/")
            print(one_line(f"damaged  {broken}: {reason}"), file=sys.stderr, flush=True)
    return code
