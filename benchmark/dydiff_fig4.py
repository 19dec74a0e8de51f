"""Table and figure of Figure 4 of the DyDiff paper: M, L, eta and the real ratio alpha, one at a time.

    python benchmark/dydiff_fig4.py --collect OUT          the runs that dydiff_fig4.sh left in OUT
    python benchmark/dydiff_fig4.py                        draws benchmark/results/dydiff_fig4.csv again

Last policies; mean over seeds of the mean over episodes, shade from lowest to highest seed.
"""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "benchmark" / "results" / "dydiff_fig4.csv"
PRESET = {"M": 2.0, "eta": 0.6, "alpha": 0.6}
TITLES = {"M": "corrections M", "L": "rollout length L", "eta": "kept share eta", "alpha": "real ratio alpha"}


@dataclass
class Args:
    collect: str | None = None
    """folder of runs, <knob>=<value>/<env>/dydiff/seed<k>"""


def collect(out: Path) -> None:
    rows = []
    for path in sorted(out.glob("*=*/*/dydiff/seed*/result.json")):
        result, settings = json.loads(path.read_text()), json.loads((path.parent / "args.json").read_text())["args"]
        knob, value = path.parts[-5].split("=")
        score = result["normalized_score"] if result["normalized_score"] is not None else result["return"]
        rows.append((result["env"], knob, value, settings["L"], result["seed"], round(score, 2)))
    if not rows:
        raise SystemExit(f"dydiff_fig4.py: no finished run of dydiff_fig4.sh in {out}; give the OUT it was called with")
    with open(CSV, "w", newline="") as file:
        csv.writer(file).writerows([("env", "knob", "value", "L", "seed", "score"), *rows])


def main(args: Args) -> None:
    if args.collect:
        collect(Path(args.collect))
    found, base, preset = defaultdict(lambda: defaultdict(list)), [], []
    with open(CSV, newline="") as file:
        for row in csv.DictReader(file):
            score, env = float(row["score"]), row["env"]
            if row["knob"] == "none":
                base.append(score)
            elif (row["knob"], row["value"]) == ("alpha", "0.6"):
                preset.append(score)
                full = float(row["L"])
            else:
                found[row["knob"]][float(row["value"])].append(score)
    for knob, value in (PRESET | {"L": full}).items():
        found[knob][value] = preset
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained", sharey=True)
    print(f"| {env} | value | last policy | per seed |\n" + "|---" * 4 + "|")
    show = lambda x: f"{np.mean(x):.1f} ± {np.std(x):.1f} | {' '.join(f'{v:.1f}' for v in x)}"  # noqa: E731
    print(f"| base alone | | {show(base)} |")
    for ax, (knob, title) in zip(axes, TITLES.items()):
        values = sorted(found[knob])
        y = [np.array(found[knob][v]) for v in values]
        for v, x in zip(values, y):
            print(f"| {title} | {v:g} | {show(x)} |")
        at = np.arange(len(values))
        ax.plot(at, [x.mean() for x in y], marker="o", ms=4)
        ax.fill_between(at, [x.min() for x in y], [x.max() for x in y], alpha=0.15, lw=0)
        ax.axhline(np.mean(base), color="gray", ls="--", lw=1, label="TD3+BC alone")
        ax.set_xticks(at, [f"{v:g}" for v in values])
        ax.set(xlabel=title)
    axes[0].set_ylabel("normalized score")
    axes[0].legend(frameon=False, fontsize=8)
    fig.suptitle(f"{env}: mean and range of {len(preset)} seeds", fontsize=10)
    fig.savefig(ROOT / "docs" / "figures" / "dydiff_fig4.png", dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
