"""What is seen during training: a progress bar on a terminal, a line now and then elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

LINES = 10
"""Printed in all where there is no terminal."""


class StepProgress:
    """Shows the steps of one run. A quiet console shows nothing, which is what ranks > 0 have."""

    def __init__(self, console: Console, name: str, color: str, done: int, steps: int) -> None:
        self._console = console
        self._name = name
        self._steps = steps
        self._bar = Progress(
            TextColumn(f"[bold {color}]{name:17}"),
            BarColumn(bar_width=None, complete_style=color, finished_style=color),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            # Room for the terminal's own ^C, which would wrap the line.
            TextColumn(" "),
            console=console,
            expand=True,
            disable=not console.is_terminal or console.quiet,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, numbers="")

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float, state_bytes: int) -> None:
        """``step`` steps are done; ``loss`` in bits per byte, ``state_bytes`` of this rank."""
        state = megabytes(state_bytes)
        numbers = f"loss {loss:.3f} · {tokens_per_second / 1000:.1f}k tok/s · state {state}"
        self._bar.update(self._task, completed=step, numbers=numbers)
        if self._bar.disable and step * LINES // self._steps > (step - 1) * LINES // self._steps:
            line = f"{self._name:17} {step:>5}/{self._steps} · {numbers}"
            self._console.print(Text(line), soft_wrap=True)


def megabytes(number: int) -> str:
    """In MB, of a million bytes."""
    return f"{number / 1e6:.1f} MB"
