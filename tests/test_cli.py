"""`python -m shardadam ckpt`: real checkpoints, damaged ones, what a user sees, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardadam
from checkpointed import advance, make
from ranks import run_ranks
from saved_runs import Mixed, step
from shardadam import checkpoint
from shardadam.checkpoint import verifying
from shardadam.checkpoint.verifying import Opened
from shardadam.cli.main import main


def ours(folder: Path, kind: str = "split") -> Path:
    model, optimizer = make(kind, 4096)
    advance(model, optimizer, range(3))
    return checkpoint.save(folder, step=3, optimizer=optimizer, model=model)


def save_on_ranks(rank: int, folder: str) -> None:
    model = Mixed()
    optimizer = shardadam.AdamW(model.named_parameters(), lr=0.02, bucket_bytes=4096)
    step(optimizer, range(3))
    for number in (3, 4):
        extras = {"ema": torch.arange(6.0), "best": 1.5}
        checkpoint.save(folder, step=number, optimizer=optimizer, model=model, extras=extras)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    run_ranks(2, save_on_ranks, str(folder))
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["ckpt", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments: object) -> str:
    """The one line of an error."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"shardadam ckpt {arguments[0]}: ") and err.count("\n") == 1, err
    return err


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_inspect_shows_the_newest(two_ranks, capsys):
    code, out, err = run(capsys, "inspect", two_ranks)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"shardadam checkpoint {two_ranks}/step-00000004"
    words = [line.split() for line in lines]
    for expected in (
        ["step", "4"],
        ["world", "size", "2"],
        ["optimizer", "AdamW"],
        [*"conv.weight 70 x 5 x 3 x 3 float32 step=3 exp_avg exp_avg_sq 36.9 KiB".split()],
        [*"phase 33 x 7 complex64 step=3 exp_avg exp_avg_sq 5.4 KiB".split()],
        [*"scale scalar float32 step=3 exp_avg exp_avg_sq 12 B".split()],
        [*"frozen 50 float32 200 B".split()],
        [*"ema 6 float32 (extra) 24 B".split()],
        ["also", "extras['best']"],
    ):
        assert expected in words, expected
    assert "lr 0.02, betas [0.9, 0.999]" in out
    for rank in range(2):
        path = two_ranks / "step-00000004" / f"rank-0000{rank}-of-00002.safetensors"
        (line,) = [words for words in words if words[:1] == [path.name]]
        assert line[-1] == "ok"


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_text_and_not_for_the_terminal(terminal, tmp_path, capsys, monkeypatch):
    if terminal:
        pytest.importorskip("rich")
    params = [("[red]x[/red] \x1b[2J", torch.nn.Parameter(torch.ones(3)))]
    checkpoint.save(tmp_path, step=1, optimizer=shardadam.AdamW(params), rng=False)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 0 and "[red]x[/red]  [2J" in out and "\x1b[2J" not in out
    (line,) = [line.split() for line in out.splitlines() if "[red]" in line]
    assert line[2:] == [*"3 float32 step=0 exp_avg exp_avg_sq 36 B".split()]
    assert ("group 0" in out) and ("1, 36 B" in out)


def test_inspect_says_which_file_is_missing_or_too_short(two_ranks, tmp_path, capsys):
    folder = ours(tmp_path)
    file = folder / "rank-00000-of-00001.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 1 and f"expected {size} bytes, found {size - 1}" in out
    file.unlink()
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 1 and "expected a file, found: No such file or directory" in out


def test_verify_all_in_a_directory(two_ranks, capsys):
    code, out, err = run(capsys, "verify", two_ranks)
    names = [f"whole    {two_ranks}/step-0000000{number}" for number in (4, 3)]
    assert (code, out.splitlines(), err) == (0, names, "")


def test_verify_says_which_tensors_of_which_file(tmp_path, capsys, monkeypatch):
    folder = ours(tmp_path / "run")
    link = tmp_path / "latest"
    link.symlink_to(folder)
    assert run(capsys, "verify", link)[0] == 0
    file = folder / "rank-00000-of-00001.safetensors"
    with Opened(folder) as opened:
        names = [(opened.manifest.entries[s.entry].name, s.part) for s in opened.manifest.files[0]]
        position = opened.file(0)[1][names.index(("2.weight", "exp_avg"))]
    flip(file, position)
    code, out, err = run(capsys, "verify", link)
    assert (code, out) == (1, "")
    assert err.startswith(f"damaged  {folder}: {file.name}: exp_avg of 2.weight: expected digest")
    flip(file, position)
    assert run(capsys, "verify", folder)[0] == 0
    with Opened(folder) as opened:
        starts = opened.file(0)[1]
    for start in starts[:-1]:
        flip(file, start)
    monkeypatch.setattr(verifying, "_LISTED", 5)
    code, _, err = run(capsys, "verify", folder)
    *listed, last = err.splitlines()
    assert code == 1 and last == f"damaged  {folder}: and {len(names) - 5} more"
    for (name, part), line in zip(names[:5], listed, strict=True):
        assert f"{file.name}: {part} of {name}: expected digest" in line
    for start in starts[:-1]:
        flip(file, start)
    assert run(capsys, "verify", folder)[0] == 0
    flip(folder / "manifest.json", 60)
    assert run(capsys, "verify", folder)[0] == 1
    (folder / "manifest.json").unlink()
    code, _, err = run(capsys, "verify", folder)
    assert code == 1 and "manifest.json: expected a file" in err


def test_no_checkpoint_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "text").write_text("hello")
    for command in ("inspect", "verify"):
        assert "expected a checkpoint" in refused(capsys, command, tmp_path)
        assert "expected a checkpoint" in refused(capsys, command, tmp_path / "nothing")
    assert "expected a checkpoint of" in refused(capsys, "verify", tmp_path / "text")


def shell(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "shardadam", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_what_a_user_sees(two_ranks, tmp_path):
    done = shell("ckpt", "verify", two_ranks)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("whole") == 2
    done = shell("ckpt", "inspect", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    done = shell("ckpt", "verify")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_help_is_short_and_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ckpt", command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and out.count("\n") < 30
    assert f"example: python -m shardadam ckpt {command} " in out.replace("\n", " ")
