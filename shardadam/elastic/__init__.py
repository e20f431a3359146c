"""Runs that end and go on: after a failure, a preemption, on other numbers of ranks.

    from shardadam import elastic

    elastic.init_process_group("gloo")
    batches = elastic.Batches(len(dataset), batch_size=256)
    run = elastic.Run("run", every=500, model=model, optimizer=optimizer, lr_scheduler=scheduler)
    for step in run.steps(10_000):
        inputs, targets = collate(dataset[index] for index in batches.of(step))
        ...

Whoever starts the ranks again (torchrun, SLURM, Kubernetes, Ray) starts the same program.
"""

from shardadam.elastic.batches import Batches
from shardadam.elastic.rendezvous import init_process_group
from shardadam.elastic.run import Preempted, Run

__all__ = ["Batches", "Preempted", "Run", "init_process_group"]
