"""What `inspect` says of a checkpoint, and how it is printed: by rich, or as plain text."""

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from shardadam.cli.telling import one_line


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor; ``holds``: what belongs to it, ``nbytes`` of all that."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    holds: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class File:
    """A file; ``wrong`` says what is wrong with it, if anything is."""

    name: str
    nbytes: int
    wrong: str = ""


@dataclass(slots=True)
class Summary:
    """All of it."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    files: list[File] = field(default_factory=list)


def size(nbytes: int) -> str:
    """As people read it."""
    if nbytes < 1024:
        return f"{nbytes} B"
    power = min(int(math.log(nbytes, 1024)), 5)
    return f"{nbytes / 1024**power:.1f} {'KMGTP'[power - 1]}iB"


def show(summary: Summary) -> None:
    """Print it."""
    shapes = [" x ".join(map(str, row.shape)) or "scalar" for row in summary.rows]
    tensors = [
        [row.name, shape, row.dtype, row.holds, size(row.nbytes)]
        for row, shape in zip(summary.rows, shapes, strict=True)
    ]
    files = [[file.name, size(file.nbytes), file.wrong or "ok"] for file in summary.files]
    tables = [
        (["tensor", "shape", "dtype", "state", "bytes"], tensors),
        (["file", "bytes", "there"], files),
    ]
    rows, stored = sum(row.nbytes for row in summary.rows), sum(f.nbytes for f in summary.files)
    facts = {
        **summary.facts,
        "tensors": f"{len(summary.rows)}, {size(rows)}",
        "total": f"{len(summary.files)} file{'s' * (len(summary.files) != 1)}, {size(stored)}",
    }
    show_tables(summary.title, facts, tables, numbers={"bytes"})


_Tables = Sequence[tuple[list[str], list[list[str]]]]


def show_tables(
    title: str, facts: dict[str, str], tables: _Tables, numbers: Collection[str] = ()
) -> None:
    """Print facts and tables, each a head and rows; ``numbers``: heads of columns of numbers."""
    # To a pipe rich would cut names to 80 columns.
    if find_spec("rich") is not None and sys.stdout.isatty():
        _show_rich(title, facts, tables, numbers)
    else:
        _show_plain(title, facts, tables)


def _show_plain(title: str, facts: dict[str, str], tables: _Tables) -> None:
    print(one_line(title))
    for name, value in facts.items():
        print(f"  {name:<12}{one_line(value)}")
    for head, rows in tables:
        clean = [head, *([one_line(cell) for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
        print()
        for row in clean:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            print("  ".join(cells).rstrip())


def _show_rich(
    title: str, facts: dict[str, str], tables: _Tables, numbers: Collection[str]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # names are text: what looks like markup in them is none

    console = Console()
    console.print(Text(one_line(title), style="bold"))
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(Text(f"  {name}", style="dim"), Text(one_line(value)))
    console.print(grid)
    for head, rows in tables:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in head:
            justify: Literal["left", "right"] = "right" if name in numbers else "left"
            table.add_column(name, justify=justify, overflow="fold")
        for row in rows:
            style = "" if row[-1] == "ok" or len(row) != 3 else "red"
            table.add_row(*(Text(one_line(cell), style=style) for cell in row))
        console.print()
        console.print(table)
