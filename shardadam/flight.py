"""A flight record: what this process has exchanged with its peers of late, and where it is now."""

import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

import torch

from shardadam.phases import Phases

_KEPT = 32
_SHOWN = 5
_dumps = itertools.count(1)
_log = logging.getLogger("shardadam")
_LIBRARIES = tuple(
    str(Path(file).parent) for file in (torch.__file__, __file__, threading.__file__)
)


@dataclass(slots=True)
class Leg:
    """One exchange, or one wait for it.

    ``began`` is a time as of time.time(), ``seconds`` how long it took or None: it goes on.
    """

    place: tuple[int, str]
    doing: str
    sends: int
    began: float
    seconds: float | None = None

    def __str__(self) -> str:
        took = "goes on" if self.seconds is None else f"took {1e3 * self.seconds:.1f} ms"
        began = time.strftime("%H:%M:%S", time.localtime(self.began))
        sent = f", sent {self.sends} bytes" if self.sends else ""  # none where it waits
        return f"{began} {_named(self.place)}: {self.doing}{sent}, {took}"


class Flight:
    """Of one optimizer: its last exchanges, oldest first, in ``legs``; ``phases`` are its own."""

    _of_process: ClassVar[WeakSet["Flight"]] = WeakSet()

    def __init__(self) -> None:
        self.phases = Phases()
        self.legs: deque[Leg] = deque(maxlen=_KEPT)
        Flight._of_process.add(self)

    def begin(self, doing: str, sends: int) -> Leg:
        """Note an exchange; the caller sets its ``seconds`` when it is done."""
        leg = Leg(self.phases.place, doing, sends, time.time())
        self.legs.append(leg)
        return leg

    def place(self) -> str:
        """Where the optimizer is."""
        return _named(self.phases.place)

    def dump(self, error: str) -> None:
        """Log the last exchanges, ``error`` having ended them.

        All that are kept, and what torch's own recorder has (TORCH_FR_BUFFER_SIZE), go to a file in
        the folder that the environment variable SHARDADAM_FLIGHT_DIR names, if it is set.
        """
        legs = list(map(str, self.legs))
        title = (
            "the last exchanges of this rank, whose steps count from the optimizer's construction:"
        )
        text = "\n  ".join([title, *legs[-_SHOWN:]])
        folder = os.environ.get("SHARDADAM_FLIGHT_DIR")
        if folder:
            name = f"flight-{socket.gethostname()}-{os.getpid()}-{next(_dumps)}.json"
            try:
                record = {"error": error, "exchanges": legs, "torch": _record_of_torch()}
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1))
                text += f"\n  more in {path}"
            except Exception as unwritten:  # never in place of the error that is told
                text += f"\n  no {name}: {type(unwritten).__name__}: {unwritten}"
        _log.error(text)


def whereabouts() -> str:
    """Where this process is: the last place of an optimizer, and the line of the user's program."""
    flights = [flight for flight in list(Flight._of_process) if flight.legs]
    text = "before any exchange"
    if flights:
        last = max(flights, key=lambda flight: flight.legs[-1].began)
        leg = last.legs[-1]
        text = last.place()
        if leg.seconds is None:
            text += f", {leg.doing} for {time.time() - leg.began:.0f} s"
    return f"{text}, at {_line()}"


def _named(place: tuple[int, str]) -> str:
    steps, phase = place
    return f"in step {steps + 1} ({phase})" if phase else f"after step {steps}"


def _line() -> str:
    """The innermost line of the main thread that is neither torch's, nor Python's, nor ours."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    for line in reversed(traceback.extract_stack(frame)):
        if not line.filename.startswith((*_LIBRARIES, "<")):
            return f"{Path(line.filename).name}:{line.lineno}: {line.line}"
    return "no line of a program"


def _record_of_torch() -> object:
    """What torch's flight recorder has of this process; None where there is none."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    return None if dump is None else json.loads(dump())
