"""The model that a plan is for, on the meta device: built by its own code, or from its config."""

import ast
import copy
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.cli import hf_shapes
from shardadam.cli.footprint import Trained
from shardadam.cli.telling import CommandError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_MOST_PIECES = 4096  # four of them, in transit, are then 0.1 % of the params


@dataclass(frozen=True, slots=True)
class Model:
    """``name``: for the user. ``note``: what of it is assumed. ``of``: it, its floats as a dtype.

    ``own``: the dtype that most of its params are built in.
    """

    name: str
    note: str
    own: str
    of: Callable[[str], Trained]


def from_count(numel: int, bucket_bytes: int) -> Model:
    """``numel`` params of which nothing else is known."""
    piece = max(bucket_bytes // 4, -(-numel // _MOST_PIECES))
    sizes = [piece] * (numel // piece) + ([numel % piece] if numel % piece else [])
    named = [(f"part{index}.weight", (size,)) for index, size in enumerate(sizes)]
    note = f"as if in params of {piece:,} elements; a model's embedding may be larger"
    return _from_shapes(f"{numel:,} params", note, named)


def from_config(path: Path) -> Model:
    """A Hugging Face model, from its ``config.json``; by transformers where it is installed.

    Raises:
        CommandError: it is no such file, or of a model that can't be built.
    """
    try:
        config = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: expected a Hugging Face config in JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise CommandError(f'{path}: expected a Hugging Face config, found none with "model_type"')
    if find_spec("transformers") is not None:
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise CommandError(f"transformers can't be imported: {error}") from None
        return _from_module(str(path), lambda: _transformers_model(transformers, config))
    try:
        named = hf_shapes.shapes(config)
    except hf_shapes.UnknownArchitecture as error:
        raise CommandError(
            f"{path}: {error} takes transformers: pip install transformers"
        ) from None
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CommandError(
            f"{path}: its fields are not those of a {config['model_type']}: {error!r}"
        ) from None
    return _from_shapes(str(path), "from its fields: transformers is not installed", named)


def from_import(where: str, arguments: Sequence[str]) -> Model:
    """What ``module:callable`` returns, given ``name=value`` arguments.

    Raises:
        CommandError: it can't be imported or called, or does not return a module.
    """
    module, _, name = where.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # a user's module may raise anything
        raise CommandError(f"{where} can't be imported: {type(error).__name__}: {error}") from None
    given = dict(map(_argument, arguments))
    shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return _from_module(f"{where}({shown})", lambda: found(**given))


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise CommandError(f"expected an argument as name=value, found {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _transformers_model(transformers: Any, config: dict[str, Any]) -> Any:
    known = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(config["model_type"], **known)
    named = [getattr(transformers, name, None) for name in config.get("architectures") or []]
    if named and named[0] is not None:
        return named[0](made)
    return transformers.AutoModelForCausalLM.from_config(made)


def _from_module(name: str, build: Callable[[], Any]) -> Model:
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:  # a user's model may raise anything
        raise CommandError(
            f"{name} could not be built on the meta device, where no tensor has values: "
            f"{type(error).__name__}: {error}"
        ) from None
    if not isinstance(model, nn.Module):
        raise CommandError(f"{name} returned {type(model).__name__}: expected a torch.nn.Module")
    params = [param for param in model.parameters() if param.requires_grad]
    if not params:
        raise CommandError(f"{name} has no params that are trained")
    for param_name, param in model.named_parameters():
        if not param.is_meta:
            raise CommandError(
                f"{name}: {param_name} is on {param.device}: expected a model whose tensors go "
                "where torch.device() says"
            )
    sizes: dict[torch.dtype, int] = {}
    for param in params:
        sizes[param.dtype] = sizes.get(param.dtype, 0) + param.numel()
    most = max(sizes, key=sizes.__getitem__)
    own = next((key for key, dtype in DTYPES.items() if dtype == most), str(most)[6:])
    mixed = "of several dtypes, named by that of most" if len(sizes) > 1 else ""

    def of(dtype: str) -> Trained:
        cast = model if dtype == own else copy.deepcopy(model).to(DTYPES[dtype])
        return Trained([*cast.named_parameters()], [*cast.buffers()])

    return Model(name, mixed, own, of)


def _from_shapes(name: str, note: str, named: Sequence[tuple[str, tuple[int, ...]]]) -> Model:
    def of(dtype: str) -> Trained:
        def param(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, dtype=DTYPES[dtype], device="meta", requires_grad=True)

        return Trained([(name, param(shape)) for name, shape in named])

    return Model(name, note, "fp32", of)
