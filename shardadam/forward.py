"""Gathers beside the forward pass: each module waits for its own params, just before it runs.

[Note: who reads which param]

A module is taken to read its own params, and those that it was seen to read in the first forward
pass in training mode: some read params of their children without calling them, as
nn.MultiheadAttention does with its out_proj, or a model that computes logits from its embedding's
weight. That pass runs with everything in place and under a dispatch mode that sees every operation.
In eval mode, where torch and others take other paths, a module waits for all params, and one that
is compiled for all under it. A param that is read too early all the same, and saved for backward,
makes backward raise, since its version moves when it has been gathered (see `Gathers.wait`).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from shardadam.buffers import FlatBucket
from shardadam.gathers import Gathers


class ForwardGate:
    """The hooks on a model.

    Attributes:
        open: whether gathers may go on beside the forward pass: once one has been watched.
    """

    def __init__(
        self, model: nn.Module, places: Mapping[Tensor, tuple[FlatBucket, int]], gathers: Gathers
    ) -> None:
        """Put the hooks on.

        Raises:
            ValueError: the model was compiled in place, so that no hook runs before it.
        """
        if _compiled_in_place(model):
            raise ValueError(
                f"{type(model).__name__} was compiled in place, and runs no hook outside of the "
                "compiled code: expected torch.compile(model), or a model of which modules are"
            )
        self.model_name = type(model).__name__
        self.open = False
        self._places, self._gathers = places, gathers
        self._reads = _modules_and_params(model)
        self._buckets: dict[nn.Module, list[FlatBucket]] = {}
        self._watch: _Watch | None = None
        self._watching: list[RemovableHandle] = []
        self._handles: list[RemovableHandle] = []
        self._others: list[FlatBucket] | None = None
        hook = _Hook(self, ForwardGate.wait_for_all)
        for module in model.modules():
            self._handles += [
                module.register_state_dict_pre_hook(hook),  # type: ignore[no-untyped-call]
                module.register_load_state_dict_pre_hook(hook),  # type: ignore[no-untyped-call]
            ]
        root_in, root_out = _Hook(self, ForwardGate._begin), _Hook(self, ForwardGate._end)
        self._watching.append(model.register_forward_pre_hook(root_in))
        for module in self._reads:
            enter, leave = _Hook(self, ForwardGate._enter), _Hook(self, ForwardGate._leave)
            self._watching.append(module.register_forward_pre_hook(enter))
            self._watching.append(module.register_forward_hook(leave, always_call=True))
        self._watching.append(model.register_forward_hook(_Hook(self, ForwardGate._watched)))
        self._watching.append(model.register_forward_hook(root_out, always_call=True))
        # So that a param that nobody has waited for, and that was read, is an error in backward.
        self._handles.append(model.register_forward_hook(hook))

    def remove(self) -> None:
        """Take the hooks off again."""
        self.open = False
        for handle in [*self._handles, *self._watching]:
            handle.remove()

    def forget_places(self) -> None:
        """Params have been placed: look buckets up again."""
        self._buckets.clear()
        self._others = None

    def others(self) -> list[FlatBucket]:
        """The buckets of which a param is in no module of the model: no hook waits for it."""
        if self._others is None:
            known = {param for params in self._reads.values() for param in params}
            places = self._places.items()
            self._others = list({place[0]: None for param, place in places if param not in known})
        return self._others

    def wait(self, module: nn.Module, *_: Any) -> None:
        """Before ``module`` runs."""
        if self._gathers.under_way:
            if not module.training:
                self._gathers.wait_for_all()
                return
            buckets = self._buckets.get(module)
            if buckets is None:
                places = (self._places.get(param) for param in self._reads[module])
                buckets = list(dict.fromkeys(place[0] for place in places if place is not None))
                self._buckets[module] = buckets
            self._gathers.wait(buckets)

    def wait_for_all(self, *_: Any) -> None:
        """Before a state dict is made or loaded, and after the model has run."""
        self._gathers.wait_for_all()

    # ---- the first forward pass -----------------------------------------------------------------

    def _begin(self, model: nn.Module, *_: Any) -> None:
        self._end(model)  # a KeyboardInterrupt calls no hooks
        if model.training:
            self._watch = _Watch(set(map(id, self._places)))
            self._watch.__enter__()  # type: ignore[no-untyped-call]

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if self._watch is not None:
            self._watch.inside.append(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._watch is not None and self._watch.inside:
            self._watch.inside.pop()

    def _watched(self, model: nn.Module, *_: Any) -> None:
        """The pass went through: from now on modules wait."""
        if self._watch is None:
            return
        for module, params in self._watch.reads.items():
            self._reads[module] = {**self._reads[module], **params}
        for module, params in self._reads.items():
            if params:
                hook = _Hook(self, ForwardGate.wait)
                self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        self.open = True

    def _end(self, model: nn.Module, *_: Any) -> None:
        if self._watch is not None:
            self._watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._watch = None
        if self.open:
            for handle in self._watching:
                handle.remove()
            self._watching.clear()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which params operations read, by the innermost module that is running."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: list[nn.Module] = []
        self.reads: dict[nn.Module, dict[Tensor, None]] = {}
        self._known = known

    @classmethod
    def is_infra_mode(cls) -> bool:
        """So that what is compiled in this pass is, as without it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if id(tensor) in self._known:
                    self.reads.setdefault(self.inside[-1], {})[tensor] = None
        return func(*args, **kwargs)


class _Hook:
    """A hook that does not keep the gate alive, nor goes along where a module is copied."""

    def __init__(self, gate: ForwardGate, call: Callable[..., None]) -> None:
        self._gate, self._call = weakref.ref(gate), call

    @_disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        gate = self._gate()
        if gate is not None:
            self._call(gate, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoHook, ()


class _NoHook:
    """What a copied module has instead: its params are not the optimizer's."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def _modules_and_params(model: nn.Module) -> dict[nn.Module, dict[Tensor, None]]:
    """The modules on which hooks run, each with the params that it has for sure."""
    found: dict[nn.Module, dict[Tensor, None]] = {}

    dynamo = sys.modules.get("torch._dynamo")  # slow to import; who has compiled, has it

    def visit(module: nn.Module) -> None:
        if module in found:
            return
        compiled = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
        found[module] = dict.fromkeys(module.parameters(recurse=compiled))
        if compiled:
            return
        for child in module.children():
            if _compiled_in_place(child):
                found[module].update(dict.fromkeys(child.parameters()))
            else:
                visit(child)

    visit(model)
    return found


def _compiled_in_place(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None
