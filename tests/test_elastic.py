"""Runs that are killed, asked to end, started again: they end as if nothing had happened."""

import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ranks import run_ranks
from shardadam import checkpoint, elastic

SCRIPT = Path(__file__).with_name("elastic_run.py")
STEPS = 14


def start(folder: Path, *, ranks: int = 2, restarts: int = 0, disturbed: str = "", steps=STEPS):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    command += ["--monitor-interval", "0.1", str(SCRIPT), str(folder), str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DISTURBED": disturbed}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, returns: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == returns, output
    return output


def result(folder: Path) -> tuple[str, int, int, int]:
    digest, started, attempt, losses = (folder / "result").read_text().split()
    return digest, int(started), int(attempt), int(losses)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(folder))
    digest, started, attempt, losses = result(folder)
    assert (started, attempt, losses) == (0, 0, STEPS)
    return digest


@pytest.mark.timeout(600)
@pytest.mark.fault("killed, restarted by torchrun over gloo, 5 or 20 times on end", "the same bits")
def test_killed_ranks_are_started_again_and_end_with_the_same_bits(undisturbed, tmp_path, times):
    """Of 32 restarts with torch's own store, 22 failed."""
    early = [(attempt, attempt % 2, 5 + attempt % 3) for attempt in range(times(0, 15))]
    late = [(0, 1, 5), (1, 0, 4), (2, 1, 9), (3, 0, 12), (4, 1, 13)]
    deaths = early + [(len(early) + attempt, rank, step) for attempt, rank, step in late]
    disturbed = " ".join(f"{a}:{rank}:{step}:SIGKILL" for a, rank, step in deaths)
    finish(start(tmp_path / "run", restarts=len(deaths), disturbed=disturbed))
    digest, started, attempt, losses = result(tmp_path / "run")
    assert digest == undisturbed
    assert (started, attempt, losses) == (12, len(deaths), STEPS)


@pytest.mark.fault("preempted by {name}, with grace", "saved, then the same bits")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_rank_that_is_asked_to_end_has_all_save_the_same_step(name, undisturbed, tmp_path):
    folder = tmp_path / "run"
    finish(start(folder, restarts=3, disturbed=f"0:1:6:{name}"))  # exits with 0: nobody restarts
    assert not (folder / "result").exists()
    assert checkpoint.latest(folder).name == "step-00000007"
    finish(start(folder))
    digest, started, attempt, losses = result(folder)
    assert digest == undisturbed
    assert (started, attempt, losses) == (7, 0, STEPS)


