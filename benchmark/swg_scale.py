"""Table and figure of score against guidance scale, from the reeval.csv files that swg_scale.sh leaves.

    python benchmark/swg_scale.py --env pendulum-demo --run-dir runs

Every setting (kappa, N, select) is a line: mean over seeds of the mean over episodes, shade from lowest to
highest seed.
"""

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import swg  # noqa: E402


@dataclass
class Args:
    env: str = "pendulum-demo"
    """dataset"""
    run_dir: str = "runs"
    """as given to swg.py"""


def main(args: Args) -> None:
    scores = defaultdict(dict)  # (kappa, N) -> {(rho, seed): score}; the newest row of a setting counts
    for path in sorted(swg.run_folder(swg.Args(env=args.env, run_dir=args.run_dir)).parent.glob("seed*/reeval.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                score = float(row["normalized_score"] or row["return"])
                scores[float(row["kappa"]), int(row["N"])][float(row["rho"]), int(row["seed"])] = score
    rhos = sorted({rho for values in scores.values() for rho, _ in values})
    print(f"| {args.env} | {' | '.join(f'rho {rho:g}' for rho in rhos)} |\n{'|---' * (len(rhos) + 1)}|")
    fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for (kappa, N), values in sorted(scores.items(), key=lambda item: (item[0][1], item[0][0])):
        known = [rho for rho in rhos if any(r == rho for r, _ in values)]
        per = [np.array([v for (r, _), v in values.items() if r == rho]) for rho in known]
        cells = {rho: f"{x.mean():.1f} ± {x.std():.1f}" for rho, x in zip(known, per)}
        print(f"| kappa {kappa:g}, N {N} | {' | '.join(cells.get(rho, '') for rho in rhos)} |")
        (line,) = ax.plot(known, [x.mean() for x in per], marker="o", ms=3, label=f"kappa {kappa:g}, N {N}")
        ax.fill_between(known, [x.min() for x in per], [x.max() for x in per], alpha=0.12, lw=0, color=line.get_color())
    seeds = len({seed for values in scores.values() for _, seed in values})
    ax.set(xlabel="guidance scale rho", ylabel="normalized score")
    ax.set_title(f"SWG on {args.env}: mean and range of {seeds} seeds")
    ax.legend(frameon=False, fontsize=8)
    fig.savefig(ROOT / "docs" / "figures" / f"swg_scale_{args.env}.png", dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
