"""One picture of all methods on all toys, with numbers: docs/figures/gallery.png and benchmark/results/gallery.csv.

    python benchmark/gallery.py [--run-dir runs/gallery] [--seed 0] [--jobs 1] [--toys bandit-moons toy-spiral]

Trains the runs that are missing in the folder with the presets (one to two hours of one CPU core for all), then
draws: on top the data, below it a row per method with 1,500 samples of the policy, coloured by the true mean reward.
Every panel has the mean reward and, where the data has modes, the share farther than 3 standard deviations from all of
them; below, where the method's target is known in closed form, the energy distance of 4,000 samples to exact ones, and
in brackets the floor, exact against exact (its mean is 0: it may fall below). With r the true mean reward:
    DAC             data x exp(r / (2 eta C)), eta and C as learned, see dac_fig2.py
    Diffusion-DICE  data x w(r), at kappa 1 and K 1: the preset but for bandit-ring, whose panel shows K 16
    SWG             data x w(r), on toy-*: data x exp(beta r) at the preset's beta; the preset is the exact case
    DyDiff          its base, Diffusion-QL (an episode of one step has nothing to roll out): no closed form
"""

import csv
import re
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
import diffusion_dice  # noqa: E402
import dydiff  # noqa: E402
import swg  # noqa: E402
from common import TOYS, UserError, energy_distance, tilted_samples, toy_dataset  # noqa: E402

METHODS = {
    dac: "DAC",
    diffusion_dice: "Diffusion-DICE (ring:\nK 16, distance at K 1)",
    swg: "SWG",
    dydiff: "DyDiff's base,\nDiffusion-QL",
}
EXACT = {diffusion_dice: dict(kappa=1.0, K=1), swg: dict(rho=1.0, kappa=1.0, N=1)}  # settings that aim at the target
CAPTION = (
    "off: share of samples farther than 3 standard deviations from every mode of the data.  "
    "dist.: energy distance of samples to exact ones of the method's target (in brackets: exact to exact)"
)


@dataclass
class Args:
    run_dir: str = "runs/gallery"
    """where the runs are, or go"""
    seed: int = 0
    """seed of every run"""
    jobs: int = 1
    """runs at a time, one thread each"""
    toys: tuple[str, ...] = tuple(TOYS)
    """columns of the figure"""
    figure: Path = ROOT / "docs" / "figures" / "gallery.png"
    """where the picture goes"""
    table: Path = ROOT / "benchmark" / "results" / "gallery.csv"
    """where the numbers go"""


def folder(args: Args, method, env: str) -> Path:
    return method.run_folder(method.Args(env=env, seed=args.seed, run_dir=args.run_dir))


def train(args: Args, method, env: str) -> None:
    if (folder(args, method, env) / "result.json").exists():
        return
    command = [sys.executable, str(ROOT / f"{method.METHOD}.py"), "--env", env, "--seed", str(args.seed)]
    command += ["--run-dir", args.run_dir, "--resume"]
    out = subprocess.run(["env", "OMP_NUM_THREADS=1", *command], capture_output=True, text=True)
    if out.returncode:
        why = (out.stderr.strip() or out.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"{method.METHOD}.py --env {env} ended with {out.returncode}: {why}", out.returncode)
    print(out.stdout.splitlines()[-1], flush=True)


