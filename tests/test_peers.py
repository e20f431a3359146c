"""The benchmark runs: else it is found broken on the day when figures are needed."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from training import network
from training.contenders import CONTENDERS, DDP, OURS
from training.rounds import Setting, run

MAIN = Path(__file__).parents[1] / "benchmarks" / "peers.py"


def test_a_tiny_table_of_two_contenders(tmp_path):
    command = [sys.executable, MAIN, "--models", "tiny", "--ranks", "2", "--rounds", "1"]
    command += ["--contenders", DDP, OURS, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not the same training" not in done.stdout and "not measured" not in done.stdout
    with (tmp_path / "peers.csv").open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    assert [(line["contender"], line["rank"]) for line in lines] == [
        *((DDP, "0"), (DDP, "1")),
        *((OURS, "0"), (OURS, "1")),
    ]
    assert all("torch" in line["stamp"] and float(line["cpu_ms"]) > 0 for line in lines)
    ddp, ours = lines[0], lines[2]
    assert float(ours["loss"]) == pytest.approx(float(ddp["loss"]), rel=1e-4)
    # 12,480 params have two moments in fp32, of which a rank keeps half: and a step count each.
    assert int(ddp["state_bytes"]) == 8 * 12_480 + 6 * 4
    assert 8 * 12_480 / 2 <= int(ours["state_bytes"]) < 8 * 12_480 * 0.6
    if "no bytes on the wire" not in done.stdout:
        # The device's headers come on top, and a tiny model's words weigh.
        assert 1.0 <= float(ours["device_bytes"]) / float(ours["sent_bytes"]) < 1.15


def test_a_contender_that_fails_is_named(monkeypatch):
    setting = Setting("tiny", 1, "fp32", (OURS,), rows=-1)
    (outcome,) = run(setting, rounds=1, iterations=1, threads=1, namespaces=False)
    assert not outcome.rounds
    assert outcome.failure.startswith("rank 0 ended with 1: ")
    assert "negative dimension" in outcome.failure


def test_a_contender_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "absent", CONTENDERS[OURS].__class__(None, needs="no_such"))
    setting = Setting("tiny", 1, "fp32", ("absent",))
    (outcome,) = run(setting, rounds=1, iterations=1, threads=1, namespaces=False)
    assert outcome.failure == "no_such is not installed: pip install '.[bench]'"


def test_a_link_has_its_rate():
    try:
        with network.shaped_link("1gbit") as (first, second):
            assert first.counts and not first.shared and first.command != second.command
            shown = network._run(second.command, f"tc qdisc show dev {network.DEVICE}")
            assert "rate 1Gbit" in shown
    except network.Unavailable as error:
        pytest.skip(f"no shaped link here: {error}")
