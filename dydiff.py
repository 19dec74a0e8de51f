"""DyDiff: long-horizon rollouts by dynamics diffusion (Zhao et al., 2024, arXiv 2405.19189v2).

A diffusion model of trajectories imitates behaviour policy and dynamics together. DyDiff makes a dynamics model of it:
it draws whole state sequences for a first state and an action sequence, then lets the current policy choose its actions
on these states, and repeats. The better rollouts join the data of any offline algorithm with an explicit policy. Steps:

    diffusion  D_theta(x; sigma)   states and actions, EDM, conditions written over      edm_loss (4), draw_states (7)
    dynamics   T_psi(s, a)         ensemble of Gaussian models, five elites              ensemble_loss (5)
    reward     r_xi(s, a)          regression                                   train_regressions (10)
    rollout    s_{t+1} = T_psi(s_t, pi(s_t)); M times: states of D_theta, actions      autoregress (6), correct (7)-(9)
    filter     the share eta with the largest sums of predicted rewards                  keep (11)
    policy     td3bc, cql or diffql on real and synthetic transitions                    make_base_update

Differences from the authors' code, each tagged where it happens (reasons and effects: docs/dydiff.md):
  [D1] minibatches are drawn with replacement, not by shuffled passes
  [D2] on CUDA, float32 matrix products may round to TF32
  [D3] bandits: 250 stored draws of the reward noise per action (common.toy_dataset)
  [D4] evaluation: one environment per episode, seeded, all in lock step; every observation is normalised
  [D5] D4RL's locomotion is evaluated in gymnasium's -v4 tasks (common.ENV_IDS)
  [D7] a generated state is tested for termination before it is clipped to the data's range, else none ever ends
  [D8] demos: a generated row that is padding ends its trajectory
  [D9] demos: conditions enter the network unscaled; no churn
  [D10] ensemble and reward network: every network's best weights are restored; terminal rows, whose successor is the
        next episode's start, are left out of the ensemble's data; one-sided bound of hopper's rule mended
Shapes: B batch, S state, A action, D = S + A, H rows of a window, E networks of the ensemble (in act and
        evaluate: episodes), K candidates per state, b start states.
Run:    python dydiff.py                          (pendulum, no download, minutes on a CPU)
        python dydiff.py --env hopper-medium-v2   (D4RL; the paper's sizes)
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from common import TOYS, UserError, edm_sigmas, make_env, normalized_score

METHOD, FORMAT = "dydiff", 3  # FORMAT: of last.pt; raised whenever an older file would not load


@dataclass
class Args:
    env: str = "pendulum-demo"
    """dataset to train on and task to evaluate in; also selects a row of PRESETS"""
    data_path: str | None = None
    """D4RL-format HDF5 file to train on; --env then names the task"""
    data_url: str | None = None
    """mirror (file or folder) to download a D4RL file from"""
    eval_env: str | None = None
    """another gymnasium id to evaluate in, e.g. Hopper-v5"""
    seed: int = 0
    """seeds torch, numpy, python and the evaluation episodes"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n"""
    run_dir: str = "runs"
    """everything is written to <run-dir>/<env>/dydiff/seed<seed>"""
    resume: bool = False
    """continue the run in that folder from its last.pt"""
    overwrite: bool = False
    """delete the run in that folder first"""
    eval_only: bool = False
    """train nothing: evaluate last.pt with the sampling settings given here, append a row to reeval.csv"""
    video: bool = False
    """also write an episode of the last policy to video/ (needs gymnasium[other] and what the task renders with)"""
    log_every: int | None = None
    """steps between two rows of losses (preset: 1000)"""
    eval_every: int | None = None
    """steps between two evaluations (preset: 5000)"""
    eval_episodes: int | None = None
    """episodes per evaluation during training (preset: 10)"""
    final_episodes: int | None = None
    """episodes of the last evaluation, and of --eval-only (preset: 100)"""
    save_every: int | None = None
    """steps between two checkpoints (preset: 50000)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the update; auto: on CUDA, if a C++ compiler is found"""
    graph: Literal["auto", "on", "off"] = "auto"
    """record updates and samplers as CUDA graphs and replay them; auto: on CUDA"""

    # --- the method; None takes the preset of --env, whose default is the released code's value ---
    steps: int | None = None
    """gradient steps of the policy (2000 epochs of 500; of 250 for td3bc alone and for diffql with rollouts)"""
    model_steps: int | None = None
    """gradient steps of the diffusion model (375,000, with 8 windows each)"""
    dynamics_steps: int | None = None
    """most gradient steps of the dynamics ensemble, which stops when its hold-out error does not fall (1,000,000)"""
    reward_steps: int | None = None
    """most gradient steps of the reward network, likewise (1,000,000)"""
    pretrained: str | None = None
    """run folder whose diffusion model, ensemble and reward network (synther: its model) are taken"""
    base: Literal["td3bc", "cql", "diffql"] | None = None
    """algorithm that learns the policy (td3bc)"""
    augment: Literal["dydiff", "single-step", "synther", "none"] | None = None
    """synthetic data: dydiff; single-step = the ensemble's rollouts alone (M = 0); synther; none = base alone"""
    discount: float = 0.99
    """gamma"""
    batch_size: int | None = None
    """B, transitions per step of the policy (256)"""
    hidden: tuple[int, ...] | None = None
    """widths of the hidden layers of Q (256 256)"""
    policy_hidden: tuple[int, ...] | None = None
    """widths of the hidden layers of the policy (256 256; diffql: 256 256 256)"""
    lr: float | None = None
    """Adam, for Q (3e-4)"""
    policy_lr: float | None = None
    """Adam, for policy and temperature (3e-4; cql: 3e-5)"""
    polyak: float = 0.005
    """averaging rate of the targets"""
    alpha_bc: float | None = None
    """td3bc: weight of Q against cloning (2.5)"""
    cql_weight: float = 10.0
    """cql: weight of the conservative term"""
    eta_q: float = 1.0
    """diffql: weight of Q against cloning"""
    clip_norm: float = 5.0
    """diffql: bound on the norm of every gradient"""
    candidates: int | None = None
    """diffql: actions per state at evaluation, one is drawn by softmax of min Q (50)"""

    # --- rollouts ---
    real_ratio: float | None = None
    """alpha, share of real rows in a batch (0.6)"""
    rollout_every: int | None = None
    """policy steps between two rollouts, an epoch (500; diffql: 250)"""
    b: int | None = None
    """b, start states per rollout (2048)"""
    L: int | None = None
    """L, transitions per rollout that are kept (99 = H - 1)"""
    M: int | None = None
    """M, corrections (2)"""
    correction: Literal["average", "replace"] = "average"
    """new states: mean of the drawn and the previous ones (released), or the drawn ones (paper)"""
    filter: Literal["softmax", "hardmax"] = "softmax"
    """which trajectories stay, by their sum of predicted rewards"""
    eta: float | None = None
    """eta, share of the trajectories that stays (0.6)"""
    filter_temperature: float = 0.05
    """of the softmax filter"""
    capacity: int | None = None
    """rows of the ring of synthetic transitions (2,000,000)"""
    terminate: Literal["unclipped", "clipped"] = "unclipped"
    """generated states are tested for termination before they are clipped to the data's range; clipped (released) never
    finds one [D7]"""
    stop_at_padding: bool | None = None
    """a generated row that is padding ends its trajectory (released: off) [D8]"""

    # --- diffusion model, ensemble, reward ---
    H: int | None = None
    """H, rows per window (100)"""
    channels: tuple[int, ...] | None = None
    """channels of the U-net's levels (128 512 1024)"""
    model_batch_size: int | None = None
    """windows per step of the diffusion model (8)"""
    model_lr: float | None = None
    """Adam (1e-3, never reached: see --model-warmup)"""
    model_warmup: int | None = None
    """windows until the rate has risen to --model-lr, linearly (10,000,000)"""
    model_cosine: bool | None = None
    """the rate also falls to 0 along a cosine (released: off)"""
    ema_half_life: int | None = None
    """windows after which a weight counts half in the average; never more than 5 % of those seen (500,000)"""
    loss_mask: bool = False
    """Eq. (4) over the states beyond the first alone (paper), not over all entries (released)"""
    scale_conditions: bool | None = None
    """the conditions are scaled by c_in with the rest of the network's input (released: on) [D9]"""
    rewrite: bool | None = None
    """conditions are also written after the churn (released: off) [D9]"""
    N: int | None = None
    """steps of EDM's sampler (34, 67 network calls)"""
    S_churn: float | None = None
    """EDM's noise (60)"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the U-net in rollouts"""
    E: int = 7
    """networks of the ensemble"""
    elites: int = 5
    """of them predict"""
    dynamics_hidden: tuple[int, ...] | None = None
    """widths of the ensemble's hidden layers (200 200 200 200)"""
    dynamics_lr: float | None = None
    """Adam (1e-4)"""
    reward_hidden: tuple[int, ...] | None = None
    """widths of the reward network's hidden layers (256 256)"""
    reward_lr: float | None = None
    """Adam (1e-4)"""
    holdout: float | None = None
    """share of the trajectories that neither model trains on, to judge them (0: released; demos: 0.05)"""
    synther_width: int | None = None
    """synther: width of the residual MLP (1024)"""
    synther_rows: int | None = None
    """synther: transitions that are generated (5,000,000, at most --capacity)"""


SAMPLING = ("candidates",)  # what --eval-only takes from the command line
PAPER = dict(
    steps=1_000_000, model_steps=375_000, dynamics_steps=1_000_000, reward_steps=1_000_000, base="td3bc",
    augment="dydiff", batch_size=256, hidden=(256, 256), lr=3e-4, alpha_bc=2.5, candidates=50, real_ratio=0.6,
    rollout_every=500, b=2048, M=2, eta=0.6, capacity=2_000_000, stop_at_padding=False, H=100,
    channels=(128, 512, 1024), model_batch_size=8, model_lr=1e-3, model_warmup=10_000_000, model_cosine=False,
    ema_half_life=500_000, scale_conditions=True, rewrite=False, N=34, S_churn=60.0,
    dynamics_hidden=(200, 200, 200, 200), dynamics_lr=1e-4, reward_hidden=(256, 256), reward_lr=1e-4, holdout=0.0,
    synther_width=1024, synther_rows=5_000_000, log_every=1000, eval_every=5000, eval_episodes=10, final_episodes=100,
    save_every=50_000,
)  # released for hopper-medium-expert; nothing else was published, so every dataset has it
_DEMO = dict(  # ours
    hidden=(64, 64), lr=1e-3, policy_lr=1e-3, alpha_bc=10.0, rollout_every=500, b=256, capacity=50_000,
    stop_at_padding=True, H=16, channels=(16, 32, 64), model_batch_size=32, model_lr=2e-3, model_warmup=16_000,
    model_cosine=True, ema_half_life=20_000, scale_conditions=False, rewrite=True, N=8, S_churn=0.0,
    dynamics_hidden=(64, 64, 64), dynamics_lr=1e-3, reward_hidden=(64, 64), reward_lr=1e-3, holdout=0.05,
    synther_width=128, synther_rows=50_000, candidates=10)
PRESETS = {  # what differs from PAPER
    **{f"{task}-{kind}-v2": dict() for task in ("hopper", "halfcheetah", "walker2d")
       for kind in ("medium", "medium-replay", "medium-expert")},
    **{f"maze2d-{size}-v1": dict() for size in ("umaze", "medium", "large")},
    "pendulum-demo": _DEMO | dict(
        steps=8000, model_steps=5000, dynamics_steps=10_000, reward_steps=5000, log_every=200, eval_every=2000,
        final_episodes=20, save_every=2000),
    "hopper-demo": _DEMO | dict(
        steps=30_000, model_steps=8000, dynamics_steps=20_000, reward_steps=20_000, hidden=(128, 128),
        policy_hidden=(128, 128), dynamics_hidden=(128, 128, 128), reward_hidden=(128, 128), H=32,
        channels=(32, 64, 128), alpha_bc=1.0, real_ratio=0.9, lr=3e-4, policy_lr=3e-4, capacity=100_000,
        eval_every=10_000, save_every=5000),
    **{toy: dict(base="diffql", augment="none", steps=8000, hidden=(64, 64), policy_hidden=(64, 64, 64), lr=1e-3,
                 policy_lr=1e-3, candidates=1, log_every=200, eval_every=4000, eval_episodes=1000,
                 final_episodes=2000, save_every=4000) for toy in TOYS},
}


