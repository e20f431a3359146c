"""What the doctor finds, and how it is told."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from shardadam.cli.telling import one_line

Level = Literal["ok", "note", "warning", "wrong"]
_MARKS = {"ok": "ok   ", "note": "     ", "warning": "WARN ", "wrong": "WRONG"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One. ``found``: what there is; ``advice``: what to do about it, where something is to do."""

    name: str
    level: Level
    found: str
    advice: str = ""

    def lines(self) -> list[str]:
        """For a person."""
        first = f"{_MARKS[self.level]} {self.name:<12}{one_line(self.found)}"
        return [first, *([f"      {'':<12}-> {one_line(self.advice)}"] if self.advice else [])]

    def as_json(self) -> dict[str, Any]:
        """For a program, and for other ranks."""
        return asdict(self)


def looked(name: str, check: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """What ``check`` finds; that it failed is a finding too, and no reason not to look further."""
    try:
        return list(check())
    except Exception as error:  # the sick fail in any way
        what = f"this could not be looked at: {type(error).__name__}: {error}"
        return [Finding(name, "wrong", what, "this should work everywhere: please report it")]


def wrong(findings: Sequence[Finding]) -> list[Finding]:
    """Those that make the exit code 1."""
    return [finding for finding in findings if finding.level == "wrong"]
