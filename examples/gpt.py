"""A byte-level GPT that is small enough to learn something in a minute on two CPU cores.

It is an ordinary pre-norm transformer with one addition: every position also looks up an embedding
of the last 2, 3, … `ORDER` bytes, hashed into a table. A look-up costs no arithmetic and knows
spelling from the first hundred steps, which leaves the layers to learn what n-grams can't know.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
ORDER = 5
"""Bytes in the longest hashed n-gram."""
TABLE_ROWS = 8192
"""Rows of the table of each n-gram length."""
TABLE_GAIN = 4.0
"""Most rows are seen rarely, so each time they should count for more."""
HASH_MULTIPLIER = 6364136223846793005  # Knuth's MMIX; int64 products wrap around, as hashes may


class Block(nn.Module):
    """Causal self-attention, then an MLP with squared ReLU, each added to the stream."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.start()

    def start(self) -> None:
        """Make it the identity, so that depth does not slow down the first steps."""
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x: Tensor) -> Tensor:  # [batch, context, width]
        x = x + self.attention_out(self._attend(self.query_key_value(self.attention_norm(x))))
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))).square())

    def _attend(self, query_key_value: Tensor) -> Tensor:
        heads = query_key_value.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        return attended.transpose(1, 2).flatten(2)


class GPT(nn.Module):
    """Maps bytes [batch, context] to logits of the next byte [batch, context, 256]."""

    def __init__(
        self,
        layers: int,
        width: int,
        context: int,
        head_width: int = 64,
        order: int = ORDER,
        table_rows: int = TABLE_ROWS,
    ) -> None:
        super().__init__()
        if width % head_width:
            raise ValueError(f"width must be a multiple of {head_width}, got {width}")
        self.context = context
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.ngrams = nn.ModuleList(nn.Embedding(table_rows, width) for _ in range(order - 1))
        self.blocks = nn.Sequential(*(Block(width, head_width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self._start()

    def init_weights(self) -> None:
        """Draw all params, of a model that was made on the meta device, as construction does."""
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        for block in self.blocks:
            block.start()
        self._start()

    def _start(self) -> None:
        nn.init.normal_(self.bytes.weight, std=0.5)
        nn.init.normal_(self.positions.weight, std=0.02)
        for table in self.ngrams:
            nn.init.zeros_(table.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.positions.weight[: text.shape[1]]
        for table, hashed in zip(self.ngrams, _ngram_hashes(text, len(self.ngrams)), strict=True):
            x = x + TABLE_GAIN * table(hashed % table.num_embeddings)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, temperature: float, seed: int) -> bytes:
        """Continue ``prompt`` by ``length`` sampled bytes; returns both."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.tensor([list(prompt)])
        for _ in range(length):
            logits = self(text[:, -self.context :])[:, -1].float()
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            text = torch.cat([text, chosen], dim=1)
        return bytes(text[0].tolist())


def _ngram_hashes(text: Tensor, count: int) -> Iterator[Tensor]:
    """For ``count`` lengths from 2 on, a hash of the n-gram that ends at each position."""
    hashed = text
    for distance in range(1, count + 1):
        earlier = F.pad(text, (distance, 0))[:, : text.shape[1]]
        hashed = hashed * HASH_MULTIPLIER + earlier + 1
        yield hashed >> 33
