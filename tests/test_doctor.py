"""`python -m shardadam doctor`: well, sick, dead and frozen ranks; each rank knows of all."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

from shardadam import lifeline
from shardadam.cli import between, doctor, machine
from shardadam.cli.findings import Finding
from shardadam.cli.main import main
from shardadam.cli.network import Place, look_at_network
from shardadam.kernels import cpu, reference

TIMEOUT_S = 4.0  # where a rank is waited for in vain; else patience is for slow machines


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_main(
    rank: int, environment: dict, folder: Path, sicken: Callable | None, timeout: float
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    output = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if sicken is not None:
        sicken(rank)
    code = main(["doctor", "--timeout", str(timeout)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def examined(
    folder: Path,
    sicken: Callable | None = None,
    world_size: int = 2,
    timeout: float = 60,
    **more: str,
) -> tuple[list[int | None], list[str], float]:
    """Exit codes and outputs of ranks as SLURM would start them, and how long it took."""
    context = multiprocessing.get_context("fork")
    environment = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **more,
    }
    start = time.monotonic()
    processes = [
        context.Process(target=rank_main, args=(rank, environment, folder, sicken, timeout))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    took = time.monotonic() - start
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes, [(folder / str(rank)).read_text() for rank in range(world_size)], took


def test_one_process(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "21 formats, norm and mean are the reference's to the last bit" in out
    assert "between the ranks" not in out and "WRONG" not in out


def test_well_ranks(tmp_path):
    codes, (told, other), _ = examined(tmp_path)
    assert codes == [0, 0] and not other, (told, other)
    assert "rank 1: as rank 0" in told and "GB/s" in told and "clocks" in told
    assert "WRONG" not in told


def test_a_rank_alone_exchanges_nothing(tmp_path):
    codes, (told,), _ = examined(tmp_path, world_size=1)
    assert codes == [0] and "WARN" not in told and "GB/s" not in told, told
    assert "network     1 rank on 1 host" in told


def test_under_torchrun():
    command = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    done = subprocess.run(
        [sys.executable, *command, "-m", "shardadam", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] and len(told["ranks"]) == 2
    assert [f["name"] for f in told["between"]] == ["network", "clocks", "reduce", "gather"]
    assert {"name", "level", "found", "advice"} == told["ranks"][1][0].keys()


def one_bit_off(rank: int) -> None:
    if rank == 1:
        right = reference.update

        def update(run) -> None:
            right(run)
            run.exp_avg.view(torch.int8)[5] ^= 1

        reference.update = update


def test_a_rank_that_computes_wrong_is_known_to_all(tmp_path):
    codes, outputs, _ = examined(tmp_path, one_bit_off, world_size=3)
    assert codes == [1, 1, 1]
    assert "WRONG numerics" in outputs[0] and "do not train on this rank" in outputs[0]
    assert "1 wrong: see WRONG above" in outputs[0]
    for rank in (1, 2):
        expected = f"shardadam doctor on rank {rank}: of rank 1: numerics: compiled CPU twin"
        assert outputs[rank].startswith(expected), outputs


def dies(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    if rank == 2:
        no_such_interface(rank)


def test_a_rank_that_is_not_there(tmp_path):
    codes, (told, _, other), took = examined(tmp_path, dies, 3, TIMEOUT_S)
    assert codes == [1, 7, 1]
    assert "WRONG rank" in told and "nothing was heard of rank 1 within 4 s" in told
    assert "not tried: ranks are missing" in told
    assert "rank 2 on " in told and "rank 1 on " not in told  # by its number, not its place
    assert "of rank 1: rank: nothing was heard of rank 1" in other
    assert took < 6 * TIMEOUT_S


def agent(port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    time.sleep(1000)
    del store


def counts_otherwise(rank: int) -> None:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(rank)


def counts_otherwise_and_is_sick(rank: int) -> None:
    counts_otherwise(rank)
    no_such_interface(rank)


def test_attempts_that_agents_count_otherwise(tmp_path):
    """Nothing that an earlier attempt has left in torchrun's store is read, and all else is."""
    port = free_port()
    process = multiprocessing.get_context("fork").Process(target=agent, args=(port,))
    process.start()
    where = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port)}
    try:
        for sicken, code in ((counts_otherwise_and_is_sick, 1), (counts_otherwise, 0)):
            folder = tmp_path / str(code)
            folder.mkdir()
            codes, outputs, _ = examined(folder, sicken, timeout=20, **where)
            assert codes == [code, code], outputs
            assert "nothing was heard" not in outputs[0] + outputs[1]
        codes, (_, other), _ = examined(folder, dies_first, timeout=2, **where)
        assert codes == [7, 2] and "nothing was heard of rank 0 within 2 s" in other
    finally:
        process.kill()
        process.join()


def dies_first(rank: int) -> None:
    if rank == 0:
        os._exit(7)


def freezes(rank: int) -> None:
    if rank == 1:
        doctor.look_at_bandwidth = lambda ranks: time.sleep(1000)


