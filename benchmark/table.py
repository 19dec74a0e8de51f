"""Tables and curves from committed evaluations.

    python benchmark/table.py                     prints all of benchmark/results/*.csv, draws the demos' curves
    python benchmark/table.py --collect RUN_DIR   first copies RUN_DIR/<label>/<env>/<method>/seed<k>/eval.csv there
    python benchmark/table.py --write             also puts the methods' tables into README.md (tested: they are those)

A file is named <env>__<method>__<label>__seed<k>.csv; a label <data>@<label> is of a run on other data, by --data-path.
Every number: mean and standard deviation over seeds of the final evaluation of the last policy (mean over its
episodes); the best evaluation has a column of its own. reeval.csv, of --eval-only: the same last policies under other
sampling settings.
"""

import csv
import re
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
    write: bool = False
    """put the tables between the marks of README.md"""


README = ROOT / "README.md"
ROWS = {  # of README's table of a method: (text, label, sampling settings if not the run's)
    "dac": [
        ("cloning (`--guidance none --N-a 1`)", "cloning", {}),
        ("eta by dual ascent (`--eta 0.1 --b 0.1`)", "dual", {}),
        ("learning rates 1e-3 (`--eta 1 --eta-lr 0 --actor-lr 1e-3 --critic-lr 1e-3`)", "lr", {}),
        ("**DAC** (stand-ins: `--eta 1 --eta-lr 0`)", "dac", {}),
    ],
    "diffusion_dice": [
        ("cloning (`--kappa 0 --K 1`)", "diffusion_dice", dict(kappa=0, K=1)),
        ("select-only (`--kappa 0 --K 4`)", "diffusion_dice", dict(kappa=0, K=4)),
        ("guide-only (`--kappa 2 --K 1`)", "diffusion_dice", dict(kappa=2, K=1)),
        ("**guide, then select**", "diffusion_dice", {}),
    ],
    "swg": [
        ("cloning (`--rho 0 --kappa 1`)", "swg", dict(rho=0, kappa=1, N=1)),
        ("cloning at temperature 0 (`--rho 0 --kappa 0`)", "swg", dict(rho=0, kappa=0, N=1)),
        ("16 candidates without guidance (`--rho 0 --kappa 1 --N 16`)", "swg", dict(rho=0, kappa=1, N=16)),
        ("SWG-R (`--rho 10 --kappa 1 --N 16`)", "swg", dict(rho=10, kappa=1, N=16)),
        ("**SWG**", "swg", {}),
    ],
    "dydiff": [
        ("TD3+BC alone (`--augment none`)", "a=none", {}),
        ("+ SynthER (`--augment synther`)", "a=synther", {}),
        ("+ rollouts of the ensemble (`--augment single-step`)", "a=single-step", {}),
        ("**+ DyDiff**", "dydiff", {}),
    ],
}
SIDE = [  # of README's table of all methods: (text, method, label, sampling settings)
    ("cloning (SWG's model, unguided)", "swg", "swg", dict(rho=0, kappa=1, N=1)),
    ("the same at temperature 0", "swg", "swg", dict(rho=0, kappa=0, N=1)),
    ("TD3+BC", "dydiff", "a=none", {}), ("DAC", "dac", "dac", {}),
    ("DAC, learning rates 1e-3", "dac", "lr", {}),
    ("Diffusion-DICE", "diffusion_dice", "diffusion_dice", {}), ("SWG", "swg", "swg", {}),
    ("TD3+BC + DyDiff", "dydiff", "dydiff", {}),
]  # fmt: skip
STAND_INS = {  # averages of data that is not in the repository (docs/data.md)
    "hopper-medium-sac": 42.6, "hopper-medium-replay-sac": 13.3, "hopper-expert-sac": 90.7,
    "hopper-medium-expert-sac": 49.3, "door-human-dapg": 28.6, "door-human-expert-dapg": 87.0,
}  # fmt: skip
LOCOMOTION = [f"{task}-{kind}-v2" for task in ("halfcheetah", "hopper", "walker2d")
              for kind in ("medium", "medium-replay", "medium-expert")]  # fmt: skip


def collect(runs: Path) -> None:
    """Of finished runs."""
    for path in sorted(runs.glob("*/*/*/seed*/eval.csv")):
        if not path.with_name("result.json").exists():
            continue
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
    if env in STAND_INS:
        return STAND_INS[env]
    return float(normalized_score(env, load_dataset(env).returns().numpy()).mean())


def name(method: str, label: str) -> str:
    label = label.rpartition("@")[2]
    return method if label == method else label if label == "cloning" else f"{method}, {label}"


def table(runs) -> str:
    lines = ["| dataset | average of the data | run | last policy | best evaluation | per seed | steps |"]
    lines += ["|---" * 7 + "|"]
    for (env, method, label), curves in runs.items():
        env = label.partition("@")[0] if "@" in label else env
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


def last_scores(env: str, method: str, label: str, settings: dict) -> dict[int, float]:
    """Seed -> score of the last policy: of the run, or of the newest --eval-only with these settings."""
    found = {}
    for path in sorted(RESULTS.glob(f"{env}__{method}__{label}__seed?{'.reeval' if settings else ''}.csv")):
        seed = int(re.search(r"seed(\d+)", path.name)[1])
        if not settings:
            scores = curve(path)
            found[seed] = scores[max(scores)]
            continue
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if all(float(row[k]) == v for k, v in settings.items()):
                    found[seed] = float(row["normalized_score"])
    return found


