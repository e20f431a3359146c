"""exact_microbatches: the same bits at every world size, of gradients whose sums are not exact."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardadam
from ranks import run_ranks
from shardadam.integrations import ddp
from shardadam.tree_sum import TreeSum, blocks

M, STEPS = 12, 3


class Transformer(nn.Module):
    """With experts that not every microbatch uses, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 72, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 40)

    def forward(self, text: Tensor, expert: int) -> Tensor:
        x = self.embedding(text)
        for layer in self.layers:
            x = layer(x)
        return self.head(x + self.experts[expert](x))


def loss_of(model: Transformer, step: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + number)
    text = torch.randint(40, (3, 9), generator=generator)
    # Experts of one microbatch, of the first ones of a rank, of every other one.
    expert = 2 if number == 5 else 1 if number < 2 else 0 if number % 2 else 1
    logits = model(text, expert)[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def whole(model: nn.Module, optimizer: shardadam.AdamW) -> list[Tensor]:
    """All params and all state, on rank 0."""
    state = optimizer.consolidate_state_dict()
    tensors = [param.detach().clone() for param in model.parameters()]
    if state is not None:
        tensors += [t for entry in state["state"].values() for t in entry.values()]
    return tensors


def trained(
    rank: int, dtype: torch.dtype, exact: bool, options: dict[str, object], norms: bool = False
) -> list[Tensor]:
    model = Transformer().to(dtype)
    optimizer = shardadam.AdamW(
        model.named_parameters(),
        lr=1e-3,
        exact_microbatches=M if exact else None,
        bucket_bytes=20_000,
        **options,
    )
    each = M // dist.get_world_size()
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(rank * each, (rank + 1) * each):
            loss = loss_of(model, step, number)
            (loss if exact else loss / each).backward()
        if norms:
            optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        if optimizer.grad_norm is not None:
            found.append(optimizer.grad_norm)
    return [*whole(model, optimizer), *found]


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in tensors]


