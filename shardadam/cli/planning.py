"""`plan`: what fits into the memory of a rank, what it costs on the wire, and what to write."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardadam.cli.footprint import Plan
from shardadam.cli.links import Transport
from shardadam.cli.modelling import DTYPES, Model
from shardadam.cli.summary import show_tables, size
from shardadam.cli.telling import DAMAGED, WHOLE, CommandError
from shardadam.options import DEFAULT_BUCKET_BYTES

_MOST_RANKS = 1 << 14
_SPREADS = {"flat": "all, flat", "mesh": "all, mesh", "replicated": "a node, mesh"}
_WORDS = {"state over", "dtype", "gradients", "memory", "fits"}
"""Columns that hold no numbers."""
_NO_WAY = (
    "Nor on more ranks: params, activations and what is in transit are on every rank. Expected "
    "fewer activations, a smaller --bucket-bytes, or params sharded by FSDP2 (docs/fsdp2.md)."
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What is at hand, as far as it is known.

    ``ranks``: world sizes. ``memory``: bytes per rank. ``link``: bytes per second a rank sends, in
    its node. ``per_node``: ranks of a node, if there are several. ``node_link``: bytes per second
    that all of a node's ranks send other nodes, None: as much as they send each other.
    """

    ranks: Sequence[int]
    memory: int | None
    link: float | None
    transport: Transport
    per_node: int | None = None
    node_link: float | None = None

    def nodes(self, ranks: int) -> int:
        """How many ``ranks`` are on.

        Raises:
            CommandError: they don't fill all.
        """
        places = self.per_node or ranks
        if ranks != self.filling(ranks):
            raise CommandError(f"--per-node {places}: expected a divisor of --ranks, found {ranks}")
        return max(1, ranks // places)

    def filling(self, ranks: int) -> int:
        """The least ranks, not fewer than ``ranks``, that fill all nodes or are on one."""
        places = self.per_node or ranks
        return ranks if ranks <= places else -(-ranks // places) * places

    def seconds(self, plan: Plan) -> float | None:
        """What a step's exchanges take by the links alone, if they are known."""
        if self.link is None:
            return None
        return plan.traffic.seconds(self.link, self.node_link, plan.ways)


@dataclass(frozen=True, slots=True)
class Wanted:
    """``dtypes``: of the params, those wanted most first. ``activations``: bytes per rank."""

    dtypes: Sequence[str]
    activations: int
    bucket_bytes: int


def plan(model: Model, hardware: Hardware, wanted: Wanted, png: Path | None) -> int:
    """Print a table and the mode to take; returns the exit code, 1 where nothing fits.

    Raises:
        CommandError: the model has params that can't be optimized.
        OSError: the figure can't be written.
    """
    dtypes = list(dict.fromkeys(model.own if d == "own" else d for d in wanted.dtypes))
    plans = [
        each
        for ranks in hardware.ranks
        for each in plans_for(model, dtypes, ranks, hardware, wanted)
    ]
    _show(model, model.of(dtypes[0]).numel, plans, hardware, wanted)
    if png is not None:
        from shardadam.cli.plan_figure import draw

        flat = [each for each in plans if each.ways.spread == "flat"]
        title = f"{model.name}: {model.of(dtypes[0]).numel:,} params"
        draw(flat, hardware.memory, title, png)
    if hardware.memory is None:
        return WHOLE
    print()
    best = [cheapest(plans, ranks, hardware) for ranks in hardware.ranks]
    for ranks, found in zip(hardware.ranks, best, strict=True):
        where = f"on {ranks} rank{'s' * (ranks != 1)}"
        if found is None:
            smallest = min(p.footprint.total for p in plans if p.world_size == ranks)
            print(
                f"{where}: nothing fits; the smallest is {size(smallest - hardware.memory)} over."
            )
            least = min(p.footprint.params + p.footprint.activations for p in plans)
            helps = least < hardware.memory  # what is on every rank leaves room
            print(f"  {_way_out(model, dtypes, ranks, hardware, wanted) if helps else _NO_WAY}")
        else:
            left = hardware.memory - found.footprint.total
            print(f"{where}, the cheapest that fits leaves {size(left)}:")
            for line in constructor(found, model.own, wanted.bucket_bytes, hardware.transport):
                print(f"  {line}")
    return WHOLE if all(best) else DAMAGED


def _show(
    model: Model, numel: int, plans: Sequence[Plan], hardware: Hardware, wanted: Wanted
) -> None:
    """Print the table."""
    facts = {
        "trained": f"{numel:,} params, built in {model.own}",
        "memory": "not given: --memory says what fits"
        if hardware.memory is None
        else f"{size(hardware.memory)} per rank",
        "sent by": hardware.transport
        + ("" if hardware.link is None else f", {hardware.link / 1e9:g} GB/s per rank")
        + (f", {hardware.node_link / 1e9:g} GB/s per node" if hardware.node_link else ""),
    }
    if not wanted.activations:
        facts["not in it"] = "activations (--activations), the framework, fragments"
    if model.note:
        facts["note"] = model.note
    spread = any(each.ways.nodes > 1 for each in plans)
    rows = [_row(each, hardware, wanted, spread=spread) for each in plans]
    head = list(rows[0])
    cells = [list(row.values()) for row in rows]
    show_tables(f"plan for {model.name}", facts, [(head, cells)], set(head) - _WORDS)


def _row(each: Plan, hardware: Hardware, wanted: Wanted, *, spread: bool) -> dict[str, str]:
    """By column."""
    parts, seconds = each.footprint, hardware.seconds(each)
    row = {"ranks": str(each.world_size)}
    if spread:
        row["state over"] = _SPREADS[each.ways.spread]
    row |= {"dtype": each.dtype, "gradients": each.grads, "memory": each.memory}
    row |= {"params": size(parts.params), "grads": size(parts.grads)}
    row |= {"state": size(parts.state), "transit": size(parts.transients)}
    if wanted.activations:
        row["activations"] = size(parts.activations)
    row |= {"peak": size(parts.total), "sent a step": size(each.sent)}
    if spread:
        row["between nodes"] = size(each.traffic.across)
    if seconds is not None:
        row["seconds"] = f"{seconds:.3g}"
    if hardware.memory is not None:
        row["fits"] = "yes" if parts.total <= hardware.memory else "no"
    return row


def plans_for(
    model: Model, dtypes: Sequence[str], ranks: int, hardware: Hardware, wanted: Wanted
) -> list[Plan]:
    """Of all modes on ``ranks`` ranks, those that change and ask least first."""
    found = []
    for dtype in dtypes:
        try:
            found += model.of(dtype).plans(
                *(dtype, ranks, hardware.transport, wanted.bucket_bytes, wanted.activations),
                hardware.nodes(ranks),
            )
        except ValueError as error:
            raise CommandError(str(error)) from None
    return found


def cheapest(plans: Sequence[Plan], ranks: int, hardware: Hardware) -> Plan | None:
    """The first that fits: they are in order of what they ask of the program and of numerics.

    Of the ways to spread its mode over nodes, the quickest; without links, what sends least.
    """
    memory = hardware.memory
    assert memory is not None
    fitting = [p for p in plans if p.world_size == ranks and p.footprint.total <= memory]
    if not fitting:
        return None
    first = fitting[0]
    mode = first.dtype, first.memory, first.grads
    alike = [p for p in fitting if (p.dtype, p.memory, p.grads) == mode]
    return min(alike, key=lambda p: (hardware.seconds(p) or 0, p.traffic.across))


def constructor(chosen: Plan, own: str, bucket_bytes: int, transport: Transport) -> list[str]:
    """The lines to write."""
    arguments = ["model.parameters()", "lr=lr"]
    ways, mesh = chosen.ways, []
    if ways.spread != "flat":
        device = "cuda" if transport == "nccl" else "cpu"
        mesh = [
            "from torch.distributed.device_mesh import init_device_mesh",
            f'mesh = init_device_mesh("{device}", ({ways.nodes}, {ways.places}))',
        ]
        arguments += ["mesh=mesh", *["replicate_state=True"] * (ways.spread == "replicated")]
    if chosen.grads != "plain":
        arguments.append(f"{chosen.grads}=True")
    if chosen.memory != "full":
        arguments.append(f'memory="{chosen.memory}"')
    if bucket_bytes != DEFAULT_BUCKET_BYTES:
        arguments.append(f"bucket_bytes={bucket_bytes}")
    cast = [] if chosen.dtype == own else [f"model.to({DTYPES[chosen.dtype]})"]
    return [*cast, *mesh, f"optimizer = shardadam.AdamW({', '.join(arguments)})"]


def _way_out(
    model: Model, dtypes: Sequence[str], ranks: int, hardware: Hardware, wanted: Wanted
) -> str:
    """What would help where nothing fits."""
    assert hardware.memory is not None
    more = ranks
    while (more := hardware.filling(2 * more)) <= _MOST_RANKS:
        found = cheapest(plans_for(model, dtypes, more, hardware, wanted), more, hardware)
        if found is not None:
            return f"It would on {more} ranks, with {found.dtype}, {found.grads}, {found.memory}."
    return _NO_WAY
