"""A SLURM cluster of two hosts on one machine, for as long as a test runs."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hosts import Host, two_hosts
from launched import ENVIRONMENT

UNPACKED = Path(__file__).parent.parent / "build" / "slurm"
"""Where `make slurm` puts Debian's packages."""

# Without munge, cgroups and a database. A node is down after 5 s of silence, and what is requeued
# may start again after 5 s, not after two minutes.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={head.name}({head.address})
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout=5
KillWait=5
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=patient Nodes=ALL Default=YES GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10
"""


class Cluster:
    """The controller and a node on the first host, a node on the second; all as root."""

    def __init__(self, folder: Path, hosts: list[Host], programs: dict[str, Path]) -> None:
        self.folder, self.hosts, self._programs = folder, hosts, programs
        configuration, plugins = folder / "slurm.conf", programs["plugins"]
        self._environment = {
            "SLURM_CONF": str(configuration),
            "PATH": f"{programs['sbatch'].parent}:{ENVIRONMENT['PATH']}",
            "LD_LIBRARY_PATH": f"{plugins}:{plugins.parent}",
        }
        lines = [CONFIGURATION.format(head=hosts[0], plugins=plugins, folder=folder)]
        lines += [f"NodeName={host.name} NodeAddr={host.address} CPUs=2" for host in hosts]
        configuration.write_text("\n".join([*lines, ""]))
        # SLURM 22.05 wants to know, though no cgroups are used.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in ("state", *(f"spool-{host.name}" for host in hosts)):
            (folder / name).mkdir()
        self._controller = self._start(hosts[0], "slurmctld")
        for host in hosts:
            self.start_node(host)
        self.wait_for(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")

    def start_node(self, host: Host) -> None:
        self._start(host, "slurmd", "-N", host.name, "-d", self._programs["slurmstepd"])

    def kill_node(self, host: Host) -> None:
        """All that is SLURM's there, with kill -9: the daemon, job steps, and what they started."""
        for pid in host.pids():
            if pid != self._controller.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def run(self, program: str, *arguments: str | Path, **environment: str) -> str:
        """What ``program`` says, run on the first host."""
        done = subprocess.run(
            self.hosts[0].command(program, *arguments),
            env=ENVIRONMENT | self._environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
        )
        assert done.returncode == 0, f"{program} {arguments}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str | Path, **environment: str) -> str:
        """A job's number; what it says is in job-NUMBER.out."""
        return self.run("sbatch", "--parsable", "-o", "job-%j.out", *arguments, **environment)

    def state(self, job: str) -> str:
        """Such as RUNNING; empty once the job has left the queue."""
        return self.run("squeue", "-h", "-o", "%T", "--states=all", f"--jobs={job}")

    def wait_for(self, condition: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.1)

    def told(self) -> str:
        """All that SLURM and the jobs have written."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"== {file.name}\n{file.read_text()}" for file in files)

    def _start(self, host: Host, program: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            host.command(self._programs[program], "-D", *arguments),
            env=ENVIRONMENT | self._environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the log has it
        )


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """One with its files in ``folder``, or a skipped test."""
    programs = found()
    with two_hosts(folder) as hosts:
        yield Cluster(folder, hosts, programs)


def found() -> dict[str, Path]:
    """SLURM's programs, installed or unpacked."""
    path = f"{os.environ['PATH']}:/usr/sbin:{UNPACKED}/usr/bin:{UNPACKED}/usr/sbin"
    names = {"sbatch": ["sbatch"]}
    # Debian's names, between which its alternatives choose.
    names |= {name: [name, f"{name}-wlm"] for name in ("slurmctld", "slurmd", "slurmstepd")}
    programs = {}
    for name, spellings in names.items():
        where = next(filter(None, (shutil.which(each, path=path) for each in spellings)), None)
        if where is None:
            pytest.skip(f"no {name} here: `make slurm` unpacks Debian's SLURM into build/slurm")
        programs[name] = Path(where)
    root = programs["sbatch"].parent.parent
    plugins = [
        *root.glob("lib/*/slurm*/select_linear.so"),
        *root.glob("lib/slurm*/select_linear.so"),
    ]
    if not plugins:
        pytest.skip(f"no plugins of SLURM below {root}/lib")
    return programs | {"plugins": plugins[0].parent}