def inverse_temperature(args: Args, run: dac.Args) -> float:
    """1 / (2 eta C) of a trained DAC, C over about 10,000 actions of the data."""
    content = dac.load(folder(args, dac, run.env) / "last.pt", run.env)
    agent, toy = dac.make_agent(run, 1, 2, torch.device("cpu")), TOYS[run.env]
    dac.restore(dac.agent_state(agent), content)
    a = toy_dataset(run.env).a[: toy.rows : -(-toy.rows // 10_000)]
    with torch.no_grad():
        return float(1 / (2 * agent.eta * dac.value_scale(agent.q_target(torch.cat([torch.zeros(len(a), 1), a], -1)))))


def target(args: Args, method, run):
    """(n, seed) -> (n, 2) exact samples of the distribution that the method aims at; None: no closed form."""
    if method is dydiff:
        return None
    if method is diffusion_dice or (method is swg and run.env not in swg.BETA_TOYS):
        return lambda n, seed: method.exact_samples(run, lambda r: r, n, seed)  # toys: rewards as stored
    beta = run.beta if method is swg else inverse_temperature(args, run)
    return lambda n, seed: tilted_samples(run.env, n, beta, seed)


def describe(env: str, method: str, a: torch.Tensor, seed: int | str = "") -> dict:
    """A row of the table for actions (n, 2)."""
    off = "" if TOYS[env].centres is None else dac.off_support(env, a)
    row = {"env": env, "method": method, "seed": seed, "mean_reward": float(TOYS[env].reward(a).mean())}
    return row | {"off_support": off, "distance": "", "floor": ""}


def measure(args: Args, method, env: str, n: int = 4000) -> tuple[torch.Tensor, dict]:
    """(n, 2) samples of the policy with the preset's settings, and their row of the table."""
    path, settings = folder(args, method, env), EXACT.get(method, {})
    act, run, _ = method.load_policy(path, "cpu", env)
    exact = target(args, method, run)
    torch.manual_seed(1)
    a = aimed = act(torch.zeros(n, 1))
    row = describe(env, method.METHOD, a, args.seed)
    if exact:
        if any(getattr(run, k) != v for k, v in settings.items()):
            aimed = method.load_policy(path, "cpu", env, **settings)[0](torch.zeros(n, 1))
        one, two = exact(n, 1), exact(n, 2)
        row |= {"distance": energy_distance(aimed, one), "floor": energy_distance(two, one)}
    return a, row


def title(row: dict) -> str:
    text = f"reward {row['mean_reward']:.2f}"
    text += "" if row["off_support"] == "" else f", {row['off_support']:.0%} off"
    if row["method"] != "data":
        far = "no closed form" if row["distance"] == "" else f"dist. {row['distance']:.4f} ({row['floor']:.4f})"
        text = f"{text}\n{far}"
    return re.sub(r"-(0\.0+\b)", r"\1", text)  # no -0.00


def main(args: Args) -> None:
    unknown = [env for env in args.toys if env not in TOYS]
    if unknown or not args.toys:
        raise UserError(f"--toys has {', '.join(unknown) or 'nothing'}; expected some of: {', '.join(TOYS)}")
    with ThreadPoolExecutor(max(args.jobs, 1)) as pool:
        list(pool.map(lambda job: train(args, *job), [(method, env) for env in args.toys for method in METHODS]))
    torch.set_num_threads(1)
    plt.rcParams["font.size"] = 6.5
    shape, rows = (len(METHODS) + 1, len(args.toys)), []
    fig, axes = plt.subplots(*shape, figsize=(1.36 * shape[1] + 0.3, 8.2), layout="constrained", squeeze=False)
    for column, env in zip(axes.T, args.toys):
        order = torch.randperm(len(toy_dataset(env)), generator=torch.Generator().manual_seed(0))
        data, reward = toy_dataset(env).a[order[:4000]], TOYS[env].reward
        low, high = float(reward(data).min()), float(reward(data).max())
        sets = [(data, describe(env, "data", data)), *(measure(args, method, env) for method in METHODS)]
        for ax, (a, row) in zip(column, sets):
            shown = a[:1500].clamp(-1.27, 1.27)  # what is outside stands at the frame
            ax.scatter(*data[:1500].T, s=2.5, c="0.88", linewidths=0)
            image = ax.scatter(*shown.T, s=2.5, c=reward(a[:1500]), vmin=low, vmax=high, linewidths=0)
            ax.set_title((f"{env}\n" if row["method"] == "data" else "") + title(row), fontsize=6.5, pad=2.5)
            ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=(), yticks=())
            rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        fig.colorbar(image, ax=column, location="bottom", label="mean reward", aspect=12, shrink=0.9, pad=0.01)
    for ax, label in zip(axes[:, 0], ("data", *METHODS.values())):
        ax.set_ylabel(label)
    fig.supxlabel(CAPTION, fontsize=6.5)
    fig.savefig(args.figure, dpi=180)
    with open(args.table, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(args.table.read_text())


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except UserError as error:
        print(f"gallery.py: {error}", file=sys.stderr)
        sys.exit(error.code)
