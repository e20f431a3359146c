"""launch/slurm.sbatch on a SLURM cluster: a job that is preempted or loses a node goes on."""

import re
import time
from collections.abc import Callable

import pytest

from launched import LAUNCH, SCRIPT, digest, launch
from shardadam import checkpoint
from slurm_cluster import Cluster, slurm_cluster

FILE = LAUNCH / "slurm.sbatch"
STEPS = 60


class Job:
    """A run that is disturbed; its steps are slow until it is let go."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.folder = cluster, cluster.folder / "run"
        self.folder.mkdir()
        (self.folder / "slow").touch()
        self.number = cluster.submit(FILE, SCRIPT, self.folder, str(STEPS), RANKS="1")

    def disturb(self, how: Callable[[], object]) -> None:
        """Once it makes steps and checkpoints; returns when SLURM has taken it off the nodes."""
        times = len(self.starts()) + 1
        self.cluster.wait_for(lambda: len(self.starts()) == times)
        self.cluster.wait_for(lambda: self.saved() > self.starts()[-1])
        how()
        self.cluster.wait_for(lambda: self.cluster.state(self.number) == "PENDING")

    def finish(self) -> None:
        (self.folder / "slow").unlink()
        self.cluster.wait_for(lambda: self.cluster.state(self.number) == "COMPLETED")

    def starts(self) -> list[int]:
        """The steps at which rank 0 has started."""
        return [*map(int, re.findall("rank 0 starts at step (.*)", self.said()))]

    def ends(self) -> list[int]:
        """The steps after which a rank was asked to end, and has saved."""
        return [*map(int, re.findall("asked to end after step (.*),", self.said()))]

    def saved(self) -> int:
        newest = checkpoint.latest(self.folder)
        return int(newest.name.removeprefix("step-")) if newest else 0

    def said(self) -> str:
        output = self.cluster.folder / f"job-{self.number}.out"
        return output.read_text() if output.exists() else ""


@pytest.mark.timeout(400)
@pytest.mark.fault("SLURM: signalled, preempted, a node lost, requeued", "the same bits")
def test_a_job_goes_on_after_all_that_slurm_does_to_it(tmp_path):
    with slurm_cluster(tmp_path) as cluster:
        job = Job(cluster)
        # Twice, as when it is preempted while its time is up.
        ask = ("scancel", "--signal", "USR1", "--batch", job.number)
        job.disturb(lambda: (cluster.run(*ask), time.sleep(0.5), cluster.run(*ask)))
        asked = job.ends()
        assert asked == [job.saved()] * 2  # both ranks, after the same step
        assert "Job step aborted" not in job.said()  # it ended before the job was requeued

        urgent = ("--partition", "urgent", "--nodes", "2", "--wrap", "true")
        job.disturb(lambda: cluster.submit(*urgent))
        preempted = job.ends()[2:]
        assert preempted == [job.saved()] * 2

        node = cluster.hosts[1]
        job.disturb(lambda: cluster.kill_node(node))
        cluster.start_node(node)
        lost = job.saved()

        job.disturb(lambda: cluster.run("scontrol", "requeue", job.number))
        requeued = job.saved()
        job.finish()
        assert job.starts() == [0, asked[0], preempted[0], lost, requeued]
        assert digest(job.folder) == launch("torchrun.sh", tmp_path / "undisturbed", STEPS)

        # What a person cancels stays away.
        unwanted = cluster.submit(FILE, "--no-python", "sleep", "99")
        cluster.wait_for(lambda: f"{unwanted}.0" in cluster.run("squeue", "--steps", "-h"))
        cluster.run("scancel", unwanted)
        cluster.wait_for(lambda: cluster.state(unwanted) == "CANCELLED")
