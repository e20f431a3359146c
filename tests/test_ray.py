"""Ray Train: a worker is killed, new ones end where an undisturbed run does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not in the test extra here")
EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_train.py"


@pytest.mark.timeout(240)
def test_recovers_from_a_killed_worker():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "6", "--save-every", "2"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    undisturbed, disturbed = (line for line in done.stdout.splitlines() if "last started" in line)
    assert undisturbed.startswith("undisturbed: last started at step 0,")
    assert disturbed.startswith("worker 1 killed at step 5: last started at step 4,")
    assert undisturbed.rpartition(" ")[2] == disturbed.rpartition(" ")[2]  # the params' digest
