"""`python -m shardadam plan`: its bytes beside an optimizer's, and beside what training takes."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peaks import memory
from torch import Tensor, nn

import shardadam
from models import Awkward, mlp
from ranks import run_ranks
from shardadam.cli.footprint import Plan, Trained

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from gpt import GPT

pytestmark = pytest.mark.filterwarnings("ignore:gradients are equal")

MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h


@pytest.fixture(scope="module", autouse=True)
def torch_is_imported():
    """What torch imports with the first optimizer, before ranks are forked: 1 s for each."""
    shardadam.AdamW(mlp().parameters())


# ---- beside an optimizer -------------------------------------------------------------------------


def plans_of(model: nn.Module, world_size: int, bucket_bytes: int) -> list[Plan]:
    trained = Trained([*model.named_parameters()])
    return trained.plans("", world_size, "gloo", bucket_bytes, 0)


def all_real_bytes(
    rank: int, plans: list[Plan], made: Callable[[], nn.Module], bucket_bytes: int
) -> list[tuple]:
    return [real_bytes(plan, made, bucket_bytes) for plan in plans]


def real_bytes(plan: Plan, made: Callable[[], nn.Module], bucket_bytes: int) -> tuple:
    """Params, gradients, state, what is kept for transit, and what a step sends."""
    model = made()
    options = {} if plan.grads == "plain" else {plan.grads: True}
    optimizer = shardadam.AdamW(
        model.parameters(), memory=plan.memory, bucket_bytes=bucket_bytes, **options
    )
    params = [param for param in model.parameters() if param.requires_grad]
    ranks = optimizer._communicator
    for _ in range(2):
        before = dict(ranks.sent_bytes)
        sum(param.abs().sum().float() for param in params).backward()
        grads = sum(param.grad.nbytes for param in params if param.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    if plan.grads != "plain":
        # Those that are in memory at a time, while their bucket fills.
        grads = max(sum(param.nbytes for param in b.params) for b in optimizer._buckets)
    moved = ("reduce-scattering gradients", "all-gathering params")
    return (
        sum(bucket.memory.flat.nbytes for bucket in optimizer._buckets),
        grads + sum(g._memory.nbytes for g in optimizer._reducer.grads if g._memory is not None),
        sum(t.nbytes for bucket in optimizer._buckets for t in bucket.state.values()),
        sum(buffer.nbytes for buffer in ranks._buffers.values()),
        sum(ranks.sent_bytes.get(name, 0) - before.get(name, 0) for name in moved),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "made", [mlp, lambda: mlp(torch.bfloat16), lambda: mlp(torch.float16), Awkward]
)
def test_bytes_are_those_of_an_optimizer(made, world_size):
    for bucket_bytes in (9000, 16 * MIB):
        model = made()
        fixed = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        plans = plans_of(model, world_size, bucket_bytes)
        expected = [
            (
                *(plan.footprint.params - fixed, plan.footprint.grads, plan.footprint.state),
                *(plan.footprint.transients, plan.sent),
            )
            for plan in plans
        ]
        for found in run_ranks(world_size, all_real_bytes, plans, made, bucket_bytes):
            assert found == expected, bucket_bytes


# ---- beside what training takes ------------------------------------------------------------------


class Encoder(nn.Module):
    """Post-norm transformer blocks over tokens."""

    def __init__(self, layers: int = 4, width: int = 384, vocabulary: int = 8000) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 6, 4 * width, 0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def perceptron(layers: int = 14, width: int = 1000) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def convolutions(width: int = 320, layers: int = 10) -> nn.Module:
    inner = [nn.Conv2d(width, width, 3, padding=1) for _ in range(layers)]
    return nn.Sequential(nn.Conv2d(3, width, 3), *inner, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def demo(table_rows: int = 8192) -> nn.Module:
    return GPT(2, 128, 128, table_rows=table_rows)


# How it is built, its input (of few activations), and of what size it warms up.
MODELS = {
    "demo": (demo, lambda: torch.randint(256, (1, 16)), {"table_rows": 100}),
    "perceptron": (perceptron, lambda: torch.randn(2, 1000), {"layers": 1}),
    "encoder": (Encoder, lambda: torch.randint(100, (1, 8)), {"layers": 1, "vocabulary": 128}),
    "convolutions": (convolutions, lambda: torch.randn(1, 3, 6, 6), {"layers": 1}),
}


def peak_of_training(rank: int, name: str, dtype: torch.dtype, plan: Plan) -> int:
    """Bytes of resident memory that making a model and training it takes, at the peak."""
    # Let glibc give back what is freed at once, so that the peak is that of what is in use.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 65536)
    make, inputs, small = MODELS[name]

    def train(model: nn.Module) -> None:
        model.to(dtype)
        options = {} if plan.grads == "plain" else {plan.grads: True}
        optimizer = shardadam.AdamW(model.parameters(), memory=plan.memory, **options)
        for _ in range(2):
            given = inputs()
            given = given.to(dtype) if given.is_floating_point() else given
            model(given).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(make(**small))  # brings code into memory, and what libraries keep
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    train(make())
    return (memory("VmHWM") - before) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts resident memory")
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "dtype", "grads", "memory_mode"),
    [
        ("demo", torch.float32, "plain", "full"),
        ("perceptron", torch.float32, "shard_grads", "full"),
        ("encoder", torch.bfloat16, "update_in_backward", "full"),
        ("convolutions", torch.bfloat16, "plain", "lean"),
    ],
)
def test_peaks_are_those_of_training(name, dtype, grads, memory_mode, world_size):
    """All modes, one a model: the bytes behind them are tested above, of every mode."""
    with torch.device("meta"):
        model = MODELS[name][0]().to(dtype)
    if world_size == 1 and grads == "shard_grads":
        grads = "plain"
    (plan,) = [
        plan
        for plan in plans_of(model, world_size, 16 * MIB)
        if (plan.grads, plan.memory) == (grads, memory_mode)
    ]
    found = max(run_ranks(world_size, peak_of_training, name, dtype, plan))
    expected = plan.footprint.total
    print(f"{name} at W = {world_size}: {found / MIB:.1f} MiB, {found / expected:.3f} of the plan")
    assert abs(found - expected) <= 0.05 * expected
