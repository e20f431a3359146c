"""Ray Train: a worker is killed, new ones end where an undisturbed run does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launched import ENVIRONMENT, LAUNCH, SCRIPT, launch
from shardadam import checkpoint

pytest.importorskip("ray", reason="ray is not in the test extra here")
RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_train.py"


@pytest.mark.timeout(240)
def test_recovers_from_a_killed_worker():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "6", "--save-every", "2"],
        env=ENVIRONMENT | RAY,
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    undisturbed, disturbed = (line for line in done.stdout.splitlines() if "last started" in line)
    assert undisturbed.startswith("undisturbed: last started at step 0,")
    assert disturbed.startswith("worker 1 killed at step 5: last started at step 4,")
    assert undisturbed.rpartition(" ")[2] == disturbed.rpartition(" ")[2]  # the params' digest


@pytest.mark.timeout(240)
@pytest.mark.fault("Ray: a rank killed", "the same bits")
def test_the_launch_file_starts_a_script_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "slow").touch()
    process = subprocess.Popen(
        [sys.executable, LAUNCH / "ray_job.py", SCRIPT, folder, "30"],
        env=ENVIRONMENT | RAY | {"HOME": str(tmp_path)},  # for Ray's results
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not checkpoint.latest(folder):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    of_ranks = ["pgrep", "-f", f"^{sys.executable} {SCRIPT} {folder}"]
    ranks = subprocess.check_output(of_ranks, text=True).split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    (folder / "slow").unlink()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    again, started, *_ = (folder / "result").read_text().split()
    assert int(started) > 0
    assert again == launch("torchrun.sh", tmp_path / "undisturbed", 30)
