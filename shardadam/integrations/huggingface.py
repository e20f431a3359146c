"""Hugging Face's Trainer: the state is saved whole, and nothing clips by one rank's norm.

    args = TrainingArguments(…, max_grad_norm=0)
    trainer = Trainer(
        model,
        args,
        optimizer_cls_and_kwargs=(shardadam.AdamW, {"lr": 3e-4, "max_grad_norm": 1.0}),
        callbacks=[huggingface.Sharded()],
        …
    )

The Trainer saves rank 0's state dict: the callback brings the whole state there in time. The
Trainer clips what a rank has in ``param.grad``: the optimizer clips, inside its step, the average.
"""

from typing import Any

import torch

from shardadam.optimizer import ShardedOptimizer

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import SaveStrategy
except ImportError as error:
    raise ImportError(
        "shardadam.integrations.huggingface needs transformers: pip install 'transformers[torch]'"
    ) from error


class Sharded(TrainerCallback):  # type: ignore[misc]
    """A callback for a Trainer with an optimizer of shardadam's; the last of its callbacks.

    Raises:
        ValueError: when training begins: another optimizer, other ranks than the Trainer's, or
            arguments by which it clips or saves in its own way.
        RuntimeError: a later callback, or the caller, asked for a save: the state is not in it.

        In each case on every rank.
    """

    def __init__(self) -> None:
        self._optimizer: ShardedOptimizer | None = None
        self._whole_at = -1  # steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the set-up."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        if not isinstance(optimizer, ShardedOptimizer):
            raise ValueError(
                f"expected an optimizer of shardadam's, found {type(optimizer).__name__}: pass "
                "Trainer(optimizer_cls_and_kwargs=(shardadam.AdamW, {…}))"
            )
        ranks = optimizer._communicator.world_size
        if ranks != args.world_size:
            raise ValueError(
                f"the optimizer has {ranks} ranks and the Trainer {args.world_size}: expected the "
                "same, from torchrun or accelerate launch, and an optimizer that is made after the "
                "TrainingArguments"
            )
        if ranks > 1 and args.max_grad_norm:
            raise ValueError(
                f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips by what one rank "
                "has: expected max_grad_norm=0 there (its default is 1.0) and "
                f"max_grad_norm={args.max_grad_norm} in the optimizer's arguments"
            )
        if ranks > 1 and getattr(args, "enable_jit_checkpoint", False):
            raise ValueError(
                "enable_jit_checkpoint=True saves as soon as a rank has a signal, without the "
                "others' state: expected False"
            )
        _take_back(optimizer)
        self._optimizer = optimizer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before a save that follows."""
        if control.should_save:
            self._consolidate(args, state)

    on_epoch_end = on_step_end

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer decides after this whether it is the best so far."""
        if control.should_save or args.save_strategy == SaveStrategy.BEST:
            self._consolidate(args, state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that it was."""
        if self._whole_at != state.global_step and not args.save_only_model:
            raise RuntimeError(
                f"the checkpoint of step {state.global_step} has only rank 0's part of the "
                "optimizer's state, as something asked for it after huggingface.Sharded had its "
                "turn: expected that to be the last of the callbacks"
            )

    def _consolidate(self, args: TrainingArguments, state: TrainerState) -> None:
        """Collective: all ranks' control says the same."""
        if self._optimizer is not None and not args.save_only_model:
            self._optimizer.consolidate_state_dict()
            self._whole_at = state.global_step


@torch.no_grad()
def _take_back(optimizer: ShardedOptimizer) -> None:
    """Make params views of the buckets again.

    On the CPU Accelerate moves the model to "cpu:0" once the optimizer has been made, and to torch
    that is not where it is: every param gets a copy of itself.
    """
    for bucket in optimizer._buckets:
        for param, view in zip(bucket.params, bucket.views, strict=True):
            if view.device.type == "cpu" and param.data_ptr() != view.data_ptr():
                view.copy_(param)
                param.data = view
