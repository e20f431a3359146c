"""Hugging Face's Trainer with sharded state: two lines, and a run that is resumed to the last bit.

torchrun --standalone --nproc-per-node 2 examples/huggingface_trainer.py
accelerate launch --multi_gpu --num_processes 2 examples/huggingface_trainer.py

Trains a small GPT-2 on Python's own sources with torch's AdamW and with shardadam's, then once more
from shardadam's checkpoint half-way.
"""

import argparse
import tempfile

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from corpus import Corpus, standard_library
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import shardadam
from shardadam.integrations import huggingface

CONTEXT = 64


class Windows(torch.utils.data.Dataset):
    """The text, cut into pieces."""

    def __init__(self, corpus: Corpus) -> None:
        self.text = corpus.train

    def __len__(self) -> int:
        return len(self.text) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.text[CONTEXT * index :][:CONTEXT].long()
        return {"input_ids": window, "labels": window}


def main() -> None:
    """Train three times, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    data = Windows(standard_library())

    def train(folder: str, ours: bool, resume: str | None = None) -> Trainer:
        set_seed(0)
        sizes = {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **sizes))
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            save_steps=args.steps // 2,
            save_strategy="steps" if ours else "no",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0 if ours else 1.0,  # shardadam clips inside its step
            ddp_find_unused_parameters=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        if ours:  # around DDP, which has averaged the gradients
            optimizer = (shardadam.AdamW, {"lr": 3e-3, "max_grad_norm": 1.0, "grad_sync": "none"})
        else:
            optimizer = (torch.optim.AdamW, {"lr": 3e-3})
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data,
            optimizer_cls_and_kwargs=optimizer,
            callbacks=[huggingface.Sharded()] if ours else [],
        )
        loss = trainer.train(resume_from_checkpoint=resume).training_loss
        report(trainer, "shardadam.AdamW" if ours else "torch.optim.AdamW", loss, resume)
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        train(folder, ours=False)
        [folder] = broadcast_object_list([folder])  # rank 0's, for all
        first = train(folder, ours=True)
        again = train(folder, ours=True, resume=f"{folder}/checkpoint-{args.steps // 2}")
        pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
        same = all(torch.equal(left, right) for left, right in pairs)
        if first.is_world_process_zero():
            print(f"resumed to the last bit: {'yes' if same else 'NO'}")
        PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def report(trainer: Trainer, name: str, loss: float, resumed: str | None) -> None:
    """One line, of rank 0."""
    state = sum(
        value.nbytes
        for entry in trainer.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    if trainer.is_world_process_zero():
        since = "since the checkpoint" if resumed else "since the beginning"
        print(
            f"{name:<18} mean loss {loss:.4f} nats per byte {since}, {state / 1e6:.2f} MB of state "
            "on rank 0"
        )


if __name__ == "__main__":
    main()
