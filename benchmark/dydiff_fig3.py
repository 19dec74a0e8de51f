"""Figure 3 of the DyDiff paper: error of generated states against the horizon, single-step model and diffusion model.

    python benchmark/dydiff_fig3.py --runs runs/pendulum-demo/dydiff/seed0 runs/hopper-demo/dydiff/seed0

Takes trained runs of dydiff.py, and the first states of windows of trajectories that no model was trained on
(--holdout; without it training windows, and the title says so). Squared error in the policy frame, mean over
dimensions; mean and 95 % interval over windows, per step.
Upper row: logged actions; the truth is what was recorded. "simulator" is these actions replayed from the recorded first
state: how much a state loses that is stored in float32 and without its contact forces (below 1e-7: not drawn).
Lower row: the run's own policy acts in the model, as in a rollout; its actions are replayed in the simulator from the
same state, and the truth is what the simulator does, as long as it does not end the episode.
The table also has the one-step consistency of the lower row: the simulator set to every generated state, its generated
action taken, compared with the next generated state.
Draws docs/figures/dydiff_fig3.png.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dydiff  # noqa: E402


@dataclass
class Args:
    runs: tuple[str, ...]
    """run folders of dydiff.py, one column each"""
    windows: int = 1000
    """at most so many, evenly spread"""


def load(folder: Path) -> tuple[dydiff.Args, dydiff.Agent]:
    content = dydiff.load(folder / "last.pt", None)
    args = dydiff.Args(**content["args"])
    S, A = (len(content["state"]["frames"][k]) for k in ("mean", "a_low"))
    agent = dydiff.make_agent(args, S, A, torch.device("cpu"))
    dydiff.restore(dydiff.agent_state(agent), content)
    return args, agent


def held_out(args: dydiff.Args, agent: dydiff.Agent, n: int) -> tuple[Tensor, bool]:
    """(windows, H, D) in the model's frame, and whether they were held out."""
    raw = common.load_raw(args.env, args.data_path, args.data_url)
    data = common.transitions(raw)
    rows = torch.cat([data.s, data.a, data.r[:, None], data.s_next, data.terminal[:, None]], -1)
    train, held, _ = dydiff.prepare(args, agent.frames, raw, rows, n)
    return (held, True) if len(held) else (train[dydiff.unpadded(train, n)], False)


def put(env, s: np.ndarray) -> None:
    """Sets the simulator to an observed state."""
    task = env.unwrapped
    env.reset()
    if hasattr(task, "set_state"):  # MuJoCo locomotion: (qpos without x, qvel)
        n = task.model.nq - 1
        if len(s) != n + task.model.nv:
            raise common.UserError(f"{len(s)} observed numbers are not {n} positions and {task.model.nv} velocities")
        task.set_state(np.append(0.0, s[:n]), s[n:])
    else:  # Pendulum: cos, sin, angular velocity
        task.state = np.array([np.arctan2(s[1], s[0]), s[2]])


def simulate(env, s_0: Tensor, a: Tensor) -> Tensor:
    """States of the simulator from s_0 (n, S) under a (n, T, A), raw units; NaN once it ended the episode.
    -> (n, T + 1, S)"""
    out = np.full((*a.shape[:2], s_0.shape[1]), np.nan)
    for i, (s, actions) in enumerate(zip(s_0.double().numpy(), a.numpy())):
        put(env, s)
        for t, action in enumerate(actions):
            out[i, t], _, terminated, _, _ = env.step(action)
            if terminated:
                break
    return torch.cat([s_0[:, None], torch.from_numpy(out).float()], 1)


