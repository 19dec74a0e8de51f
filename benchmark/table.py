"""Tables and curves from committed evaluations.

    python benchmark/table.py                     prints the table of benchmark/results/*.csv, draws the demos' curves
    python benchmark/table.py --collect RUN_DIR   first copies RUN_DIR/<label>/<env>/<method>/seed<k>/eval.csv there

A file is named <env>__<method>__<label>__seed<k>.csv. The table: mean and standard deviation over seeds of the final
evaluation of the last policy (mean over its episodes); the best evaluation has a column of its own. A second table has
what --eval-only wrote to reeval.csv: the same last policies under other sampling settings.
"""

import csv
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import load_dataset, normalized_score  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
DEMOS = ("pendulum-demo", "hopper-demo")


@dataclass
class Args:
    collect: str | None = None
    """folder of runs, one subfolder per label, to copy evaluations from"""


def collect(runs: Path) -> None:
    for path in sorted(runs.glob("*/*/*/seed*/eval.csv")):
        label, env, method, seed = path.parts[-5:-1]
        shutil.copy(path, RESULTS / f"{env}__{method}__{label}__{seed}.csv")
        if path.with_name("reeval.csv").exists():
            shutil.copy(path.with_name("reeval.csv"), RESULTS / f"{env}__{method}__{label}__{seed}.reeval.csv")


def curve(path: Path) -> dict[int, float]:
    """Step -> mean normalized score over the episodes of that evaluation."""
    scores = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            scores[int(row["step"])].append(float(row["normalized_score"]))
    return {step: float(np.mean(x)) for step, x in scores.items()}


def load() -> dict[tuple[str, str, str], list[dict[int, float]]]:
    """(env, method, label) -> one curve per seed."""
    runs = defaultdict(list)
    for path in sorted(RESULTS.glob("*__*__*__seed?.csv")):
        runs[tuple(path.stem.split("__")[:3])].append(curve(path))
    return runs


def data_average(env: str) -> float:
    return float(normalized_score(env, load_dataset(env).returns().numpy()).mean())


def name(method: str, label: str) -> str:
    return method if label == method else label if label == "cloning" else f"{method}, {label}"


def table(runs) -> str:
    lines = ["| dataset | average of the data | run | last policy | best evaluation | per seed | steps |"]
    lines += ["|---" * 7 + "|"]
    for (env, method, label), curves in runs.items():
        last, best = [c[max(c)] for c in curves], [max(c.values()) for c in curves]
        mean, values = f"{np.mean(last):.1f} ± {np.std(last):.1f}", " ".join(f"{x:.1f}" for x in last)
        start = f"| {env} | {data_average(env):.1f} | {name(method, label)} | {mean} | "
        lines.append(f"{start}{np.mean(best):.1f} | {values} | {max(curves[0]):,} |")
    return "\n".join(lines)


def reevaluations() -> str:
    scores = defaultdict(dict)  # (env, run, settings) -> seed -> score; a repeated setting counts once
    for path in sorted(RESULTS.glob("*.reeval.csv")):
        env, method, label, _ = path.name.split("__")
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                shown = [f"{k} {row[k]}" for k in ("N_a", "rho", "kappa", "K", "N", "temperature") if k in row]
                settings = f"{', '.join(shown)}, {row['episodes']} episodes"
                scores[env, name(method, label), settings][row["seed"]] = float(row["normalized_score"])
    lines = ["| dataset | run | sampling | last policy | per seed |", "|---" * 5 + "|"]
    for (env, run, settings), x in scores.items():
        values = [x[seed] for seed in sorted(x)]
        per_seed = " ".join(f"{v:.1f}" for v in values)
        lines.append(f"| {env} | {run} | {settings} | {np.mean(values):.1f} ± {np.std(values):.1f} | {per_seed} |")
    return "\n".join(lines)


def draw(runs, env: str) -> None:
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (task, method, label), curves in runs.items():
        if task == env and not label.startswith(("w=", "a=")):  # ablations: the table alone
            steps = sorted(set.intersection(*(set(c) for c in curves)))
            y = np.array([[c[s] for s in steps] for c in curves])  # (seeds, evaluations)
            text = f"{name(method, label)} ({len(curves)} seeds)"
            (line,) = ax.plot(steps, y.mean(0), marker="o", ms=3, label=text)
            ax.fill_between(steps, y.min(0), y.max(0), alpha=0.2, lw=0, color=line.get_color())
    ax.axhline(data_average(env), color="gray", ls="--", lw=1, label="average of the data")
    ax.set(xlabel="gradient step", ylabel="normalized score", title=f"{env}: mean and range over seeds")
    ax.legend(frameon=False, fontsize=8)
    fig.savefig(ROOT / "docs" / "figures" / f"{env.replace('-', '_')}.png", dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    if args.collect:
        collect(Path(args.collect))
    runs = load()
    print(table(runs), reevaluations(), sep="\n\n")
    for env in DEMOS:
        draw(runs, env)
