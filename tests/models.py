"""Small models that several tests train."""

import torch
from torch import Tensor, nn


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Six params of 5 to 6,000 elements, none a multiple of 128."""
    torch.manual_seed(seed)
    layers = [nn.Linear(30, 90), nn.ReLU(), nn.Linear(90, 65), nn.ReLU(), nn.Linear(65, 5)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """A loss on a batch that is a function of ``seed``."""
    batch = torch.randn(16, 30, generator=torch.Generator().manual_seed(seed))
    return model(batch.to(next(model.parameters()).dtype)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """One step per seed."""
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    """Copies of the params."""
    return [param.detach().clone() for param in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
