"""Figure 1 of the DyDiff paper: what on-policy data, and long rollouts, are worth to a base algorithm with little data.

    python benchmark/dydiff_fig1.py --models runs/pendulum-demo/dydiff/seed0 runs/pendulum-demo/dydiff/seed1

The data is split by trajectory, 5 % and 95 %. TD3+BC always learns on the 5 %, in the base's mixture with what every
--rollout-every steps brings, about the same number of transitions in every arm:
    a  nothing | rows of the other 95 % | the current policy's own transitions in the real environment
    b  rollouts of DyDiff of different lengths, the shorter ones from more start states
    c  rollouts of full length of the ensemble alone (M = 0)
The models of b and c are those of the given runs (trained on all of the data: what is asked is what rollouts are
worth, not models of 5 % of it); one repetition per run, its split, networks and evaluation from the run's seed.
Writes benchmark/results/dydiff_fig1.csv (one row per evaluation), prints a table, draws docs/figures/dydiff_fig1.png.
"""

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dydiff_fig3 import load  # noqa: E402

import common  # noqa: E402
import dydiff  # noqa: E402

CSV = ROOT / "benchmark" / "results" / "dydiff_fig1.csv"


@dataclass
class Args:
    models: tuple[str, ...] = ()
    """run folders of dydiff.py whose models are used, all of one env; without any, the committed CSV is drawn"""
    lengths: tuple[int, ...] = (1, 5, 15)
    """rollout lengths L of b"""
    rows: int = 1000
    """transitions that every --rollout-every steps bring"""
    steps: int = 8000
    """gradient steps"""
    share: float = 0.05
    """of the trajectories that the base always has"""


def arms(args: Args, run: dydiff.Args) -> dict[str, dydiff.Args]:
    out = {k: run for k in ("nothing", "behaviour data", "on-policy data")}
    for L in args.lengths:
        out[f"DyDiff, L = {L}"] = replace(run, L=L, b=round(args.rows / (run.eta * L)))
    L = run.H - 1
    return out | {f"ensemble alone, L = {L}": replace(run, L=L, b=round(args.rows / (run.eta * L)), M=0)}


class Feed:
    """roll(): `rows` transitions into the ring, of the real environment or of other data."""

    def __init__(self, run: dydiff.Args, agent: dydiff.Agent, rows: int, others: torch.Tensor | None):
        self.run, self.agent, self.rows, self.others = run, agent, rows, others
        self.env, self.s = common.make_env(run.env), None

    def __call__(self) -> dict:
        if self.others is not None:
            dydiff.push(self.agent, self.others[torch.randint(len(self.others), (self.rows,))])
            return {}
        frames, out = self.agent.frames, []
        while len(out) < self.rows:
            if self.s is None:
                self.s = self.env.reset(seed=int(torch.randint(2**31, ())))[0]
            s = torch.as_tensor(self.s, dtype=torch.float32)
            with torch.no_grad():
                a = self.agent.policy.act(frames.to_policy(s)[None])[0]
            self.s, r, terminal, timeout, _ = self.env.step(a.numpy())
            new = torch.as_tensor(self.s, dtype=torch.float32)
            ends = torch.tensor([r, terminal], dtype=torch.float32)
            out.append(torch.cat([frames.to_policy(s), a, ends[:1], frames.to_policy(new), ends[1:]]))
            self.s = None if terminal or timeout else self.s
        dydiff.push(self.agent, torch.stack(out))
        return {}


def repetition(args: Args, folder: Path):
    """Yields (arm, step, score)."""
    run, trained = load(folder)
    run = replace(run, steps=args.steps, pretrained=str(folder))
    raw = common.load_raw(run.env, run.data_path, run.data_url)
    data, frames = common.transitions(raw), trained.frames
    S, A = data.s.shape[1], data.a.shape[1]
    with torch.no_grad():
        s, s_next = frames.to_policy(data.s), frames.to_policy(data.s_next)
    rows = torch.cat([s, data.a, data.r[:, None], s_next, data.terminal[:, None]], -1)
    keep = np.ones(len(raw.s), bool) if raw.s_next is not None else np.append(~raw.timeout[:-1], False)
    pieces = dydiff.trajectories(raw.terminal, raw.timeout)
    order, mine = np.random.default_rng(run.seed).permutation(len(pieces)), np.zeros(len(raw.s), bool)
    for k in order[: max(round(args.share * len(pieces)), 1)]:
        mine[pieces[k][0] : sum(pieces[k])] = True
    mine = torch.from_numpy(mine[keep])
    for name, arm in arms(args, run).items():
        dydiff.seed_all(run.seed)
        agent = dydiff.make_agent(arm, S, A, torch.device("cpu"))
        agent.frames.load_state_dict(frames.state_dict())
        models = {k: v for k, v in dydiff.agent_state(agent).items() if k in dydiff.MODELS}
        dydiff.borrow(arm, models, dydiff.STAGES[arm.augment], dydiff.SETTINGS[arm.augment])
        if name == "nothing":
            roll = None
        elif name == "behaviour data":
            roll = Feed(arm, agent, args.rows, rows[~mine])
        elif name == "on-policy data":
            roll = Feed(arm, agent, args.rows, None)
        else:
            roll = dydiff.Roller(arm, agent, frames.to_model(data.s[mine]))
        update, act = dydiff.make_update(arm, agent, rows[mine], S, A, roll), dydiff.make_act(arm, agent, A)
        for step in range(args.steps + 1):
            if step % run.eval_every == 0:
                last = step == args.steps
                episodes = run.final_episodes if last else run.eval_episodes
                returns, _ = dydiff.evaluate(act, arm, torch.device("cpu"), episodes)
                scores = common.normalized_score(run.env, returns)
                yield run.env, name, run.seed, step, round(float((returns if scores is None else scores).mean()), 2)
            if step < args.steps:
                update(step)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    if args.models:
        found = []
        for folder in args.models:
            for row in repetition(args, Path(folder)):
                found.append(row)
                if row[3] == args.steps:
                    print(*row, flush=True)
        with open(CSV, "w", newline="") as file:
            csv.writer(file).writerows([("env", "arm", "seed", "step", "score"), *found])
    curves = defaultdict(lambda: defaultdict(list))
    with open(CSV, newline="") as file:
        for row in csv.DictReader(file):
            curves[row["arm"]][int(row["step"])].append(float(row["score"]))
            env = row["env"]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    print(f"| {env} | last policy | per seed |\n" + "|---" * 3 + "|")
    for k, (arm, curve) in enumerate(curves.items()):
        steps, y = sorted(curve), np.array([curve[s] for s in sorted(curve)])  # (evaluations, seeds)
        print(f"| {arm} | {y[-1].mean():.1f} ± {y[-1].std():.1f} | {' '.join(f'{x:.1f}' for x in y[-1])} |")
        for ax in axes[[0] if k and k < 3 else [1] if k else [0, 1]]:
            color = "gray" if not k else f"C{k}"
            ax.plot(steps, y.mean(1), marker="o", ms=3, label=arm, color=color)
            ax.fill_between(steps, y.min(1), y.max(1), alpha=0.15, lw=0, color=color)
    for ax, title in zip(axes, ("a: what is added to 5 % of the data", "b, c: rollouts of different lengths")):
        ax.set(xlabel="gradient step", title=title)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel(f"normalized score, {env}")
    fig.savefig(ROOT / "docs" / "figures" / "dydiff_fig1.png", dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except common.UserError as error:
        print(f"dydiff_fig1.py: {error}", file=sys.stderr)
        sys.exit(error.code)
