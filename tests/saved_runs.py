"""What the tests of checkpoints save: some of everything, gradients that sum exactly."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import shardadam


class Mixed(nn.Module):
    """Convolution, batch norm, complex, frozen, empty and 0-dim params; buffers."""

    def __init__(self, seed: int = 0, channels_last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(5, 70, 3)
        self.norm = nn.BatchNorm2d(70)
        self.phase = nn.Parameter(torch.randn(33, 7, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.randn(50), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.randn(()))
        self.wide = nn.Parameter(torch.randn(300, dtype=torch.float64))
        self.register_buffer("mask", torch.rand(9) > 0.5)
        if channels_last:
            self.to(memory_format=torch.channels_last)
            self.phase.data = self.phase.data.t().contiguous().t()


def step(optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """One step per seed, with gradients of few bits: their mean is exact at every world size."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                    param.grad = (noise * 16).round().to(param.dtype)
        optimizer.step()


def stored(model: nn.Module) -> list[Tensor]:
    """Copies of all params and buffers, in plain memory order."""
    return [t.detach().clone().contiguous() for t in model.state_dict().values()]


def full_state(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    """Copies of a one-rank optimizer's state, shaped like the params, by param."""
    assert isinstance(optimizer, shardadam.Adam | shardadam.AdamW | shardadam.NAdam)
    return [
        [value.clone().contiguous() for _, value in sorted(optimizer.state[param].items())]
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def load_converted(path: Path, to: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `convert --to torch` or `--to dcp` wrote, as a user of those would."""
    if to == "torch":
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optim"])
    else:
        state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=path, no_dist=True)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