def resolve(args: Args) -> Args:
    """Fills what the command line left at None from PRESETS, else PAPER, and refuses nonsense."""
    preset = PAPER | PRESETS.get(args.env, {})
    base, augment = args.base or preset["base"], args.augment or preset["augment"]
    if (base == "diffql" and augment != "none") or (base, augment) == ("td3bc", "none"):  # 250 steps per epoch, not 500
        preset = PAPER | dict(steps=500_000, rollout_every=250) | PRESETS.get(args.env, {})
    args = replace(args, **{k: v for k, v in preset.items() if getattr(args, k) is None})
    if args.policy_hidden is None:
        args = replace(args, policy_hidden=args.hidden + args.hidden[-1:] if args.base == "diffql" else args.hidden)
    if args.policy_lr is None:
        args = replace(args, policy_lr=3e-5 if args.base == "cql" else args.lr)
    if args.L is None:
        args = replace(args, L=max(args.H - 1, 1))
    if args.augment == "single-step":
        args = replace(args, M=0)
    positive = """model_steps dynamics_steps reward_steps lr policy_lr alpha_bc candidates rollout_every b H L capacity
                  model_batch_size model_lr model_warmup ema_half_life dynamics_lr reward_lr E elites synther_width
                  synther_rows filter_temperature"""
    folds = 2 ** max(len(args.channels) - 1, 0)
    groups = len(args.channels) > 0 and all(c > 0 and c % 8 == 0 for c in args.channels)
    rules = [
        ("channels", "one or more positive multiples of 8 (group norm)", groups),
        ("real_ratio", "in [0, 1]", 0 <= args.real_ratio <= 1),
        ("eta", "in (0, 1]", 0 < args.eta <= 1),
        ("b", "enough that --eta keeps one", not 0 < args.eta <= 1 or int(args.eta * args.b) >= 1),
        ("holdout", "in [0, 1)", 0 <= args.holdout < 1),
        ("H", f"a multiple of {folds}, of at least 2 (the U-net halves it)", args.H % folds == 0 and args.H > 1),
        ("L", "less than H", args.L < args.H),
        ("elites", "at most --E", args.elites <= args.E),
        ("N", "at least 2", args.N >= 2),
    ]
    refuse(args, positive, "M S_churn cql_weight eta_q clip_norm", rules)
    if args.env in TOYS and args.augment != "none":
        raise UserError(f"{args.env} has episodes of one step: there is nothing to roll out; give --augment none")
    if args.pretrained and args.augment == "none":
        raise UserError("--augment none has no models to take from another run; leave --pretrained out")
    return args


def refuse(args, positive: str, natural: str, rules: list[tuple[str, str, bool]]) -> None:
    """Nonsense on the command line: the first rule (option, what is expected, whether it is so) that does not hold."""
    positive += " steps batch_size log_every eval_every eval_episodes final_episodes save_every"
    rules = [(k, "> 0", 0 < getattr(args, k) < math.inf) for k in positive.split()] + rules
    rules += [(k, ">= 0", 0 <= getattr(args, k) < math.inf) for k in natural.split()]
    rules += [
        ("seed", "in [0, 2^32)", 0 <= args.seed < 2**32),  # numpy's range
        ("discount", "in [0, 1]", 0 <= args.discount <= 1),
        ("polyak", "in (0, 1]", 0 < args.polyak <= 1),
    ]
    for k, v in asdict(args).items():
        if isinstance(v, tuple):
            rules.append((k, "one or more positive widths", len(v) > 0 and min(v) > 0))
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run, --overwrite deletes it: give one of the two")
    for name, want, ok in rules:  # NaN fails every comparison
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected {want}")


# --- networks ---------------------------------------------------------------------------------------------
class ConvBlock(nn.Sequential):
    """Convolution along time, group norm, Mish.  (B, i, H) -> (B, o, H)"""

    def __init__(self, i: int, o: int):
        super().__init__(nn.Conv1d(i, o, 5, padding=2), nn.GroupNorm(8, o), nn.Mish())


class ResBlock(nn.Module):
    """Two convolution blocks, the noise embedding added between them."""

    def __init__(self, i: int, o: int, width: int):
        super().__init__()
        self.first, self.second, self.embed = ConvBlock(i, o), ConvBlock(o, o), nn.Linear(width, o)
        self.skip = nn.Conv1d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.first(x) + self.embed(F.mish(e))[..., None]  # (B, o, H)
        return self.second(h) + self.skip(x)


def sinusoidal_embedding(x: Tensor, width: int) -> Tensor:
    """Sinusoidal features [sin, cos] of x, frequencies 1 to 1/10000.  (B,) -> (B, width)"""
    half = width // 2
    u = x[:, None] * torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=x.device))  # (B, width / 2)
    return torch.cat([u.sin(), u.cos()], -1)


class UNet(nn.Module):
    """F_theta(x; c_noise), a temporal U-net: convolutions along time, D features as channels.  (B, H, D)
    widths: channels per level, H divisible by 2 for every level but the last."""

    def __init__(self, D: int, widths: tuple[int, ...]):
        super().__init__()
        w = self.width = widths[0]
        self.embed = nn.Sequential(nn.Linear(w, 4 * w), nn.Mish(), nn.Linear(4 * w, w))
        self.down = nn.ModuleList(
            nn.ModuleList([ResBlock(i, o, w), ResBlock(o, o, w)]) for i, o in pairwise((D, *widths))
        )
        self.shrink = nn.ModuleList(nn.Conv1d(o, o, 3, 2, 1) for o in widths[:-1])
        self.middle = nn.ModuleList(ResBlock(widths[-1], widths[-1], w) for _ in range(2))
        self.up = nn.ModuleList(
            nn.ModuleList([ResBlock(2 * i, o, w), ResBlock(o, o, w)]) for i, o in pairwise(widths[::-1])
        )
        self.grow = nn.ModuleList(nn.ConvTranspose1d(o, o, 4, 2, 1) for o in widths[-2::-1])
        self.out = nn.Sequential(ConvBlock(w, w), nn.Conv1d(w, D, 1))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        e = self.embed(sinusoidal_embedding(c_noise, self.width))  # (B, width)
        x, kept = x.transpose(1, 2), []  # (B, D, H)
        for k, (first, second) in enumerate(self.down):
            x = second(first(x, e), e)
            kept.append(x)
            if k < len(self.shrink):
                x = self.shrink[k](x)  # (B, channels, H / 2)
        for block in self.middle:
            x = block(x, e)
        for (first, second), grow in zip(self.up, self.grow):
            x = grow(second(first(torch.cat([x, kept.pop()], 1), e), e))  # (B, channels, 2 H)
        return self.out(x).transpose(1, 2)  # (B, H, D)


class Heads(nn.Module):
    """E independent MLPs, one batched product per layer.  (B, width) or (E, B, width) -> (E, B, out)"""

    def __init__(self, width: int, hidden: tuple[int, ...], out: int, E: int, activation: str, init: str):
        super().__init__()
        sizes = (width, *hidden, out)
        self.activation = getattr(F, activation)
        self.weights = nn.ParameterList(torch.empty(E, i, o) for i, o in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(E, 1, o) for o in sizes[1:])
        for w, b in zip(self.weights, self.biases):
            i, o = w.shape[1:]
            if init == "normal":  # of the released base algorithms: N(0, 1 / fan-in), biases 0
                nn.init.normal_(w, std=i**-0.5)
            else:  # of the released ensemble, an accident of its tensors' shape; "torch": the default of nn.Linear
                bound = (i * o) ** -0.5 if init == "ensemble" else i**-0.5
                nn.init.uniform_(w, -bound, bound)
                nn.init.uniform_(b, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, (w_out, b_out) = zip(self.weights, self.biases)
        x = x.expand(len(w_out), -1, -1) if x.dim() == 2 else x
        for w, b in hidden:
            x = self.activation(torch.baddbmm(b, x, w))  # (E, B, width)
        return torch.baddbmm(b_out, x, w_out)  # (E, B, out)


class Ensemble(nn.Module):
    """T_psi: E Gaussian models of s' - s in the policy frame, of which the elites predict."""

    def __init__(self, S: int, A: int, hidden: tuple[int, ...], E: int, elites: int):
        super().__init__()
        self.heads = Heads(S + A, hidden, 2 * S, E, "silu", "ensemble")
        self.register_buffer("elites", torch.arange(elites))

    def forward(self, s_a: Tensor) -> tuple[Tensor, Tensor]:
        """mean and log-variance of s' - s, the latter softly within [-10, 0.5].  ([E,] B, S + A) -> (E, B, S) each"""
        mean, raw = self.heads(s_a).chunk(2, -1)
        return mean, -10 + F.softplus(0.5 - F.softplus(0.5 - raw) + 10)

    def predict(self, s: Tensor, a: Tensor) -> Tensor:
        """s + mean of an elite, drawn anew for every row.  (B, S), (B, A) -> (B, S)"""
        mean, _ = self(torch.cat([s, a], -1))  # (E, B, S)
        k = self.elites[torch.randint(len(self.elites), (len(s),), device=s.device)]  # (B,)
        return s + mean[k, torch.arange(len(s), device=s.device)]


class Gaussian(nn.Module):
    """pi(a|s) of TD3+BC and CQL: a = tanh(u), u ~ N(mean, std^2).  (B, S)"""

    def __init__(self, S: int, A: int, hidden: tuple[int, ...]):
        super().__init__()
        self.net = Heads(S, hidden, 2 * A, 1, "relu", "normal")

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(s)[0].chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, s: Tensor, n: int = 1) -> tuple[Tensor, Tensor]:
        """n actions per state and their log-probabilities, reparameterised.  (n, B, A), (n, B)"""
        mean, log_std = self(s)
        eps = torch.randn(n, *mean.shape, device=s.device)
        u = mean + log_std.exp() * eps  # (n, B, A)
        log_p = -0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_p = log_p - 2 * (math.log(2) - u - F.softplus(-2 * u))  # log |da/du| = log(1 - tanh(u)^2)
        return u.tanh(), log_p.sum(-1)

    def act(self, s: Tensor) -> Tensor:
        return self(s)[0].tanh()


class DiffusionPolicy(nn.Module):
    """pi(a|s) of Diffusion-QL: eps(a_t, t, s) and the reverse chain of T = 5 steps."""

    def __init__(self, S: int, A: int, hidden: tuple[int, ...], T: int = 5):
        super().__init__()
        self.A, self.T, sched = A, T, common.vp_schedule(T)
        self.floats = sched.floats  # constants of a chain that is compiled or recorded
        self.register_buffer("alpha_bar", sched.alpha_bar)
        self.time = nn.Sequential(nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        layers = [layer for i, o in pairwise((A + 16 + S, *hidden)) for layer in (nn.Linear(i, o), nn.Mish())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden[-1], A))

    def forward(self, a_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        t = (t - 1).float()  # 1..T, of which the released code counts from 0
        e = self.time(sinusoidal_embedding(t, 16)).expand(len(s), -1)  # (B, 16)
        return self.net(torch.cat([a_t, e, s], -1))  # (B, A)

    def clean(self, a_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 = (a_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), clipped.   t (B,) or (1,)"""
        ab = self.alpha_bar[t][:, None]
        return ((a_t - (1 - ab).sqrt() * eps) / ab.sqrt()).clamp(-1, 1)

    def act(self, s: Tensor) -> Tensor:
        """One ancestral sample per state, with the posterior's mean and variance.  (B, S) -> (B, A)"""
        beta, alpha, alpha_bar = self.floats
        x = torch.randn(len(s), self.A, device=s.device)
        for t in range(self.T, 0, -1):
            time, ab, ab_prev = torch.full((1,), t, device=s.device), alpha_bar[t], alpha_bar[t - 1]
            x_0 = self.clean(x, time, self(x, time, s))
            x = (ab_prev**0.5 * beta[t] * x_0 + alpha[t] ** 0.5 * (1 - ab_prev) * x) / (1 - ab)
            if t > 1:
                x = x + (beta[t] * (1 - ab_prev) / (1 - ab)) ** 0.5 * torch.randn_like(x)
        return x.clamp(-1, 1)


class TransitionNet(nn.Module):
    """F_theta of SynthER: a residual MLP on whole transitions (s, a, r, s', terminal).  (B, D)"""

    def __init__(self, D: int, width: int, depth: int = 6):
        super().__init__()
        self.first, self.last = nn.Linear(D, width), nn.Linear(width, D)
        self.embed = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        block = lambda: nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width))  # noqa: E731
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        h = self.first(x) + self.embed(sinusoidal_embedding(c_noise, 128))  # (B, width)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


