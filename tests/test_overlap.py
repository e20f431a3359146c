"""overlap_gather(): step() returns while params are gathered, and modules wait for theirs."""

import copy
import gc
import pickle
import time

import pytest
import torch
from torch import nn

import shardadam
from models import loss_of, mlp, same, values
from ranks import run_ranks
from shardadam import gathers


class Reader(nn.Module):
    """Reads params in most ways there are: tied, of a child that is not called, not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(6)])
        self.norm = nn.LayerNorm(64)
        self.unused = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(64))
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.bias = nn.Linear(1, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        for layer in self.layers:
            hidden = hidden + layer(self.norm(hidden)).relu()
        return self.head(hidden * self.scale) + self.bias.bias


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, seed: int) -> torch.Tensor:
    batch = tokens(seed)
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def trained(rank: int, overlap: bool, **options: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Reader()
    optimizer = shardadam.AdamW(model.named_parameters(), bucket_bytes=20_000, **options)
    if overlap:
        optimizer.overlap_gather(model)
        loss(model.eval(), 0)  # teaches nothing: eval mode may take other paths
        model.train()
    for step in range(6):
        optimizer.zero_grad()
        loss(model, 10 * step + rank).backward()
        optimizer.step()
        under_way = optimizer._gathers.under_way
        assert under_way == (overlap and optimizer._communicator.world_size > 1)
    optimizer.synchronize()
    assert not optimizer._gathers.under_way
    return values(model)


def bitwise_same(rank: int) -> list[torch.Tensor]:
    results = [
        trained(rank, overlap, shard_grads=shard_grads, max_grad_norm=clip)
        for overlap in (False, True)
        for shard_grads in (False, True)
        for clip in (None, 0.1)
    ]
    for index, result in enumerate(results):
        assert same(result, results[index % 2]), index
    return results[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_are_the_same_bits(world_size):
    results = run_ranks(world_size, bitwise_same)
    assert all(same(result, results[0]) for result in results)


def ready(rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of large params that are all under way."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(4)])
    optimizer = shardadam.AdamW(model.named_parameters(), lr=0.1, bucket_bytes=2**22)
    optimizer.overlap_gather(model)
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def each_waits_for_its_own(rank: int) -> None:
    model, optimizer = ready(rank)
    gathers, left = optimizer._gathers, []
    for layer in model:
        layer.register_forward_hook(lambda *_: left.append(len(gathers._under_way)))
    assert len(gathers._under_way) == 4
    model(torch.ones(1, 1000))
    assert left == [3, 2, 1, 0]


def test_a_module_waits_for_its_own_params_only():
    run_ranks(2, each_waits_for_its_own)


def others_wait(rank: int) -> None:
    for use in (
        lambda model, optimizer: model.state_dict(),
        lambda model, optimizer: model[1].state_dict(),
        lambda model, optimizer: model.load_state_dict(copy.deepcopy(model).state_dict()),
        lambda model, optimizer: model.eval()(torch.ones(1, 1000)),
        lambda model, optimizer: optimizer.step(),
        lambda model, optimizer: copy.deepcopy(optimizer),
        lambda model, optimizer: optimizer.clip_grad_norm_(1.0),
        lambda model, optimizer: optimizer.overlap_gather(model),
    ):
        model, optimizer = ready(rank)
        use(model, optimizer)
        assert not optimizer._gathers.under_way


def test_whoever_reads_or_writes_all_params_waits_for_all():
    run_ranks(2, others_wait)


def too_early(rank: int) -> None:
    model, _optimizer = ready(rank)
    early = (model[3].weight * torch.ones(1000, requires_grad=True)).sum()
    model(torch.ones(1, 1000))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        early.backward()


def test_a_param_read_too_early_is_an_error_in_backward():
    run_ranks(2, too_early)


class Branching(nn.Module):
    """Reads a param that is not its own, but not in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(100, 100, bias=False) for _ in range(2))
        self.branches = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.first(hidden)
        return hidden @ self.second.weight if self.branches else hidden


def unseen(rank: int) -> None:
    torch.manual_seed(0)
    model = Branching()
    optimizer = shardadam.AdamW(model.named_parameters(), bucket_bytes=2**15)
    optimizer.overlap_gather(model)
    (model(torch.ones(1, 100)) @ model.second.weight).sum().backward()
    optimizer.step()
    assert optimizer._gathers.under_way
    model.branches = True
    output = model(torch.ones(1, 100))
    assert not optimizer._gathers.under_way
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_read_that_no_hook_has_seen_is_an_error_in_backward():
    run_ranks(2, unseen)