WAYS = {
    "fp32": (torch.float32, {"max_grad_norm": 0.5}, (2, 3, 4)),
    "bf16": (torch.bfloat16, {"max_grad_norm": 0.5}, (2, 3, 4)),
    "leanest": (torch.bfloat16, {"memory": "leanest", "amsgrad": True}, (4,)),
    "fp32, clipped by a call": (torch.float32, {}, (3,)),
    "from a file": (torch.float32, {"offload": True}, (2,)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_at_every_world_size(way, tmp_path):
    dtype, options, world_sizes = WAYS[way]
    if "offload" in options:
        options = {"offload": tmp_path}
    arguments = dtype, True, options, "call" in way
    expected, *_ = run_ranks(1, trained, *arguments)
    for world_size in world_sizes:
        found, *others = run_ranks(world_size, trained, *arguments)
        assert bits(found) == bits(expected)
        params = len(list(Transformer().parameters()))
        for other in others:
            assert bits(other[:params]) == bits(expected[:params])


def test_without_it_they_differ():
    arguments = torch.float32, False, {"max_grad_norm": 0.5}
    results = [bits(run_ranks(n, trained, *arguments)[0]) for n in (1, 2, 3, 4)]
    assert len({tuple(result) for result in results}) == 4


def tree(terms: list[Tensor | None], start: int, length: int) -> Tensor | None:
    """By its definition."""
    if length == 1:
        return terms[start] if start < len(terms) else None
    left = tree(terms, start, length // 2)
    right = tree(terms, start + length // 2, length // 2)
    if left is None or right is None:
        return right if left is None else left
    return left + right


def defined(rank: int) -> None:
    models = Transformer(), Transformer()
    options = {"lr": 1e-3, "max_grad_norm": 0.5}
    exact = shardadam.AdamW(models[0].named_parameters(), exact_microbatches=M, **options)
    by_hand = shardadam.AdamW(models[1].named_parameters(), **options)
    for step in range(STEPS):
        grads = []
        for number in range(M):
            loss_of(models[0], step, number).backward()
            assert all(param.grad is None for param in models[0].parameters())
            models[1].zero_grad()
            loss_of(models[1], step, number).backward()
            grads.append([param.grad for param in models[1].parameters()])
        for param, terms in zip(models[1].parameters(), zip(*grads, strict=True), strict=True):
            total = tree(list(terms), 0, 16)
            param.grad = None if total is None else total / M
        assert models[1].experts[3].weight.grad is None
        exact.step()
        by_hand.step()
        assert bits([exact.grad_norm]) == bits([by_hand.grad_norm])
        assert bits(whole(models[0], exact)) == bits(whole(models[1], by_hand))
    assert exact.state[models[0].experts[3].weight]["step"] == 0


def test_it_is_the_tree_that_is_documented():
    run_ranks(1, defined)


def minus_zero(rank: int) -> list[list[bool]]:
    """-0 where that is the sum, of params that not every microbatch has."""
    params = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = shardadam.AdamW(params, exact_microbatches=4)
    signs = torch.tensor([-0.0, -0.0, 0.0])
    each = 4 // dist.get_world_size()
    for number in range(rank * each, (rank + 1) * each):
        used = params if number == 1 else params[:1]
        sum((param * signs).sum() for param in used).backward()
    optimizer.clip_grad_norm_(1.0)
    (grads,) = optimizer._reducer.grads
    shards = [torch.empty(grads.bucket.bucket.shard_numel) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, grads.shard)
    flat = torch.cat(shards)
    return [flat[s.offset : s.offset + 3].signbit().tolist() for s in grads.bucket.bucket.spans]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_sign_of_zero(world_size):
    for found in run_ranks(world_size, minus_zero):
        assert found == [[True, True, False]] * 2


@pytest.mark.parametrize("start", range(20))
def test_blocks(start):
    for stop in range(start, 70):
        found = list(blocks(range(start, stop)))
        assert [n for block in found for n in block] == list(range(start, stop))
        grown = TreeSum()
        most = 0
        for number in range(start, stop):
            leaf = grown.free.pop() if grown.free else [torch.empty(1, dtype=torch.int64)]
            most = max(most, 1 + len(grown.blocks))
            leaf[0].fill_(number)
            grown.append(range(number, number + 1), leaf)
        assert [block for block, _ in grown.blocks] == found
        for block, (total,) in grown.blocks:
            length = len(block)
            assert length & (length - 1) == 0 and block.start % length == 0
            assert total == sum(block)
        length = max(stop - start, 1).bit_length() - 1  # of log2, rounded down
        assert most <= (2 * length + 1 if start else length + 1)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact_microbatches": 0}, "Invalid exact_microbatches: 0, expected the number"),
        ({"exact_microbatches": True}, "Invalid exact_microbatches: True"),
        ({"exact_microbatches": 4, "shard_grads": True}, "and shard_grads=True does otherwise"),
        ({"exact_microbatches": 4, "update_in_backward": True}, "update_in_backward=True does"),
        ({"exact_microbatches": 4, "grad_sync": "none"}, 'grad_sync="none" does otherwise'),
    ],
    ids=str,
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shardadam.AdamW(nn.Linear(3, 3).parameters(), **options)


def fault(rank: int, kind: str) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    model.register_parameter("frozen", frozen)
    optimizer = shardadam.AdamW(model.named_parameters(), exact_microbatches=4)
    before = [param.detach().clone() for param in model.parameters()]
    passes = {"too few": 2 - rank, "too many": 2 + rank, "none on one": 2 * rank}.get(kind, 2)
    if kind == "frozen":
        frozen.requires_grad_()
    try:
        for index in range(passes):
            loss = model(torch.randn(2, 4)).sum() + model.frozen.sum()
            if kind == "a torn pass" and rank == 1 and index == 0:
                model[0].weight.register_hook(lambda grad: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    loss.backward()
                model[0].weight._backward_hooks.clear()
            loss = model(torch.randn(2, 4)).sum() + model.frozen.sum()
            loss.backward()
        if kind == "by hand" and rank == 1:
            model[1].bias.grad = torch.ones(4)
        if kind == "scaler":
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(loss.detach())
            scaler.step(optimizer)
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        after = [param.detach().clone() for param in model.parameters()]
        assert bits(before) == bits(after)
        # As if nothing had happened.
        if kind == "scaler":
            del optimizer.grad_scale, optimizer.found_inf
        optimizer.zero_grad()
        for _ in range(2):
            (model(torch.randn(2, 4)).sum() + model.frozen.sum()).backward()
        optimizer.step()
        assert optimizer.state[model[0].weight]["step"] == 1
        return str(error)
    raise AssertionError("no error")


FAULTS = {
    "too few": "expected 2 backward passes on each before step(), found 1",
    "too many": "expected 2 backward passes on each before step(), found 3",
    "none on one": "rank 0 has 0 backward passes before this, rank 1 has 2",
    "a torn pass": "a backward pass was broken off",
    "by hand": "1.bias has a gradient that came in no backward pass",
    "frozen": "frozen came to the optimizer between the backward passes",
    "scaler": "GradScaler found no gradients",
}


@pytest.mark.fault("exact_microbatches: {kind}", "an error on every rank")
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_an_error_on_every_rank(kind):
    for message in run_ranks(2, fault, kind, timeout_s=30):
        assert FAULTS[kind] in message


def test_a_param_that_is_unfrozen_is_taken_over_by_a_step_before():
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    optimizer = shardadam.AdamW(layer.parameters(), exact_microbatches=2)
    layer.bias.requires_grad_()
    optimizer.step()
    for _ in range(2):
        layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.bias]["step"] == optimizer.state[layer.weight]["step"] == 1


def at_construction(rank: int, kind: str) -> str:
    number = 6 if kind == "differs" and rank else 4 if kind == "differs" else 5
    with pytest.raises((ValueError, RuntimeError)) as caught:
        shardadam.AdamW(nn.Linear(4, 4).parameters(), exact_microbatches=number)
    return str(caught.value)


def test_microbatches_that_ranks_can_not_share():
    for message in run_ranks(2, at_construction, "odd", timeout_s=30):
        assert "exact_microbatches=5: expected a multiple of the world size, which is 2" in message
    for message in run_ranks(2, at_construction, "differs", timeout_s=30):
        assert "rank 0 has exact_microbatches=4, rank 1 has exact_microbatches=6" in message


def with_ddp(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    optimizer = shardadam.AdamW(model.parameters(), exact_microbatches=2)
    model.register_comm_hook(optimizer, ddp.reduce_scatter)
    with pytest.raises(ValueError, match="expected one of the two, and no DDP with the other"):
        model(torch.randn(2, 4)).sum().backward()


def test_ddp_with_the_hook():
    run_ranks(2, with_ddp, timeout_s=30)
