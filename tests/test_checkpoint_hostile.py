"""Damaged, torn and hostile checkpoints: found, named, never executed; memory stays bounded."""

import contextlib
import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

import shardadam
from models import mlp, same, values
from ranks import run_ranks
from saved_runs import step
from shardadam import checkpoint
from shardadam.checkpoint import manifest

FILE = "rank-00000-of-00001.safetensors"


def save_two(rank: int, folder: str) -> None:
    model = mlp(torch.bfloat16)
    optimizer = shardadam.AdamW(model.parameters())
    step(optimizer, range(2))
    for number in (1, 2):
        extras = {"ema": torch.ones(3)}
        checkpoint.save(folder, step=number, optimizer=optimizer, model=model, extras=extras)


@pytest.mark.filterwarnings("ignore:gradients are equal")
@pytest.mark.filterwarnings("ignore:.*is not whole, skipped")
@pytest.mark.filterwarnings("ignore:.*has no random state")
@pytest.mark.fault(
    "bit rot in a checkpoint, shards of two runs swapped", "an error that names the file"
)
def test_every_flipped_bit_is_found(tmp_path):
    run_ranks(2, save_two, str(tmp_path))
    chance = random.Random(0)
    newest = tmp_path / "step-00000002"
    files = sorted(newest.iterdir())
    assert len(files) == 3
    sizes = [path.stat().st_size for path in files]
    model = mlp(torch.bfloat16, seed=1)
    optimizer = shardadam.AdamW(model.parameters())
    for number in range(500):
        # Half of them in headers and manifest, where a parser could overlook them.
        path = files[number % 3] if number % 2 else chance.choices(files, sizes)[0]
        place = chance.randrange(path.stat().st_size if number % 4 else 2000)
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
        found = checkpoint.verify(newest)
        assert len(found.broken) == 1, (path, place)
        assert str(path) in found.broken[0][1]
        if number % 10 == 0:
            loaded = checkpoint.load(tmp_path, optimizer=optimizer, model=model)
            assert loaded.step == 1
            assert loaded.skipped == found.broken
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
    assert checkpoint.verify(newest).whole == [newest]


def params_of(number: int) -> list:
    return [torch.full((3000,), float(number)), torch.full((7, 11), -float(number))]


def saves_until_killed(folder: str, first: int, written: int) -> None:
    model = torch.nn.ParameterList(params_of(0))
    optimizer = shardadam.AdamW(model.parameters())
    for number in range(first, first + 10_000):
        with torch.no_grad():
            for param, values in zip(model, params_of(number), strict=True):
                param.copy_(values)
        checkpoint.save(folder, step=number, optimizer=optimizer, model=model, keep=2)
        os.write(written, number.to_bytes(8, "little"))


@pytest.mark.fault("killed in a save, moment {seed}", "the newest is whole")
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_the_newest_is_whole(seed, tmp_path):
    chance = random.Random(seed)
    model = torch.nn.ParameterList(params_of(0))
    optimizer = shardadam.AdamW(model.parameters())
    last, torn = 0, 0
    for _ in range(100):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                saves_until_killed(str(tmp_path), last + 1, writer)
            os._exit(1)
        os.close(writer)
        time.sleep(chance.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        told = os.read(reader, 1 << 20)
        os.close(reader)
        last = max(last, int.from_bytes(told[-8:], "little")) if told else last
        torn += any(name.startswith(".") for name in os.listdir(tmp_path))
        if not last and not checkpoint.latest(tmp_path):
            continue
        found = checkpoint.load(tmp_path, optimizer=optimizer, model=model, rng=False)
        assert found.skipped == []
        assert found.step in (last, last + 1)  # it may be there and not yet told
        assert same(values(model), params_of(found.step))
        last = found.step
        for leftover in tmp_path.glob(".*"):
            shutil.rmtree(leftover)
    assert torn > 20
    assert last > 20


HOSTILE = [
    None, True, -1, 0, 1, 2**31, 2**62, 2**64, 10**400, 0.5, -0.0, 1e308, "", "x", "..",
    "../../etc", "/etc/passwd", "a\x00b",
    "\ud800", "values", "rng", "F32", "float32", "complex64", "0" * 32,
    "nan", [], [[]], {}, {"$tuple": 3}, {"$tensor": ["float32", [2**40], 1.0]}, {"$float": "1e9"},
    {"$dict": [[[], 1]]}, {"$x": 1}, {"step": 1.0}, [2**31, 2**31, 2**31], [0], [1, 0], ["x"],
]  # fmt: skip


def paths(value: object, path: tuple = ()) -> list[tuple]:
    found = [path]
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        found += paths(item, (*path, key))
    return found


def mutated(chance: random.Random, value: dict, places: list[tuple]) -> bytes:
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        path = chance.choice(places)
        if not path:
            continue
        try:
            owner = value
            for key in path[:-1]:
                owner = owner[key]
            kind = chance.randrange(5)
            if kind == 0:
                del owner[path[-1]]
            elif kind == 1 and isinstance(owner, list):
                owner.insert(chance.randrange(len(owner) + 1), copy.deepcopy(owner[path[-1]]))
            elif kind == 2:
                other = chance.choice(places)
                item = value
                for key in other:
                    item = item[key]
                owner[path[-1]] = copy.deepcopy(item)
            elif kind == 3 and isinstance(owner[path[-1]], int):
                owner[path[-1]] += chance.choice((-1, 1, 128, -128, 2**40))
            else:
                owner[path[-1]] = copy.deepcopy(chance.choice(HOSTILE))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    body = json.dumps(value, separators=(",", ":")).encode()
    if chance.random() < 0.1:
        place = chance.randrange(len(body))
        body = chance.choice(
            (
                body[:place],
                body[:place] + bytes([chance.randrange(256)]) + body[place + 1 :],
                body[:place] + b"[" * 100_000 + body[place:],
                body.replace(b'"step"', b'"step":1,"step"', 1),
                body.replace(b"0.9", chance.choice((b"NaN", b"1e999", b"-Infinity"))),
            )
        )
    return manifest.seal(body)


def fuzzed(folder: str, state: str, count: int, seed: int) -> dict:
    """What came of loading ``count`` mutants; in a process whose memory is limited."""
    chance = random.Random(seed)
    whole = Path(folder) / "step-00000001"
    text = (whole / "manifest.json").read_bytes()
    data = (whole / FILE).read_bytes()
    good = json.loads(text)["manifest"]
    places = paths(good)

    def built() -> tuple:
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        optimizer = shardadam.AdamW(model.parameters(), lr=0.1, state=state)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 256 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    objects = built()
    outcomes = {"refused": 0, "taken": 0}
    warnings.simplefilter("ignore")
    for number in range(count):
        # New files: to truncate one makes some file systems write it to the disk.
        for name in ("manifest.json", FILE):
            (whole / name).unlink()
        with open(whole / "manifest.json", "wb") as file:
            file.write(text if number % 5 == 4 else mutated(chance, good, places))
        with open(whole / FILE, "wb") as file:
            if number % 5 == 4:  # the file of a rank
                size = int.from_bytes(data[:8], "little")
                place = chance.choice((chance.randrange(8), chance.randrange(8 + size)))
                new = bytearray(data)
                new[place : place + chance.choice((0, 1, 8))] = chance.randbytes(
                    chance.choice((0, 1, 8))
                )
                file.write(new[: chance.choice((len(new), len(new), place))])
            else:
                file.write(data)
        model, optimizer, scheduler = objects
        try:
            checkpoint.load(
                folder,
                optimizer=optimizer,
                model=model,
                lr_scheduler=scheduler,
                strict=number % 2 == 0,
            )
            outcomes["taken"] += 1
            objects = built()
        except checkpoint.CheckpointError as error:
            outcomes["refused"] += 1
            assert len(str(error)) < 3000
        except BaseException as error:
            kept = (whole / "manifest.json").read_bytes()
            raise AssertionError(f"mutant {number}: {kept[:3000]!r}") from error
        assert optimizer._broken is None
    return outcomes


def fuzz_in_child(rank: int, *args) -> dict:
    return fuzzed(*args)


@pytest.mark.fault("hostile manifests: mutants of {saved} for {here}", "an error")
@pytest.mark.parametrize("saved", ["fp32", "q16"])
@pytest.mark.parametrize("here", ["fp32", "q8"])
def test_ten_thousand_mutants(saved, here, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = shardadam.AdamW(model.parameters(), state=saved, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    extras = {"ema": torch.ones(3, 2), "note": ("a", 1)}
    objects = {"optimizer": optimizer, "model": model, "lr_scheduler": scheduler}
    checkpoint.save(tmp_path, step=1, extras=extras, loader=[1], **objects)
    seed = len(saved) + 10 * len(here)
    (outcomes,) = run_ranks(1, fuzz_in_child, str(tmp_path), here, 2500, seed)
    assert outcomes["refused"] > 2000, outcomes
    assert outcomes["taken"] > 10, outcomes  # the mutants are not all nonsense


@pytest.fixture
def one(tmp_path):
    checkpoint.save(tmp_path, step=1, extras={"ema": torch.arange(1000.0)})
    return tmp_path / "step-00000001"


def rewritten(folder: Path, change) -> None:
    value = json.loads((folder / "manifest.json").read_text())["manifest"]
    change(value)
    (folder / "manifest.json").write_bytes(manifest.seal(json.dumps(value).encode()))


def reason(folder: Path) -> str:
    with pytest.raises(checkpoint.CheckpointError, match="found 1 that are broken"):
        with pytest.warns(UserWarning, match="is not whole, skipped"):
            checkpoint.load(folder.parent)
    (broken,) = checkpoint.verify(folder).broken
    return broken[1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda m: m.update(format="tar"),
            "format: expected \"shardadam checkpoint\", found 'tar'",
        ),
        (lambda m: m.update(step=2), "expected step 1, found 2"),
        (
            lambda m: m["entries"].append(["param", "p", [1], "float32", [0], {"step": 1e308}]),
            "expected scalars with a step, found {'step': 1e.308}",
        ),
        (lambda m: m["entries"][0].__setitem__(1, "../../evil"), "its header is not the one"),
        (lambda m: m["entries"][0].__setitem__(2, [2**61]), "expected fewer elements"),
        (lambda m: m["entries"].append(m["entries"][0]), "entries: expected every name once"),
        (
            lambda m: m["files"][0][0].__setitem__(4, None),
            "expected a digest of 32 hex.*found None",
        ),
        (lambda m: m["files"][0][0].__setitem__(4, "0" * 32), "expected digest 0{32}, found"),
        (lambda m: m["files"][0].append(m["files"][0][0]), "each part of an entry once"),
        (lambda m: m["files"].append(m["files"][0]), "files: expected a list of 1"),
        (lambda m: m["files"][0].pop(), "expected .* elements, found 0"),
        (lambda m: m.update(attempt="0" * 16), "its header is not the one of this checkpoint"),
    ],
)
def test_manifests_that_lie(change, expected, one):
    rewritten(one, change)
    assert re.search(expected, reason(one)), reason(one)


def test_overlapping_ranges(one):
    def change(value: dict) -> None:
        value["world_size"] = 2
        value["files"].append([value["files"][0][-1]])

    rewritten(one, change)
    assert "expected a shard from element" in reason(one)


def test_files_that_are_none(one):
    path, kept = one / FILE, (one / FILE).read_bytes()
    for spoil, expected in (
        (lambda: path.write_bytes(kept[:-1]), f"expected {len(kept)} bytes, found {len(kept) - 1}"),
        (lambda: path.write_bytes(kept + b"x"), f"found {len(kept) + 1}"),
        (lambda: path.write_bytes(b"\xff" * 8 + kept[8:]), "from byte 0 expected"),
        (lambda: os.symlink("/etc/passwd", path), "expected a file, found: Too many levels"),
        (lambda: os.mkfifo(path), "expected a regular file"),
        (lambda: path.mkdir(), "expected a regular file"),
        (lambda: None, "expected a file, found: No such file"),
    ):
        if path.exists():
            path.unlink()
        spoil()
        assert expected in reason(one)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
    path.write_bytes(kept)
    assert checkpoint.verify(one).whole == [one]


def test_manifests_that_are_none(one):
    path, kept = one / "manifest.json", (one / "manifest.json").read_bytes()
    for text, expected in (
        (b"", "it is damaged"),
        (kept[:-10], "it is damaged"),
        (b"\x80\x04cos\nsystem\n(S'false'\ntR.", "it is damaged"),
        (manifest.seal(b'{"step":1'), "expected JSON"),
        (manifest.seal(b"[" * 10**6), "expected JSON"),
        (manifest.seal(b'{"step":1,"step":2}'), "a name that stands twice"),
        (manifest.seal(b'{"step":NaN}'), "NaN, which is no JSON"),
        (manifest.seal(b"9" * 10**6), "expected JSON"),
        (manifest.seal(b"3"), "manifest: expected an object"),
    ):
        path.write_bytes(text)
        assert expected in reason(one)
    with open(path, "wb") as file:
        file.truncate(2**40)  # a hole: no block of it is on the disk
    assert "expected up to 67108864 bytes, found 1099511627776" in reason(one)


def test_folders_that_are_links(one):
    real = one.with_name("real")
    one.rename(real)
    one.symlink_to(real)
    assert "expected a folder" in reason(one)


def test_nothing_to_load(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            checkpoint.CheckpointError, match="expected a folder step-.* found none"
        ):
            checkpoint.load(folder)
        assert checkpoint.latest(folder) is None
