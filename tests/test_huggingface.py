"""Hugging Face's Trainer and Accelerate, on real ranks, beside torch's AdamW under the same."""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import shardadam
from models import same, values
from ranks import run_ranks
from shardadam.integrations import ddp, huggingface
from shardadam.shard_tensor import ShardTensor

ROOT = Path(__file__).parents[1]
OURS = {"lr": 1e-3, "max_grad_norm": 0.5, "bucket_bytes": 2**17}


def launched(rank: int) -> None:
    """As torchrun tells it."""
    world_size = str(dist.get_world_size())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world_size}
    os.environ |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


class Text(torch.utils.data.Dataset):
    """Rows of a module of Python's, of unequal length: the loss counts tokens over all ranks."""

    def __init__(self) -> None:
        self.text = torch.tensor(list(Path(argparse.__file__).read_bytes()))

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.text[100 * index :][:32]
        labels = row.clone()
        labels[20 + index % 12 :] = -100
        return {"input_ids": row, "labels": labels}


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    set_seed(0)  # dropout too: a resumed run has to draw the same
    sizes = {
        "n_positions": 32,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, **sizes)).to(dtype)


def arguments(folder: str, **options) -> TrainingArguments:
    return TrainingArguments(
        folder,
        **{
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 1,
            "max_grad_norm": 0,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        },
    )


def trainer_of(args: TrainingArguments, optimizer=None, model=None, callbacks=None) -> Trainer:
    return Trainer(
        model or gpt2(),
        args,
        train_dataset=Text(),
        eval_dataset=Text(),
        optimizer_cls_and_kwargs=optimizer or (shardadam.AdamW, OURS),
        callbacks=[huggingface.Sharded()] if callbacks is None else callbacks,
    )


def shared_folder(folder: str) -> str:
    """Rank 0's."""
    folders = [folder]
    dist.broadcast_object_list(folders)
    return folders[0]


# ---- the Trainer ---------------------------------------------------------------------------------


