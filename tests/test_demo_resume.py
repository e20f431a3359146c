"""The demo, stopped on two ranks, goes on the same on one, two and four."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS, THEIRS = "shardadam.AdamW", "torch.optim.AdamW"
STEPS, STOP = 20, 8


def demo(ranks, out, *options, returns=0):
    data = sorted(map(str, (ROOT / "shardadam").glob("*.py")))
    command = [sys.executable]
    if ranks > 1:
        launch = str(ROOT / "examples/launch.py")
        command += [launch, "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / "examples/train_gpt.py"), "--out", str(out), "--data", *data]
    command += ["--steps", str(STEPS), "--batch-size", "8", "--context", "32", "--layers", "1"]
    command += ["--width", "64", *options]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == returns, done.stdout + done.stderr
    return done.stdout


def held_out(output):
    (cells,) = re.findall(r"held-out bits per byte(.*)", output)
    return [float(number) for number in re.findall(r"\d+\.\d+", cells)[:2]]


def manifest(out, name):
    (path,) = (out / "checkpoints" / name).glob("step-*")
    return json.loads((path / "manifest.json").read_text())["manifest"]


def losses(out, name):
    return manifest(out, name)["documents"]["extras"]["losses"]


def digests(out, name):
    """Of every tensor in the checkpoint: the weights, and all of the optimizer's state."""
    return [shard[-1] for file in manifest(out, name)["files"] for shard in file]


@pytest.mark.timeout(300)  # five launches, each of which imports torch on every rank
def test_resumes_at_another_world_size(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = held_out(demo(2, whole))

    assert f"after step {STOP} of {STEPS}" in demo(2, stopped, "--stop-after", str(STOP))
    ours = stopped / "checkpoints" / OURS
    shutil.copytree(ours, tmp_path / "ours")
    # Resumed, ours is trained to the end; then torch's is stopped in turn.
    assert f"Saved {THEIRS}" in demo(2, stopped, "--resume", "--stop-after", str(STOP))
    assert losses(stopped, OURS) == losses(whole, OURS)
    assert digests(stopped, OURS) == digests(whole, OURS)
    shutil.rmtree(ours)
    shutil.move(tmp_path / "ours", ours)

    for ranks in (1, 4):
        resumed = tmp_path / f"on-{ranks}"
        shutil.copytree(stopped, resumed)
        # Printed to three digits: each is off by half of the last, and the gradients' sums differ
        # in their last bits.
        assert held_out(demo(ranks, resumed, "--resume")) == pytest.approx(expected, abs=0.002)
        for name in (OURS, THEIRS):
            assert losses(resumed, name)[:STOP] == losses(whole, name)[:STOP]
            assert losses(resumed, name) == pytest.approx(losses(whole, name), abs=0.002)


def test_says_what_cannot_be_split(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    output = demo(2, tmp_path, "--batch-size", "7", returns=2)
    assert output == "--batch-size 7 can't be split over 2 ranks.\n"
