"""Figures 2 and 3 of the SWG paper with numbers: how far guided samples are from exact ones, for every beta.

    python benchmark/swg_toys.py [--run-dir runs/swg_toys] [--size cpu] [--seeds 0 1 2] [--jobs 2]

Trains swg.py on toy-spiral and toy-8gaussians (runs that are already there are kept), draws docs/figures/swg_fig2.png
and swg_fig3.png of the first seed (top: SWG, bottom: exact), and prints and stores, per toy and beta, over all seeds
the energy distance of 2,000 samples to exact ones beside the floor (exact against exact), mean energy E beside the
exact one, and for the 8 Gaussians the frequencies of the modes and their total variation to the exact ones.
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import swg  # noqa: E402

FIGURES = {"toy-spiral": "swg_fig2.png", "toy-8gaussians": "swg_fig3.png"}


@dataclass
class Args:
    run_dir: str = "runs/swg_toys"
    """where the runs go"""
    size: Literal["cpu", "paper"] = "cpu"
    """swg.py --size"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds; the figures show the first"""
    betas: tuple[int, ...] = (0, 1, 5, 10, 15, 20)
    """of the table; the figures have the paper's 0 1 5 10 15"""
    samples: int = 2000
    """per seed and beta"""
    jobs: int = 2
    """runs at a time, one thread each"""


def train(args: Args, env: str, seed: int) -> None:
    run = swg.Args(env=env, seed=seed, run_dir=args.run_dir)
    if (swg.run_folder(run) / "result.json").exists():
        return
    command = [sys.executable, str(ROOT / "swg.py"), "--env", env, "--seed", str(seed), "--run-dir", args.run_dir]
    command += ["--size", args.size, "--resume"]
    out = subprocess.run(["env", "OMP_NUM_THREADS=1", *command], stdout=subprocess.PIPE, text=True, check=True)
    print(out.stdout.splitlines()[-1], flush=True)


def load(args: Args, env: str, seed: int) -> tuple[swg.Agent, swg.Args]:
    run = swg.Args(env=env, seed=seed, run_dir=args.run_dir)
    content = swg.load(swg.run_folder(run) / "last.pt", env)
    run = swg.Args(**(content["args"] | {"hidden": tuple(content["args"]["hidden"])}))
    agent = swg.make_agent(run, 1, 2, torch.device("cpu"))
    swg.restore(swg.agent_state(agent), content)
    torch.manual_seed(1)
    return agent, run


def modes(a: torch.Tensor) -> np.ndarray:
    """(8,) share of the points (n, 2) that are nearest to each mode of the 8 Gaussians."""
    k = (7 * common.TOYS["toy-8gaussians"].reward(a)).round().long()
    return torch.bincount(k, minlength=8).numpy() / len(a)


def measure(args: Args, env: str, seed: int) -> list[dict]:
    agent, run = load(args, env, seed)
    rows, reward = [], common.TOYS[env].reward
    for beta in args.betas:
        act = swg.make_act(replace(run, beta=beta, rho=float(beta > 0)), agent, 2)
        a = act(torch.zeros(args.samples, 1))
        exact, other = (common.tilted_samples(env, args.samples, beta, 10 * seed + i) for i in (1, 2))
        row = {"env": env, "seed": seed, "beta": beta, "distance": common.energy_distance(a, exact)}
        row |= {"floor": common.energy_distance(other, exact), "E": float(reward(a).mean())}
        many = common.tilted_samples(env, 100_000, beta, 99)
        row["E_exact"] = float(reward(many).mean())
        if env == "toy-8gaussians":
            p = np.exp(beta * np.arange(8) / 7) / np.exp(beta * np.arange(8) / 7).sum()
            row["total_variation"] = 0.5 * np.abs(modes(a) - p).sum()
            row |= {f"p{k}": x for k, x in enumerate(modes(a))}
        rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def table(rows: list[dict]) -> str:
    head = "| toy | beta | distance to exact | floor | mean E | exact | total variation of the modes |"
    lines = [head, "|---" * 7 + "|"]
    for env, beta in dict.fromkeys((row["env"], row["beta"]) for row in rows):
        mine = [row for row in rows if (row["env"], row["beta"]) == (env, beta)]

        def cell(key, digits, mine=mine):
            x = np.array([row[key] for row in mine if key in row], dtype=float)
            if not len(x):
                return ""
            spread = f" ({x.min():.{digits}f} to {x.max():.{digits}f})" if np.ptp(x) > 0 else ""
            return f"{x.mean():.{digits}f}{spread}"

        cells = [cell("distance", 4), cell("floor", 4), cell("E", 3), cell("E_exact", 3), cell("total_variation", 3)]
        lines.append(f"| {env} | {beta} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(args, *job), [(env, seed) for seed in args.seeds for env in FIGURES]))
    torch.set_num_threads(1)
    rows = [row for env in FIGURES for seed in args.seeds for row in measure(args, env, seed)]
    keys = list(dict.fromkeys(k for row in rows for k in row))
    with open(ROOT / "benchmark" / "results" / "swg_toys.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    for env, name in FIGURES.items():
        agent, run = load(args, env, args.seeds[0])
        swg.beta_figure(run, agent, ROOT / "docs" / "figures" / name, torch.device("cpu"))
    print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
