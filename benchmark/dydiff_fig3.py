"""Figure 3 of the DyDiff paper: error of generated states against the horizon, single-step model and diffusion model.

    python benchmark/dydiff_fig3.py --runs runs/pendulum-demo/dydiff/seed0 runs/hopper-demo/dydiff/seed0

Takes trained runs of dydiff.py. Both models get the true first state and the logged actions of windows of trajectories
that neither was trained on (--holdout; without it training windows, and the title says so); the truth is what the
simulator did with these actions when the data was recorded. Squared error in the policy frame, mean over dimensions:
mean and 95 % interval over windows, per step. "mean of both" is one averaging correction with the actions held.
Draws docs/figures/dydiff_fig3.png and prints a table.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dydiff  # noqa: E402


@dataclass
class Args:
    runs: tuple[str, ...]
    """run folders of dydiff.py, one panel each"""
    windows: int = 1000
    """at most so many, evenly spread"""


def load(folder: Path) -> tuple[dydiff.Args, dydiff.Agent]:
    content = torch.load(folder / "last.pt", weights_only=True)
    lists = {k: tuple(v) for k, v in content["args"].items() if isinstance(v, list)}
    args = dydiff.Args(**(content["args"] | lists))
    S, A = (len(content["state"]["frames"][k]) for k in ("mean", "a_low"))
    agent = dydiff.make_agent(args, S, A, torch.device("cpu"))
    dydiff.restore(dydiff.agent_state(agent), content)
    return args, agent


def errors(args: dydiff.Args, agent: dydiff.Agent, n: int) -> tuple[dict[str, torch.Tensor], bool]:
    """{model: (windows, H)}, and whether the windows were held out."""
    raw = common.load_raw(args.env, args.data_path, args.data_url)
    data = common.transitions(raw)
    rows = torch.cat([data.s, data.a, data.r[:, None], data.s_next, data.terminal[:, None]], -1)
    train, held, _ = dydiff.prepare(args, agent.frames, raw, rows, torch.device("cpu"), n)
    windows = held if len(held) else train[dydiff.unpadded(train, n)]
    torch.manual_seed(0)
    return dydiff.rollout_errors(args, agent, agent.frames, windows), bool(len(held))


def main(args: Args) -> None:
    torch.set_num_threads(1)
    fig, axes = plt.subplots(1, len(args.runs), figsize=(5 * len(args.runs), 3.6), layout="constrained", squeeze=False)
    print("| data | windows | model | step 1 | half | last |\n" + "|---" * 6 + "|")
    for ax, folder in zip(axes[0], map(Path, args.runs)):
        run, agent = load(folder)
        found, held = errors(run, agent, args.windows)
        for name, x in found.items():
            steps, x = np.arange(1, run.H), x[:, 1:].detach().numpy()
            mean, half = x.mean(0), 1.96 * x.std(0) / len(x) ** 0.5
            (line,) = ax.plot(steps, mean, label=name)
            ax.fill_between(steps, np.maximum(mean - half, 1e-9), mean + half, alpha=0.2, color=line.get_color(), lw=0)
            shown = " | ".join(f"{mean[t]:.2g}" for t in (0, run.H // 2 - 1, run.H - 2))
            print(f"| {run.env} | {len(x)} | {name} | {shown} |")
        ax.axhline(1, color="gray", ls="--", lw=1, label="variance of the data")
        ax.set(yscale="log", xlabel="step", ylabel="squared error, policy frame")
        ax.set_title(f"{run.env}, {len(x)} {'held-out' if held else 'TRAINING'} windows")
        ax.legend(frameon=False, fontsize=8)
    fig.savefig(ROOT / "docs" / "figures" / "dydiff_fig3.png", dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
