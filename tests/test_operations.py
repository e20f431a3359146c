"""docs/operations.md is true, and every error says what to do or is found there."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import shardadam

PACKAGE = Path(shardadam.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "operations.md").read_text()


def nodes() -> Iterator[ast.AST]:
    """Of the package."""
    for path in PACKAGE.rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text()))


def text_of(node: ast.AST) -> str:
    """A string's constant parts, or nothing."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def phrases() -> list[str]:
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| ")]
    return [phrase for cell in cells for phrase in re.findall(r"`([^`]+)`", cell)]


def test_every_phrase_is_in_the_code():
    known = [text_of(n) for n in nodes() if isinstance(n, ast.JoinedStr | ast.Constant)]
    assert len(phrases()) > 25
    assert [p for p in phrases() if not any(p in text for text in known)] == []


def test_the_table_of_errors_knows_what_to_do():
    spec = importlib.util.spec_from_file_location("errors", PACKAGE.parent / ".ci" / "errors.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    advice = list(page.rows())
    raised = [error for room in ("", *page.ROOMS) for error in page.errors(room)]
    assert len(raised) > 300
    helpless = [text for kind, text in raised if not page.todo(kind, text, advice)]
    assert [text for text in helpless if len(text.split()) > 2] == []
