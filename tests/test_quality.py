"""The quality benchmark runs, and on a short stream its bounds hold."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quality import field
from quality.contenders import Rounded, Task
from quality.forced import USUAL, Setting, run
from quality.stream import Stream
from quality.trainings import BF16_PARAMS, FP32, LEAN, LEANEST, Text, train

MAIN = Path(__file__).parents[1] / "benchmarks" / "quality.py"
OURS = (field.FP32, field.BF16, field.Q16, field.Q8)


def short_stream():
    return Stream(batch=4, table_rows=512)


def test_ours_are_near_fp32_and_never_large():
    small = Setting(scale=1e-6)
    names = (*OURS, field.COMPANDED)
    rows = run(short_stream(), {USUAL: names, small: names}, steps=100, every=10)
    found = {(row.setting, row.contender): row for row in rows}
    for setting in (USUAL, small):
        reference = found[setting, field.FP32]
        assert set(reference.errors.values()) == {0.0} and reference.bias == 0.0
        for name, most in ((field.Q16, 0.02), (field.Q8, 0.10)):
            row = found[setting, name]
            # Errors grow with steps: that all are under the bounds for step 1,600 is little.
            assert 0.0 < row.errors[100] <= most
            assert row.largest_rare <= row.largest <= 5.0
            assert abs(row.bias) < 0.01
    # What the measure is for: a scale in fp16 that is 0 makes exp_avg_sq 0, and updates m / eps.
    assert found[small, field.COMPANDED].largest > 1000.0


def test_the_reference_is_adam():
    stream = short_stream()
    ours = field.make(field.FP32, Task(stream.shapes))
    plain = Rounded(Task(stream.shapes), lambda exp_avg, exp_avg_sq: (exp_avg, exp_avg_sq))
    for _ in range(5):
        grads = stream.gradients()
        update = ours.update(grads)
        # Both are a dozen roundings from the rule: two times 12 · 2⁻²⁴ < 2e-6, relative; exp_avg,
        # a difference, can lose all of its digits, but not more than that of what is subtracted.
        torch.testing.assert_close(update, plain.update(grads), rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(ours.root(), plain.root(), rtol=2e-6, atol=0.0)
        stream.train(update)


@pytest.mark.parametrize("name", [name for name in field.FIELD if field.FIELD[name].package])
def test_a_package_gives_its_updates_away(name):
    if reason := field.why_not(name):
        pytest.skip(reason)
    rows = run(short_stream(), {USUAL: (field.FP32, name)}, steps=2, every=1)
    # Step 1 reads no codes yet. torchao has 1 - 0.999 in fp32, within 2⁻²⁵ / 0.001, and its root.
    assert rows[1].errors[1] < 1.6e-5 < rows[1].errors[2]


@pytest.mark.parametrize("configuration", [FP32, BF16_PARAMS, LEAN, LEANEST])
def test_a_training_learns(configuration):
    text = Text(steps=20)
    text.held_out_bytes = 5_000
    untrained = 5.545  # ln 256: its head is zero
    assert train(text, configuration, lr=1.2e-2, seed=0).loss < 0.75 * untrained


def test_tables_and_figures(tmp_path):
    command = [sys.executable, MAIN, "--quick", "--steps=3", "--parts", "updates"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "met: shardadam q8, step 3, error of the update" in done.stdout
    for file in ("updates.csv", "updates.png"):
        assert (tmp_path / file).stat().st_size > 0
