"""DeepSpeed: Adam, AdamW and NAdam as the optimizer that its ZeRO shards.

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=AdamW(model.parameters(), lr=3e-4), config=config
    )

Here DeepSpeed shards: it puts its own flat fp32 shard in the place of a group's params, stage 3 one
after the other within a step, reduces and clips gradients, and saves. So these classes do what it
expects of one of torch.optim: they keep nothing but ``state``, of whatever params a step finds in
the groups, and never communicate. The update is the same kernel as ever.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from shardadam.adam import hyperparameters
from shardadam.kernels import Run, backend_for, fold, supports
from shardadam.kernels.run import in_memory_order
from shardadam.kernels.state_formats import MOMENTS
from shardadam.params import describe

_backend = functools.cache(backend_for)


class _Local(torch.optim.Optimizer):
    """torch.optim's class of the same name, with our update. For fp32 and fp64 params.

    Takes torch.optim's arguments; ``foreach``, ``fused`` and ``capturable`` change nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_supports_amp_scaling = False  # torch sets it with fused=True

    @_disable_dynamo  # traced, host arithmetic would be compiled, and round otherwise
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every param that has a gradient, on this rank alone.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            ValueError: a param or gradient that can't be used; nothing has been changed.
            RuntimeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = {  # a param that is listed twice counts once
            param: (group, _ready(f"param {position} of group {index}", param, group, self.state))
            for index, group in enumerate(self.param_groups)
            for position, param in enumerate(group["params"])
            if param.grad is not None
        }
        runs: dict[torch.device, list[Run]] = defaultdict(list)
        for param, (group, grad) in due.items():
            runs[param.device].append(self._run(param, group, grad))
        for device, there in runs.items():
            _backend(device).update(there)
            for run in there:
                run.release()
        return loss

    def _run(self, param: Tensor, group: dict[str, Any], grad: Tensor) -> Run:
        """The next update of ``param``, whose step is counted."""
        decoupled = isinstance(self, torch.optim.AdamW) or group.get("decoupled_weight_decay")
        hyper = hyperparameters(group, bool(decoupled), group.get("momentum_decay"))
        state = self.state[param]
        state["step"] += 1
        step = float(state["step"])
        if hyper.momentum_decay is not None:
            state["mu_product"] *= hyper.momentum(step)
        moments = {name: in_memory_order(state[name]) for name in _moments(group)}
        return Run(
            param=in_memory_order(param),
            exp_avg=moments["exp_avg"],
            exp_avg_sq=moments["exp_avg_sq"],
            max_exp_avg_sq=moments.get("max_exp_avg_sq"),
            master=None,
            grad=grad,
            coefficients=fold(hyper, step, float(state.get("mu_product", 1.0))),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch.optim. DeepSpeed's FusedAdam counts a group's steps, not a param's."""
        for group in state["param_groups"]:
            for param in group["params"]:
                entry = state["state"].get(param)
                if entry and "step" not in entry:
                    if "step" not in group:
                        raise ValueError("the state of a param has moments and no step")
                    entry["step"] = torch.tensor(float(group["step"]))
        super().__setstate__(state)


def _ready(name: str, param: Tensor, group: dict[str, Any], states: dict[Any, Any]) -> Tensor:
    """The gradient of ``param``, for which there is state now, all laid out in memory like it.

    Raises:
        ValueError: it can't be updated with its gradient and state.
        RuntimeError: a sparse gradient.
    """
    grad = param.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{name}: Adam does not support sparse gradients, please consider SparseAdam instead"
        )
    if group.get("differentiable"):
        raise ValueError("differentiable=True is not supported: step() writes params in place")
    if param.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} is {describe(param)}: expected the float32 masters that DeepSpeed makes, so "
            "deepspeed.initialize() with this optimizer, and its engine's step(). Without "
            "DeepSpeed it is shardadam's own class of the same name that updates such params"
        )
    if not supports(param.dtype) or _strides(param) != param.stride():
        raise ValueError(
            f"{name}: expected a dense float32 or float64 param, found {describe(param)} with "
            f"strides {param.stride()}"
        )
    grad = _like(param, grad.resolve_neg(), f"the gradient of {name}")
    state = states[param]
    if not state:
        state["step"] = torch.tensor(0.0)
        if "momentum_decay" in group:
            state["mu_product"] = torch.tensor(1.0)
        state.update({moment: torch.zeros_like(param) for moment in MOMENTS[:2]})
    if group.get("amsgrad") and MOMENTS[2] not in state:
        state[MOMENTS[2]] = torch.zeros_like(param)
    for moment in _moments(group):
        state[moment] = _like(param, state[moment], f"{moment} of {name}")
    return grad


def _moments(group: dict[str, Any]) -> tuple[str, ...]:
    return MOMENTS if group.get("amsgrad") else MOMENTS[:2]


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Those that ``tensor`` has if it is dense."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()


def _like(param: Tensor, tensor: Tensor, name: str) -> Tensor:
    """``tensor`` with the strides of ``param``: the kernel goes by the order of memory."""
    if (tensor.dtype, tensor.shape, tensor.device) != (param.dtype, param.shape, param.device):
        raise ValueError(
            f"{name}: expected {describe(param)}, like the param; found {describe(tensor)}"
        )
    return tensor if tensor.stride() == param.stride() else torch.empty_like(param).copy_(tensor)


class Adam(_Local, torch.optim.Adam):
    """torch.optim.Adam's arguments and rule, for DeepSpeed."""


class AdamW(_Local, torch.optim.AdamW):
    """torch.optim.AdamW's arguments and rule, for DeepSpeed."""


class NAdam(_Local, torch.optim.NAdam):
    """torch.optim.NAdam's arguments and rule, for DeepSpeed."""
