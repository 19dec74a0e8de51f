"""The toy of Diffusion-DICE's project page: why guide-then-select beats select-only and guide-only.

    python benchmark/diffusion_dice_ring.py [--run-dir runs/ring] [--jobs 2] [--seeds 0 1 2 3 4]

Data on a ring around a hole; the learned reward is wrong in the hole, where the behaviour model leaks a few samples.
Trains, per seed, one run with in-sample guidance and one with contrastive guidance (QGPO) on the same behaviour model
(runs that are already there are kept), draws docs/figures/diffusion_dice_ring.png of the first seed, and prints over
1,000 selections per seed the share in the hole (radius below 0.25), on the outer ring (0.8 to 1.2) and the mean true
reward, every method at the same numbers of candidates.
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import diffusion_dice as dd  # noqa: E402
from common import TOYS, toy_dataset  # noqa: E402

ENV, SCALE = "bandit-ring", TOYS["bandit-ring"].scale  # actions are points / SCALE
METHODS = {  # name: (run, kappa); K is varied
    "select-only": ("igl", 0.0),
    "QGPO, scale 1": ("cep", 1.0),
    "QGPO, scale 4": ("cep", 4.0),
    "guide-then-select": ("igl", 1.0),
    "guide-then-select, kappa 2": ("igl", 2.0),
}
CANDIDATES = (1, 4, 16, 64)  # K = 1 of a guided method is guide-only


@dataclass
class Args:
    run_dir: str = "runs/ring"
    """where the runs go"""
    jobs: int = 2
    """runs at a time, one thread each"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds; the figure shows the first"""
    nfe: tuple[int, ...] = (15,)
    """evaluations of the sampler; the figure takes the first, further ones are measured at K = 16 alone"""


def train(args: Args, seed: int) -> None:
    folders = {kind: Path(args.run_dir) / kind / ENV / "diffusion_dice" / f"seed{seed}" for kind in ("igl", "cep")}
    for kind, folder in folders.items():
        if (folder / "result.json").exists():
            continue
        command = [sys.executable, str(ROOT / "diffusion_dice.py"), "--env", ENV, "--seed", str(seed), "--resume"]
        command += ["--run-dir", f"{args.run_dir}/{kind}", "--device", "cpu"]
        if kind == "cep":  # QGPO: 16 generated actions per state
            command += ["--guidance", "cep", "--M", "16", "--batch-size", "256", "--pretrained", str(folders["igl"])]
        out = subprocess.run(["env", "OMP_NUM_THREADS=1", *command], stdout=subprocess.PIPE, text=True, check=True)
        print(out.stdout.splitlines()[-1], flush=True)


def load(args: Args, kind: str, seed: int) -> tuple[dd.Agent, dd.Args]:
    run = dd.Args(env=ENV, seed=seed, run_dir=f"{args.run_dir}/{kind}")
    content = dd.load(dd.run_folder(run) / "last.pt", ENV)
    widths = {k: tuple(content["args"][k]) for k in ("hidden", "guidance_hidden", "behavior_hidden")}
    run = dd.Args(**(content["args"] | widths))
    agent = dd.make_agent(run, 1, 2, torch.device("cpu"))
    dd.restore(dd.agent_state(agent), content)
    torch.manual_seed(1)
    return agent, run


def act(agent: dd.Agent, run: dd.Args, n: int, **settings) -> torch.Tensor:
    """(n, 2) points, in the units of the page"""
    fn = dd.make_act(replace(run, temperature=0.0, **settings), agent, 2)
    return SCALE * torch.cat([fn(torch.zeros(min(n, 500), 1)) for _ in range(-(-n // 500))])[:n]


def numbers(x: torch.Tensor) -> dict[str, float]:
    r = x.norm(dim=-1)
    outer, reward = (r > 0.8) & (r < 1.2), TOYS[ENV].reward(x / SCALE)
    values = {"hole": (r < 0.25).float(), "outer": outer.float(), "reward": reward}
    return {k: float(v.mean()) for k, v in values.items()}


def measure(args: Args) -> list[dict]:
    rows = []
    for seed in args.seeds:
        for name, (kind, kappa) in METHODS.items():
            agent, run = load(args, kind, seed)
            for nfe in args.nfe:
                for K in CANDIDATES if nfe == args.nfe[0] else (16,):
                    x = act(agent, run, 1000, kappa=kappa, K=K, nfe=nfe)
                    values = {k: round(v, 4) for k, v in numbers(x).items()}
                    rows.append({"seed": seed, "method": name, "K": K, "nfe": nfe} | values)
        origin = agent.judge(torch.zeros(1, 1), torch.zeros(1, 2)).item()
        print(f"seed {seed}: learned reward {origin:.2f} in the middle of the hole (true: -1)", flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| method | K | calls | in the hole | on the outer ring | mean true reward |", "|---" * 6 + "|"]
    for name in METHODS:
        for K, nfe in dict.fromkeys((row["K"], row["nfe"]) for row in rows):
            mine = [row for row in rows if (row["method"], row["K"], row["nfe"]) == (name, K, nfe)]
            cells = []
            for k in ("hole", "outer", "reward"):
                x = np.array([row[k] for row in mine])
                cells.append(f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f})")
            lines.append(f"| {name} | {K} | {nfe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trajectory(agent: dd.Agent, run: dd.Args, n: int, kappa: float, nfe: int) -> list[torch.Tensor]:
    """States of the reverse process at the start of every solver step, and its end."""
    states = []
    hook = agent.score.register_forward_pre_hook(lambda net, inputs: states.append(SCALE * inputs[0].detach()))
    end = act(agent, run, n, kappa=kappa, K=1, nfe=nfe)
    hook.remove()
    starts = np.cumsum([0, *dd.orders(nfe)[:-1]])  # a step of order 2 calls twice
    return [*(states[i] for i in starts), end]


def draw(args: Args) -> None:
    seed, nfe, K = args.seeds[0], args.nfe[0], 16
    agent, run = load(args, "igl", seed)
    span, points = torch.linspace(-1.5, 1.5, 151), SCALE * toy_dataset(ENV).a
    grid = torch.cartesian_prod(span, span)
    with torch.no_grad():
        learned = agent.judge(torch.zeros(len(grid), 1), grid / SCALE)
    fig, axes = plt.subplots(4, 6, figsize=(15, 10.4), layout="constrained")
    maps = [("data", points), ("behaviour model", act(agent, run, 50_000, kappa=0.0, K=1, nfe=nfe))]
    for ax, (title, x) in zip(axes[0], maps):
        *_, image = ax.hist2d(*x.T.numpy(), bins=30, range=[[-1.5, 1.5]] * 2, density=True)
        fig.colorbar(image, ax=ax, shrink=0.8)
        ax.set_title(f"density: {title}")
    rewards = [("true reward", TOYS[ENV].reward(grid / SCALE)), ("learned reward", learned)]
    for ax, (title, value) in zip(axes[0, 2:], rewards):
        fig.colorbar(ax.pcolormesh(span, span, value.view(151, 151).T), ax=ax, shrink=0.8)
        ax.set_title(title)
    guide = [("g at t = 0.02", 0.02), ("g at t = 0.2", 0.2)]
    for ax, (title, t) in zip(axes[0, 4:], guide):
        with torch.no_grad():
            g = agent.guidance(grid[:, None] / SCALE, torch.tensor([t]), torch.zeros(len(grid), 1))
        fig.colorbar(ax.pcolormesh(span, span, g.view(151, 151).T, vmin=-3, vmax=3), ax=ax, shrink=0.8)
        ax.set_title(title)
    rows = {"select-only": ("igl", 0.0, K), "guide-only (QGPO)": ("cep", 4.0, 1), "guide-then-select": ("igl", 1.0, K)}
    for row, (name, (kind, kappa, candidates)) in zip(axes[1:], rows.items()):
        agent, run = load(args, kind, seed)
        states = trajectory(agent, run, 500, kappa, nfe)
        shown = [states[0], states[3], states[5], states[7], states[-1]]
        shown += [act(agent, run, 64, kappa=kappa, K=candidates, nfe=nfe)]
        times = np.linspace(1, 1e-3, nfe + 1)[np.cumsum([0, *dd.orders(nfe)])]
        titles = [f"t = {times[i]:.2f}" for i in (0, 3, 5, 7, -1)]
        titles += [f"64 selected of {candidates} each" if candidates > 1 else "64 of them, no selection"]
        for ax, x, title in zip(row, shown, titles):
            dots = dict(c=TOYS[ENV].reward(x / SCALE), vmin=-1, vmax=1, s=6 if len(x) > 64 else 16, linewidths=0)
            ax.scatter(*x.clamp(-1.9, 1.9).T, cmap="viridis", **dots)
            ax.add_patch(plt.Circle((0, 0), 0.25, fill=False, lw=0.6))
            ax.set_title(title)
        row[0].set_ylabel(name, fontsize=12)
    for ax in axes.flat:
        span = 1.5 if ax in axes[0] else 2
        ax.set(xlim=(-span, span), ylim=(-span, span), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    fig.savefig(ROOT / "docs" / "figures" / "diffusion_dice_ring.png", dpi=80)
    plt.close(fig)


def main(args: Args) -> None:
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: train(args, seed), args.seeds))
    torch.set_num_threads(1)
    rows = measure(args)
    with open(ROOT / "benchmark" / "results" / "diffusion_dice_ring.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(args)
    print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
