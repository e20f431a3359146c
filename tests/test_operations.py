"""docs/operations.md has every error of a run that does not say itself what was expected."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import shardadam

PACKAGE = Path(shardadam.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "operations.md").read_text()


def nodes() -> Iterator[ast.AST]:
    """Of the package, but for its command line."""
    for path in PACKAGE.rglob("*.py"):
        if "cli" not in path.relative_to(PACKAGE).parts:
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


def test_every_error_of_a_run_says_what_was_expected_or_is_on_the_page():
    raised = [
        text_of(node.exc.args[-1])
        for node in nodes()
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and ast.unparse(node.exc.func) == "RuntimeError"
    ]
    assert len(raised) > 12
    unsaid = [text for text in raised if "xpected" not in text]
    assert [text for text in unsaid if not any(p in text for p in phrases())] == []
