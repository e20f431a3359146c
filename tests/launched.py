"""What starts the runs of elastic_run.py, as a person would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPT = Path(__file__).with_name("elastic_run.py")
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}
"""In which what is installed here is found."""


def launch(name: str, folder: Path, steps: int = 9, **environment: str) -> str:
    """The digest of the params after a run that the file ``name`` starts."""
    folder.mkdir()
    done = subprocess.run(
        [LAUNCH / name, SCRIPT, folder, str(steps)],
        env={**ENVIRONMENT, "RANKS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return digest(folder)


def digest(folder: Path) -> str:
    """Of the params after the run in ``folder``."""
    return (folder / "result").read_text().split()[0]