# --- losses: pure functions, all randomness is an argument ------------------------------------------------
SIGMA_DATA = 0.5


def condition(x: Tensor, s_0: Tensor, a: Tensor) -> Tensor:
    """Eq. (3): the first state and all actions are written over.  x (B, H, D), s_0 (B, S), a (B, H, A)"""
    s = torch.cat([s_0[:, None], x[:, 1:, : s_0.shape[1]]], 1)  # (B, H, S)
    return torch.cat([s, a], -1)


def denoise(net, x: Tensor, sigma: Tensor, written=None) -> Tensor:
    """EDM's D_theta(x; sigma) = c_skip x + c_out F_theta(c_in x; ln(sigma) / 4).   x (B, ...), sigma (B,)
    written(x): writes the conditions over the network's input, after it was scaled (--scale-conditions False)."""
    sd, sigma = SIGMA_DATA, sigma.view(-1, *(1,) * (x.dim() - 1))
    c_skip, norm = sd**2 / (sigma**2 + sd**2), (sigma**2 + sd**2).sqrt()
    u = x / norm
    if written:
        u = written(u)
    return c_skip * x + sigma * sd / norm * net(u, sigma.flatten().log() / 4)


def unscaled_conditions(args, s_0: Tensor, a: Tensor):
    """What `denoise` writes over the network's input; None: nothing, the conditions are scaled like the rest [D9]."""
    return None if args.scale_conditions else (lambda u: condition(u, s_0, a))


