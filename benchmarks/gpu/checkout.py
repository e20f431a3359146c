"""Modules of this checkout that no package installs, by their path."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parents[2]


def module(path: str) -> ModuleType:
    """The module in file ``path`` of the checkout, as "tests/kernel_runs.py"."""
    file = _ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded
