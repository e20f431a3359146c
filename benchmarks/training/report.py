"""Tables in Markdown, and all figures as CSV."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from training.contenders import CONTENDERS, LOCAL
from training.goals import Found
from training.results import Row
from training.rounds import Outcome, Setting


def table(setting: Setting, rows: Sequence[Row], failures: Sequence[Outcome]) -> str:
    """A line for each contender; ratios are to the first line's."""
    heads = ["", "iteration ms", "×", "CPU-ms", "×", "step ms", "step CPU-ms"]
    heads += ["peak RSS MB", "state MB", "wire MB"]
    local = next((row for row in rows if row.contender == LOCAL), None) if setting.link else None
    if local:
        heads.append("exposed ms")
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            label(setting, row),
            str(row.wall),
            f"{row.wall.middle / rows[0].wall.middle:.2f}",
            str(row.cpu),
            f"{row.cpu.middle / rows[0].cpu.middle:.2f}",
            str(row.step),
            f"{row.step_cpu.middle:.2f}",
            f"{row.peak_rss_bytes / 1e6:.0f}",
            f"{row.state_bytes / 1e6:.1f}",
            "–" if row.device_bytes is None else f"{row.device_bytes / 1e6:.2f}",
        ]
        if local:
            cells.append(f"{row.wall.middle - local.wall.middle:.0f}")
        lines.append(_line(cells))
    for outcome in failures:
        lines.append(_line([outcome.contender, f"not measured: {_clean(outcome.failure)}"]))
    return "\n".join(lines)


def verdicts(found: Sequence[Found]) -> str:
    """A line for each goal and contender of ours."""
    lines = [_line(["goal", "", "ratio", "at most", ""]), "|---" * 5 + "|"]
    for one in found:
        met = "met" if one.met else "MISSED"
        lines.append(_line([one.says, one.ours, f"{one.ratio:.3f}", f"{one.most:g}", met]))
    return "\n".join(lines)


def unlike(setting: Setting, rows: Sequence[Row]) -> list[str]:
    """Who did not train as the others did: what it took is not to be compared.

    Who has no masters rounds every update to bf16: another training, and said to be one.
    """
    alike = [row for row in rows if row.contender != LOCAL and keeps_updates(setting, row)]
    return [
        f"{row.contender}: loss {row.loss:.5f}, expected {alike[0].loss:.5f} as "
        f"{alike[0].contender}'s"
        for row in alike
        if not abs(row.loss / alike[0].loss - 1) < 0.01
    ]


def keeps_updates(setting: Setting, row: Row) -> bool:
    """Whether its params are fp32, or have masters that are."""
    return setting.dtype == "fp32" or CONTENDERS[row.contender].masters


def label(setting: Setting, row: Row) -> str:
    """The contender, and what it lacks."""
    return row.contender + ", no masters" * (not keeps_updates(setting, row))


class Table:
    """The CSV file: a line for each contender, round and rank, written as rounds end."""

    FIELDS = (
        *("model", "batch", "dtype", "world_size", "link", "contender", "round", "rank"),
        *("wall_ms", "cpu_ms", "step_wall_ms", "step_cpu_ms", "peak_rss_bytes"),
        *("training_peak_rss_bytes", "state_bytes", "params", "device_bytes", "sent_bytes"),
        *("loss", "failure", "stamp"),
    )

    def __init__(self, file: Path, stamp: str) -> None:
        self._file, self._stamp = file, stamp
        self._written: set[tuple[Setting, str, int]] = set()
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerow(self.FIELDS)

    def add(self, outcome: Outcome) -> None:
        """Write what isn't there yet; times are medians of the round's iterations."""
        setting = outcome.setting
        keys = (
            *(setting.model, setting.batch, setting.dtype, setting.world_size),
            *(setting.link or "loopback", outcome.contender),
        )
        with self._file.open("a", newline="") as opened:
            writer = csv.writer(opened)
            for number, ranks in enumerate(outcome.rounds):
                if (setting, outcome.contender, number) in self._written:
                    continue
                self._written.add((setting, outcome.contender, number))
                for rank, one in enumerate(ranks):
                    times = (one.wall_ms, one.cpu_ms, one.step_wall_ms, one.step_cpu_ms)
                    medians = (f"{statistics.median(values):.4f}" for values in times)
                    memory = (one.peak_rss_bytes, one.training_peak_rss_bytes, one.state_bytes)
                    wire = (one.device_bytes, sum(one.sent.values()) if one.sent else None)
                    cells = (*keys, number, rank, *medians, *memory, one.params, *wire, one.loss)
                    writer.writerow((*cells, "", self._stamp))
            if outcome.failure and (setting, outcome.contender, -1) not in self._written:
                self._written.add((setting, outcome.contender, -1))
                blank = [""] * (len(self.FIELDS) - len(keys) - 2)
                writer.writerow((*keys, *blank, outcome.failure, self._stamp))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _clean(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "/")
