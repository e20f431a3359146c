"""Files of others that promise more than they hold: what is refused before it is in memory."""

import errno
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apex_layout import save, v1_ranks, v2
from models import same
from shardadam.cli import torchfile
from test_cli import refused, run
from test_cli_apex import GROUPS, STEP, options, trained

HUGE = 2**38
VALUE = torch.tensor([1.0, 2.0])


def saved(path, buffer: object = VALUE, exp_avg: object = VALUE, name: object = "buffer") -> None:
    entry = {"step": torch.tensor(1.0), "exp_avg": exp_avg, "exp_avg_sq": VALUE}
    group = {"lr": 0.1, "params": [0], "param_names": ["param"]}
    optim = {"state": {0: entry}, "param_groups": [group]}
    torch.save({"model": {"param": VALUE, name: buffer}, "optim": optim}, path)


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize("where", ["buffer", "exp_avg"])
@pytest.mark.parametrize(
    "tensor, found",
    [
        (lambda: torch.zeros(1).expand(HUGE), f"in expanded tensors, .*, found {4 * HUGE - 4}"),
        (lambda: torch.empty(HUGE, device="meta"), "on the CPU, found torch.strided on meta"),
        (lambda: torch.eye(2).to_sparse(), "found torch.sparse_coo on cpu"),
        (nested, "found nested on cpu"),
        (quantized, "found quantized on cpu"),
    ],
    ids=["expanded", "meta", "sparse", "nested", "quantized"],
)
def test_tensors_that_are_not_all_there_are_refused(
    tmp_path, capsys, where: str, tensor: Callable[[], Tensor], found: str
):
    saved(tmp_path / "file", **{where: tensor()})
    for command in (
        ("inspect", tmp_path / "file"),
        ("convert", tmp_path / "file", tmp_path / "new", "--to", "ours"),
        ("convert", tmp_path / "file", tmp_path / "new", "--to", "dcp"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = refused(capsys, *command)
        assert f"{where}: expected a dense tensor" in error or "bytes in expanded" in error
        assert re.search(found, error)


def test_a_small_expanded_buffer_is_converted(tmp_path, capsys):
    saved(tmp_path / "file", buffer=VALUE.expand(1000, 2))
    assert run(capsys, "convert", tmp_path / "file", tmp_path / "ours", "--to", "ours")[0] == 0
    assert run(capsys, "convert", tmp_path / "ours", tmp_path / "back", "--to", "torch")[0] == 0
    model, _, _ = torchfile.load(tmp_path / "back")
    assert same(model["buffer"], VALUE.expand(1000, 2))


def test_odd_names_and_states_are_no_tracebacks(tmp_path, capsys):
    saved(tmp_path / "file", name=7)
    assert "dict of tensors by their names" in refused(capsys, "inspect", tmp_path / "file")
    entry = {"step": torch.tensor(1.0), "exp_avg": [1.0], "exp_avg_sq": VALUE}
    optim = {"state": {0: entry}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"model": {"param": VALUE}, "optim": optim}, tmp_path / "file")
    arguments = ("convert", tmp_path / "file", tmp_path / "new", "--to", "ours")
    assert "expected param_names" in refused(capsys, *arguments)
    (tmp_path / "text").write_text("hello")
    assert "torch.load can't read it" in refused(capsys, "inspect", tmp_path / "text")


def test_options_are_shown_in_short(tmp_path, capsys):
    many: object = 1
    for _ in range(40):
        many = [many, many]
    group = {"lr": 0.1, "betas": (0.9, 0.99), "many": many, "params": [0]}
    torch.save({"state": {}, "param_groups": [group]}, tmp_path / "file")
    code, out, _ = run(capsys, "inspect", tmp_path / "file")
    assert code == 0 and "betas (0.9, 0.99)" in out and len(out) < 2000


@pytest.mark.parametrize("optimizer", ["NAdam", "AdamW"])
def test_the_state_is_not_taken_for_that_of_a_class_with_another(tmp_path, capsys, optimizer):
    param = torch.nn.Parameter(VALUE.clone())
    made = (torch.optim.AdamW if optimizer == "NAdam" else torch.optim.NAdam)([("param", param)])
    param.grad = VALUE
    made.step()
    torch.save({"model": {"param": param.data}, "optim": made.state_dict()}, tmp_path / "file")
    arguments = ("convert", tmp_path / "file", tmp_path / "new", "--to", "ours")
    error = refused(capsys, *arguments, "--optimizer", optimizer)
    assert f"param: expected the state of {optimizer}, found" in error
    assert run(capsys, *arguments)[0] == 0


def test_of_apex(tmp_path, capsys):
    model, params = trained("fp32")
    order = GROUPS["one group"]
    named = options(order, model, named=True)
    optim = v2(params, order, named, STEP)
    convert = ("convert", tmp_path / "file", tmp_path / "new", "--to", "ours")
    large = {**model.state_dict(), "large": torch.zeros(1).expand(HUGE)}
    save({"model": large, "optimizer": optim}, tmp_path / "file")
    assert "bytes in expanded tensors" in refused(capsys, *convert)
    # Of a wrapped model, say.
    other = {f"module.{name}": value for name, value in model.state_dict().items()}
    save({"model": other, "optimizer": optim}, tmp_path / "file")
    error = refused(capsys, *convert)
    assert "in the model, found none" in error and str(tmp_path / "file") in error
    (tmp_path / "file").unlink()
    (tmp_path / "folder").mkdir()
    own = v1_ranks(params, order, named, STEP, 2)[0]
    save({"model": model.state_dict(), "optimizer": own}, tmp_path / "folder" / "0")
    error = refused(capsys, "inspect", tmp_path / "folder")
    assert f"{tmp_path / 'folder'}: param " in error and "as in all ranks' files" in error


def test_of_deepspeed(tmp_path, capsys):
    """A file such as DeepSpeed writes, without DeepSpeed."""
    model = {"module": {"w": VALUE}, "param_shapes": [{"w": torch.Size([2])}]}

    def written(partitions: object = 1, **option: object) -> None:
        state = {name: VALUE for name in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(1.0)}
        base = {"state": {0: state}, "param_groups": [{"lr": 0.1, "params": [0], **option}]}
        rank = {
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": [VALUE],
            "group_paddings": [0],
            "partition_count": partitions,
            "zero_stage": 1,
        }
        name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": rank}, tmp_path / name)
        torch.save(model, tmp_path / "mp_rank_00_model_states.pt")

    written()
    assert run(capsys, "inspect", tmp_path)[0] == 0
    written(partitions=10**18)
    assert "of ranks 0 to 999999999999999999, found" in refused(capsys, "inspect", tmp_path)
    many: object = 1
    for _ in range(40):
        many = [many, many]
    written(many=many)
    assert "expected param_groups as rank 0 has it" in refused(capsys, "inspect", tmp_path)
    model["module"]["buffer"] = torch.zeros(1).expand(HUGE)
    written()
    assert "bytes in expanded tensors" in refused(capsys, "inspect", tmp_path)


def test_what_cannot_be_written_is_called_by_its_name(tmp_path, capsys, monkeypatch):
    def full(path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torchfile, "write", full)
    saved(tmp_path / "file")
    run(capsys, "convert", tmp_path / "file", tmp_path / "ours", "--to", "ours")
    error = refused(capsys, "convert", tmp_path / "ours", tmp_path / "new", "--to", "torch")
    assert f"{tmp_path / 'new'}: No space left" in error
