#!/usr/bin/env python3
"""Ray: a script on workers of the cluster. When one fails, Ray starts all of them again.

    python launch/ray_job.py                                the demo
    python launch/ray_job.py train.py --lr 1e-3             a script, and its arguments
    RANKS=16 GPUS=1 RESTARTS=9 python launch/ray_job.py …   workers, GPUs of each, restarts
    ray job submit -- python /shared/launch/ray_job.py …    to a cluster that is elsewhere

The script, and the checkpoints that it writes, are on storage that every node sees.
"""

import os
import subprocess
import sys
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

DEMO = ["examples/train_gpt.py", "--resume", "--skip-baseline"]


def run_script(config: dict[str, Any]) -> None:
    """On a worker: the script is a process, since signals come to a main thread; this is none."""
    ranks = {
        # Ray has set RANK, MASTER_ADDR and so on, and has a store there: it serves the script too.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    # It dies with the worker: else ranks that Ray has given up would go on beside the new ones.
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, *config["command"]]
    subprocess.run(command, env=os.environ | ranks, cwd=config["folder"], check=True)


if __name__ == "__main__":
    gpus = int(os.environ.get("GPUS", "0"))
    TorchTrainer(
        run_script,
        train_loop_config={"command": sys.argv[1:] or DEMO, "folder": os.getcwd()},
        torch_config=TorchConfig(backend="gloo"),  # of Ray's own group; the script makes another
        scaling_config=ScalingConfig(
            num_workers=int(os.environ.get("RANKS", "2")),
            use_gpu=gpus > 0,
            resources_per_worker={"GPU": gpus} if gpus else {"CPU": 1},
        ),
        run_config=RunConfig(
            failure_config=FailureConfig(max_failures=int(os.environ.get("RESTARTS", "3")))
        ),
    ).fit()
