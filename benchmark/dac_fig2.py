"""DAC Fig. 2: diffusion cloning, denoised, hard and soft guidance on four two-dimensional bandits.

    python benchmark/dac_fig2.py [--run-dir runs/fig2] [--jobs 2] [--seed 0]

Trains the sixteen fits with the presets of dac.py (those that are already there are kept), draws
docs/figures/dac_fig2.png and prints for every panel, over 10,000 samples, the share off the data's support (farther
than 3 standard deviations from every mode), the mean reward and the energy distance to exact samples: the data
distribution tilted by exp(r / (2 eta C)) at the final eta and C of the soft run. The row `exact` has the floor, the
distance between two exact sample sets.
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dac  # noqa: E402
from common import TOYS, energy_distance, tilted_samples, toy_dataset  # noqa: E402

SETS = ("bandit-two", "bandit-three", "bandit-moons", "bandit-circles")
NAMES = {"none": "cloning", "denoised": "denoised", "hard": "hard", "soft": "soft"}
COLORS = {"none": "tab:green", "denoised": "tab:orange", "hard": "tab:blue", "soft": "m"}


@dataclass
class Args:
    run_dir: str = "runs/fig2"
    """where the sixteen runs go"""
    jobs: int = 2
    """runs at a time, one thread each"""
    steps: int | None = None
    """gradient steps of every run (the paper's and the preset's: 20,000)"""
    seed: int = 0
    """seed of every run"""


def train(args: Args, env: str, guidance: str) -> None:
    run_dir = f"{args.run_dir}/{guidance}"
    if (Path(run_dir) / env / "dac" / f"seed{args.seed}" / "result.json").exists():
        return
    command = [sys.executable, str(ROOT / "dac.py"), "--env", env, "--guidance", guidance, "--run-dir", run_dir]
    command += ["--seed", str(args.seed), "--resume", "--device", "cpu", "--eval-every", "20000"]
    command += ["--steps", str(args.steps)] if args.steps else []
    command += ["--compile", "on"] if guidance == "denoised" else []  # 50 reverse steps with gradients: worth compiling
    print(subprocess.run(["env", "OMP_NUM_THREADS=1", *command], stdout=subprocess.PIPE, text=True, check=True)
          .stdout.splitlines()[-1], flush=True)  # fmt: skip


@torch.no_grad()
def samples(args: Args, env: str, guidance: str, n: int) -> tuple[torch.Tensor, dac.Agent, dac.Args]:
    run_args = dac.Args(env=env, seed=args.seed, run_dir=f"{args.run_dir}/{guidance}")
    content = dac.load(dac.run_folder(run_args) / "last.pt", env)
    run_args = dac.resolve(run_args)
    agent = dac.make_agent(run_args, 1, 2, torch.device("cpu"))
    dac.restore(dac.agent_state(agent), content)
    torch.manual_seed(1)
    act = dac.make_act(run_args, agent, 2)
    return act(torch.zeros(n, 1)), agent, run_args


def panel(ax, a: torch.Tensor, **style) -> None:
    ax.scatter(*a[:100].clamp(-1.45, 1.45).T, s=14, linewidths=0.8, zorder=3, **style)
    ax.plot(0.4, -0.4, marker="*", color="k", ms=9, zorder=4)


def main(args: Args) -> None:
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [(env, g) for g in ("denoised", "soft", "hard", "none") for env in SETS]
        list(pool.map(lambda x: train(args, *x), jobs))
    fig, axes = plt.subplots(5, 4, figsize=(12, 15), sharex=True, sharey=True, layout="constrained")
    rows, span = [], torch.linspace(-1.5, 1.5, 61)
    grid = torch.cartesian_prod(span, span)
    for column, env in enumerate(SETS):
        toy, data = TOYS[env], toy_dataset(env).a[: TOYS[env].rows]
        soft = samples(args, env, "soft", 1)[1]
        with torch.no_grad():
            field = soft.judge(torch.zeros(len(grid), 1), grid).view(61, 61).T
            C = soft.q_target(torch.cat([torch.zeros(len(data), 1), data], -1)).abs().mean()
        beta = 1 / (2 * float(soft.eta) * float(C))
        exact, floor = tilted_samples(env, 10_000, beta, seed=1), tilted_samples(env, 10_000, beta, seed=2)
        sets = {g: samples(args, env, g, 10_000)[0] for g in NAMES} | {"exact": exact}
        for row, ax in enumerate(axes[:, column]):
            ax.scatter(*data.T, c=toy.reward(data), s=4, cmap="Greys_r", vmin=-2.5, vmax=0.3, linewidths=0)
            ax.contour(span, span, field, 12, linestyles="dashed", linewidths=0.6, cmap="viridis")
            for g, color in COLORS.items():
                if (row == 0 and g != "none") or (row > 0 and list(NAMES)[row - 1] == g):
                    panel(ax, sets[g], marker="^" if g == "soft" else "x", color=color)
            ax.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        axes[0, column].set_title(f"{env}\nas in the paper")
        for row, g in enumerate((*NAMES, "exact"), 1):
            a = sets[g]
            r, off, d = float(toy.reward(a).mean()), dac.off_support(env, a), energy_distance(a[:4000], exact[:4000])
            if g == "exact":
                d = energy_distance(floor[:4000], exact[:4000])
            else:
                axes[row, column].set_title(f"{NAMES[g]}: {100 * off:.0f} % off, reward {r:.2f}")
            numbers = {"off_support": off, "mean_reward": r, "distance_to_exact": d, "eta": float(soft.eta)}
            rows.append({"env": env, "guidance": g, "seed": args.seed} | {k: round(v, 4) for k, v in numbers.items()})
    out = ROOT / "docs" / "figures"
    out.mkdir(exist_ok=True, parents=True)
    fig.savefig(out / "dac_fig2.png", dpi=80)
    with open(ROOT / "benchmark" / "results" / "dac_fig2.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("| set | guidance | off support | mean reward | distance to exact |\n|---|---|---|---|---|")
    for x in rows:
        values = f"{100 * x['off_support']:.1f} % | {x['mean_reward']:.3f} | {x['distance_to_exact']:.4f}"
        print(f"| {x['env']} | {x['guidance']} | {values} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