def as_adamw(rank: int, options: dict) -> None:
    launched(rank)
    with tempfile.TemporaryDirectory() as folder:
        once = arguments(folder, save_strategy="no", **options)
        ours = trainer_of(once)
        read_only = trainer_of(once, (shardadam.AdamW, {**OURS, "grad_sync": "none"}))
        clipped = arguments(folder, save_strategy="no", max_grad_norm=0.5, **options)
        theirs = trainer_of(clipped, (torch.optim.AdamW, {"lr": 1e-3}), callbacks=[])
        for trainer in (ours, read_only, theirs):
            set_seed(1)
            trainer.train()
    assert same(values(ours.model), values(read_only.model))  # DDP has averaged
    norms = [[e["grad_norm"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert min(norms[1]) > 0.5, "it has to clip"
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    # The ranks' products are rounded to 2^-24 of themselves, or 2^-9 in bfloat16, where a weight
    # that differs in its last bit may round to the neighbour.
    unit = 2**-9 if options.get("bf16") else 2**-24
    torch.testing.assert_close(*losses, rtol=16 * unit, atol=0)
    torch.testing.assert_close(*norms, rtol=64 * unit, atol=0)
    # An update is a ratio of gradients, and goes at most by lr: three of them, 0.003. They differ
    # by what rounding makes of gradients whose terms nearly cancel: 2^10 units, or 2^6 of bf16's.
    far = 0.003 * (2**6 if options.get("bf16") else 2**10) * unit
    for left, right in zip(values(ours.model), values(theirs.model), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=far)


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_learns_as_with_torchs_adamw(options):
    run_ranks(2, as_adamw, options)


# ---- saving and resuming -------------------------------------------------------------------------

KINDS = {
    "autocast": (torch.float32, {}, {"bf16": True}),
    "bf16 weights": (torch.bfloat16, {}, {"gradient_accumulation_steps": 1}),
    "coded state": (torch.bfloat16, {"memory": "leanest"}, {}),
}


def resumes(rank: int, dtype: torch.dtype, ours: dict, options: dict) -> None:
    launched(rank)
    with tempfile.TemporaryDirectory() as folder:
        folder = shared_folder(folder)
        made = (shardadam.AdamW, {**OURS, **ours})
        uninterrupted = trainer_of(arguments(folder, **options), made, gpt2(dtype))
        uninterrupted.train()
        resumed = trainer_of(arguments(folder, **options), made, gpt2(dtype))
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        # A model and an optimizer that the user made.
        model = gpt2(dtype)
        args = arguments(folder, **options)
        decays = [param for param in model.parameters() if param.dim() > 1]
        others = [param for param in model.parameters() if param.dim() <= 1]
        groups = [{"params": decays}, {"params": others}]
        optimizer = shardadam.AdamW(groups, weight_decay=0, **{**OURS, **ours, "bucket_bytes": 999})
        by_hand = Trainer(
            model,
            args,
            train_dataset=Text(),
            optimizers=(optimizer, None),
            callbacks=[huggingface.Sharded()],
        )
        by_hand.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        dist.barrier()
    expected = uninterrupted.optimizer.optimizer.consolidate_state_dict()
    for trainer in (resumed, by_hand):
        assert same(values(trainer.model), values(uninterrupted.model))
        found = trainer.optimizer.optimizer.consolidate_state_dict()
        if rank == 0:
            for index, entry in expected["state"].items():
                assert same(list(found["state"][index].values()), list(entry.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_last_bit(kind):
    run_ranks(2, resumes, *KINDS[kind])


def at_other_times(rank: int) -> None:
    """At the end of an epoch, and where the best so far is kept."""
    launched(rank)
    times = [
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
        {
            "save_strategy": "best",
            "metric_for_best_model": "eval_loss",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "max_steps": 4,
            "load_best_model_at_end": True,
        },
    ]
    for options in times:
        with tempfile.TemporaryDirectory() as folder:
            folder = shared_folder(folder)
            trainer_of(arguments(folder, **options)).train()
            saved = sorted(Path(folder).glob("checkpoint-*/optimizer.pt"))
            assert saved
            for path in saved:
                state = torch.load(path, weights_only=True)["state"]
                assert state and not any(
                    isinstance(value, ShardTensor) for e in state.values() for value in e.values()
                )
            dist.barrier()


def test_every_checkpoint_has_the_whole_state():
    run_ranks(2, at_other_times)


# ---- what goes wrong -----------------------------------------------------------------------------


class AsksForASave(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_save = True


class OnlyOnTheSideOfTheParams(huggingface.Sharded):
    """As on a GPU, where params stay where they are, without the callback."""

    def on_step_end(self, *_, **__) -> None:
        pass

    on_save = on_evaluate = on_epoch_end = on_step_end


def refuses(rank: int) -> None:
    launched(rank)
    with tempfile.TemporaryDirectory() as folder:
        folder = shared_folder(folder)
        theirs = (torch.optim.AdamW, {"lr": 1e-3})
        for options, optimizer, match in (
            ({"max_grad_norm": 1.0}, None, "expected max_grad_norm=0 there .* and max_grad_norm=1"),
            ({"enable_jit_checkpoint": True}, None, "enable_jit_checkpoint=True saves as soon"),
            ({}, theirs, "expected an optimizer of shardadam's, found AdamW"),
        ):
            trainer = trainer_of(arguments(folder, **options), optimizer)
            before = values(trainer.model)
            with pytest.raises(ValueError, match=match):
                trainer.train()
            assert same(values(trainer.model), before)
        # What DDP, or what the Trainer does with its gradients, does not allow.
        for options in ({"shard_grads": True}, {"update_in_backward": True}):
            trainer = trainer_of(arguments(folder), (shardadam.AdamW, options))
            accumulates = "in the first: expected step\\(\\) after each"
            with pytest.raises((ValueError, RuntimeError), match=f"no DDP wrapper|{accumulates}"):
                trainer.train()
        # An optimizer of fewer ranks than the Trainer has.
        own = [dist.new_group([each]) for each in range(2)][rank]
        alone = (shardadam.AdamW, {"process_group": own})
        with pytest.raises(ValueError, match="the optimizer has 1 ranks and the Trainer 2"):
            trainer_of(arguments(folder), alone).train()
        # Too late to bring the state together.
        callbacks = [huggingface.Sharded(), AsksForASave()]
        with pytest.raises(RuntimeError, match="step 1 has only rank 0's part .* to be the last"):
            trainer_of(arguments(folder), callbacks=callbacks).train()
        trainer_of(arguments(folder, max_steps=1), callbacks=callbacks[::-1]).train()
        # Saved without the callback, by rank 0 alone.
        trainer = trainer_of(arguments(folder), callbacks=[OnlyOnTheSideOfTheParams()])
        trainer.train()
        dist.barrier()
        part = torch.load(f"{folder}/checkpoint-2/optimizer.pt", weights_only=True)
        if rank == 1:
            with pytest.raises(ValueError, match="was saved by rank 0 of 2 .* this is rank 1 of 2"):
                trainer.optimizer.load_state_dict(part)
        dist.barrier()
    # On the CPU even the first step fails.
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ValueError, match=".data was repl"):
        trainer_of(arguments(folder), callbacks=[]).train()


def test_what_the_callback_refuses():
    run_ranks(2, refuses)


def unaware(rank: int) -> None:
    """Processes of a group of which the Trainer knows nothing: it would clip and save alone."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(arguments(folder))
        with pytest.raises(ValueError, match="the optimizer has 2 ranks and the Trainer 1"):
            trainer.train()


def test_a_trainer_that_believes_to_be_alone():
    run_ranks(2, unaware)


def alone(rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        uninterrupted = trainer_of(arguments(folder, max_grad_norm=1.0))
        uninterrupted.train()
        resumed = trainer_of(arguments(folder, max_grad_norm=1.0))
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert same(values(resumed.model), values(uninterrupted.model))


def test_alone():
    run_ranks(1, alone)  # a process of its own: Accelerate keeps what it found


# ---- Accelerate ----------------------------------------------------------------------------------


def with_accelerate(rank: int, hook: bool) -> None:
    launched(rank)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = shared_folder(folder)
        for name in ("ours", "resumed", "torch's"):
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            data = torch.utils.data.DataLoader(Text(), batch_size=2)
            model, data = accelerator.prepare(gpt2(), data)
            if name == "torch's":
                made = torch.optim.AdamW(model.parameters(), lr=1e-3)
            else:
                made = shardadam.AdamW(model.parameters(), lr=1e-3, bucket_bytes=2**17)
                if hook:
                    model.register_comm_hook(made, ddp.reduce_scatter)
                accelerator.register_save_state_pre_hook(
                    lambda *_, o=made: o.consolidate_state_dict()
                )
            optimizer = accelerator.prepare(made)
            for step, batch in enumerate(data):
                if step == 10 and name == "ours":
                    accelerator.save_state(f"{folder}/half", safe_serialization=False)
                    dist.barrier()
                if step < 10 and name == "resumed":
                    continue
                if step == 10 and name == "resumed":  # beginning to read has drawn random numbers
                    accelerator.load_state(f"{folder}/half")
                if step == 16:
                    break
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    if accelerator.sync_gradients and name == "torch's":
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    elif accelerator.sync_gradients:
                        made.clip_grad_norm_(0.5)
                    optimizer.step()
                    optimizer.zero_grad()
            results.append(values(model))
            if name == "resumed":
                accelerator.save_state(f"{folder}/safe")
                dist.barrier()
                with pytest.raises(RuntimeError, match="None is covering the entire storage"):
                    accelerator.load_state(f"{folder}/safe")
        dist.barrier()
    ours, resumed, theirs = results
    assert same(ours, resumed)
    for left, right in zip(ours, theirs, strict=True):
        # As above, eight updates.
        torch.testing.assert_close(left, right, rtol=0, atol=0.008 * 2**10 * 2**-24)


@pytest.mark.parametrize("hook", [False, True], ids=["", "with DDP's hook"])
def test_accelerate(hook):
    run_ranks(2, with_accelerate, hook)


def round_trip(rank: int) -> None:
    """prepare() loads what state_dict() says."""
    launched(rank)
    accelerator = Accelerator(cpu=True)
    for memory in ("full", "leanest"):
        model = gpt2(torch.bfloat16)
        optimizer = shardadam.AdamW(model.parameters(), memory=memory)
        model(**{k: v[None] for k, v in Text()[rank].items()}).loss.backward()
        optimizer.step()
        before = [v.clone() for e in optimizer.state.values() for v in e.values()]
        prepared = accelerator.prepare(optimizer)
        assert same([v for e in prepared.state.values() for v in e.values()], before)


def test_the_round_trip_of_prepare():
    run_ranks(2, round_trip)


def test_accelerate_launch_runs_the_example():
    command = "accelerate launch --multi_gpu --num_processes 2 examples/huggingface_trainer.py"
    done = subprocess.run(
        [Path(sys.executable).parent / "accelerate", *command.split()[1:], "--steps", "4"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert "resumed to the last bit: yes" in done.stdout, done.stderr


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "shardadam.integrations.huggingface")
    with pytest.raises(
        ImportError, match=r"needs transformers: pip install 'transformers\[torch\]'"
    ):
        importlib.import_module("shardadam.integrations.huggingface")
