"""Scalars of every step, read back from the files that TensorBoard reads."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import shardadam
from models import mlp, train, train_scaled
from ranks import run_ranks
from shardadam.integrations.tensorboard import StepLog

SECONDS = {"meet", "reduce", "clip", "update", "gather", "exposed_communication"}


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """By tag: steps and values."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def logged(rank: int, folder) -> list[dict]:
    """Six steps, the stats after each."""
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), max_grad_norm=1.0)
    train(model, optimizer, range(1))
    log = StepLog(optimizer, folder, every=2, steps_before=100)
    seen = []
    for seed in range(6):
        train(model, optimizer, range(seed, seed + 1))
        seen.append(optimizer.stats())
    log.close()
    train(model, optimizer, range(1))
    return seen


@pytest.mark.filterwarnings("ignore:gradients are equal")
def test_the_first_of_two_ranks_writes_what_stats_say(tmp_path):
    stats = run_ranks(2, logged, tmp_path)[0]
    found = scalars(tmp_path)
    assert found.keys() == {
        *("shardadam/grad_norm", "shardadam/skipped_steps", "shardadam/sent_bytes"),
        *(f"shardadam_seconds/{phase}" for phase in SECONDS),
    }
    assert len([*tmp_path.iterdir()]) == 1, "one rank's file"
    for values in found.values():  # the log came after one step, and wrote of every second one
        assert [step for step, _ in values] == [103, 105, 107]
    norms = [value for _, value in found["shardadam/grad_norm"]]
    assert norms == pytest.approx([s["grad_norm"] for s in stats[1::2]], rel=1e-6)  # float32
    assert [value for _, value in found["shardadam/skipped_steps"]] == [0, 0, 0]
    (_, sent), *_ = found["shardadam/sent_bytes"][1:]
    before, after = (sum(stats[i]["sent_bytes"].values()) for i in (1, 3))
    assert sent == (after - before) / 2 > 0
    for phase in SECONDS - {"exposed_communication"}:
        (_, seconds), *_ = found[f"shardadam_seconds/{phase}"][1:]
        expected = (stats[3]["seconds"][phase] - stats[1]["seconds"][phase]) / 2
        assert seconds == pytest.approx(expected, rel=1e-6)
    for exposed, reduce, gather in zip(
        *(found[f"shardadam_seconds/{p}"] for p in ("exposed_communication", "reduce", "gather")),
        strict=True,
    ):
        assert exposed[1] == pytest.approx(reduce[1] + gather[1], rel=1e-5)


class Kept:
    """A writer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.got.append((tag, scalar_value, global_step))


def test_any_writer_sees_skipped_steps():
    model, writer = mlp(), Kept()
    optimizer = shardadam.AdamW(model.parameters())
    log = StepLog(optimizer, writer)
    train_scaled(model, optimizer, [True, False])
    log.close()
    train(model, optimizer, range(1))
    assert [g for g in writer.got if g[0] == "shardadam/skipped_steps"] == [
        ("shardadam/skipped_steps", 1, 1),
        ("shardadam/skipped_steps", 1, 2),
    ]
    assert not any(tag == "shardadam/grad_norm" for tag, *_ in writer.got), "it was not measured"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": 0}, "every: expected a number of steps, found 0"),
        ({"rank": 1}, "rank: expected one of 1 or None, found 1"),
        ({"writer": 3}, "writer: expected a SummaryWriter or a directory, found int"),
        ({"optimizer": None}, "optimizer: expected one of shardadam's, found NoneType"),
    ],
)
def test_wrong_arguments(options, error):
    given = {"optimizer": shardadam.AdamW(mlp().parameters()), "writer": Kept()} | options
    with pytest.raises(ValueError, match=error):
        StepLog(**given)


def test_without_tensorboard_a_directory_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    optimizer = shardadam.AdamW(mlp().parameters())
    with pytest.raises(ImportError, match=r"pip install 'shardadam\[tensorboard\]'"):
        StepLog(optimizer, tmp_path / "events")
    assert not (tmp_path / "events").exists()
