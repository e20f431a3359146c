"""Lightning's Trainer and Fabric, on real ranks, beside torch's AdamW under the same."""

import argparse
import os
import tempfile
from pathlib import Path

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

import shardadam
from models import same, values
from ranks import run_ranks
from shardadam.integrations import ddp

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
OURS = {"lr": 1e-3, "bucket_bytes": 2**15}
HALF = [MixedPrecision("16-mixed", "cpu")]  # asked for by name, Lightning takes bfloat16 on a CPU


def launched(rank: int) -> None:
    """As torchrun tells it."""
    world_size = str(dist.get_world_size())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world_size}
    os.environ |= {"TORCHELASTIC_RUN_ID": "a test", "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def next_byte() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Embedding(256, 16), nn.Flatten(), nn.Linear(8 * 16, 60), nn.ReLU(), nn.Dropout(0.1)
    return nn.Sequential(*layers, nn.Linear(60, 256))


def windows() -> torch.utils.data.DataLoader:
    """Nine bytes each of a module of Python's: 16 batches of 4 in an epoch, or 8 on two ranks."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    return torch.utils.data.DataLoader(text.unfold(0, 9, 9)[:64], batch_size=4)


class Module(lightning.LightningModule):
    def __init__(self, optimizer, options: dict, **kinds) -> None:
        super().__init__()
        self.model = next_byte()
        self.made, self.options, self.kinds = optimizer, options, kinds
        self.losses: list[float] = []
        self.automatic_optimization = "manual" not in kinds

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        # For dropout: Lightning's checkpoints have no random generators.
        torch.manual_seed(2 * self.trainer.global_step + self.trainer.global_rank)
        loss = F.cross_entropy(self.model(batch[:, :-1]), batch[:, -1])
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = self.loss(batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            norm = optimizer.clip_grad_norm_(0.5)
            assert torch.equal(norm, optimizer.grad_norm)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.made(self.parameters(), **self.options)
        if "hook" in self.kinds:
            self.trainer.strategy.model.register_comm_hook(optimizer, ddp.reduce_scatter)
        return optimizer


def trained(module: Module, resume: str | None = None, **options) -> Module:
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "strategy": "ddp",
            "devices": 2,
            "max_epochs": 1,
            **QUIET,
            **options,
        }
    )
    trainer.fit(module, windows(), ckpt_path=resume)
    return module


def ours(**options) -> Module:
    return Module(shardadam.AdamW, {**OURS, **options})


def shared_folder(folder: str) -> str:
    """Rank 0's."""
    folders = [folder]
    dist.broadcast_object_list(folders)
    return folders[0]


# ---- the Trainer ---------------------------------------------------------------------------------

PRECISIONS = {
    "32-true": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"plugins": HALF},
}


def as_adamw(rank: int, options: dict) -> None:
    launched(rank)
    one = trained(ours(max_grad_norm=0.5), **options)
    other = trained(Module(torch.optim.AdamW, {"lr": 1e-3}), gradient_clip_val=0.5, **options)
    assert len(one.losses) == 8
    # Products are rounded to these; a weight that differs in its last bit may round to the
    # neighbour there.
    unit = 2**-9 if "precision" in options else 2**-12 if "plugins" in options else 2**-24
    torch.testing.assert_close(one.losses, other.losses, rtol=16 * unit, atol=0)
    # An update is a ratio of gradients, and goes at most by lr: eight of them, 0.008. They differ
    # by what rounding makes of gradients whose terms nearly cancel, in 2^10 units, or in 16 of the
    # coarse ones; and each is added to a weight, which is rounded.
    far = 0.008 * (2**10 if unit == 2**-24 else 16) * unit
    for left, right in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(left, right, rtol=8 * 2**-23, atol=far)


@pytest.mark.parametrize("kind", PRECISIONS)
def test_learns_as_with_torchs_adamw(kind):
    run_ranks(2, as_adamw, PRECISIONS[kind])


def the_same(rank: int) -> None:
    """By each way to clip, and with DDP's hook."""
    launched(rank)
    expected = trained(ours(max_grad_norm=0.5))
    assert not same(values(expected), values(trained(ours()))), "it has to clip"
    for kinds, options in (
        ({"manual": True}, {}),
        ({"hook": True}, {"max_grad_norm": 0.5}),
        ({"manual": True, "hook": True}, {}),
        ({}, {"max_grad_norm": 0.5, "grad_sync": "none"}),
    ):
        found = trained(Module(shardadam.AdamW, {**OURS, **options}, **kinds))
        assert same(values(found), values(expected)), (kinds, options)
    # Lightning's own: of averaged gradients, by a norm that is rounded otherwise.
    clipped = trained(ours(), gradient_clip_val=0.5)
    for left, right in zip(values(clipped), values(expected), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0.008 * 2**10 * 2**-24)


