"""`python -m shardadam ckpt convert`: bit for bit between three formats, and what is refused."""

import os
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import shardadam
from checkpointed import KINDS, advance, assert_same_state, make
from models import mlp, same, train, values
from ranks import run_ranks
from saved_runs import Mixed, full_state, load_converted, step, stored
from shardadam import checkpoint
from shardadam.checkpoint.parts import PARTS
from shardadam.checkpoint.reading import Reader
from shardadam.checkpoint.verifying import Opened
from test_cli import flip, ours, refused, run

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:.*gradients are equal"
)
LOST = "shardadam ckpt convert: left out: the random generators' states\n"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.bool else tensor.contiguous().view(torch.uint8)


def content(folder: Path) -> dict:
    """All params, their state and hyperparameters: what a conversion has to keep."""
    found: dict = {}
    with Opened(folder) as opened:
        reader, documents = Reader(opened), opened.manifest.documents
        for index, entry in enumerate(reader.entries):
            if entry.kind == "param":
                parts = {
                    part: reader.range(index, part, 0, entry.numel, tuple(range(len(entry.shape))))
                    for part in PARTS
                    if reader.has(index, part)
                }
                found[entry.name] = (entry.shape, entry.dtype, entry.scalars, parts)
        found["documents"] = documents.get("optimizer"), documents.get("groups")
        found["step"] = opened.manifest.step
    return found


def assert_same_content(left: Path, right: Path) -> None:
    a, b = content(left), content(right)
    assert a.keys() == b.keys()
    for name in a.keys() - {"documents", "step"}:
        assert a[name][:3] == b[name][:3]
        assert a[name][3].keys() == b[name][3].keys(), name
        for part, tensor in a[name][3].items():
            assert torch.equal(bits(tensor), bits(b[name][3][part])), (name, part)
    assert a["documents"] == b["documents"]
    assert a["step"] == b["step"]


@pytest.mark.parametrize("through", ["torch", "dcp"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, through, tmp_path, capsys):
    folder = ours(tmp_path / "run", kind)
    middle, back = tmp_path / "middle", tmp_path / "step-00000003"
    assert run(capsys, "convert", folder, middle, "--to", through)[::2] == (0, LOST)
    assert run(capsys, "convert", middle, back, "--to", "ours")[::2] == (0, "")
    assert run(capsys, "verify", back)[0] == 0
    assert_same_content(folder, back)
    # The other way round too: what is loaded goes on as what was saved.
    (model, optimizer), (other, resumed) = (make(kind, size) for size in (4096, 2**20))
    checkpoint.load(tmp_path / "run", optimizer=optimizer, model=model)
    with pytest.warns(UserWarning, match="no random state"):
        checkpoint.load(tmp_path, optimizer=resumed, model=other)
    for each in ((model, optimizer), (other, resumed)):
        advance(*each, range(5, 7))
    assert same(values(model), values(other))
    assert all(map(same, full_state(optimizer), full_state(resumed)))


@pytest.mark.parametrize("to", ["torch", "dcp"])
@pytest.mark.parametrize("kind", ["split", "awkward-nadam"])
def test_others_read_what_was_written(kind, to, tmp_path, capsys):
    model, optimizer = make(kind, 4096)
    advance(model, optimizer, range(3))
    checkpoint.save(tmp_path / "run", step=3, optimizer=optimizer, model=model)
    run(capsys, "convert", tmp_path / "run", tmp_path / "new", "--to", to)
    other, resumed = make(kind, 2**20)
    load_converted(tmp_path / "new", to, other, resumed)
    assert same(values(model), values(other))
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


def save_all_formats(rank: int, folder: str) -> dict | None:
    model, optimizer = make("awkward-16", 4096)
    optimizer.param_groups[0]["lr"] = 0.125
    advance(model, optimizer, range(3))
    checkpoint.save(f"{folder}/ours", step=3, optimizer=optimizer, model=model)
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=f"{folder}/dcp")
    torch.save({"model": {}, "optim": optimizer.state_dict()}, f"{folder}/part-{rank}")
    whole = optimizer.consolidate_state_dict()
    if whole is not None:
        torch.save({"model": model.state_dict(), "optim": whole}, f"{folder}/torch")


