"""What the traps of DyDiff's release cost, measured on the models of trained runs.

    python benchmark/dydiff_traps.py --runs runs/pendulum-demo/dydiff/seed0 runs/hopper-demo/dydiff/seed0

1. Sampler: error of generated states on held-out windows with the logged actions (as in dydiff_fig3.py) under other
   sampler settings than the run's: churn, conditions written after the churn, number of steps, bfloat16, compiled.
2. Rollouts of the run's own policy: trajectories that the termination rule ends, tested before and after the clip to
   the data's range; trajectories that contain padding; rows stored with and without stopping there.
3. --ensemble-steps N: ensembles trained N steps with and without the terminal rows, whose stored successor is the next
   episode's start; error of their rollouts as in 1.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dydiff_fig3 import held_out, load  # noqa: E402

import common  # noqa: E402
import dydiff  # noqa: E402


@dataclass
class Args:
    runs: tuple[str, ...]
    """run folders of dydiff.py"""
    windows: int = 500
    """at most so many windows, and start states of rollouts"""
    compile: bool = False
    """also the compiled network"""
    ensemble_steps: int = 0
    """gradient steps of each of the two ensembles; 0: none is trained"""


SETTINGS = {
    "the run's": {},
    "churn 60, not rewritten": dict(S_churn=60.0, rewrite=False),
    "churn 60, rewritten": dict(S_churn=60.0, rewrite=True),
    "N 34, no churn": dict(N=34, S_churn=0.0),
    "N 34, churn 60, not rewritten (released)": dict(N=34, S_churn=60.0, rewrite=False),
    "N 34, churn 60, rewritten": dict(N=34, S_churn=60.0, rewrite=True),
    "bfloat16": dict(dtype="bfloat16"),
}


def sampler(args: Args, run: dydiff.Args, agent: dydiff.Agent, windows: torch.Tensor) -> None:
    print("| data | sampler | step 1 | half | last | seconds |\n" + "|---" * 6 + "|")
    frames, S = agent.frames, agent.frames.mean.shape[0]
    truth = frames.to_policy(frames.from_model(windows[..., :S], clip=False))
    nets = {name: (agent.unet_ema, settings) for name, settings in SETTINGS.items()}
    if args.compile:
        nets["compiled"] = (torch.compile(agent.unet_ema), {})
    for name, (net, settings) in nets.items():
        draw = lambda: dydiff.draw_states(replace(run, **settings), net, windows[:, 0, :S], windows[..., S:])  # noqa: B023, E731
        draw() if name in ("the run's", "compiled") else None  # warm
        torch.manual_seed(0)
        clock = time.perf_counter()
        e = (frames.to_policy(frames.from_model(draw())) - truth).square().mean((0, 2))  # (H,)
        seconds = time.perf_counter() - clock
        print(f"| {run.env} | {name} | {e[1]:.2g} | {e[run.H // 2]:.2g} | {e[-1]:.2g} | {seconds:.1f} |", flush=True)


def rollouts(args: Args, run: dydiff.Args, agent: dydiff.Agent, s: torch.Tensor) -> None:
    print("| data | terminal, tested unclipped | clipped | contain padding | rows stored, stopping | not |")
    print("|---" * 6 + "|")
    frames, act = agent.frames, agent.policy.act
    torch.manual_seed(0)
    start = dydiff.autoregress(frames, act, agent.ensemble, s, run.H)
    given = lambda s_0, a: dydiff.draw_states(run, agent.unet_ema, s_0, a)  # noqa: E731
    s, _, padded = dydiff.correct(run, frames, act, given, *start)
    found = {}
    for terminate in ("unclipped", "clipped"):
        for stop in (True, False):
            stored, terminal = dydiff.ends(replace(run, terminate=terminate, stop_at_padding=stop), frames, s, padded)
            found[terminate, stop] = int((terminal & stored).any(1).sum()), int(stored.sum())
    of = f"of {len(s)}"
    ended, clipped = found["unclipped", False][0], found["clipped", False][0]
    row = f"{ended} {of} | {clipped} | {int(padded[:, 1:].any(1).sum())} {of}"
    print(f"| {run.env} | {row} | {found['unclipped', True][1]} | {found['unclipped', False][1]} |", flush=True)


class Short:
    """Stands in for a Run: `steps` steps of the dynamics stage, nothing of the reward's."""

    def __init__(self, steps: int):
        self.steps = steps

    def train(self, name: str, steps: int, update) -> None:
        for i in range(self.steps if name == "dynamics" else 0):
            update(i)


def ensembles(args: Args, run: dydiff.Args, agent: dydiff.Agent, windows: torch.Tensor) -> None:
    raw = common.load_raw(run.env, run.data_path, run.data_url)
    data, frames = common.transitions(raw), agent.frames
    S, A = data.s.shape[1], data.a.shape[1]
    parts = [frames.to_policy(data.s), data.a, data.r[:, None], frames.to_policy(data.s_next), data.terminal[:, None]]
    rows = dydiff.prepare(run, frames, raw, torch.cat(parts, -1))[2]
    change = (rows[:, S + A + 1 : -1] - rows[:, :S]).square().sum(-1)
    end = rows[:, -1] == 1
    share = (
        f"{100 * float(end.float().mean()):.2g} % of the rows, {100 * float(change[end].sum() / change.sum()):.0f} %"
    )
    print(f"{run.env}: terminal rows are {share} of the squared change")
    print("| data | ensemble trained | step 1 | half | last |\n" + "|---" * 5 + "|")
    for name, known in (("without terminal rows", False), ("with them (released)", True)):
        torch.manual_seed(0)
        fresh = dydiff.make_agent(replace(run, augment="single-step", M=0), S, A, torch.device("cpu"))
        fresh.frames.load_state_dict(frames.state_dict())
        dydiff.train_regressions(run, fresh, Short(args.ensemble_steps), rows, S, A, known)
        with torch.no_grad():
            e = dydiff.rollout_errors(replace(run, augment="single-step"), fresh, windows)["ensemble"].mean(0)
        print(f"| {run.env} | {name} | {e[1]:.2g} | {e[run.H // 2]:.2g} | {e[-1]:.2g} |", flush=True)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    loaded = [load(Path(folder)) for folder in args.runs]
    for run, agent in loaded:
        with torch.no_grad():
            sampler(args, run, agent, held_out(run, agent, args.windows)[0])
        print()
        if args.ensemble_steps:
            ensembles(args, run, agent, held_out(run, agent, args.windows)[0])
            print()
    for run, agent in loaded:
        data = common.transitions(common.load_raw(run.env, run.data_path, run.data_url))
        g = torch.Generator().manual_seed(0)
        starts = agent.frames.to_model(data.s[torch.randint(len(data), (args.windows,), generator=g)])
        with torch.no_grad():
            rollouts(args, run, agent, starts)
        print()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except common.UserError as error:
        print(f"dydiff_traps.py: {error}", file=sys.stderr)
        sys.exit(error.code)
