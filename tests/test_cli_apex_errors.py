"""From apex's DistributedFusedAdam: what is refused, and that nothing in a file is executed."""

import io
import os
import random
from collections.abc import Callable

import pytest
import torch

from apex_layout import apex_is_there, gathered, save, v1_ranks, v2
from shardadam import checkpoint
from shardadam.cli import apex, apex_shards
from test_cli import refused
from test_cli_apex import GROUPS, STEP, options, trained, written
from test_cli_convert import converted_or_refused, damaged


def broken_shards(ranks: list[dict], change: Callable[[list], object]) -> str:
    change(ranks)
    try:
        apex_shards.put_together(
            [
                (f"rank {rank}", own)
                for rank, own in enumerate(
                    apex_shards.opened(gathered(ranks)["gathered_states"], "f")
                )
            ],
            "f",
        )
    except checkpoint.CheckpointError as error:
        return str(error)
    raise AssertionError("it was taken")


def test_what_is_not_whole_is_refused(tmp_path, capsys):
    def ranks() -> list[dict]:
        model, params = trained("bf16 with remainders")
        order = GROUPS["one group"]
        return v1_ranks(params, order, options(order, model, False), STEP, 3)

    def fragment(ranks: list) -> object:
        (first, *_) = [f for f in ranks[1]["state"][1]["fragments"] if f.in_local_shard]
        return first

    def bucket(ranks: list) -> object:
        return ranks[1]["state"]["buckets"][fragment(ranks).bucket_id]

    def set_to(thing: Callable, name: str, value: object) -> Callable:
        return lambda ranks: setattr(thing(ranks), name, value)

    assert "expected each of its" in broken_shards(ranks(), lambda ranks: ranks.pop(1))
    twice = broken_shards(ranks(), lambda ranks: ranks.append(ranks[1]))
    assert " twice" in twice
    cases = {
        "expected one of": set_to(fragment, "bucket_id", 99),
        "expected shard_range": set_to(fragment, "shard_range", (5, 3)),
        "expected shard_param_range": set_to(fragment, "shard_param_range", None),
        "expected param_range": set_to(fragment, "param_range", (0, 2**60)),
        "elements, found": set_to(fragment, "shard_range", (0, 0)),
        "expected a 1-D exp_avg_shard": set_to(bucket, "exp_avg_shard", torch.zeros(3)),
        "expected a 1-D exp_avg_sq_shard": set_to(bucket, "exp_avg_sq_shard", None),
        "param_remainders_shard: expected int16": set_to(
            bucket, "param_remainders_shard", torch.ones(64)
        ),
        "the same state": set_to(bucket, "param_remainders_shard", None),
        "expected fragments": lambda ranks: ranks[0]["state"].update({1: {}}),
        "expected a ParameterFragment": lambda ranks: ranks[0]["state"].update(
            {1: {"fragments": [torch.ones(2)]}}
        ),
        "expected a StateBucket": lambda ranks: ranks[1]["state"].update(buckets=[None] * 20),
    }
    for expected, change in cases.items():
        assert expected in broken_shards(ranks(), change)
    # Files: one of another step, one that is none, none of the model's.
    model, params = trained("fp32")
    order = GROUPS["one group"]
    arguments = (params, order, options(order, model, False))
    written("files/2", tmp_path / "files", model, *arguments, STEP)
    later = v1_ranks(*arguments, STEP + 1, 2)
    save({"optim": later[1]}, tmp_path / "files" / "1.pt")
    convert = ("convert", tmp_path / "files", tmp_path / "new", "--to", "ours")
    assert "'s step and params, found other" in refused(capsys, *convert)
    torch.save({"optim": {}}, tmp_path / "files" / "1.pt")
    assert "1.pt: expected the state dict of a Dist" in refused(capsys, *convert)