def test_a_rank_that_freezes(tmp_path):
    codes, (told, frozen, other), took = examined(tmp_path, freezes, 3, TIMEOUT_S)
    assert codes == [1, 1, 1]
    assert "WRONG collectives" in told and "could not exchange data" in told
    assert "nothing was heard of rank 1 within 4 s" in told
    assert "between the ranks: rank: nothing was heard of rank 1" in other
    assert "gave up after 16 s: something waits" in frozen
    assert took < 6 * TIMEOUT_S


def test_no_store(capfd, monkeypatch):
    where = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (*where.items(), ("MASTER_PORT", str(free_port()))):
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--timeout", "2"]) == 2
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("shardadam doctor: the launcher's store at 127.0.0.1:")
    assert "Expected MASTER_ADDR to be an address of the first host" in told


# ---- what is between ranks -----------------------------------------------------------------------


def wrong_clock(rank: int) -> None:
    if rank == 1:
        ahead = time.time
        between.time = SimpleNamespace(time=lambda: ahead() + 5, perf_counter=time.perf_counter)


def test_clocks(tmp_path):
    codes, (told, _), _ = examined(tmp_path, wrong_clock)
    assert codes == [0, 0]
    assert "WARN  clocks      rank 1's is 5.0" in told and "s ahead of rank 0's" in told
    assert "NTP" in told
    assert "Nothing is wrong. 1 could be better" in told


def no_such_interface(rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "eth77"


def test_an_interface_that_is_not_there(tmp_path):
    codes, (told, other), took = examined(tmp_path, no_such_interface)
    assert codes == [1, 1] and took < 30  # nothing was tried
    assert "GLOO_SOCKET_IFNAME=eth77, and there is no such interface; there are lo" in told
    assert "export GLOO_SOCKET_IFNAME=lo" in told
    assert "network: rank 0 on" in other


def place(host: str, own: str, **chosen: str) -> Place:
    interfaces = {"lo": "127.0.0.1", "eth0": f"10.0.0.{host[-1]}"}
    return Place(host, host, chosen, own, interfaces, interfaces["eth0"])


def test_gloo_on_loopback_between_hosts():
    """Debian's /etc/hosts gives a host's own name an address that only it can reach."""
    well = place("node1", "10.0.0.1")
    (found,) = look_at_network({0: well, 3: place("node2", "127.0.1.1")}, False)
    assert found.level == "wrong"
    assert "rank 3 on node2 would tell ranks on other hosts to reach it at 127.0.1.1" in found.found
    assert found.advice == "on node2: export GLOO_SOCKET_IFNAME=eth0"
    named = place("node2", "10.0.0.2", GLOO_SOCKET_IFNAME="lo")
    (found,) = look_at_network({0: well, 1: named}, False)
    assert "GLOO_SOCKET_IFNAME=lo" in found.found
    helped = place("node2", "127.0.1.1", GLOO_SOCKET_IFNAME="eth0")
    (found,) = look_at_network({0: well, 1: helped}, False)
    assert found == Finding("network", "ok", "2 ranks on 2 hosts, by eth0")
    (found,) = look_at_network(
        dict.fromkeys((0, 1), place("node1", "127.0.1.1")), False
    )  # one host
    assert found.level == "ok"


def test_machines_are_told_apart_by_their_network_too():
    """Containers of one host may have its name, and loopback addresses of their own."""
    code = "from shardadam.lifeline import own_machine; print(own_machine())"
    command = ["unshare", "--net", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespace can be made here: {done.stderr.strip()}")
    boot, space = lifeline.own_machine().split("/", 1)
    there, other = done.stdout.strip().split("/", 1)
    assert boot == there and space != other
    assert Place.here().machine == f"{boot}/{space}"


def test_threads_of_ranks_that_share_cpus_or_have_their_own():
    own = machine.look_at_threads([(2, [0, 1]), (2, [2, 3])])
    assert own == [Finding("threads", "ok", "2 per rank, 4 CPUs for 2 ranks")]
    (found,) = machine.look_at_threads([(2, [0, 1])] * 2)
    assert found.level == "warning" and "OMP_NUM_THREADS=1" in found.advice
    (found,) = machine.look_at_threads([(4, [0, 1]), (4, [2, 3, 4, 5, 6, 7])])
    assert found.found == "4 per rank, 8 CPUs for 2 ranks, 2 for one"
    assert found.level == "warning" and "OMP_NUM_THREADS=2" in found.advice


def test_versions_that_differ():
    one, other = {"python": "3.12.1", "torch": "2.13.0"}, {"python": "3.11.7", "torch": "2.12.0"}
    warning, wrong = doctor._same_versions({0: one, 1: one, 3: other})
    assert (warning.level, wrong.level) == ("warning", "wrong")
    assert wrong.found == "torch is 2.13.0 on rank 0 and 2.12.0 on rank 3"


def test_without_a_compiled_kernel(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda: (None, "the compiled twin is not in this install"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "WARN  CPU kernel  the compiled twin is not in this install" in out
    assert "-> install a C++ compiler" in out and "2 could be better" in out


def test_what_fails_unforeseen_is_told_too(capsys, monkeypatch):
    def fails() -> list[Finding]:
        raise OSError("no /proc here")

    monkeypatch.setattr("shardadam.cli.machine.look_at_twin", fails)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG CPU kernel  this could not be looked at: OSError: no /proc here" in out
    assert "numerics" in out
