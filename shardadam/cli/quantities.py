"""Bytes, and bytes per second, as people write them."""

import argparse
import re

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_NUMBER = re.compile(
    r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([KMGTP]?)(i?)([bB]?)(/s)?\s*", re.IGNORECASE
)


def nbytes(text: str) -> int:
    """``"80GB"`` (80e9), ``"80GiB"`` (80 * 2**30), ``"80e9"``.

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    found = _NUMBER.fullmatch(text)
    value = None if found is None or found[4] == "b" or found[5] else _value(found)
    if not value:
        raise argparse.ArgumentTypeError(f"expected bytes, such as 80GB or 24GiB, found {text!r}")
    return int(value)


def bandwidth(text: str) -> float:
    """Bytes per second, of ``"50GB/s"`` or, of bits, ``"400Gb/s"``.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    found = _NUMBER.fullmatch(text)
    value = None if found is None or not found[4] else _value(found)
    if found is None or not value:
        raise argparse.ArgumentTypeError(
            f"expected bytes or bits per second, such as 50GB/s or 400Gb/s, found {text!r}"
        )
    return value / 8 if found[4] == "b" else value


def count(text: str) -> int:
    """A positive whole number, also as ``"7e9"`` or ``"7B"``.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    billions = re.fullmatch(r"([0-9.]+)([KMBT])", text)
    try:
        value = float(billions[1]) if billions else float(text)
        value *= 1000 ** (" KMBT".index(billions[2])) if billions else 1
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e16:
        raise argparse.ArgumentTypeError(f"expected a number, such as 7e9 or 7B, found {text!r}")
    return int(value)


def ranks(text: str) -> int:
    """A world size.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text!r}")
    return int(text)


def _value(found: re.Match[str]) -> float | None:
    try:
        base = 1024 if found[3] else 1000
        return float(found[1]) * float(base ** _POWERS[found[2].upper()])
    except ValueError:
        return None
