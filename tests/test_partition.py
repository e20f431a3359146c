"""Two hosts whose link breaks, or is slow: an error on both in time, or the same result."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hosts import Host, ip, two_hosts

SCRIPT = Path(__file__).with_name("elastic_run.py")
TIMEOUT_S = 8


def start(hosts: list[Host], folder: Path, steps: int, port: int) -> list[subprocess.Popen]:
    folder.mkdir(exist_ok=True)
    return [
        host.start(
            *(sys.executable, SCRIPT, folder, str(steps)),
            RANK=str(rank),
            WORLD_SIZE=str(len(hosts)),
            MASTER_ADDR=hosts[0].address,
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="eth0",
            TIMEOUT_S=str(TIMEOUT_S),
        )
        for rank, host in enumerate(hosts)
    ]


def finish(started: list[subprocess.Popen]) -> None:
    outputs = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)


@pytest.mark.timeout(200)
@pytest.mark.fault(
    "the network parts two hosts, and is mended", "an error on both, then the same bits"
)
def test_a_link_that_breaks(tmp_path):
    with two_hosts(tmp_path) as hosts:
        finish(start(hosts, tmp_path / "whole", 14, 29521))
        folder = tmp_path / "broken"
        folder.mkdir()
        (folder / "slow").touch()
        started = start(hosts, folder, 14, 29522)
        deadline = time.monotonic() + 60
        while not list(folder.glob("step-*")):
            assert time.monotonic() < deadline and all(p.poll() is None for p in started)
            time.sleep(0.05)
        ip("-n", hosts[0].namespace, "link", "set", "eth0", "down")
        parted = time.monotonic()
        outputs = [process.communicate(timeout=60)[0] for process in started]
        assert time.monotonic() - parted < TIMEOUT_S + 5 + 5  # both, and the ends of programs
        assert [process.returncode for process in started] == [1, 1]
        assert re.search(r"rank 0 of 2 failed while .*: rank 1 gives no sign of life", outputs[0])
        assert re.search(r"rank 1 of 2 failed while .*: nobody can be asked: the st", outputs[1])
        ip("-n", hosts[0].namespace, "link", "set", "eth0", "up")
        (folder / "slow").unlink()
        finish(start(hosts, folder, 14, 29525))
    whole, broken = (
        (tmp_path / link / "result").read_text().split() for link in ("whole", "broken")
    )
    assert whole[0] == broken[0] and broken[1] == "4"  # from the checkpoint


@pytest.mark.timeout(200)
@pytest.mark.fault("a slow link between two hosts", "the same bits")
def test_a_link_that_is_slow(tmp_path):
    with two_hosts(tmp_path) as hosts:
        finish(start(hosts, tmp_path / "fast", 6, 29523))
        for host in hosts:
            for shape in (
                "qdisc add dev eth0 root handle 1: htb default 1",
                "class add dev eth0 parent 1: classid 1:1 htb rate 5mbit",
            ):
                shaped = subprocess.run(
                    ["tc", "-n", host.namespace, *shape.split()], capture_output=True, text=True
                )
                if shaped.returncode:
                    pytest.skip(f"links can't be shaped here: {shaped.stderr.strip()}")
        finish(start(hosts, tmp_path / "slow", 6, 29524))
    fast, slow = ((tmp_path / link / "result").read_text() for link in ("fast", "slow"))
    assert fast == slow
