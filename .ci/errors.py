"""What `make docs` fills in: a table of every error, made from the code and from operations.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What to do about those that neither say what was expected nor are in operations.md.
BY_KIND = {
    "CheckpointError": "take another checkpoint; `python -m shardadam ckpt verify` looks closer",
    "CommandError": "mend what it names, or see `--help`",
    "ConfigError": "mend the key that it names",
    "CompilerMissing": "install what it names; until then, params are to be on the CPU",
    "OSError": "look at the disk that it names",
}
ROOMS = {
    "cli": "Commands",
    "checkpoint": "Checkpoints",
    "integrations": "Integrations",
    "elastic": "Runs that go on",
    "kernels": "Kernels",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the table."""
    return (
        markdown.replace("<!-- errors -->", table()) if "<!-- errors -->" in markdown else markdown
    )


def table() -> str:
    """Every error with a text of its own, room by room."""
    advice = list(rows())
    lines: list[str] = []
    for room in ("", *ROOMS):
        found = sorted({(text, kind) for kind, text in errors(room) if len(text.split()) > 2})
        lines += [
            "",
            f"## {ROOMS.get(room, 'The optimizer')}",
            "",
            "| text | what to do |",
            "|---|---|",
        ]
        lines += [f"| {_cell(text)} | {todo(kind, text, advice)} |" for text, kind in found]
    return "\n".join(lines)


def errors(room: str) -> Iterator[tuple[str, str]]:
    """The kind and text of each error that a folder of the package raises, … for what varies."""
    for path in sorted((ROOT / "shardadam" / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                yield ast.unparse(node.exc.func), text_of(node.exc.args[-1])


def text_of(node: ast.AST) -> str:
    """A string's constant parts."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def rows() -> Iterator[tuple[list[str], str]]:
    """The phrases of each line of operations.md, and what to do."""
    before = ""
    for line in (ROOT / "docs" / "operations.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        phrases = re.findall(r"`([^`]+)`", cells[0])
        if line.startswith("| ") and phrases:
            before = cells[2].replace("likewise", before)
            yield phrases, before


def todo(kind: str, text: str, advice: list[tuple[list[str], str]]) -> str:
    """What operations.md says, or the error itself does; nothing if neither."""
    for phrases, what in advice:
        if any(phrase in text for phrase in phrases):
            return what
    return "what it expects" if "xpected" in text else BY_KIND.get(kind, "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").replace("*", "\\*")