def test_what_two_ranks_wrote(tmp_path, capsys):
    run_ranks(2, save_all_formats, str(tmp_path))
    for name in ("dcp", "torch"):
        made = tmp_path / f"from-{name}"
        assert run(capsys, "convert", tmp_path / name, made, "--to", "ours")[::2] == (0, "")
        assert_same_content(tmp_path / "ours" / "step-00000003", made / "step-00000003")
        code, out, _ = run(capsys, "inspect", tmp_path / name)
        (line,) = [line.split() for line in out.splitlines() if line.startswith("turned ")]
        assert code == 0 and line[:5] == ["turned", "11", "x", "37", "bfloat16"]
        assert {"exp_avg", "exp_avg_sq", "remainder"} <= set(line)
    run(capsys, "convert", tmp_path / "dcp", tmp_path / "both", "--to", "torch")
    saved = [torch.load(tmp_path / name, weights_only=True) for name in ("torch", "both")]
    assert saved[0]["optim"]["param_groups"] == saved[1]["optim"]["param_groups"]
    assert_same_state(*(each["optim"] for each in saved))
    error = refused(capsys, "convert", tmp_path / "part-0", tmp_path / "new", "--to", "ours")
    assert "this is one rank's part" in error
    assert "this is one rank's part" in refused(capsys, "inspect", tmp_path / "part-1")