def test_a_launcher_that_is_asked_to_end_passes_it_on(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, steps=100_000)
    deadline = time.monotonic() + 60
    while not list(folder.glob("step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    saved = checkpoint.latest(folder)
    step = int(saved.name.removeprefix("step-"))
    finish(start(folder, steps=step + 2))
    assert result(folder)[1] == step


@pytest.mark.fault("preempted, and back on 3 ranks, then 1", "the same batches")
def test_other_numbers_of_ranks_go_on_with_the_same_batches(tmp_path):
    folder = tmp_path / "run"
    finish(start(folder, ranks=2, disturbed="0:0:5:SIGTERM"))
    finish(start(folder, ranks=3, disturbed="0:2:9:SIGTERM"))
    finish(start(folder, ranks=1))
    assert result(folder)[1:] == (10, 0, STEPS)


@pytest.mark.timeout(1800)
@pytest.mark.fault("kill -9 at random moments, 3 or 50 times, with restarts", "the same bits")
def test_kills_at_random_moments(undisturbed, tmp_path, times):
    """From outside, also in the middle of a save; the launcher starts the ranks again."""
    for run in range(times(1, 10)):
        killed(tmp_path / str(run), random.Random(run), kills=times(3, 5))
        assert result(tmp_path / str(run))[0] == undisturbed


def killed(folder: Path, rng: random.Random, kills: int) -> None:
    process = start(folder, restarts=20)
    time.sleep(4)
    for _ in range(kills):
        time.sleep(rng.uniform(0.0, 3.0))
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", SCRIPT.name], capture_output=True, text=True
        ).stdout.split()
        if children:
            os.kill(int(rng.choice(children)), signal.SIGKILL)
    finish(process)


def batches_of(rank: int) -> list[list[int]]:
    batches = elastic.Batches(100, batch_size=12, seed=5)
    return [batches.of(step) for step in range(20)]


def test_batches_are_shared_out():
    alone = elastic.Batches(100, batch_size=12, seed=5, rank=0, world_size=1)
    assert alone.steps_per_epoch == 8
    whole = [alone.of(step) for step in range(20)]
    first = [*itertools.chain(*whole[:8])]
    assert len(set(first)) == 96 and set(first) <= set(range(100))
    assert whole[8:16] != whole[:8]
    assert [batch for _, batch in zip(range(5), alone.after(3), strict=False)] == whole[3:8]
    for world_size in (2, 3, 4):
        parts = run_ranks(world_size, batches_of)
        for step, batch in enumerate(whole):
            assert sorted(itertools.chain(*(part[step] for part in parts))) == sorted(batch)
    with pytest.raises(ValueError, match="expected a multiple of 8 ranks, found 12"):
        elastic.Batches(100, batch_size=12, rank=0, world_size=8)
    with pytest.raises(ValueError, match="batch_size: 128 is more than there are samples, 100"):
        elastic.Batches(100, batch_size=128, rank=0, world_size=8)


@pytest.mark.parametrize("before", [signal.SIG_DFL, lambda *_: os._exit(3)])
def test_forked_processes_end_by_signals_as_before(before, tmp_path):
    run = elastic.Run(tmp_path, every=100, model=torch.nn.Linear(3, 3))
    kept = signal.signal(signal.SIGTERM, before)
    try:
        for _ in run.steps(2):
            context = multiprocessing.get_context("fork")
            runs = context.Event()
            child = context.Process(target=lambda runs=runs: (runs.set(), time.sleep(60)))
            child.start()
            runs.wait()  # Python forgets signals that come to a process before
            child.terminate()
            child.join(10)
            code = child.exitcode
            child.kill()
            assert code == (3 if callable(before) else -signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_a_run_begins_anew_only_where_there_is_no_checkpoint(tmp_path):
    """Also if a save broke off between its renames, or there are files of other names."""
    (tmp_path / "step-notes.txt").touch()
    model = torch.nn.Linear(3, 3)
    run = elastic.Run(tmp_path, every=2, model=model)
    assert run.loaded is None
    assert list(run.steps(2)) == [0, 1]
    whole = tmp_path / "step-00000002"
    whole.rename(tmp_path / f"replaced-{whole.name}-{'0' * 16}")
    again = elastic.Run(tmp_path, every=2, model=model)
    assert (again.step, again.loaded.step) == (2, 2)


def run_where_one_folder_cant_be_read(rank: int, folder: Path) -> str:
    name = folder / ("a" * 300 if rank == 0 else "a")
    try:
        elastic.Run(name, every=2, model=torch.nn.Linear(3, 3))
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "begun"


def test_a_folder_that_cant_be_read_is_an_error_on_every_rank(tmp_path):
    first, second = run_ranks(2, run_where_one_folder_cant_be_read, tmp_path)
    assert first.startswith("OSError") and "File name too long" in first
    assert re.match("OSError.*rank 0 of 2: File name too long", second)


def test_the_launcher_says_how_a_preempted_run_exits(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDADAM_PREEMPTED_EXIT_CODE", "75")
    run = elastic.Run(tmp_path, every=100, model=torch.nn.Linear(3, 3))
    with pytest.raises(elastic.Preempted) as asked:
        for _ in run.steps(5):
            signal.raise_signal(signal.SIGTERM)
    assert asked.value.code == 75
    for wrong in ("256", "-1", "", "yes"):
        monkeypatch.setenv("SHARDADAM_PREEMPTED_EXIT_CODE", wrong)
        with pytest.raises(ValueError, match="SHARDADAM_PREEMPTED_EXIT_CODE: expected a number"):
            elastic.Run(tmp_path, every=100, model=torch.nn.Linear(3, 3))


def test_signals_are_handled_as_before_after_the_loop(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run = elastic.Run(tmp_path, every=100, model=torch.nn.Linear(3, 3))
    with pytest.raises(elastic.Preempted, match="asked to end after step 2") as asked:
        for step in run.steps(5):
            assert signal.getsignal(signal.SIGTERM) is not before
            if step == 1:
                signal.raise_signal(signal.SIGUSR1)
    assert asked.value.code == 0
    assert asked.value.path == checkpoint.latest(tmp_path) == tmp_path / "step-00000002"
    assert signal.getsignal(signal.SIGTERM) is before
    again = elastic.Run(tmp_path, every=100, model=torch.nn.Linear(3, 3))
    assert list(again.steps(5)) == [2, 3, 4]
    with pytest.raises(ValueError, match="every: expected steps between checkpoints, found 0"):
        elastic.Run(tmp_path, every=0)