def test_all_ways_to_clip_are_one():
    run_ranks(2, the_same)


KINDS = {
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
    "16-mixed": ({}, {"plugins": HALF}),
    "coded state": ({"memory": "leanest"}, {"precision": "bf16-true"}),
}


def resumes(rank: int, made: dict, options: dict) -> None:
    launched(rank)
    with tempfile.TemporaryDirectory() as folder:
        folder = shared_folder(folder)
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        saves = {"callbacks": [saver], "enable_checkpointing": True}
        whole = trained(ours(max_grad_norm=0.5, **made), max_epochs=2, **options, **saves)
        dist.barrier()
        path = f"{folder}/epoch=0.ckpt"
        again = trained(ours(max_grad_norm=0.5, **made), path, max_epochs=2, **options)
        dist.barrier()
    assert same(values(whole), values(again))
    states = [m.optimizers().consolidate_state_dict() for m in (whole, again)]
    if rank == 0:
        for index, entry in states[0]["state"].items():
            assert same(list(entry.values()), list(states[1]["state"][index].values()))


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_last_bit(kind):
    run_ranks(2, resumes, *KINDS[kind])


def elsewhere(rank: int, path: str) -> None:
    """Saved on two ranks, on one; and without a group of ranks."""
    whole = torch.load(path, weights_only=True)["optimizer_states"][0]
    module = ours(max_grad_norm=0.5)
    module.configure_optimizers().load_state_dict(whole)
    trained(module, path, devices=1, strategy="auto", max_epochs=2)
    assert module.trainer.global_step == 8 + 16


def saves(rank: int, path: str) -> None:
    launched(rank)
    trained(ours(max_grad_norm=0.5)).trainer.save_checkpoint(path)


def test_goes_on_with_another_number_of_ranks(tmp_path):
    path = str(tmp_path / "two.ckpt")
    run_ranks(2, saves, path)
    run_ranks(1, elsewhere, path)


def refuses(rank: int) -> None:
    launched(rank)
    # What is clipped after DDP's hook has reduced it.
    with pytest.raises(ValueError, match="changed after backward had reduced it"):
        trained(Module(shardadam.AdamW, OURS, hook=True), gradient_clip_val=0.5)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trained(ours(), gradient_clip_val=0.5, plugins=HALF)
    with pytest.raises(ValueError, match="does not match the world size"):
        trained(ours(), devices=1)
    for option in ("shard_grads", "update_in_backward"):
        with pytest.raises(ValueError, match="no DDP wrapper"):
            trained(ours(**{option: True}))


def test_what_is_an_error():
    run_ranks(2, refuses)


# ---- Fabric --------------------------------------------------------------------------------------


def with_fabric(rank: int, precision: str) -> None:
    launched(rank)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = shared_folder(folder)
        for name in ("ours", "resumed", "Fabric clips", "torch's"):
            fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2, precision=precision)
            fabric.launch()
            model = fabric.setup_module(next_byte().eval())
            kind = torch.optim.AdamW if name == "torch's" else shardadam.AdamW
            made = kind(model.parameters(), lr=1e-3)
            optimizer = fabric.setup_optimizers(made)
            for step, batch in enumerate(fabric.setup_dataloaders(windows())):
                if step == 4 and name == "ours":
                    fabric.save(f"{folder}/half", {"model": model, "optimizer": optimizer})
                if step < 4 and name == "resumed":
                    continue
                if step == 4 and name == "resumed":
                    fabric.load(f"{folder}/half", {"model": model, "optimizer": optimizer})
                loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
                fabric.backward(loss)
                if kind is shardadam.AdamW and name != "Fabric clips":
                    norm = optimizer.clip_grad_norm_(0.5)
                    assert optimizer.grad_norm is norm is made.grad_norm
                else:
                    fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()
            results.append(values(model))
            fabric.barrier()
    first, resumed, *others = results
    assert same(first, resumed)
    unit = 2**-9 if precision == "bf16-mixed" else 2**-24
    far = 0.008 * (2**10 if unit == 2**-24 else 16) * unit
    for other in others:
        for left, right in zip(first, other, strict=True):
            torch.testing.assert_close(left, right, rtol=8 * 2**-23, atol=far)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision):
    run_ranks(2, with_fabric, precision)