def test_what_ours_cannot_do_is_refused(tmp_path, capsys):
    model, params = trained("fp32")
    order = GROUPS["one group"]
    convert = ("convert", tmp_path / "apex", tmp_path / "new", "--to", "ours")
    (own,) = options(order, model, named=True)

    def written_with(state: Callable[[dict], object], **changed: object) -> str:
        optim = v2(params, order, [own | changed], STEP)
        state(optim)
        save({"model": model.state_dict(), "optimizer": optim}, tmp_path / "apex")
        return refused(capsys, *convert)

    def nothing(optim: dict) -> None:
        pass

    assert "expected bias_correction" in written_with(nothing, bias_correction=False)
    assert "as many param_names" in written_with(nothing, param_names=["first"])
    assert "step: expected a number" in written_with(lambda o: o["state"].update(step=[1]))
    assert "expected param, exp_avg" in written_with(lambda o: o["state"][1].pop("param"))
    assert "float tensors" in written_with(
        lambda o: o["state"][1].update(exp_avg=torch.ones(41, 17, dtype=torch.int64))
    )
    assert "long: expected exp_avg of shape (41, 17)" in written_with(
        lambda o: o["state"][1].update(exp_avg=torch.ones(17, 41))
    )
    assert "numbers of params" in written_with(lambda o: o["param_groups"].append({}))
    half, _ = trained("fp16 alone")
    remainders = trained("bf16 with remainders")[1]
    ranks = v1_ranks(remainders, order, [own], STEP, 1)
    save({"model": half.state_dict(), "optimizer": gathered(ranks)}, tmp_path / "apex")
    assert "expected bfloat16 for remainders" in refused(capsys, *convert)


def test_any_bytes_are_refused_in_one_line(tmp_path, capsys):
    model, params = trained("bf16 with remainders")
    order = GROUPS["one group"]
    arguments = (params, order, options(order, model, True), STEP)
    generator = random.Random(0)
    for layout in ("v2", "v1/2", "files/2"):
        path = tmp_path / layout.replace("/", "-")
        written(layout, path, model, *arguments)
        file = path / "1.pt" if path.is_dir() else path
        for _ in damaged(file, generator, 60):
            converted_or_refused(capsys, path, tmp_path / "new")


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, (f"touch {os.environ['EVIL']}",)


class Getattr:
    """What the stand-in for getattr must not do."""

    def __reduce__(self) -> tuple:
        return getattr, (getattr, "__name__")


@pytest.mark.parametrize("bad", [Evil, Getattr])
def test_nothing_is_executed(bad, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    model, params = trained("fp32")
    order = GROUPS["one group"]
    ranks = v1_ranks(params, order, options(order, model, True), STEP, 2)
    whole = {"model": model.state_dict()}
    ranks[1]["state"][2] = bad()
    save(whole | {"optimizer": gathered(ranks)}, tmp_path / "inner")
    save(whole | {"optimizer": gathered([bad()])}, tmp_path / "alone")
    save(whole | {"optimizer": ranks[1]}, tmp_path / "outer")
    save(whole | {"optimizer": v2(params, order, [{"lr": bad()}], STEP)}, tmp_path / "v2")
    for name in ("inner", "alone", "outer", "v2"):
        for command in (("inspect",), ("convert",)):
            more = (tmp_path / "new", "--to", "ours") if command == ("convert",) else ()
            error = refused(capsys, *command, tmp_path / name, *more)
            assert "expected tensors and plain values" in error
            if name in ("inner", "alone"):
                assert "gathered_states[" in error
    assert not (tmp_path / "evil").exists()
    # The file is a real danger: torch.load without weights_only does what it says.
    if bad is Evil:
        with apex_is_there():
            torch.load(tmp_path / "inner", weights_only=False)
            file = tmp_path / "alone"
            inner = torch.load(file, weights_only=False)["optimizer"]["gathered_states"][0]
            torch.load(io.BytesIO(inner.numpy().tobytes()), weights_only=False)
        assert (tmp_path / "evil").exists()


def test_stand_ins_are_there_only_while_reading(tmp_path):
    model, params = trained("fp32")
    order = GROUPS["one group"]
    written("files/1", tmp_path / "apex", model, params, order, [{}], STEP)
    before = set(torch.serialization.get_safe_globals())
    assert apex.is_apex(tmp_path / "apex")
    assert set(torch.serialization.get_safe_globals()) == before
