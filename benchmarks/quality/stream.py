"""One stream of real gradients: a small GPT that reads the standard library.

Its embeddings of bytes and of hashed pairs and triples have rows of all frequencies: some are hit
by every batch, some once in the whole stream.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from gpu.checkout import module
from torch import Tensor, nn

gpt = module("examples/gpt.py")
standard_library = cache(module("examples/corpus.py").standard_library)

LAYERS, WIDTH, CONTEXT, BATCH = 2, 64, 64, 16
ORDER, TABLE_ROWS = 3, 4096
LR, WARM_UP = 2e-3, 50


class Stream:
    """Gradients of a model that only the reference's updates train."""

    def __init__(self, seed: int = 0, batch: int = BATCH, table_rows: int = TABLE_ROWS) -> None:
        torch.manual_seed(seed)
        self.text = standard_library()
        self.seed, self.batch, self.steps = seed, batch, 0
        self.model = gpt.GPT(LAYERS, WIDTH, CONTEXT, order=ORDER, table_rows=table_rows)
        self.params = dict(self.model.named_parameters())
        self.shapes = [param.shape for param in self.params.values()]
        self.numel = sum(shape.numel() for shape in self.shapes)
        self.loss = float("nan")
        self._hits = {  # of each row of each embedding
            f"{name}.weight": torch.zeros(part.num_embeddings)
            for name, part in self.model.named_modules()
            if isinstance(part, nn.Embedding)
        }

    def gradients(self) -> Tensor:
        """Those of the next batch, all params' in one tensor."""
        inputs, targets = self.text.batch(self.seed, self.steps, self.batch, CONTEXT)
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        grads = torch.autograd.grad(loss, list(self.params.values()))
        self.steps, self.loss = self.steps + 1, loss.item()
        for name, grad in zip(self.params, grads, strict=True):
            if name in self._hits:
                self._hits[name] += (grad != 0).any(1)
        return torch.cat([grad.flatten() for grad in grads])

    @torch.no_grad()
    def train(self, update: Tensor) -> None:
        """Step against ``update``."""
        lr = LR * min(self.steps / WARM_UP, 1.0)
        for param, part in zip(self.params.values(), split(update, self.shapes), strict=True):
            param.sub_(part, alpha=lr)

    def rare(self, most: int) -> Tensor:
        """Which elements are of embedding rows that 1 to ``most`` steps have hit."""
        masks = []
        for name, shape in zip(self.params, self.shapes, strict=True):
            mask = torch.zeros(shape, dtype=torch.bool)
            if name in self._hits:
                mask[(self._hits[name] >= 1) & (self._hits[name] <= most)] = True
            masks.append(mask.flatten())
        return torch.cat(masks)


def split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of ``flat`` with the ``shapes`` of params that lie in it one after another."""
    bounds = accumulate((shape.numel() for shape in shapes), initial=0)
    return [
        flat[first:end].view(shape)
        for (first, end), shape in zip(pairwise(bounds), shapes, strict=True)
    ]
