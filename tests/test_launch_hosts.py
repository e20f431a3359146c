"""The files that start ranks, on two hosts: by torchrun, by ssh, and as Kubernetes does."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from hosts import Host, two_hosts
from launched import ENVIRONMENT, LAUNCH, SCRIPT, digest, launch

PATH = f"{ENVIRONMENT['PATH']}:/usr/sbin"


@pytest.mark.timeout(200)
def test_torchrun_starts_ranks_and_starts_them_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    environment = {"HEAD": "10.77.0.1", "HOSTS": "2", "RANKS": "1", "DISTURBED": "0:1:6:SIGKILL"}
    with two_hosts(tmp_path) as hosts:
        command = [LAUNCH / "torchrun_hosts.sh", SCRIPT, folder, "9"]
        started = [host.start(*command, **environment) for host in hosts]
        outputs = [process.communicate(timeout=150)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    again = (folder / "result").read_text().split()
    assert again[1] == "4"  # from the checkpoint
    assert again[0] == launch("torchrun.sh", tmp_path / "one host")


def let_in(folder: Path, hosts: list[Host]) -> None:
    """Each host's ssh into the others, by a key that nothing else knows."""
    key, sshd = folder / "key", shutil.which("sshd", path=PATH)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    # Where sshd locks up its children; its service makes it elsewhere.
    Path("/run/sshd").mkdir(exist_ok=True)
    server = f"-oHostKey={key} -oAuthorizedKeysFile={key}.pub -oStrictModes=no -oPidFile=none"
    for host in hosts:
        host.start(sshd, "-D", "-f", "/dev/null", "-oPermitRootLogin=yes", *server.split())
    client = f"-F /dev/null -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -q {client} "$@"\n')
    ssh.chmod(0o755)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "name, needs", [("deepspeed.sh", "pdsh"), ("mpirun.sh", "mpirun")], ids=["deepspeed", "mpi"]
)
def test_a_hostfile_and_ssh_start_ranks(name, needs, tmp_path):
    if name == "deepspeed.sh" and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not in the test extra here")
    missing = [each for each in (needs, "sshd") if not shutil.which(each, path=PATH)]
    if missing:
        pytest.skip(f"no {missing} here (Debian: pdsh, openmpi-bin, openssh-server)")
    folder, hostfile = tmp_path / "run", tmp_path / "hosts"
    folder.mkdir()
    hostfile.write_text("node-1 slots=1\nnode-2 slots=1\n")
    environment = {"HOSTFILE": str(hostfile), "RANKS": "2"}
    environment["PATH"] = f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}"
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with two_hosts(tmp_path) as hosts:
        let_in(tmp_path, hosts)
        process = hosts[0].start(LAUNCH / name, SCRIPT, folder, "9", **environment)
        output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert digest(folder) == launch("torchrun.sh", tmp_path / "one host")
