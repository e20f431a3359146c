"""Small models that several tests train."""

import math

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


def train_scaled(model: nn.Module, optimizer: torch.optim.Optimizer, bad: list[bool]) -> None:
    """A step under a GradScaler for each of ``bad``, which says whether it overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for overflows in bad:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 0)).backward()
        if overflows:
            next(model.parameters()).grad.view(-1)[0] = math.inf
        scaler.step(optimizer)
        scaler.update()


def values(model: nn.Module) -> list[Tensor]:
    """Copies of the params."""
    return [param.detach().clone() for param in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Awkward(nn.Module):
    """Channels last, transposed, complex, 0-dim, empty, tied and frozen params."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.last = nn.Parameter(random(6, 5, 4, 3).to(memory_format=torch.channels_last))
        self.turned = nn.Parameter(random(37, 11).t())
        self.sliced = nn.Parameter(random(9, 8)[:, ::2])
        self.waves = nn.Parameter(random(13, 17, dtype=torch.complex64))
        self.scale = nn.Parameter(random(()).squeeze())
        self.empty = nn.Parameter(random(0, 4))
        self.frozen = nn.Parameter(random(5), requires_grad=False)
        self.narrow = nn.Parameter(random(3, 1, 200))

    def train_a_step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in self.parameters():
            if param.requires_grad:
                shape = (*param.shape, 2) if param.is_complex() else param.shape
                grad = torch.randn(shape, generator=generator).to(param.real.dtype)
                param.grad = torch.view_as_complex(grad) if param.is_complex() else grad


class RealAwkward(Awkward):
    """Without the complex ones, which have no coded state."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        del self.waves