def cell(data: str, method: str, label: str, settings: dict) -> str:
    """Mean and standard deviation over seeds; empty: not run."""
    env = "door-human-v0" if data.startswith("door") else data if data in DEMOS else "hopper-demo"
    x = [*last_scores(env, method, f"{data}@{label}" if data in STAND_INS else label, settings).values()]
    one = "" if len(x) == 3 else f" ({len(x)})"  # seeds
    return f"{np.mean(x):.1f} ± {np.std(x):.1f}{one}" if len(x) > 1 else f"{x[0]:.1f}{one}" if x else ""


def wide_table(rows: list) -> str:
    """rows: (text, method, label, sampling settings).  A column per dataset that one of them has a score on."""
    cells = {data: [cell(data, *row[1:]) for row in rows] for data in (*DEMOS, *STAND_INS)}
    cells = {data: column for data, column in cells.items() if any(column)}
    lines = [f"| | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    lines.append(f"| average of the data | {' | '.join(f'{data_average(data):.1f}' for data in cells)} |")
    lines += [f"| {row[0]} | {' | '.join(column[i] for column in cells.values())} |" for i, row in enumerate(rows)]
    return "\n".join(lines)


def readme_table(method: str) -> str:
    """All datasets that the method was run on here; "all": the methods side by side; "d4rl": beside the papers."""
    if method == "all":
        return wide_table(SIDE)
    if method == "d4rl":
        return beside_published()
    return wide_table([(text, method, label, settings) for text, label, settings in ROWS[method]])


def beside_published() -> str:
    """D4RL's locomotion: the papers' scores (no table of SWG's could be obtained), and ours."""
    with open(RESULTS / "published.csv", newline="") as file:
        published = {(row["dataset"], row["run"]): f"{row['score']} ± {row['spread']}" for row in csv.DictReader(file)}
    runs = {"dac": ("DAC", "dac"), "diffusion_dice": ("Diffusion-DICE", "diffusion_dice"),
            "dydiff": ("TD3+BC + DyDiff", "td3bc+dydiff"), "swg": ("SWG", "")}  # fmt: skip
    heads = [f"{name}: paper | here" if run else f"{name}: here" for name, run in runs.values()]
    lines = [f"| | {' | '.join(heads)} |", "|---" * 8 + "|"]
    for data in LOCOMOTION:
        cells = []
        for method, (_, run) in runs.items():
            ours = [*last_scores(data, method, method, {}).values()]
            cells += [published.get((data, run), "")] * bool(run)
            cells.append(f"{np.mean(ours):.1f} ± {np.std(ours):.1f} ({len(ours)})" if ours else "not measured")
        lines.append(f"| {data} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """README.md, its tables made anew."""
    for method in ("all", "d4rl", *ROWS):
        start, end = f"<!-- results: {method} -->\n", "<!-- end of results -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{readme_table(method)}\n{end}{rest.partition(end)[2]}"
    return text


def draw_stand_ins(runs) -> None:
    """docs/figures/stand_ins.png: score against the share of the main stage, all methods on every stand-in set."""
    found = [data for data in STAND_INS if any(label.startswith(f"{data}@") for _, _, label in runs)]
    if not found:
        return
    fig, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained", sharex=True)
    for ax, data in zip(axes.flat, found):
        for color, (text, method, label, settings) in enumerate(SIDE):
            for (_, run, name), curves in runs.items():
                if (run, name) == (method, f"{data}@{label}") and not settings:
                    steps = sorted(set.intersection(*(set(c) for c in curves)))
                    y, x = np.array([[c[s] for s in steps] for c in curves]), np.array(steps) / steps[-1]
                    ax.plot(x, y.mean(0), marker="o", ms=3, color=f"C{color}", label=text)
                    ax.fill_between(x, y.min(0), y.max(0), alpha=0.2, lw=0, color=f"C{color}")
        ax.axhline(STAND_INS[data], color="gray", ls="--", lw=1, label="average of the data")
        ax.set_title(data)
    for ax in axes.flat[len(found) :]:
        ax.set_axis_off()
    for ax in axes[-1]:
        ax.set_xlabel("share of the main stage's steps")
    for ax in axes[:, 0]:
        ax.set_ylabel("normalized score")
    named = {text: line for ax in axes.flat for line, text in zip(*ax.get_legend_handles_labels())}
    fig.legend(named.values(), named, frameon=False, ncol=len(named), loc="outside lower center")
    fig.suptitle("Stand-in sets, reduced sizes: mean and range over seeds")
    fig.savefig(ROOT / "docs" / "figures" / "stand_ins.png", dpi=110)
    plt.close(fig)


def draw(runs, env: str) -> None:
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (task, method, label), curves in runs.items():
        ablation = label.startswith(("w=", "a=", "b=cql", "b=diffql")) or "@" in label
        if task == env and not ablation:
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
    draw_stand_ins(runs)
    if args.write:
        README.write_text(with_tables(README.read_text()))