def edm_loss(denoised: Tensor, y: Tensor, sigma: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. (4):  mean_B lambda(sigma) || D_theta(x; sigma) - y ||^2,  lambda = (sigma^2 + sd^2) / (sigma sd)^2.
    mask (H, D): the entries that count (paper: states beyond the first; released code: all).   (B, ...), sigma (B,)"""
    e = (denoised - y).square()
    if mask is not None:
        e = e * mask
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return (weight * e.flatten(1).sum(-1)).mean()


def ensemble_loss(mean: Tensor, log_var: Tensor, delta: Tensor) -> Tensor:
    """Eq. (5), as Gaussian likelihood:  mean (mu - Delta)^2 e^-lv + mean lv, per network.   (E, B, S) -> (E,)"""
    return ((mean - delta).square() * (-log_var).exp()).mean((1, 2)) + log_var.mean((1, 2))


def critic_target(r: Tensor, terminal: Tensor, q_next: Tensor, discount: float) -> Tensor:
    """y = r + gamma (1 - terminal) min_j Qbar_j(s', a')"""
    return r + discount * (1 - terminal) * q_next


def critic_loss(q: Tensor, y: Tensor) -> Tensor:
    """Sum over heads of the mean over the batch of (Q_j(s, a) - y)^2.   q (2, B), y (B,)"""
    return (q - y).square().mean(-1).sum()


def td3bc_actor_loss(q: Tensor, a_pi: Tensor, a: Tensor, alpha_bc: float) -> Tensor:
    """-lambda mean Q_1(s, a~) + 0.5 mean (a~ - a)^2,  lambda = alpha_bc / mean |Q_1(s, a~)|.   q (B,), a (B, A)"""
    return -alpha_bc / q.abs().mean().detach() * q.mean() + 0.5 * (a_pi - a).square().mean()


def conservative(q_random: Tensor, q_next: Tensor, q_pi: Tensor, log_next: Tensor, log_pi: Tensor, A: int) -> Tensor:
    """CQL(H)'s  logsumexp{ Q(s,u) - ln 0.5^A, Q(s,a'_k) - log pi(a'_k|s'), Q(s,a_k) - log pi(a_k|s) }.
    (n, B) each -> (B,)"""
    parts = [q_random - A * math.log(0.5), q_next - log_next.detach(), q_pi - log_pi.detach()]
    return torch.cat(parts).logsumexp(0)


# --- sampler ----------------------------------------------------------------------------------------------
S_TMIN, S_TMAX, S_NOISE = 0.3699492132558657, 52.241950650433864, 1.002  # released; EDM tunes them per dataset


def churn(sigmas: Tensor, S_churn: float) -> list[float]:
    """gamma_i of every step: min(S_churn / N, sqrt(2) - 1) for S_tmin <= t_i <= S_tmax, else 0."""
    g = min(S_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    return [g if S_TMIN <= t <= S_TMAX else 0.0 for t in sigmas[:-1].tolist()]


def edm_sample(denoised, x: Tensor, sigmas: Tensor, gammas: list[float], written=lambda x: x, rewrite: bool = False):
    """Algorithm 2, EDM's stochastic sampler: N Euler steps with Heun's correction but in the last.  denoised(x, sigma)
    is D_theta; x (B, ...) ~ N(0, I), float64; sigmas (N + 1,) down to 0; written(x) writes the conditions over x after
    every step, with rewrite also after the churn (the released code does not)."""
    x = written(sigmas[0].item() * x)
    for t, t_next, gamma in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), gammas):
        t_hat, x_hat = t + gamma * t, x
        if gamma:
            x_hat = x + (t_hat**2 - t**2) ** 0.5 * S_NOISE * torch.randn_like(x)
            x_hat = written(x_hat) if rewrite else x_hat
        d = (x_hat - denoised(x_hat, t_hat)) / t_hat
        x = written(x_hat + (t_next - t_hat) * d)
        if t_next:
            d_next = (x - denoised(x, t_next)) / t_next
            x = written(x_hat + (t_next - t_hat) * (d + d_next) / 2)
    return x


def draw_states(args, net, s_0: Tensor, a: Tensor) -> Tensor:
    """Eq. (7): states of the diffusion model for a first state and an action sequence, all in its frame, state in
    float64 and network in --dtype.   s_0 (B, S), a (B, H, A) -> (B, H, S), row 0 exact"""
    B, H, A = a.shape
    S, sigmas = s_0.shape[1], edm_sigmas(args.N)
    x = torch.randn(B, H, S + A, device=a.device, dtype=torch.float64)
    s_d, a_d = s_0.double(), a.double()
    unscaled = unscaled_conditions(args, s_0, a)

    def denoised(x: Tensor, sigma: float) -> Tensor:
        sigma = torch.full((B,), sigma, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return denoise(net, x.float(), sigma, unscaled).double()

    def written(x: Tensor) -> Tensor:
        return condition(x, s_d, a_d)

    return edm_sample(denoised, x, sigmas, churn(sigmas, args.S_churn), written, args.rewrite)[..., :S].float()


def select(a: Tensor, q: Tensor, n: int, temperature: float = 0.0) -> Tensor:
    """Of n actions per state the one of the largest q, or one drawn with probability softmax(q / temperature).
    a (E n, A), q (E n,) -> (E, A)"""
    a, q = a.view(-1, n, a.shape[-1]), q.view(-1, n)
    k = (q / temperature).softmax(-1).multinomial(1).squeeze(1) if temperature > 0 else q.argmax(-1)  # (E,)
    return a[torch.arange(len(a), device=a.device), k]


def make_act(args: Args, agent: Agent, A: int):
    """act(s), raw states: tanh(mean); diffql: one of K candidates, drawn by softmax of min Q.  (E, S) -> (E, A)"""
    policy = per_size(agent.policy.act, args)

    @torch.no_grad()
    def act(s: Tensor) -> Tensor:
        s = agent.frames.to_policy(s)
        if args.base != "diffql":
            return policy(s)
        s_k = s.repeat_interleave(args.candidates, 0)  # (E K, S)
        a = policy(s_k)  # (E K, A)
        return select(a, agent.judge(s_k, a), args.candidates, temperature=1.0)

    return act


# --- rollouts ---------------------------------------------------------------------------------------------
class Frames(nn.Module):
    """Raw units, policy frame (s - mean) / std, and the diffusion model's frame, min to max -> [-1, 1].  All shapes
    (..., S) or (..., A).  Never trained, saved with the rest."""

    def __init__(self, S: int, A: int):
        super().__init__()
        for name, size in dict(mean=S, std=S, s_low=S, s_span=S, a_low=A, a_span=A).items():
            self.register_buffer(name, torch.ones(size))

    def fit(self, s: Tensor, stored_s: Tensor, stored_a: Tensor) -> None:
        """s: states of the transitions, for the policy frame; stored rows: for the model's.  Span of a constant: 1."""

        def low_span(x: Tensor) -> tuple[Tensor, Tensor]:
            low, high = x.amin(0), x.amax(0)
            return low, torch.where(high > low, high - low, 1.0)

        numbers = s.mean(0), s.std(0, correction=0) + 1e-6, *low_span(stored_s), *low_span(stored_a)
        for x, new in zip(self.buffers(), numbers):
            x.copy_(new)

    def to_policy(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std

    def from_policy(self, s: Tensor) -> Tensor:
        return s * self.std + self.mean

    def to_model(self, raw: Tensor) -> Tensor:
        return 2 * (raw - self.s_low) / self.s_span - 1

    def from_model(self, x: Tensor, clip: bool = True) -> Tensor:
        return ((x.clamp(-1, 1) if clip else x) + 1) / 2 * self.s_span + self.s_low

    def action_to_model(self, a: Tensor) -> Tensor:
        return 2 * (a - self.a_low) / self.a_span - 1

    def action_from_model(self, x: Tensor) -> Tensor:
        return (x.clamp(-1, 1) + 1) / 2 * self.a_span + self.a_low


def terminated(env: str, s: Tensor) -> Tensor:
    """gymnasium's and D4RL's rules of healthy states, on raw states; other tasks never end.   (..., S) -> (...)"""
    env = env.lower()  # hopper-medium-v2, Hopper-v5, mujoco/hopper/medium-v0
    if "hopper" in env:
        healthy = s.isfinite().all(-1) & (s[..., 1:].abs() < 100).all(-1) & (s[..., 0] > 0.7) & (s[..., 1].abs() < 0.2)
        return ~healthy
    if "walker2d" in env:
        return ~((s[..., 0] > 0.8) & (s[..., 0] < 2) & (s[..., 1].abs() < 1))
    if re.search(r"\bant\b", env):  # not antmaze
        return ~(s.isfinite().all(-1) & (s[..., 0] >= 0.2) & (s[..., 0] <= 1))
    return torch.zeros(s.shape[:-1], dtype=torch.bool, device=s.device)


def act_in_model(frames: Frames, act, x: Tensor) -> Tensor:
    """The policy on states of the model's frame: x -> raw (clipped) -> policy frame -> a.  (B, S) -> (B, A)"""
    return act(frames.to_policy(frames.from_model(x)))


def autoregress(frames: Frames, act, ensemble: Ensemble, s_0: Tensor, H: int) -> tuple[Tensor, Tensor]:
    """Eq. (6): a_t = pi(s_t), s_{t+1} = T_psi(s_t, a_t).  s_0 (B, S), result (B, H, S) in the model's frame, raw
    actions (B, H, A).  Stored states are not clipped, what policy and ensemble read is."""
    states, actions, x = [], [], s_0
    for t in range(H):
        a = act_in_model(frames, act, x)
        states.append(x)
        actions.append(a)
        if t < H - 1:
            x = frames.to_model(frames.from_policy(ensemble.predict(frames.to_policy(frames.from_model(x)), a)))
    return torch.stack(states, 1), torch.stack(actions, 1)


def correct(args, frames: Frames, act, states_given, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. (7)-(9), M times: the diffusion model's states for these actions, then the policy's actions on these states.
    states_given(s_0, a): draw_states.   s (B, H, S) in the model's frame, a (B, H, A) raw.  Returns also which rows of
    the last draw are padding, (B, H): with averaging the states themselves no longer show it [D8]"""
    B, H, S = s.shape
    padded = torch.zeros(B, H, dtype=torch.bool, device=s.device)
    for _ in range(args.M):
        drawn = states_given(s[:, 0], frames.action_to_model(a))  # (7)
        s = torch.cat([s[:, :1], drawn[:, 1:] if args.correction == "replace" else (drawn[:, 1:] + s[:, 1:]) / 2], 1)
        a = act_in_model(frames, act, s.reshape(B * H, S)).view(B, H, -1)  # (9)
        padded = drawn.mean(-1) < -0.95
    return s, a, padded


def keep(R: Tensor, kind: str, eta: float, temperature: float, gumbel: Tensor) -> Tensor:
    """Indices of the trajectories that stay.  hardmax: R >= its (1 - eta)-quantile.  softmax: int(eta b) of them
    without replacement, p ~ exp(z / temperature), z = (R - mean) / std (Gumbel top-k).   R, gumbel (b,)"""
    if kind == "hardmax":
        return (R >= R.quantile(1 - eta)).nonzero().squeeze(-1)
    return (keep_probabilities(R, temperature).log() + gumbel).topk(int(eta * len(R))).indices


def keep_probabilities(R: Tensor, temperature: float) -> Tensor:
    R = R.double()
    z = (R - R.mean()) / (R.std(correction=0) + 1e-6)
    p = (z / temperature).softmax(0)
    return (1 - 1e-6) * p + 1e-6 / len(R)


def ends(args, frames: Frames, s: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
    """Which transitions t = 0..H-2 of trajectories are stored, and which of them end their episode.  s (B, H, S) in the
    model's frame, padded (B, H).   (B, H-1) bool each"""
    terminal = terminated(args.env, frames.from_model(s[:, 1:], clip=args.terminate == "clipped"))  # [D7]
    gone = terminal.cumsum(1) - terminal.long() > 0  # it ended before
    if args.stop_at_padding:  # [D8] a padded row is no state: neither it nor what follows
        gone |= padded[:, 1:].cumsum(1) > 0
    return ~gone, terminal


# --- one gradient step: eager = compiled = graphed --------------------------------------------------------
@dataclass
class Agent:
    """Everything that learning changes. Parts that the chosen --augment and --base do not need are None."""

    frames: Frames
    unet: nn.Module | None  # D_theta: UNet, or TransitionNet for synther
    unet_ema: nn.Module | None
    unet_opt: torch.optim.Optimizer | None
    seen: Tensor  # windows seen by it, for learning rate and EMA
    ensemble: Ensemble | None
    ensemble_best: Ensemble | None  # every network's best weights so far
    ensemble_opt: torch.optim.Optimizer | None
    ensemble_fit: Tensor | None  # (E + 2,): best hold-out error of every network, checks without one, 1 if stopped
    reward: Heads | None
    reward_best: Heads | None
    reward_opt: torch.optim.Optimizer | None
    reward_fit: Tensor | None
    ring: Tensor | None  # (capacity, 2 S + A + 2): s, a, r, s', terminal of synthetic transitions, policy frame
    filled: Tensor  # rows of the ring that are in use, and where the next one goes
    place: Tensor
    policy: nn.Module
    policy_target: nn.Module
    q: Heads
    q_target: Heads
    log_alpha: Tensor | None  # CQL's temperature
    policy_opt: torch.optim.Optimizer
    q_opt: torch.optim.Optimizer
    alpha_opt: torch.optim.Optimizer | None

    def judge(self, s: Tensor, a: Tensor) -> Tensor:
        """min_j Qbar_j(s, a), s in the policy frame.   (B, S), (B, A) -> (B,)"""
        return self.q_target(torch.cat([s, a], -1)).squeeze(-1).amin(0)


def make_agent(args: Args, S: int, A: int, device: torch.device) -> Agent:
    unet = ensemble = reward = ring = None
    if args.augment == "dydiff":
        unet = UNet(S + A, args.channels).to(device)
    elif args.augment == "synther":
        unet = TransitionNet(2 * S + A + 2, args.synther_width).to(device)
    if args.augment in ("dydiff", "single-step"):
        ensemble = Ensemble(S, A, args.dynamics_hidden, args.E, args.elites).to(device)
        reward = Heads(S + A, args.reward_hidden, 1, 1, "relu", "torch").to(device)
    if args.augment != "none":
        ring = torch.zeros(args.capacity, 2 * S + A + 2, device=device)
    ensemble_opt = None
    if ensemble:  # weight decay per layer, coupled, on weights alone
        decays = (2.5e-5, *[5e-5] * (len(args.dynamics_hidden) > 1), *[7.5e-5] * (len(args.dynamics_hidden) - 2), 1e-4)
        groups = [{"params": [w], "weight_decay": d} for w, d in zip(ensemble.heads.weights, decays)]
        groups.append({"params": list(ensemble.heads.biases)})
        ensemble_opt = adam(groups, args.dynamics_lr)
    if args.base == "diffql":
        policy = DiffusionPolicy(S, A, args.policy_hidden).to(device)
    else:
        policy = Gaussian(S, A, args.policy_hidden).to(device)
    q = Heads(S + A, args.hidden, 1, 2, "relu", "normal").to(device)
    log_alpha = torch.zeros((), device=device) if args.base == "cql" else None
    frozen = lambda net: deepcopy(net).requires_grad_(False) if net else None  # noqa: E731
    fit = lambda E: torch.tensor([math.inf] * E + [0.0, 0.0], device=device)  # noqa: E731
    return Agent(
        frames=Frames(S, A).to(device), unet=unet, unet_ema=frozen(unet),
        unet_opt=adam(unet.parameters(), args.model_lr) if unet else None,
        seen=torch.zeros((), device=device, dtype=torch.float64),
        ensemble=ensemble, ensemble_best=frozen(ensemble), ensemble_opt=ensemble_opt,
        ensemble_fit=fit(args.E) if ensemble else None,
        reward=reward, reward_best=frozen(reward),
        reward_opt=adam(reward.parameters(), args.reward_lr) if reward else None,
        reward_fit=fit(1) if reward else None,
        ring=ring, filled=torch.zeros((), device=device, dtype=torch.float64),
        place=torch.zeros((), device=device, dtype=torch.float64),
        policy=policy, policy_target=frozen(policy), q=q, q_target=frozen(q), log_alpha=log_alpha,
        policy_opt=adam(policy.parameters(), args.policy_lr), q_opt=adam(q.parameters(), args.lr),
        alpha_opt=adam([log_alpha], args.policy_lr) if args.base == "cql" else None,
    )  # fmt: skip


def adam(params, lr: float, kind=torch.optim.Adam, **options) -> torch.optim.Optimizer:
    """Its learning rate is a tensor: an update changes it in place, also inside a graph."""
    params = list(params)
    device = (params[0]["params"][0] if isinstance(params[0], dict) else params[0]).device
    lr = torch.tensor(lr, device=device)
    return kind(params, lr, fused=True, capturable=device.type == "cuda", **options)


def descend(loss: Tensor, opt: torch.optim.Optimizer, clip_norm: float = 0.0, stacked: int = 1) -> None:
    """One step.  clip_norm bounds the norm of the gradient, of each of the `stacked` networks of a Heads by itself."""
    opt.zero_grad(set_to_none=True)
    loss.backward()
    if clip_norm:
        grads = [p.grad.view(stacked, -1) for p in opt.param_groups[0]["params"]]
        norm = torch.cat(grads, 1).norm(dim=1, keepdim=True)  # (stacked, 1)
        for g in grads:
            g.mul_((clip_norm / (norm + 1e-6)).clamp(max=1))
    opt.step()


@dataclass
class Windows:
    """All windows of H rows, by index: nothing is copied.  Trajectories shorter than H have one, padded on the right
    with -1.0001 in the model's frame."""

    rows: Tensor  # (N, D) states and actions in the model's frame
    start: Tensor  # (n,) first row of every window
    length: Tensor  # (n,) its real rows, H or fewer
    H: int

    def __len__(self) -> int:
        return len(self.start)

    def to(self, device: torch.device) -> Windows:
        return Windows(self.rows.to(device), self.start.to(device), self.length.to(device), self.H)

    def __getitem__(self, i: Tensor) -> Tensor:
        """(B,) -> (B, H, D)"""
        t = torch.arange(self.H, device=i.device)
        at = self.start[i, None] + t  # (B, H)
        real = (t < self.length[i, None])[..., None]  # (B, H, 1)
        return torch.where(real, self.rows[at.clamp(max=len(self.rows) - 1)], -1.0001)


def trajectories(terminal: np.ndarray, timeout: np.ndarray) -> list[tuple[int, int]]:
    """(first row, length) of every trajectory: cut after each terminal row or time-out; what follows the last is
    dropped."""
    last = np.flatnonzero(terminal | timeout)
    first = np.append(0, last[:-1] + 1)
    return [(int(i), int(j - i + 1)) for i, j in zip(first, last)]


def make_windows(rows: Tensor, pieces: list[tuple[int, int]], H: int) -> Windows:
    """Eq. (2): all windows [j, j + H) of a trajectory of T > H rows, one of T <= H."""
    start = [first + j for first, T in pieces for j in range(max(T - H, 0) + 1)]
    length = [min(T, H) for first, T in pieces for j in range(max(T - H, 0) + 1)]
    return Windows(rows, torch.tensor(start), torch.tensor(length), H)


def make_model_update(args: Args, agent: Agent, draw, mask: Tensor | None, S: int | None):
    """First stage: update() is one step of D_theta; draws on the device and returns 0-d tensors.  draw(): clean data
    (B, ...); S: numbers of a state, None without conditions."""
    net, device = agent.unet, agent.seen.device

    def update() -> dict[str, Tensor]:
        y = draw()  # (B, H, D); synther: (B, D)
        sigma = (-1.2 + 1.2 * torch.randn(len(y), device=device)).exp()  # (B,)
        x = y + sigma.view(-1, *(1,) * (y.dim() - 1)) * torch.randn_like(y)
        unscaled = None
        if S:
            s_0, a = y[:, 0, :S], y[:, :, S:]
            x, unscaled = condition(x, s_0, a), unscaled_conditions(args, s_0, a)  # (3)
        loss = edm_loss(denoise(net, x, sigma, unscaled), y, sigma, mask)  # (4)
        agent.unet_opt.zero_grad(set_to_none=True)
        loss.backward()
        for p in net.parameters():
            p.grad.nan_to_num_(0.0, 1e5, -1e5)
        agent.seen += len(y)
        lr = agent.unet_opt.param_groups[0]["lr"]
        warm = (agent.seen / args.model_warmup).clamp(max=1)
        if args.model_cosine:
            warm = warm * 0.5 * (1 + torch.cos(math.pi * agent.seen / (len(y) * args.model_steps)))
        lr.copy_(args.model_lr * warm)
        agent.unet_opt.step()
        half_life = (0.05 * agent.seen).clamp(max=args.ema_half_life)
        rate = (1 - 0.5 ** (len(y) / half_life)).float()
        with torch.no_grad():
            for x, new in zip(agent.unet_ema.parameters(), net.parameters()):
                x.lerp_(new, rate)
        return {"losses/diffusion": loss.detach(), "charts/lr": lr.clone()}

    return update


def make_fit_update(args, name: str, steps: int, net, best, opt, fit: Tensor, loss, holdout_error, n: int, E: int):
    """Stages with a hold-out: update(i) is one step of all E networks, on minibatches of their own, drawn from n rows
    with replacement.  Every n // 256 steps ("epoch") the hold-out error is taken and each network's best weights are
    kept; at the 8th check in a row without an improvement of any network the stage stops: what is left of its steps
    does nothing.   loss(i), i (E, 256) -> (E,);  holdout_error() -> (E,)."""
    device, epoch, state, losses = fit.device, max(n // 256, 1), {"stopped": bool(fit[E + 1] > 0)}, {}

    def step() -> Tensor:
        opt.zero_grad(set_to_none=True)
        each = loss(torch.randint(n, (E, 256), device=device))  # [D1]
        each.mean().backward()
        opt.step()
        return each.detach().mean()

    step = accelerate(step, args, device)

    @torch.no_grad()
    def check() -> None:
        now = holdout_error()  # (E,)
        better = now < fit[:E]
        for x, y in zip(best.parameters(), net.parameters()):
            x[better] = y[better]
        fit[:E] = torch.minimum(fit[:E], now)
        fit[E] = 0.0 if better.any() else fit[E] + 1
        fit[E + 1] = float(fit[E] >= 8)
        state["stopped"] = bool(fit[E + 1] > 0)

    def update(i: int) -> dict[str, Tensor]:
        if not state["stopped"]:
            loss = step()
            losses[f"losses/{name}"], losses["charts/lr"] = loss, opt.param_groups[0]["lr"]
            if (i + 1) % epoch == 0 or i + 1 == steps:
                check()
                losses[f"losses/{name}_holdout"] = fit[:E].mean()
        return dict(losses)

    return update


def make_base_update(args: Args, agent: Agent):
    """update(batch, actor, ema): one step of the base algorithm on (s, a, r, s', terminal) in the policy frame.  actor,
    ema: whether the policy, and its average, take part in this step (plain booleans: one recorded graph for each)."""
    policy, target, q, q_target = agent.policy, agent.policy_target, agent.q, agent.q_target

    def twin(net: Heads, s: Tensor, a: Tensor) -> Tensor:
        return net(torch.cat([s, a], -1)).squeeze(-1)  # (2, B)

    def td3bc(s, a, r, s_next, terminal, actor: bool, ema: bool) -> dict[str, Tensor]:
        with torch.no_grad():
            a_next = target.sample(s_next)[0][0]
            y = critic_target(r, terminal, twin(q_target, s_next, a_next).amin(0), args.discount)
        q_a = twin(q, s, a)
        loss_q = 0.5 * critic_loss(q_a, y)
        losses = {"critic": loss_q, "q_mean": q_a.mean()}
        descend(loss_q, agent.q_opt)
        if actor:
            a_pi = policy.sample(s)[0][0]
            loss = losses["actor"] = td3bc_actor_loss(twin(q, s, a_pi)[0], a_pi, a, args.alpha_bc)
            descend(loss, agent.policy_opt)
            average(q_target, q, args.polyak)
            average(target, policy, args.polyak)
        return losses

    def cql(s, a, r, s_next, terminal, actor: bool, ema: bool) -> dict[str, Tensor]:
        A = a.shape[1]
        a_pi, log_pi = (x[0] for x in policy.sample(s))
        agent.log_alpha.grad = (A - log_pi.detach()).mean()  # of -log_alpha mean(log_pi - A): target entropy -A
        agent.alpha_opt.step()
        alpha = agent.log_alpha.clamp(-10, 0.5).exp()
        loss_pi = (alpha * log_pi - twin(q, s, a_pi).amin(0)).mean()
        descend(loss_pi, agent.policy_opt)
        with torch.no_grad():
            a_next = policy.sample(s_next)[0][0]
            y = critic_target(r, terminal, twin(q_target, s_next, a_next).amin(0), args.discount)
            n = 10
            (a_k, log_k), (a_next_k, log_next_k) = policy.sample(s, n), policy.sample(s_next, n)
            u = 2 * torch.rand_like(a_k) - 1
            many = torch.cat([u, a_next_k, a_k]).flatten(0, 1)  # (3 n B, A)
        q_a = twin(q, s, a)  # (2, B)
        q_many = twin(q, s.repeat(3 * n, 1), many).view(2, 3 * n, len(s))
        loss_td = critic_loss(q_a, y)
        gap = torch.stack([conservative(*x.split(n), log_next_k, log_k, A) for x in q_many]) - q_a  # (2, B)
        loss_q = loss_td + args.cql_weight * gap.mean(1).sum()
        losses = {"critic": loss_td, "gap": gap.mean(), "actor": loss_pi, "alpha": alpha, "q_mean": q_a.mean()}
        descend(loss_q, agent.q_opt)
        average(q_target, q, args.polyak)
        return losses

    def diffql(s, a, r, s_next, terminal, actor: bool, ema: bool) -> dict[str, Tensor]:
        with torch.no_grad():
            a_next = target.act(s_next)
            y = critic_target(r, terminal, twin(q_target, s_next, a_next).amin(0), args.discount)
        q_a = twin(q, s, a)
        loss_q = critic_loss(q_a, y)
        descend(loss_q, agent.q_opt, args.clip_norm, stacked=2)
        t, eps = torch.randint(1, policy.T + 1, (len(s),), device=s.device), torch.randn_like(a)
        ab = policy.alpha_bar[t][:, None]
        a_t = ab.sqrt() * a + (1 - ab).sqrt() * eps
        eps_hat = policy(a_t, t, s)
        q_pi = twin(q, s, policy.clean(a_t, t, eps_hat))  # (2, B), at the one-step prediction of x_0
        first = torch.rand((), device=s.device) < 0.5  # which of the two is maximised, the other scales
        one, other = torch.where(first, q_pi, q_pi.flip(0))
        loss_bc = (eps_hat - eps).square().mean()
        loss_pi = loss_bc - args.eta_q * one.mean() / other.abs().mean().detach()
        descend(loss_pi, agent.policy_opt, args.clip_norm)
        average(q_target, q, args.polyak)
        if ema:
            average(target, policy, args.polyak)
        return {"critic": loss_q, "actor": loss_pi, "cloning": loss_bc, "q_mean": q_a.mean()}

    return {"td3bc": td3bc, "cql": cql, "diffql": diffql}[args.base]


def split(row: Tensor, S: int, A: int) -> tuple[Tensor, ...]:
    """(..., 2 S + A + 2) -> s, a, r, s', terminal"""
    s, a, r, s_next, terminal = row.split((S, A, 1, S, 1), -1)
    return s, a, r[..., 0], s_next, terminal[..., 0]


def make_update(args: Args, agent: Agent, data: Tensor, S: int, A: int, roll=None):
    """Main stage: update(i) is one step of the base algorithm on real and synthetic rows, int(alpha B) of them real;
    before every --rollout-every-th step roll() fills the ring.  data: (rows, 2 S + A + 2), policy frame."""
    n_real, device = int(args.real_ratio * args.batch_size), data.device
    learn, steps, stats, enough = make_base_update(args, agent), {}, {}, []

    def make(actor: bool, ema: bool, mixed: bool):
        def step() -> dict[str, Tensor]:
            n = n_real if mixed else args.batch_size
            rows = data[torch.randint(len(data), (n,), device=device)]  # [D1]
            if mixed:
                j = torch.rand(args.batch_size - n, device=device, dtype=torch.float64) * agent.filled
                rows = torch.cat([rows, agent.ring[j.long()]])
            losses = learn(*split(rows, S, A), actor, ema)
            lr = agent.q_opt.param_groups[0]["lr"].clone()
            return {f"losses/{k}": x.detach() for k, x in losses.items()} | {"charts/lr": lr}

        return accelerate(step, args, device)

    def update(i: int) -> dict[str, Tensor]:
        if roll and i % args.rollout_every == 0:
            stats.update(roll())
        if i % args.rollout_every == 0 or not enough:  # the ring never gets emptier
            enough[:] = [agent.ring is not None and int(agent.filled) >= args.batch_size - n_real]
        actor = args.base != "td3bc" or i % 2 == 1  # td3bc: policy and targets at every second step
        ema = args.base == "diffql" and i >= 1000 and i % 5 == 0
        key = (actor, ema, enough[0])
        if key not in steps:
            steps[key] = make(*key)
        stats.update(steps[key]())  # td3bc: the actor's loss of the step before stays
        return dict(stats)

    return update


class Roller:
    """roll(): one rollout into the ring, with its cost and what came of it.  All b starts are one batch."""

    def __init__(self, args: Args, agent: Agent, starts: Tensor):
        self.args, self.agent, self.frames, self.starts = args, agent, agent.frames, starts  # (rows, S), model's frame
        self.seconds, self.began, self.flops = 0.0, time.perf_counter(), None
        self.net = accelerate(agent.unet_ema, replace(args, graph="off"), starts.device) if agent.unet else None

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        args, agent, frames, clock = self.args, self.agent, self.frames, time.perf_counter()
        s_0 = self.starts[torch.randint(len(self.starts), (args.b,), device=self.starts.device)]
        s, a = autoregress(frames, agent.policy.act, agent.ensemble, s_0, args.H)
        given = lambda s_0, a: draw_states(args, self.net, s_0, a)  # noqa: E731
        s, a, padded = correct(args, frames, agent.policy.act, given, s, a)  # single-step: M = 0
        s_p = frames.to_policy(frames.from_model(s))  # (b, H, S)
        r = agent.reward(torch.cat([s_p, a], -1).flatten(0, 1)).view(s.shape[:2])  # (b, H)
        kept = keep(r.sum(1), args.filter, args.eta, args.filter_temperature, gumbel(args.b, s.device))  # (11)
        kept = kept.sort().values  # not by rank: a ring that is too small drops the first ones
        stored, terminal = ends(args, frames, s, padded)  # (b, H - 1)
        stored[:, args.L :] = False
        rows = torch.cat([s_p[:, :-1], a[:, :-1], r[:, :-1, None], s_p[:, 1:], terminal[..., None].float()], -1)
        rows = rows[kept][stored[kept]]  # (n, 2 S + A + 2)
        push(agent, rows)
        if s.is_cuda:
            torch.cuda.synchronize(s.device)
        now = time.perf_counter()
        self.seconds += now - clock
        ends_there = (terminal & stored)[kept].any(1)
        calls = args.M * (2 * args.N - 1) if args.augment == "dydiff" else 0
        stats = {
            "seconds": now - clock, "share_of_time": self.seconds / (now - self.began), "network_calls": calls,
            "gflop": calls * args.b * self.gflop_per_call(), "rows": len(rows), "reward_sum": r.sum(1).mean(),
            "reward_sum_kept": r.sum(1)[kept].mean(), "terminal": ends_there.sum(), "filled": agent.filled,
        }  # fmt: skip
        return {f"rollout/{k}": torch.as_tensor(v, dtype=torch.float64) for k, v in stats.items()}

    def gflop_per_call(self) -> float:
        """Of the U-net, for one trajectory."""
        if self.args.augment != "dydiff":
            return 0.0
        if self.flops is None:
            D, (p, *_) = self.starts.shape[1] + self.frames.a_low.shape[0], self.agent.unet_ema.parameters()
            with FlopCounterMode(display=False) as counter:
                self.agent.unet_ema(torch.zeros(1, self.args.H, D, device=p.device), torch.zeros(1, device=p.device))
            self.flops = counter.get_total_flops() / 1e9
        return self.flops


def gumbel(n: int, device: torch.device) -> Tensor:
    return -torch.empty(n, device=device, dtype=torch.float64).exponential_().log()


def push(agent: Agent, rows: Tensor) -> None:
    """Into the ring, first in, first out."""
    size = len(agent.ring)
    rows = rows[-size:]
    at = (int(agent.place) + torch.arange(len(rows), device=rows.device)) % size
    agent.ring[at] = rows
    agent.place.fill_((int(agent.place) + len(rows)) % size)
    agent.filled.fill_(min(size, int(agent.filled) + len(rows)))


@torch.no_grad()
def average(target: nn.Module, source: nn.Module, rate: float) -> None:
    """target <- (1 - rate) target + rate source"""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


# --- running: the same text in all four scripts (tests/test_shared.py) ------------------------------------
class Graphed:
    """fn recorded once as a CUDA graph, then replayed. Every call is exactly one call of fn: the first ones run
    eagerly, on a side stream, until the allocator has settled. Inputs are copied into the recorded buffers."""

    def __init__(self, fn, warmup: int = 5):
        self.fn, self.warmup, self.graph = fn, warmup, None

    def __call__(self, *inputs: Tensor):
        if self.warmup > 0:
            self.warmup -= 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = self.fn(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            return out
        if self.graph is None:
            self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # recorded, not executed
                self.out = self.fn(*self.inputs)
        for x, new in zip(self.inputs, inputs):
            x.copy_(new)
        self.graph.replay()
        return self.out


def accelerate(fn, args, device: torch.device):
    """fn as --compile and --graph ask; `auto` as their help texts say."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if args.compile == "on" and not compiler:
        raise UserError("--compile on needs a C++ compiler ($CXX, g++ or clang++), and none is there; leave it out")
    if args.compile == "on" or (args.compile == "auto" and compiler and device.type == "cuda"):
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it warns of Adam's profiler marks
        fn = torch.compile(fn)
    if args.graph == "on" or (args.graph == "auto" and device.type == "cuda"):
        fn = Graphed(fn)
    return fn


def per_size(fn, args):
    """fn with a recording (--graph) for every number of rows that it is called with.  (n, ...), ... -> (n, ...)"""
    recorded = {}

    def call(*inputs: Tensor) -> Tensor:
        n = len(inputs[0])
        if n not in recorded:
            recorded[n] = accelerate(fn, replace(args, compile="off"), inputs[0].device)
        return recorded[n](*inputs).clone()  # not the buffer that the next replay overwrites

    return call


def pick_device(args) -> torch.device:
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:n")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        raise UserError(f"--device {name}: {seen}; use --device cpu, or install a CUDA build of torch")
    if args.graph == "on" and device.type == "cpu":
        raise UserError("--graph on records CUDA graphs, and this run is on the CPU; leave it at auto")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high")  # [D2] TF32, as JAX computes by default
    return device


@torch.no_grad()
def evaluate(act, args, device: torch.device, episodes: int, stopped=lambda: False):
    """(episodes,) undiscounted returns and (episodes,) lengths.  [D4] One environment per episode, all in lock
    step, one batch of actions per step, each counted until its own first end.  Episode i starts from seed + i,
    the policy's noise from seed: two policies face the same starts. Training randomness stays as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        if args.env in TOYS:
            a = act(torch.zeros(episodes, 1, device=device))
            return TOYS[args.env].reward(a).cpu().double().numpy(), np.ones(episodes, int)
        envs = [make_env(args.env, args.eval_env) for _ in range(episodes)]
        s = np.stack([env.reset(seed=args.seed + i)[0] for i, env in enumerate(envs)])  # (E, S)
        returns, lengths, alive = np.zeros(episodes), np.zeros(episodes, int), np.ones(episodes, bool)
        while alive.any():
            if stopped():
                raise KeyboardInterrupt
            a = act(torch.as_tensor(s, dtype=torch.float32, device=device))  # (E, A)
            a = a.clamp(-1, 1).cpu().numpy()
            for i in np.flatnonzero(alive):
                s[i], r, terminated, truncated, _ = envs[i].step(a[i])
                returns[i] += r
                lengths[i] += 1
                alive[i] = not (terminated or truncated)
        for env in envs:
            env.close()
    return returns, lengths


def save(path: Path, state: dict, progress: dict, args) -> None:
    """All that continuing bit for bit needs; loads with weights_only.  Atomic: the old file stays until the
    new one is complete."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    content = {"method": METHOD, "format": FORMAT, "args": asdict(args), "progress": progress, "rng": rng}
    content["state"] = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
    part = path.with_suffix(".part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        kept = "the one before it is kept" if path.exists() else "there is no earlier one"
        why = f"cannot write {path} ({first_line(error)}); {kept}"
        raise UserError(f"{why}: make room, then --resume", code=1) from error


def load(path: Path, env: str | None) -> dict:
    """The content of a last.pt, if it is of this method and env (None: any)."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: train first, or check --env, --seed and --run-dir")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        is_of = f"{content['method']} (format {content['format']}) on {content['args']['env']}"
    except Exception as error:  # zipfile, pickle and torch each have their own for a damaged file
        why = f"{path} is damaged or not a checkpoint ({first_line(error)})"
        raise UserError(f"{why}; start anew with --overwrite") from error
    expected = f"{METHOD} (format {FORMAT}) on {env or content['args']['env']}"
    if is_of != expected:
        raise UserError(f"{path} is of {is_of}; expected {expected}: check --env and --run-dir")
    return content


def restore(state: dict, content: dict) -> dict:
    """Puts a checkpoint into modules, optimisers, tensors and random generators; returns its progress."""
    for k, v in state.items():
        if hasattr(v, "load_state_dict"):
            v.load_state_dict(content["state"][k])
        else:
            v.copy_(content["state"][k])
        for group in getattr(v, "param_groups", ()):  # as this device needs them, whatever saved them
            group["lr"] = torch.as_tensor(group["lr"], device=group["params"][0].device)
            group["capturable"] = group["params"][0].is_cuda
    torch.set_rng_state(content["rng"]["cpu"])
    if torch.cuda.is_available() and "cuda" in content["rng"]:
        torch.cuda.set_rng_state(content["rng"]["cuda"])
    return content["progress"]


def run_folder(args) -> Path:
    return Path(args.run_dir).expanduser() / args.env.replace("/", "_") / METHOD / f"seed{args.seed}"


class Run:
    """One run folder: arguments, losses, evaluations, checkpoints, result. `state` names all that learning
    changes, `progress` where it stands: stage, step of that stage, stages done, seconds of each."""

    # a resumed run may change these, nothing else
    FREE = """device data_path data_url eval_env run_dir resume overwrite eval_only video log_every save_every
              compile graph""".split()

    def __init__(self, args, state: dict, device: torch.device):
        self.args, self.state, self.device, self.folder = args, state, device, run_folder(args)
        self.progress = {"stage": "", "step": 0, "done": [], "seconds": {}, "eval_seconds": 0.0}
        self.rows: list[dict] = []  # of eval.csv
        self.signal = 0
        last, exists = self.folder / "last.pt", (self.folder / "args.json").exists()
        try:
            if exists and args.overwrite:
                shutil.rmtree(self.folder)
            elif exists and not args.resume:
                hint = "--resume continues it, --overwrite replaces it, --run-dir goes elsewhere"
                raise UserError(f"{self.folder} holds a run: {hint}")
            if args.resume and last.exists():
                self.resume(last)
            elif args.resume:
                print(f"nothing saved yet in {self.folder}: starting at step 0")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write("args.json", json.dumps(describe(args, device), indent=2))
            self.write_evaluations()
        except OSError as error:
            why = f"cannot write to {self.folder} ({error.strerror})"
            raise UserError(f"{why}; give another --run-dir") from error

    def resume(self, path: Path) -> None:
        content = load(path, self.args.env)
        now, then = (json.loads(json.dumps(x)) for x in (asdict(self.args), content["args"]))
        changed = [k for k in now if k not in self.FREE and now[k] != then.get(k)]
        if changed:
            what = ", ".join(f"{k}={then.get(k)}, not {now[k]}" for k in changed)
            raise UserError(f"{path} was trained with {what}: give the same settings, or another --run-dir")
        self.progress = restore(self.state, content)
        if (self.folder / "eval.csv").exists():
            with open(self.folder / "eval.csv", newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= self.progress["step"]]
        print(f"resuming {self.folder} at {self.progress['stage']} step {self.progress['step']}")

    def write(self, name: str, text: str) -> None:
        part = self.folder / f"{name}.part"
        try:
            part.write_text(text)
            os.replace(part, self.folder / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.folder / name)) from error

    def write_evaluations(self) -> None:
        keys = ("step", "episode", "return", "length", "normalized_score")
        lines = [",".join(keys), *(",".join(str(row[k]) for k in keys) for row in self.rows)]
        self.write("eval.csv", "\n".join(lines) + "\n")

    def train(self, stage: str, steps: int, update, act=None) -> None:
        """Calls update(i) for i = 0, 1, ..., steps - 1, from where the checkpoint stands.  act: the policy to
        evaluate at step 0, on the way and at the end; stages without one log to a subfolder.  Ctrl-C and SIGTERM
        save, and say how to go on."""
        args, progress, losses = self.args, self.progress, {}
        if stage in progress["done"]:
            return
        if progress["stage"] != stage:
            progress |= {"stage": stage, "step": 0}
            progress["seconds"][stage], self.rows = 0.0, []
        start = progress["step"]
        where = self.folder if act else self.folder / stage
        self.writer = SummaryWriter(str(where), purge_step=start + 1 if start else 0)
        handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=steps, initial=start, desc=stage, unit="step", disable=None)
        try:
            for step in range(start, steps + 1):
                last = step == steps
                if act and (last or step % args.eval_every == 0) and step not in self.evaluated():
                    self.check(losses)
                    self.evaluate(act, step, args.final_episodes if last else args.eval_episodes)
                if last:
                    progress["done"].append(stage)
                if last or (step > start and step % args.save_every == 0):
                    self.save(losses)
                if last:
                    break
                clock = time.perf_counter()
                losses = update(step)
                progress["step"] = step + 1
                if (step + 1) % args.log_every == 0:
                    self.log(losses)
                progress["seconds"][stage] += time.perf_counter() - clock
                bar.update()
                if self.signal:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            self.save(losses)
            bar.close()
            print(f"\nstopped at {stage} step {progress['step']} of {steps}, saved; continue with: {again()}")
            raise SystemExit(128 + self.signal) from None
        finally:
            bar.close()
            self.writer.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def on_signal(self, number, frame) -> None:
        if self.signal:  # asked twice: at once, without saving
            raise SystemExit(128 + number)
        self.signal = number

    def check(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """The numbers; a non-finite one ends the run before it can reach a checkpoint."""
        values = {k: v.item() for k, v in losses.items()}
        for k, v in values.items():
            if not math.isfinite(v):
                last = self.folder / "last.pt"
                good = f"last good checkpoint: {last}" if last.exists() else "there is no checkpoint yet"
                where = f"{self.progress['stage']} step {self.progress['step']}"
                raise UserError(f"{k} is {v} at {where}; {good}. Try smaller learning rates", code=1)
        return values

    def log(self, losses: dict[str, Tensor]) -> None:
        for k, v in self.check(losses).items():
            self.writer.add_scalar(k, v, self.progress["step"])
        self.writer.add_scalar("charts/steps_per_second", self.steps_per_second(), self.progress["step"])

    def steps_per_second(self) -> float:
        return self.progress["step"] / max(self.progress["seconds"][self.progress["stage"]], 1e-9)

    def save(self, losses: dict[str, Tensor]) -> None:
        nets = {k: v for k, v in self.state.items() if isinstance(v, nn.Module)}
        self.check(losses | {f"weights of {k}": sum(x.sum() for x in v.state_dict().values()) for k, v in nets.items()})
        save(self.folder / "last.pt", self.state, self.progress, self.args)

    def evaluate(self, act, step: int, episodes: int) -> None:
        clock = time.perf_counter()
        returns, lengths = evaluate(act, self.args, self.device, episodes, lambda: self.signal)
        scores = normalized_score(self.args.env, returns)
        for i in range(episodes):
            row = {"step": step, "episode": i, "return": round(float(returns[i]), 4), "length": lengths[i]}
            score = "" if scores is None else round(float(scores[i]), 4)
            self.rows.append(row | {"normalized_score": score})
        self.write_evaluations()
        text = f"return {returns.mean():.1f} +- {returns.std():.1f}"
        tags = {"return": returns.mean()}
        if scores is not None:
            text = f"normalized score {scores.mean():.1f} +- {scores.std():.1f}, {text}"
            tags |= {"normalized_score": scores.mean(), "normalized_score_std": scores.std()}
            tags["normalized_score_last5"] = self.curve()[1][-5:].mean()
        for k, v in tags.items():
            self.writer.add_scalar(f"eval/{k}", v, step)
        self.progress["eval_seconds"] += time.perf_counter() - clock
        tqdm.write(f"step {step:>7}: {text}, {episodes} episodes, {self.steps_per_second():.0f} steps/s")

    def evaluated(self) -> list[int]:
        return sorted({int(row["step"]) for row in self.rows})

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, mean and standard deviation over episodes of every evaluation: scores, else returns."""
        key = "normalized_score" if self.rows[0]["normalized_score"] != "" else "return"
        steps = self.evaluated()
        values = [[float(row[key]) for row in self.rows if int(row["step"]) == step] for step in steps]
        return np.array(steps), np.array([np.mean(v) for v in values]), np.array([np.std(v) for v in values])

    def finish(self, data_returns: np.ndarray, act) -> None:
        """result.json, curve.png, the video if asked for, and the last line."""
        step = self.progress["step"]
        final = [row for row in self.rows if int(row["step"]) == step]
        returns = np.array([float(row["return"]) for row in final])
        scores = normalized_score(self.args.env, returns)
        result = {"method": METHOD, "env": self.args.env, "seed": self.args.seed, "step": step}
        for k, v in {"normalized_score": scores, "return": returns}.items():
            result |= {k: None if v is None else v.mean(), f"{k}_std": None if v is None else v.std()}
        result["normalized_score_last5"] = None if scores is None else self.curve()[1][-5:].mean()
        result |= {"episodes": len(final), "steps_per_second": self.steps_per_second()}
        result["train_seconds"] = sum(self.progress["seconds"].values())
        result["eval_seconds"] = self.progress["eval_seconds"]
        self.write("result.json", json.dumps(result | {"device": device_name(self.device)}, indent=2))
        data_scores = normalized_score(self.args.env, data_returns)
        plot_curve(self, float((data_returns if data_scores is None else data_scores).mean()))
        if self.args.video:
            record(act, self.args, self.device)
        if self.args.env == "pendulum-demo":
            print(f"next: python {METHOD}.py --env hopper-demo   (real MuJoCo data, minutes on a CPU)")
        print(summary(self.args, returns, step))


def record(act, args, device: torch.device) -> None:
    """--video: one episode of the policy, from the start of an evaluation's first, as mp4 in the folder video/."""
    try:
        env = make_env(args.env, args.eval_env, render_mode="rgb_array")
        env = gym.wrappers.RecordVideo(env, str(run_folder(args) / "video"), name_prefix="last", disable_logger=True)
        s, over = env.reset(seed=args.seed)[0], False
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(args.seed)
            while not over:
                a = act(torch.as_tensor(s[None], dtype=torch.float32, device=device))[0]  # (A,)
                s, _, terminated, truncated, _ = env.step(a.clamp(-1, 1).cpu().numpy())
                over = terminated or truncated
        env.close()
        print(f"video: {run_folder(args) / 'video'}")
    except Exception as error:  # renderers, encoders and the toys, which have no environment, each have their own
        print(f"no video: {first_line(error)}")


def summary(args, returns: np.ndarray, step: int) -> str:
    scores = normalized_score(args.env, returns)
    kind, values = ("return", returns) if scores is None else ("normalized score", scores)
    text = f"{kind} {values.mean():.1f} +- {values.std():.1f} over {len(values)} episodes at step {step}"
    return f"{METHOD} {args.env} seed {args.seed}: {text} -> {run_folder(args)}"


def again() -> str:
    words = [word for word in sys.argv if word not in ("--overwrite", "--resume")]
    return shlex.join(["python", *words, "--resume"])


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def describe(args, device: torch.device) -> dict:
    """What args.json holds."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    versions = {m.__name__: m.__version__ for m in (torch, np, gym)} | {"python": platform.python_version()}
    about = {"versions": versions, "device": device_name(device), "git_commit": commit, "command": sys.argv}
    return {"method": METHOD, "args": asdict(args)} | about


def plot_curve(run: Run, data_average: float) -> None:
    """curve.png: every evaluation (shade: one standard deviation over episodes), data average as a line."""
    import matplotlib.pyplot as plt

    steps, mean, std = run.curve()
    scored = normalized_score(run.args.env, np.zeros(1)) is not None
    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    ax.fill_between(steps, mean - std, mean + std, alpha=0.2, lw=0)
    ax.plot(steps, mean, marker="o", ms=3, label=METHOD)
    ax.axhline(data_average, color="gray", ls="--", lw=1, label="average of the data")
    ax.set(xlabel="gradient step", ylabel="normalized score" if scored else "return")
    ax.set_title(f"{run.args.env}, seed {run.args.seed}")
    ax.legend(frameon=False)
    fig.savefig(run.folder / "curve.png", dpi=150)
    plt.close(fig)


def plot_toy(path: Path, env: str, data, value, samples: Tensor, note: str = "") -> None:
    """samples.png: data coloured by mean reward; the learned value field, value: (n, 2) -> (n,); samples
    coloured by reward, with the share of them that is off the data's support, where the toy has modes, and a note."""
    import matplotlib.pyplot as plt

    toy, span = TOYS[env], torch.linspace(-1.5, 1.5, 121)
    a, samples = data.a[torch.randperm(len(data))[:2000].to(data.a.device)].cpu(), samples.cpu()
    known, got = toy.reward(a), toy.reward(samples)
    field = value(torch.cartesian_prod(span, span).to(data.a.device)).cpu().view(121, 121).T
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    dots = dict(s=5, cmap="viridis", vmin=float(known.min()), vmax=float(known.max()), linewidths=0)
    fig.colorbar(axes[0].scatter(*a.T, c=known, **dots), ax=axes[0], label="mean reward", shrink=0.8)
    axes[0].set_title(f"{env}\ndata")
    fig.colorbar(axes[1].contourf(span, span, field, 20, cmap="magma"), ax=axes[1], label="value", shrink=0.8)
    axes[1].scatter(*a.T, s=1, c="white", alpha=0.3, linewidths=0)
    axes[1].set_title("learned value\ndata in white")
    shown = samples.clamp(-1.45, 1.45)
    fig.colorbar(axes[2].scatter(*shown.T, c=got, **dots), ax=axes[2], label="mean reward", shrink=0.8)
    off = "" if toy.centres is None else f", {100 * off_support(env, samples):.0f} % off support"
    axes[2].set_title(f"{METHOD} samples\nmean reward {got.mean():.2f}{off}\n{note}".strip())
    for ax in axes:
        ax.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def off_support(env: str, a: Tensor) -> float:
    """Share of actions farther than 3 standard deviations of the data's noise from every one of its modes."""
    return float((torch.cdist(a, TOYS[env].centres).amin(-1) > 3 * TOYS[env].spread).float().mean())


def announce(args, data, returns: np.ndarray, device: torch.device) -> None:
    """What is trained on, and every setting."""
    scores = normalized_score(args.env, returns)
    average = f"average return {returns.mean():.1f}"
    average += "" if scores is None else f" (normalized score {scores.mean():.1f})"
    print(f"{args.env}: {len(data)} transitions in {len(returns)} episodes, {average}; {device_name(device)}")
    if args.env not in PRESETS:
        print(f"note: no preset for {args.env}: general settings of the paper, see below")
    print(" ".join(f"{k}={v}" for k, v in asdict(args).items() if v is not None))


def task_sizes(args) -> tuple[int, int]:
    """Observation and action sizes of the evaluation task; if it cannot be made, the run ends before a download."""
    if args.env in TOYS:
        return 1, 2
    env = make_env(args.env, args.eval_env)
    env.close()
    return *env.observation_space.shape, *env.action_space.shape


def check_task(task: tuple[int, int], S: int, A: int) -> None:
    """Data and evaluation task must have the same sizes: found out before training, not after."""
    if (S, A) != task:
        fix = "--env (or --eval-env) must name the task that the data comes from"
        raise UserError(f"the data has sizes (observation, action) {S, A}, the task {task}: {fix}")


def borrow(args, state: dict, stages: list[str], settings: str) -> list[str]:
    """--pretrained: into `state`, what `stages` of another run of this env have learned under the same `settings`.
    Returns the stages that are done thereby: none without --pretrained, or once this run has a checkpoint itself."""
    if not args.pretrained or (args.resume and (run_folder(args) / "last.pt").exists()):
        return []
    path = Path(args.pretrained).expanduser() / "last.pt"
    content = load(path, args.env)
    missing = [k for k in stages if k not in content["progress"]["done"]]
    if missing:
        raise UserError(f"{path} has not done {', '.join(missing)}; give a run that has, or --resume that one")
    theirs, ours = (json.loads(json.dumps(x)) for x in (content["args"], asdict(args)))
    wrong = [k for k in settings.split() if theirs[k] != ours[k]]
    if wrong:
        text = lambda v: " ".join(map(str, v)) if isinstance(v, list) else v  # noqa: E731
        what = ", ".join(f"--{k.replace('_', '-')} {text(theirs[k])}, here {text(ours[k])}" for k in wrong)
        raise UserError(f"{path} was trained with {what}; give the same")
    try:
        for k, v in state.items():
            if hasattr(v, "load_state_dict"):
                v.load_state_dict(content["state"][k])
            else:
                v.copy_(content["state"][k])
    except RuntimeError as error:
        raise UserError(f"{path}: its data has other sizes; --pretrained takes a run of the same task") from error
    return stages


# --- main -------------------------------------------------------------------------------------------------
def agent_state(agent: Agent) -> dict:
    return {f.name: getattr(agent, f.name) for f in fields(agent) if getattr(agent, f.name) is not None}


MODELS = "frames unet unet_ema seen ensemble ensemble_best ensemble_fit reward reward_best reward_fit".split()
STAGES = {"dydiff": ["diffusion", "dynamics", "reward"], "single-step": ["dynamics", "reward"], "synther": ["synther"],
          "none": []}  # fmt: skip
_REGRESSIONS = "dynamics_hidden E elites reward_hidden holdout"
SETTINGS = {"dydiff": f"{_REGRESSIONS} H channels scale_conditions", "single-step": _REGRESSIONS,
            "synther": "synther_width", "none": ""}  # fmt: skip


@torch.no_grad()
def rollout_errors(args: Args, agent: Agent, windows: Tensor) -> dict[str, Tensor]:
    """Squared error of generated states, policy frame, mean over dimensions, given the true first state and the logged
    actions.  windows (n, H, D), model's frame, unpadded.   {model: (n, H)}: the ensemble's mean unrolled, one draw of
    the diffusion model, and the mean of both (one averaging correction with the actions held)."""
    frames, S = agent.frames, len(agent.frames.mean)
    truth = frames.to_policy(frames.from_model(windows[..., :S], clip=False))  # (n, H, S)
    a = frames.action_from_model(windows[..., S:])
    s = [truth[:, 0]]
    for t in range(args.H - 1):
        s.append(agent.ensemble.predict(s[-1], a[:, t]))
    found = {"ensemble": torch.stack(s, 1)}  # (n, H, S)
    if args.augment == "dydiff":
        drawn = draw_states(args, agent.unet_ema, windows[:, 0, :S], windows[..., S:])
        found["diffusion"] = frames.to_policy(frames.from_model(drawn))
        found["mean of both"] = (found["ensemble"] + found["diffusion"]) / 2
    return {k: (x - truth).square().mean(-1) for k, x in found.items()}


@torch.no_grad()
def denoising_errors(args: Args, agent: Agent, windows: Tensor) -> dict[float, float]:
    """Squared error of the denoised states at a few noise levels, beside their variance (key 0), model's frame.  A
    model that does not beat the variance at sigma = 80 does not read its conditions."""
    S = len(agent.frames.mean)
    s_0, a, y = windows[:, 0, :S], windows[:, :, S:], windows[:, 1:, :S]
    errors = {0.0: float(y.var((0, 1)).mean())}
    for sigma in (80.0, 10.0, 1.0):
        x = condition(windows + sigma * torch.randn_like(windows), s_0, a)
        unscaled = unscaled_conditions(args, s_0, a)
        level = torch.full((len(x),), sigma, device=x.device)
        errors[sigma] = float((denoise(agent.unet_ema, x, level, unscaled)[:, 1:, :S] - y).square().mean())
    return errors


def report_models(args: Args, agent: Agent, windows: Tensor, held: bool) -> None:
    """Prints how good the models are, and a warning where they are poor: rollouts of a useless model do harm."""
    if not len(windows):
        print(f"note: no trajectory has {args.H} rows: models not judged")
        return
    with torch.random.fork_rng([windows.device] if windows.is_cuda else []):
        torch.manual_seed(args.seed)
        errors = {k: x.mean(0) for k, x in rollout_errors(args, agent, windows).items()}
        noise = denoising_errors(args, agent, windows) if args.augment == "dydiff" else {}
    at = sorted({1, args.H // 2, args.H - 1})
    print(f"models on {len(windows)} {'held-out' if held else 'training'} windows, squared error of states (data: 1):")
    for k, x in errors.items():
        print(f"  {k:12} " + ", ".join(f"step {t} {x[t]:.2g}" for t in at))
    if noise:
        text = ", ".join(f"sigma {k:g} {v:.3g}" for k, v in noise.items() if k)
        print(f"  denoising    {text} (variance {noise[0.0]:.3g})")
        if noise[80.0] > 0.8 * noise[0.0]:
            print("warning: the diffusion model ignores its conditions: train longer, or --scale-conditions False")
    for k, x in errors.items():
        if not x[args.H - 1] < 1:
            print(f"warning: after {args.H - 1} steps the {k} is no better than the data's mean; its rollouts do harm")


def main(args: Args) -> None:
    if args.eval_only:
        return reevaluate(args)
    args = resolve(args)
    device = pick_device(args)
    seed_all(args.seed)

    task = task_sizes(args)
    toy = args.env in TOYS and not args.data_path
    raw = None if toy else common.load_raw(args.env, args.data_path, args.data_url)
    data = common.toy_dataset(args.env) if toy else common.transitions(raw)
    S, A = data.s.shape[1], data.a.shape[1]
    check_task(task, S, A)
    returns = data.returns().numpy()  # as stored
    stored_s, stored_a = (data.s, data.a) if toy else (torch.from_numpy(raw.s), torch.from_numpy(raw.a))
    agent = make_agent(args, S, A, device)
    frames = agent.frames
    with torch.no_grad():
        frames.fit(*(x.to(device) for x in (data.s, stored_s, stored_a)))
    data = data.to(device)
    s, s_next = frames.to_policy(data.s), frames.to_policy(data.s_next)
    rows = torch.cat([s, data.a, data.r[:, None], s_next, data.terminal[:, None]], -1)  # (rows, 2 S + A + 2)

    if args.augment in ("dydiff", "single-step"):
        windows, held, model_rows = prepare(args, frames, raw, rows)
    fitted, state = deepcopy(frames.state_dict()), agent_state(agent)
    models = {k: state[k] for k in MODELS if k in state}
    taken = borrow(args, models, STAGES[args.augment], SETTINGS[args.augment])  # before the run's folder is touched
    if any(not torch.allclose(v, fitted[k]) for k, v in frames.state_dict().items()):
        raise UserError(f"{args.pretrained}: its models are of other data; --pretrained takes a run on the same")
    run = Run(args, state, device)
    run.progress["done"] += taken
    announce(args, data, returns, device)

    if args.augment == "synther":
        synthesize = train_synther(args, agent, run, rows, S, A)
    elif args.augment != "none":
        if args.augment == "dydiff":
            mask = None
            if args.loss_mask:  # states beyond the first
                mask = torch.zeros(args.H, S + A, device=device)
                mask[1:, :S] = 1

            def draw() -> Tensor:
                return windows[torch.randint(len(windows), (args.model_batch_size,), device=device)]  # [D1]

            update = accelerate(make_model_update(args, agent, draw, mask, S), args, device)
            run.train("diffusion", args.model_steps, lambda i: update())
        train_regressions(args, agent, run, model_rows, S, A, known_successors=raw.s_next is not None)
        report_models(args, agent, held if len(held) else windows[unpadded(windows, 256)], bool(len(held)))
    roll = None
    if args.augment == "synther" and not int(agent.filled):
        push(agent, synthesize())
    elif args.augment in ("dydiff", "single-step"):
        roll = Roller(args, agent, frames.to_model(data.s))
    act = make_act(args, agent, A)
    run.train("train", args.steps, make_update(args, agent, rows, S, A, roll), act)

    if args.env in TOYS:
        toy_figure(args, agent, data, run.folder, act)
    run.finish(returns, act)


@torch.no_grad()
def toy_figure(args: Args, agent: Agent, data, folder: Path, act) -> None:
    """samples.png"""
    zero = torch.zeros(2000, 1, device=data.a.device)
    s = agent.frames.to_policy(zero)

    def value(a: Tensor) -> Tensor:
        return agent.judge(s[:1].expand(len(a), -1), a)

    plot_toy(folder / "samples.png", args.env, data, value, act(zero))


def unpadded(windows: Windows, n: int) -> Tensor:
    """n or fewer indices of windows without padding, evenly spread."""
    whole = (windows.length == windows.H).nonzero().squeeze(-1)
    if not len(whole):
        return whole
    return whole[torch.linspace(0, len(whole) - 1, min(n, len(whole)), device=whole.device).long()]


def prepare(args: Args, frames: Frames, raw, rows: Tensor, n: int = 256):
    """Windows to train on, n or fewer held-out ones (n, H, D), and the transitions of the trajectories that are trained
    on."""
    pieces = trajectories(raw.terminal, raw.timeout)
    if not pieces:
        raise UserError("no trajectory of the data ends (terminal or time-out): there is no window to train on")
    g = np.random.default_rng(0)  # the same split for every seed: --pretrained shares models between seeds
    out = set(g.permutation(len(pieces))[: round(args.holdout * len(pieces))].tolist())
    if len(out) == len(pieces):
        raise UserError(f"--holdout {args.holdout} leaves no trajectory of {len(pieces)} to train on; give less")
    device = rows.device
    s, a = (torch.from_numpy(x).to(device) for x in (raw.s, raw.a))
    x = torch.cat([frames.to_model(s), frames.action_to_model(a)], -1)  # (N, D)
    train = make_windows(x, [p for k, p in enumerate(pieces) if k not in out], args.H).to(device)
    held = make_windows(x, [p for k, p in enumerate(pieces) if k in out], args.H).to(device) if out else None
    held = held[unpadded(held, n)] if held else x.new_zeros(0, args.H, x.shape[1])
    keep = np.ones(len(raw.s), bool) if raw.s_next is not None else np.append(~raw.timeout[:-1], False)
    inside = np.ones(len(raw.s), bool)
    for k in out:
        inside[pieces[k][0] : sum(pieces[k])] = False
    going_on = int((keep & inside & ~raw.terminal).sum())
    if going_on < 20:
        raise UserError(f"{going_on} transitions do not end an episode; expected 20 or more to learn dynamics from")
    return train, held, rows[torch.from_numpy(inside[keep]).to(device)]


def train_regressions(args: Args, agent: Agent, run: Run, rows: Tensor, S: int, A: int, known_successors: bool) -> None:
    """Stages "dynamics" and "reward", each with its hold-out, and the best weights restored at the end [D10]."""
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(rows))).to(rows.device)
    n = min(5000, len(rows) // 5)
    test, train = rows[order[:n]], rows[order[n:]]
    if not known_successors:  # the successor of a terminal row is the next episode's start [D10]
        test_d, train_d = (x[x[:, -1] == 0] for x in (test, train))
    else:
        test_d, train_d = test, train

    def dynamics(rows: Tensor, i=slice(None)):
        s, a, _, s_next, _ = split(rows[i], S, A)
        mean, log_var = agent.ensemble(torch.cat([s, a], -1))  # (E, B, S)
        return mean, log_var, s_next - s

    def mse() -> Tensor:
        mean, _, delta = dynamics(test_d)
        return (mean - delta).square().mean((1, 2))  # (E,)

    def reward(rows: Tensor, i=slice(None)) -> Tensor:  # (10)
        s, a, r, _, _ = split(rows[i], S, A)
        return (agent.reward(torch.cat([s, a], -1)).squeeze(-1) - r).square().mean(-1)  # (1,)

    fits = [
        ("dynamics", args.dynamics_steps, agent.ensemble, agent.ensemble_best, agent.ensemble_opt, agent.ensemble_fit,
         lambda i: ensemble_loss(*dynamics(train_d, i)), mse, len(train_d), args.E),
        ("reward", args.reward_steps, agent.reward, agent.reward_best, agent.reward_opt, agent.reward_fit,
         lambda i: reward(train, i), lambda: reward(test), len(train), 1),
    ]  # fmt: skip
    for name, steps, net, best, opt, fit, loss, error, size, heads in fits:
        update = make_fit_update(args, name, steps, net, best, opt, fit, loss, error, size, heads)
        run.train(name, steps, update)
        with torch.no_grad():
            for x, y in zip(net.parameters(), best.parameters()):
                x.copy_(y)
    agent.ensemble.elites.copy_(agent.ensemble_fit[: args.E].argsort()[: args.elites])


def train_synther(args: Args, agent: Agent, run: Run, rows: Tensor, S: int, A: int):
    """SynthER (Lu et al., 2023): a diffusion model of whole transitions, standardised by column; returns a function
    that generates --synther-rows of them, (n, 2 S + A + 2).  Terminal flags are rounded."""
    mean, std = rows.mean(0), rows.std(0) + 1e-6

    def draw() -> Tensor:
        return SIGMA_DATA * (rows[torch.randint(len(rows), (args.batch_size,), device=rows.device)] - mean) / std

    update = accelerate(make_model_update(args, agent, draw, None, None), args, rows.device)
    run.train("synther", args.model_steps, lambda i: update())

    @torch.no_grad()
    def synthesize() -> Tensor:
        with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
            torch.manual_seed(args.seed)
            sigmas, parts = edm_sigmas(args.N), []
            left = min(args.synther_rows, args.capacity)
            while left > 0:
                n = min(left, 2**16)
                x = torch.randn(n, rows.shape[1], device=rows.device, dtype=torch.float64)

                def denoised(x: Tensor, sigma: float) -> Tensor:
                    return denoise(agent.unet_ema, x.float(), torch.full((len(x),), sigma, device=x.device)).double()

                x = edm_sample(denoised, x, sigmas, churn(sigmas, args.S_churn)).float()
                x = x / SIGMA_DATA * std + mean
                x[:, S : S + A] = x[:, S : S + A].clamp(-1, 1)
                x[:, -1] = (x[:, -1] > 0.5).float()
                parts.append(x)
                left -= n
            return torch.cat(parts)

    return synthesize


def seed_all(seed: int) -> None:
    """Training draws come from torch alone; python and numpy are seeded for whatever a reader adds."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_policy(folder: str | Path, device: str = "auto", env: str | None = None, **settings):
    """The last policy of a run folder: act(s), observations (E, S) on the device -> actions (E, A); the arguments of
    the run, with `settings` (those of --eval-only and more) in their place; the gradient step it stands at."""
    content = load(Path(folder) / "last.pt", env)
    if content["progress"]["stage"] != "train":
        raise UserError(f"{folder} has no policy yet, its main stage has not begun: continue with --resume")
    args = resolve(replace(Args(**content["args"]), device=device, **settings))
    device, (S, A) = pick_device(args), task_sizes(args)
    agent = make_agent(args, S, A, device)
    try:
        restore(agent_state(agent), content)
    except RuntimeError as error:
        sizes = f"observations of {S} numbers and actions of {A}"
        raise UserError(f"{folder}: its data is not of the task, {sizes}; check --env and --eval-env") from error
    return make_act(args, agent, A), args, content["progress"]["step"]


def reevaluate(args: Args) -> None:
    """--eval-only: the trained policy under the sampling settings given here; one row more in reeval.csv."""
    given = {k: getattr(args, k) for k in (*SAMPLING, "final_episodes", "eval_env")}
    given = {k: v for k, v in given.items() if v is not None}
    given |= {k: getattr(args, k) for k in ("run_dir", "graph", "video")}
    act, args, step = load_policy(run_folder(args), args.device, args.env, **given)
    device = pick_device(args)
    returns, lengths = evaluate(act, args, device, args.final_episodes)
    scores = normalized_score(args.env, returns)
    row = {"env": args.env, "seed": args.seed, "step": step}
    row |= {k: getattr(args, k) for k in (*SAMPLING, "eval_env")} | {"episodes": len(returns)}
    row |= {"return": returns.mean(), "return_std": returns.std(), "length": lengths.mean()}
    row |= {"normalized_score": "" if scores is None else scores.mean()}
    row |= {"normalized_score_std": "" if scores is None else scores.std()}
    path = run_folder(args) / "reeval.csv"
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    if args.video:
        record(act, args, device)
    print(summary(args, returns, step))


def parse_args(kind):
    """The command line, by tyro, whose framed messages become one line."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            return tyro.cli(kind, description=__doc__.split("\n\n")[0])
    except SystemExit as stop:
        lines = [line.strip(" │╭╮╰╯─") for line in text.getvalue().splitlines()]
        if stop.code:
            print(f"{METHOD}.py: {' '.join(line for line in lines[1:] if line)}", file=sys.stderr)
        raise
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    try:
        main(parse_args(Args))
    except UserError as error:
        print(f"{METHOD}.py: {error}", file=sys.stderr)
        sys.exit(error.code)
    except OSError as error:  # save() has its own; this is for evaluations, figures and events
        why = f"cannot write {error.filename or 'the run folder'} ({error.strerror})"
        print(f"{METHOD}.py: {why}: make room, then --resume", file=sys.stderr)
        sys.exit(1)
