"""Lightning's Trainer with sharded state: the class in configure_optimizers(), and nothing else.

torchrun --standalone --nproc-per-node 2 examples/lightning_trainer.py

Trains a small GPT on Python's own sources with torch's AdamW and with shardadam's, then once more
from shardadam's checkpoint half-way.
"""

import argparse
import os
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus import Corpus, standard_library
from gpt import GPT
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import shardadam

CONTEXT = 64


class Windows(torch.utils.data.Dataset):
    """The text, cut into pieces of which each predicts its own next byte."""

    def __init__(self, corpus: Corpus) -> None:
        self.text = corpus.train

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.text[CONTEXT * index :][: CONTEXT + 1].long()
        return window[:-1], window[1:]


class LanguageModel(LightningModule):
    """A GPT and an optimizer."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = GPT(layers=1, width=64, context=CONTEXT)
        self.optimizer, self.options = optimizer, options

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, targets = batch
        self.loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        return self.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=3e-3, **self.options)


def main() -> None:
    """Train three times, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    # One hint to a run: DDP has averaged the gradients (docs/ddp.md), and loaders have no workers.
    warnings.filterwarnings("ignore")
    data = torch.utils.data.DataLoader(Windows(standard_library()), batch_size=8, shuffle=True)

    def train(model: LanguageModel, folder: str, resume: str | None = None) -> LanguageModel:
        trainer = Trainer(
            accelerator="cpu",
            strategy="ddp",
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", "2")),
            max_epochs=2,
            limit_train_batches=args.steps // 2,
            gradient_clip_val=None if "max_grad_norm" in model.options else 1.0,
            callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data, ckpt_path=resume)
        report(model)
        return model

    with tempfile.TemporaryDirectory() as folder:
        train(LanguageModel(torch.optim.AdamW), f"{folder}/torch")
        folders = [folder]
        dist.broadcast_object_list(folders)  # rank 0's, for all
        folder = f"{folders[0]}/shardadam"
        ours = {"optimizer": shardadam.AdamW, "max_grad_norm": 1.0, "grad_sync": "none"}
        first = train(LanguageModel(**ours), folder)
        again = train(LanguageModel(**ours), folder, resume=f"{folder}/epoch=0.ckpt")
        pairs = zip(first.parameters(), again.parameters(), strict=True)
        same = all(torch.equal(left, right) for left, right in pairs)
        if dist.get_rank() == 0:
            print(f"resumed to the last bit: {'yes' if same else 'NO'}")
        dist.barrier()
    dist.destroy_process_group()


def report(model: LanguageModel) -> None:
    """One line, of rank 0."""
    optimizer = model.optimizers()
    state = sum(
        value.nbytes
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    loss = model.loss.detach().clone()
    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        kind = f"{model.optimizer.__module__.partition('.')[0]}'s AdamW"
        print(
            f"{kind:<17} loss {loss / dist.get_world_size():.4f} nats per byte after "
            f"{model.trainer.global_step} steps, {state / 1e6:.2f} MB of state on rank 0"
        )


if __name__ == "__main__":
    main()