def test_from_torch_optim_without_names(tmp_path, capsys):
    model = mlp(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    train(model, optimizer, range(3))
    saved = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    torch.save(saved | {"epoch": 7}, tmp_path / "torch")
    code, out, err = run(capsys, "convert", tmp_path / "torch", tmp_path / "new", "--to", "ours")
    assert (code, err) == (0, "shardadam ckpt convert: left out: epoch\n")
    assert out == f"{tmp_path}/new: 6 tensors, state of 6\n"
    other = mlp(torch.bfloat16, seed=3)
    resumed = shardadam.AdamW(other.parameters())
    checkpoint.load(tmp_path / "new", optimizer=resumed, model=other, rng=False)
    assert same(values(model), values(other)) and resumed.param_groups[0]["lr"] == 0.25
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        for part in ("step", "exp_avg", "exp_avg_sq"):
            expected = optimizer.state[left][part]
            assert torch.equal(resumed.state[right][part], expected.float())
    # Two groups of params without names could be any.
    groups = [{"params": list(model.parameters())[i::2]} for i in range(2)]
    saved["optim"] = torch.optim.AdamW(groups).state_dict()
    torch.save(saved, tmp_path / "groups")
    error = refused(capsys, "convert", tmp_path / "groups", tmp_path / "other", "--to", "ours")
    assert "expected param_names" in error


def test_what_is_left_out_is_said(tmp_path, capsys):
    model = Mixed()
    optimizer = shardadam.AdamW(model.named_parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    step(optimizer, range(2))
    checkpoint.save(
        tmp_path / "run",
        step=77,
        optimizer=optimizer,
        model=model,
        lr_scheduler=scheduler,
        loader=5,
        extras={"ema": torch.ones(3)},
    )
    code, _, err = run(capsys, "convert", tmp_path / "run", tmp_path / "new", "--to", "torch")
    assert code == 0
    for lost in ("lr_scheduler", "extras['ema']", "loader", "the random generators' states"):
        assert lost in err
    arguments = ("convert", tmp_path / "new", tmp_path / "back", "--to", "ours", "--step", 77)
    assert run(capsys, *arguments)[0] == 0
    assert_same_content(tmp_path / "run" / "step-00000077", tmp_path / "back" / "step-00000077")
    other = Mixed(seed=1, channels_last=True)
    checkpoint.load(tmp_path / "back", model=other, rng=False)
    assert same(stored(model), stored(other))


def test_a_target_that_is_there_stays(tmp_path, capsys):
    folder = ours(tmp_path / "run")
    for to, make_it in (("torch", Path.touch), ("dcp", Path.mkdir)):
        target = tmp_path / to
        make_it(target)
        assert "it is there already" in refused(capsys, "convert", folder, target, "--to", to)
    assert (tmp_path / "torch").read_bytes() == b"" and not os.listdir(tmp_path / "dcp")
    error = refused(capsys, "convert", folder, tmp_path / "new", "--to", "ours")
    assert "expected another format than ours" in error
    error = refused(capsys, "convert", folder, tmp_path / "no" / "new", "--to", "torch")
    assert "expected a folder to write into" in error


@pytest.mark.parametrize("to", ["torch", "dcp", "ours"])
def test_what_fails_leaves_nothing(to, tmp_path, monkeypatch, capsys):
    source = ours(tmp_path / "run")
    if to == "ours":
        run(capsys, "convert", source, tmp_path / "source", "--to", "torch")
        source = tmp_path / "source"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(os, "rename" if to == "dcp" else "fsync", full)
    error = refused(capsys, "convert", source, tmp_path / "new", "--to", to)
    assert "No space left on device" in error
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    folder = ours(tmp_path / "run")

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    for to in ("torch", "dcp"):
        error = refused(capsys, "convert", folder, tmp_path / "new", "--to", to)
        assert "writing failed: PytorchStreamWriter" in error
    assert os.listdir(tmp_path) == ["run"]


def test_a_damaged_source_is_refused(tmp_path, capsys):
    folder = ours(tmp_path / "run")
    for to in ("torch", "dcp"):
        run(capsys, "convert", folder, tmp_path / to, "--to", to)
    flip(folder / "rank-00000-of-00001.safetensors", -1)
    arguments = (tmp_path / "new", "--to", "torch")
    assert "expected digest" in refused(capsys, "convert", folder, *arguments)
    (data,) = (tmp_path / "dcp").glob("*.distcp")
    os.truncate(data, 2000)
    code, out, _ = run(capsys, "inspect", tmp_path / "dcp")
    assert code == 1 and "bytes or more, found 2000" in out
    assert "the file's end" in refused(capsys, "convert", tmp_path / "dcp", *arguments)
    data.unlink()
    assert run(capsys, "inspect", tmp_path / "dcp")[0] == 1
    assert "No such file" in refused(capsys, "convert", tmp_path / "dcp", *arguments)
    os.truncate(tmp_path / "torch", 2000)
    error = refused(capsys, "inspect", tmp_path / "torch")
    assert "expected tensors and plain values" in error


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["EVIL"],)


def test_nothing_is_executed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    torch.save({"model": {}, "optim": Evil()}, tmp_path / "torch")
    folder = tmp_path / "dcp"
    run(capsys, "convert", ours(tmp_path / "run"), folder, "--to", "dcp")
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    error = refused(capsys, "inspect", folder)
    assert "refused: posix.mkdir, which no metadata of DCP has" in error
    assert ": it names posix.mkdir" in refused(capsys, "inspect", tmp_path / "torch")
    state = {"model": mlp().state_dict(), "optim": {"state": {}, "param_groups": [{"lr": Evil()}]}}
    dcp.save(state, checkpoint_id=tmp_path / "value", no_dist=True)
    error = refused(capsys, "convert", tmp_path / "value", tmp_path / "new", "--to", "ours")
    assert "optim.param_groups.0.lr: expected tensors and plain values" in error
    assert not (tmp_path / "evil").exists()


def test_files_outside_of_the_folder_are_refused(tmp_path, capsys):
    folder = tmp_path / "dcp"
    dcp.save({"model": nn.Linear(2, 2).state_dict()}, checkpoint_id=folder, no_dist=True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())

    def inspected(metadata: object) -> str:
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        return refused(capsys, "inspect", folder)

    def with_changed(name: str, value: object) -> str:
        for info in metadata.storage_data.values():
            setattr(info, name, value)
        return inspected(metadata)

    assert "expected a part of" in with_changed("offset", -1)
    assert "expected the name of a file" in with_changed("relative_path", "../secret")
    metadata.storage_data = {1: 2}
    assert "expected DCP's metadata" in inspected(metadata)


def damaged(file: Path, generator: random.Random, times: int) -> Iterator[None]:
    """``file`` with a few other bytes, perhaps cut, ``times`` over; at the end as it was."""
    good = file.read_bytes()
    for _ in range(times):
        bad = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            bad[generator.randrange(len(bad))] = generator.randrange(256)
        file.write_bytes(bad[: generator.choice((len(bad), generator.randrange(len(bad))))])
        yield
    file.write_bytes(good)


def converted_or_refused(capsys, source: Path, target: Path) -> None:
    code, _, err = run(capsys, "convert", source, target, "--to", "ours")
    if code:
        assert err.count("\n") == 1
    else:
        shutil.rmtree(target)


def test_any_bytes_are_refused_in_one_line(tmp_path, capsys):
    folder = tmp_path / "dcp"
    run(capsys, "convert", ours(tmp_path / "run"), folder, "--to", "dcp")
    run(capsys, "convert", tmp_path / "run", tmp_path / "torch", "--to", "torch")
    generator = random.Random(0)
    for file, source in ((folder / ".metadata", folder), (tmp_path / "torch",) * 2):
        for _ in damaged(file, generator, 60):
            converted_or_refused(capsys, source, tmp_path / "new")
