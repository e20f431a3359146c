"""What the shell and the terminal are told."""

WHOLE, DAMAGED, ERROR = 0, 1, 2
"""Exit codes; 2 is argparse's as well."""


def one_line(text: str) -> str:
    """``text`` without line ends and whatever else would move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