def rollouts(args: dydiff.Args, agent: dydiff.Agent, s_0: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: states (n, H, S) raw, actions (n, H, A)}, the run's policy acting in the model.  s_0: model's frame."""
    frames, act = agent.frames, agent.policy.act
    start = dydiff.autoregress(frames, act, agent.ensemble, s_0, args.H)
    drawn = dydiff.draw_states(args, agent.unet_ema, s_0, frames.action_to_model(start[1]))
    found = {"ensemble (M = 0)": start, "diffusion, actions of M = 0": (drawn, start[1])}
    given = lambda s, a: dydiff.draw_states(args, agent.unet_ema, s, a)  # noqa: E731
    for name, kind in (("DyDiff, M = 2, replacing", "replace"), ("DyDiff, M = 2, averaging", "average")):
        found[name] = dydiff.correct(replace(args, M=2, correction=kind), frames, act, given, *start)[:2]
    return {k: (frames.from_model(s, clip=False), a) for k, (s, a) in found.items()}


def difference(frames: dydiff.Frames, s: Tensor, truth: Tensor) -> Tensor:
    return (frames.to_policy(s) - frames.to_policy(truth)).square().mean(-1)


@torch.no_grad()
def main(args: Args) -> None:
    torch.set_num_threads(1)
    size = (5 * len(args.runs), 7)
    fig, axes = plt.subplots(2, len(args.runs), figsize=size, layout="constrained", squeeze=False, sharey="col")
    print("| data | windows | actions | states of | step 1 | half | last | one-step consistency |\n" + "|---" * 8 + "|")
    for column, folder in zip(axes.T, map(Path, args.runs)):
        run, agent = load(folder)
        frames, env = agent.frames, common.make_env(run.env)
        S = frames.mean.shape[0]
        windows, held = held_out(run, agent, args.windows)
        what = f"{len(windows)} {'held-out' if held else 'TRAINING'}"
        truth, a = frames.from_model(windows[..., :S], clip=False), frames.action_from_model(windows[..., S:])
        torch.manual_seed(0)
        logged = dydiff.rollout_errors(run, agent, windows)
        logged["simulator"] = difference(frames, simulate(env, truth[:, 0], a[:, :-1]), truth)
        own, consistency = {}, {}
        for name, (s, actions) in rollouts(run, agent, windows[:, 0, :S]).items():
            own[name] = difference(frames, s, simulate(env, s[:, 0], actions[:, :-1]))
            some = slice(None, None, max(len(s) // 100, 1))  # 100 of them
            step = simulate(env, s[some, :-1].flatten(0, 1), actions[some, :-1].flatten(0, 1)[:, None])[:, 1]
            consistency[name] = difference(frames, step, s[some, 1:].flatten(0, 1)).nanmean()
        for ax, kind, found in zip(column, ("logged", "the policy's"), (logged, own)):
            for name, x in found.items():
                steps, x = np.arange(1, run.H), x[:, 1:].numpy()
                n = np.isfinite(x).sum(0)
                mean, half = np.nanmean(x, 0), 1.96 * np.nanstd(x, 0) / n**0.5
                (line,) = ax.plot(steps, mean, label=name, ls=":" if name == "simulator" else "-")
                low = np.maximum(mean - half, mean / 10)
                ax.fill_between(steps, low, mean + half, alpha=0.2, color=line.get_color(), lw=0)
                shown = " | ".join(f"{mean[t]:.2g}" for t in (0, run.H // 2 - 1, run.H - 2))
                last = f"{consistency[name]:.2g}" if name in consistency and kind != "logged" else ""
                print(f"| {run.env} | {what} | {kind} | {name} | {shown} | {last} |", flush=True)
            ax.axhline(1, color="gray", ls="--", lw=1, label="variance of the data")
            ax.set(yscale="log", xlabel="step", ylabel="squared error, policy frame")
            ax.set_title(f"{run.env}, {kind} actions\n{what} windows", fontsize=10)
            ax.legend(frameon=False, fontsize=7)
            ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-7))
    fig.savefig(ROOT / "docs" / "figures" / "dydiff_fig3.png", dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except common.UserError as error:
        print(f"dydiff_fig3.py: {error}", file=sys.stderr)
        sys.exit(error.code)