def elsewhere(rank: int) -> None:
    """Params that are in no module of the model that waits are in place after step()."""
    model, other = mlp(), mlp()
    optimizer = shardadam.AdamW([*model.parameters(), *other[:2].parameters()], bucket_bytes=2**12)
    optimizer.overlap_gather(model)
    for grows in (False, True):
        if grows:
            optimizer.add_param_group({"params": list(other[2:].parameters())})
        for _ in range(2):
            (loss_of(model, rank) + loss_of(other, rank)).backward()
            optimizer.step()
        assert optimizer._gathers.under_way
        params = {param for bucket in optimizer._gathers._under_way for param in bucket.params}
        assert params.isdisjoint(other.parameters())


def test_params_outside_of_the_model_are_not_left_under_way():
    run_ranks(2, elsewhere)


def interrupted(rank: int) -> None:
    """In the first, watched forward pass: the next one is watched alone."""
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    optimizer.overlap_gather(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, rank)
    handle.remove()
    loss_of(model, rank)
    assert optimizer._gate.open
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_an_interrupted_first_pass_leaves_no_watch():
    run_ranks(2, interrupted)


def copied(rank: int) -> None:
    model, optimizer = ready(rank)
    optimizer.synchronize()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(values(twin), values(model))
        twin(torch.ones(1, 1000))
        twin.state_dict()
    del optimizer
    model(torch.ones(1, 1000)).sum().backward()


def test_a_copied_model_and_one_whose_optimizer_is_gone_go_on():
    run_ranks(2, copied)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden).relu()


def compiled(rank: int, way: str) -> None:
    results = []
    for overlap in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[Block() for _ in range(4)])
        optimizer = shardadam.AdamW(
            model.named_parameters(), bucket_bytes=20_000, shard_grads=overlap
        )
        run = model
        options = {"backend": "aot_eager", "fullgraph": True}
        if way == "whole":
            run = torch.compile(model, **options)
        elif way == "blocks":
            for index, block in enumerate(model):
                model[index] = torch.compile(block, **options)
        else:
            for block in model:
                block.compile(**options)
        if overlap:
            optimizer.overlap_gather(run)
        for step in range(4):
            optimizer.zero_grad()
            batch = torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))
            run(batch).square().mean().backward()
            optimizer.step()
            assert optimizer._gathers.under_way == overlap
        optimizer.synchronize()
        results.append(values(model))
    assert same(*results)


@pytest.mark.parametrize("way", ["whole", "blocks", "blocks in place"])
def test_compiled_models_have_no_graph_break(way):
    run_ranks(2, compiled, way)


def compiled_in_place(rank: int) -> None:
    model = nn.Linear(4, 4)
    model.compile(backend="eager")
    optimizer = shardadam.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"expected torch.compile\(model\)"):
        optimizer.overlap_gather(model)


def test_a_model_compiled_in_place_is_refused():
    run_ranks(2, compiled_in_place)


def compiled_step(rank: int) -> None:
    """step() in a compiled function runs outside of the graph, and is the same."""
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[Block() for _ in range(3)])
        optimizer = shardadam.AdamW(model.named_parameters(), bucket_bytes=20_000)
        optimizer.overlap_gather(model)

        def train(batch: torch.Tensor, model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

        run = torch.compile(train, backend="aot_eager") if compiles else train
        for step in range(4):
            run(torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank)))
        optimizer.synchronize()
        results.append(values(model))
    assert same(*results)


def test_a_step_in_a_compiled_region():
    run_ranks(2, compiled_step)


def discarded(rank: int) -> None:
    for _ in range(6):
        model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 300))
        optimizer = shardadam.AdamW(model.parameters(), bucket_bytes=20_000)
        assert not gathers._left  # nothing of the one before is kept for longer
        optimizer.overlap_gather(model)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(4, 300)).sum().backward()
            optimizer.step()
        assert optimizer._gathers.under_way
        if rank == 1:
            time.sleep(0.2)
        del model, optimizer
        gc.collect()
        assert gathers._left


def test_an_optimizer_discarded_while_it_gathers_leaves_the_next_one_alone():
    run_ranks(2, discarded, timeout_s=60, peer_timeout_s=10)
