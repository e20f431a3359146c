"""A ds_config.json, read without DeepSpeed: its settings by dotted key."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardadam.cli.telling import one_line

AUTO = "auto"
"""A value that Hugging Face's Trainer and Accelerate fill in."""
_LARGEST = 2**20  # bytes; real ones have a few thousand
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


class ConfigError(Exception):
    """A config that can't be read, in one line."""


def read(path: Path) -> dict[str, Any]:
    """The settings in a file, by dotted key: "zero_optimization.stage".

    Raises:
        ConfigError: no JSON, or not an object.
        OSError: no file.
    """
    with path.open("rb") as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ConfigError(f"{path}: expected a config, found more than {_LARGEST} bytes")
    try:
        config = json.loads(
            text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite
        )
    except RecursionError:
        raise ConfigError(
            f"{path}: expected a config, found JSON that is nested too deep"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: expected JSON, line {error.lineno}, column {error.colno}: {error.msg} "
            "(comments and trailing commas, which DeepSpeed reads, are no JSON)"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected an object {{…}}, found {type(config).__name__}")
    return _flat(config, "")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


def _flat(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


class Settings:
    """What is in a config. ``unsaid``: the keys that nothing has been said of yet."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        self._leaves = dict(leaves)
        self.unsaid = dict(leaves)

    def has(self, key: str) -> bool:
        """Whether the config sets ``key``, or keys below it."""
        return bool(self.below(key))

    def below(self, key: str) -> list[str]:
        """The keys of the section ``key``, or ``key`` itself, that nothing has been said of."""
        return [name for name in self.unsaid if name == key or name.startswith(f"{key}.")]

    def shown(self, key: str) -> str:
        """The setting, in one line."""
        if key not in self._leaves:
            return f"{key} (its default)"
        text = repr(self._leaves[key])
        return one_line(f"{key} = {text if len(text) < 40 else text[:37] + '…'}")

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of ``key``, or `AUTO`; ``default`` where it is not set, or null.

        Raises:
            ConfigError: it is not of ``kind``. Numbers are also taken from whole ones.
        """
        value = self._leaves.get(key)
        if value is None:
            return default
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is float and type(value) is int:
            right = True
        if kind is int and isinstance(value, float) and value.is_integer():
            value, right = int(value), True  # 5e8
        if not right and value != AUTO:
            raise ConfigError(f"{key}: expected {_KINDS[kind]}, found {_shown(value)}")
        return value

    def pair(self, key: str) -> Any:
        """Two numbers, as of ``betas``, None or `AUTO`."""
        value = self._leaves.get(key)
        if value is None or value == AUTO:
            return value
        if not (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(part, int | float) and not isinstance(part, bool) for part in value)
        ):
            raise ConfigError(f"{key}: expected two numbers, found {_shown(value)}")
        return tuple(value)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}…"
