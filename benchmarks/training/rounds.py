"""Contenders take turns, each round in fresh processes.

Fresh processes, because a peak of memory is a process's, and because where the memory of one comes
to lie would otherwise be part of every figure instead of its spread. One contender at a time, so
that no machine has to hold all of them.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.contenders import CONTENDERS
from training.models import MODELS
from training.network import Place, loopback, shaped_link
from training.rank import Job, Measured, described

TIMEOUT_S = 300.0
_ERROR = re.compile(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Setting:
    """One table: what is trained, on how many ranks, by whom; the first is the measure."""

    model: str
    world_size: int
    dtype: str
    contenders: tuple[str, ...]
    link: str | None = None
    """The rate of a link between two ranks, None for the loopback device."""
    rows: int | None = None
    """Of the batch, where it isn't the model's."""

    @property
    def batch(self) -> int:
        return self.rows or MODELS[self.model].rows

    def __str__(self) -> str:
        ranks = f"{self.world_size} gloo rank" + "s" * (self.world_size > 1)
        link = f" joined by {self.link}" if self.link else ""
        says = MODELS[self.model].says
        return f"{self.model} ({says}), batch {self.batch}, {self.dtype}, {ranks}{link}"


@dataclass
class Outcome:
    """Of one contender in one setting: by round, then rank; or why there is nothing."""

    setting: Setting
    contender: str
    rounds: list[list[Measured]] = field(default_factory=list)
    failure: str | None = None


def prepare(names: Sequence[str]) -> None:
    """Have built what is built on first use; what fails here fails in the contender too."""
    wanted = [CONTENDERS[name] for name in names]
    for work in dict.fromkeys(one.prepare for one in wanted if not one.missing()):
        if work:
            command = [sys.executable, "-c", work]
            subprocess.run(command, env=_environment(), capture_output=True, check=False)


def run(
    setting: Setting, rounds: int, iterations: int | None, threads: int, namespaces: bool
) -> Iterator[Outcome]:
    """All rounds of all contenders; yields every contender's outcome whenever it has grown."""
    outcomes = [Outcome(setting, name) for name in setting.contenders]
    for outcome in outcomes:
        outcome.failure = CONTENDERS[outcome.contender].missing()
    for number in range(rounds):
        # There and back, so that a drift of the machine hits all alike.
        for outcome in outcomes if number % 2 == 0 else reversed(outcomes):
            if outcome.failure is None:
                try:
                    outcome.rounds.append(
                        _round(setting, outcome.contender, iterations, threads, namespaces)
                    )
                except RuntimeError as error:
                    outcome.failure = str(error)
            yield outcome


def _round(
    setting: Setting, contender: str, iterations: int | None, threads: int, namespaces: bool
) -> list[Measured]:
    model = MODELS[setting.model]
    with _places(setting, namespaces) as places, tempfile.TemporaryDirectory() as folder:
        job = Job(
            contender,
            setting.model,
            setting.dtype,
            setting.batch,
            iterations or model.iterations,
            threads,
            folder,
            None,
        )
        processes = [
            _start(job, rank, setting.world_size, place) for rank, place in enumerate(places)
        ]
        _wait(processes, Path(folder))
        measured = [
            Measured(**json.loads(job.result(rank).read_text()))
            for rank in range(setting.world_size)
        ]
        for one, place in zip(measured, places, strict=True):
            if place.shared and one.device_bytes is not None:
                one.device_bytes /= setting.world_size
    return measured


def _places(setting: Setting, namespaces: bool) -> contextlib.AbstractContextManager[list[Place]]:
    if setting.link:
        return shaped_link(setting.link)
    if namespaces:
        return loopback(setting.world_size)
    return contextlib.nullcontext([Place()] * setting.world_size)


def _start(job: Job, rank: int, world_size: int, place: Place) -> subprocess.Popen[bytes]:
    environment = {
        **_environment(),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "OMP_NUM_THREADS": str(job.threads),
        "GLOO_SOCKET_IFNAME": place.device,
    }
    words = described(job, device=place.device if place.counts else None)
    command = [*place.command, sys.executable, "-m", "training.rank", words]
    with open(Path(job.folder, f"rank{rank}.log"), "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _environment() -> dict[str, str]:
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "DS_ACCELERATOR": "cpu"}


def _wait(processes: Sequence["subprocess.Popen[bytes]"], folder: Path) -> None:
    """Until all have ended; the first that fails ends the others, which would wait for it."""
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not done after {TIMEOUT_S:.0f} s; {_last_words(folder, 0)}")
            if any(process.poll() for process in processes):
                break
            time.sleep(0.02)
        for rank, process in enumerate(processes):
            if process.poll():
                said = _last_words(folder, rank)
                raise RuntimeError(f"rank {rank} ended with {process.returncode}: {said}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _last_words(folder: Path, rank: int) -> str:
    lines = (folder / f"rank{rank}.log").read_text(errors="replace").strip().splitlines()
    # An exception's own line; torch begins them with the rank, and a thread may speak after it.
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["it said nothing"])[-1].strip()
