"""launch/kubernetes/indexed_job.yaml's very command and environment, in two pods of no cluster."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hosts import Host, two_hosts
from launched import ENVIRONMENT, LAUNCH, ROOT
from shardadam import checkpoint

# For the demo: enough steps to be disturbed among them, of little text.
SMALL = "--steps 100 --checkpoint-every 20 --context 32 --layers 1 --width 64 --data".split()
SMALL += sorted(map(str, (ROOT / "shardadam").glob("*.py")))


class Pod:
    """What a kubelet does with one: its process is started again while it fails."""

    def __init__(self, host: Host, container: dict, out: Path) -> None:
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == "checkpoints")
        words = [*container["command"], *container["args"]]
        # The volume is where it can be on this machine.
        self._command = [word.replace(mount["mountPath"], str(out)) for word in words]
        self._environment = {each["name"]: each["value"] for each in container["env"]}
        self._host, self.restarts, self.succeeded = host, -1, False
        self._start()

    def _start(self) -> None:
        self._process = self._host.start(*self._command, *SMALL, **self._environment)
        self.restarts += 1

    def drain(self) -> None:
        """As when its node is to go: SIGTERM to its process, and another pod in its place."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """All of it, at once, as when its node is gone."""
        for pid in self._host.pids():
            os.kill(pid, signal.SIGKILL)

    def see(self) -> None:
        if not self.succeeded and self._process.poll() is not None:
            print(self._process.communicate()[0])
            self.succeeded = self._process.returncode == 0
            if not self.succeeded:
                self._start()


def newest(out: Path) -> Path | None:
    return checkpoint.latest(out / "checkpoints" / "shardadam.AdamW")


def digests(out: Path) -> list[str]:
    """Of every tensor in the newest checkpoint: the weights, and the optimizer's state."""
    manifest = json.loads((newest(out) / "manifest.json").read_text())["manifest"]
    return [shard[-1] for file in manifest["files"] for shard in file]


def undisturbed(out: Path) -> list[str]:
    demo = ["examples/train_gpt.py", "--skip-baseline", f"--out={out}", *SMALL]
    environment = ENVIRONMENT | {"RANKS": str(2 * os.cpu_count())}
    subprocess.run([LAUNCH / "torchrun.sh", *demo], env=environment, check=True)
    return digests(out)


def wait(pods: list[Pod], until: Callable[[], object]) -> None:
    while not until():
        for pod in pods:
            pod.see()
        time.sleep(0.1)


@pytest.mark.timeout(300)
@pytest.mark.fault("Kubernetes: a pod drained, the first one killed", "the same bits")
def test_pods_end_as_an_undisturbed_run_does(tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the dev extra")
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes/indexed_job.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"]
    (container,) = spec["containers"]
    names = [f"{job['metadata']['name']}-{index}" for index in range(job["spec"]["completions"])]
    out = tmp_path / "out"
    with two_hosts(tmp_path, names, service=spec["subdomain"]) as hosts:
        pods = [Pod(host, container, out) for host in hosts]
        wait(pods, lambda: newest(out))
        pods[1].drain()
        wait(pods, lambda: pods[1].restarts)
        saved = newest(out)
        wait(pods, lambda: newest(out) != saved)
        assert [pod.restarts for pod in pods] == [0, 1]  # the first one's torchrun has waited
        pods[0].kill()  # where the other has found it
        wait(pods, lambda: all(pod.succeeded for pod in pods))
        assert pods[0].restarts == 1
        assert sum(pod.restarts for pod in pods) <= job["spec"]["backoffLimit"]
    assert newest(out).name == "step-00000100"
    assert digests(out) == undisturbed(tmp_path / "undisturbed")
