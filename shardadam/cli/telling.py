"""What the shell and the terminal are told."""

WHOLE, DAMAGED, ERROR = 0, 1, 2
"""Exit codes; 2 is argparse's as well."""


class CommandError(ValueError):
    """A command can't be run as it was given; the message says why, in one line."""


def one_line(text: str) -> str:
    """``text`` without line ends and whatever else would move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
