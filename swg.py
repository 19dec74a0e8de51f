"""SWG: Diffusion Self-Weighted Guidance (Tagle, Ruiz-del-Solar & Tobar, TMLR 2025, arXiv 2505.18345).

The policy sought is the behaviour policy times a weight, pi ~ mu w, with w made from a critic. SWG diffuses the action
together with its weight, z = (a, w): what the model predicts for the clean weight is E[w | z_t], and the gradient of
its logarithm guides the same model. No second network is trained. docs/swg.md states (1)-(10).

    critic    V(s), twin Q(s,a)    expectile regression, one-step backup              value_loss (8), critic_loss (9)
    weights   w(s,a) of Q - V      once, over the whole dataset                       weight, weigh
    model     eps(z_t, t, s)       noise of action and weight together                joint_loss (10)
    act       eps - rho sigma_t grad_z log w_hat(z_t), DDPM; N candidates             sample (6) (7), make_act
The two toys of the paper have no critic: w = exp(beta (E - 1)), the energy E known, and one model for all beta.

Differences from the authors' code, each tagged where it happens (reasons and effects: docs/swg.md):
  [D1] minibatches come from all rows and from --seed, not from 95 % of them and the same for all seeds
  [D2] on CUDA, float32 matrix products may round to TF32
  [D3] bandits: 250 stored draws of the reward noise per action (common.toy_dataset)
  [D4] evaluation: one environment per episode, seeded, all in lock step; during training with the preset's rho
  [D5] D4RL's locomotion is evaluated in gymnasium's -v4 tasks (common.ENV_IDS)
  [D6] antmaze: jumps between rows are cut as time-outs (common.cut_jumps); the task is d4rl_envs.py's
  [D7] rho per dataset was never released: the presets have 10
  [D8] V has no LayerNorm where S <= 4: on raw states it leaves a sphere of S - 2 dimensions
  [D9] weights other than expectile and hard: A in units of its standard deviation; the largest weight scaled to tau
  [D10] the paper's toys: with --size cpu the network reads 6 z, w is in units of its root mean square for each beta,
        its error counts half, log w_hat has a floor; with both sizes EMA at every step, points / 4.5, not their range
Shapes: B batch, S state, A action, T diffusion steps, N candidates, E episodes (in the toys' formulas: the energy).
Run:    python swg.py                          (pendulum, no download, about a minute on a CPU)
        python swg.py --env hopper-medium-v2   (D4RL; the paper's sizes)
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from common import TOYS, UserError, load_dataset, make_env, normalized_score, reward_scale

METHOD, FORMAT = "swg", 1  # FORMAT: of last.pt; raised whenever an older file would not load
BETA_TOYS = ("toy-spiral", "toy-8gaussians")  # the paper's: one model for all beta, which takes the place of the state


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
    """everything is written to <run-dir>/<env>/swg/seed<seed>"""
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
    """steps between two evaluations (preset: 200000, as released)"""
    eval_episodes: int | None = None
    """episodes per evaluation during training (preset: 20, as released)"""
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
    """gradient steps of the diffusion model (1,000,000)"""
    critic_steps: int | None = None
    """gradient steps of V and Q, before it (1,000,000); the toys of the paper have no critic"""
    pretrained: str | None = None
    """run folder whose critic is taken instead of training one: seeds and weights can share it"""
    critic_batch_size: int | None = None
    """transitions per step of the critic (256)"""
    critic_lr: float | None = None
    """Adam, for V and Q (3e-4)"""
    hidden: tuple[int, ...] | None = None
    """widths of the hidden layers of V and Q (256 256)"""
    layer_norm: bool | None = None
    """LayerNorm on the raw state that enters V, as released (default: on where S > 4) [D8]"""
    discount: float = 0.99
    """gamma"""
    tau: float | None = None
    """tau, the expectile of Eq. (8), also h in the weights (0.7; antmaze: 0.9)"""
    polyak: float | None = None
    """averaging rate of the target Q (0.005)"""
    weight: Literal["expectile", "smooth-expectile", "exponential", "linex", "dice", "hard"] = "expectile"
    """w as a function of the advantage; expectile is the paper's default"""
    weight_max: float | None = None
    """the largest weight of the dataset after scaling; default: max(tau, 1 - tau), that of expectile weights"""
    width: int | None = None
    """width of the diffusion model (256)"""
    blocks: int | None = None
    """residual blocks of the diffusion model, of 4 x width; toys: hidden layers (3)"""
    head: Literal["tap", "plain"] = "tap"
    """predicts the weight from its own layers after block 2 (released), or from the last layer with the action"""
    dropout: float | None = None
    """in the residual branches (0.1)"""
    schedule: Literal["vp", "cosine", "linear"] | None = None
    """beta_1 ... beta_T (vp; toys: cosine)"""
    T: int | None = None
    """T, diffusion steps (15; toys: 100)"""
    weight_factor: float | None = None
    """factor of the weight's squared error in Eq. (10) (1; toys: 0.5, released: 2)"""
    unit: Literal["one", "rms"] | None = None
    """toys of the paper: w as it is (released), or in units of its root mean square for each beta [D10]"""
    input_scale: float | None = None
    """toys of the paper: factor of z where the network reads it; 1 learns fine structure slowly (6; released: 1)"""
    batch_size: int | None = None
    """B, transitions per step of the diffusion model (1024)"""
    lr: float | None = None
    """AdamW, for the diffusion model (3e-4)"""
    lr_decay_steps: int | None = None
    """steps after which the cosine of the learning rate reaches 0; 0: --steps (3,000,000: it ends at three quarters)"""
    weight_decay: float | None = None
    """AdamW (1e-4)"""
    clip_norm: float | None = None
    """bound on the norm of the model's gradient; 0: none (0; toys: 3, the released 1 on a mean over 3 coordinates)"""
    ema: float | None = None
    """rate of the average of the model's weights; the average acts (0.001)"""
    rho: float | None = None
    """rho, guidance scale: 1 is exact, 0 the behaviour policy [D7] (preset: 10, ours; released sweep: 1 to 30)"""
    kappa: float | None = None
    """kappa, temperature: factor of all noise when acting; 0 is deterministic (0; toys: 1)"""
    N: int | None = None
    """N, candidates per state when acting: 1 is SWG, more is SWG-R and needs kappa > 0 (1)"""
    select: Literal["q", "weight"] | None = None
    """SWG-R takes the candidate with the largest min target Q, or with the largest generated weight (q)"""
    beta: float | None = None
    """toys of the paper: beta of the policy that is evaluated, w = exp(beta (E - 1)); trained for 0 to 24 (5)"""
    factor: Literal["released", "exact"] | None = None
    """w_hat is divided by sqrt(alpha_t), as released, or by sqrt(alpha_bar_t), Eq. (6): it only moves the clip"""
    log: Literal["clip", "floor", "free"] | None = None
    """log w_hat: clip = flat outside [w_min, w_max] (released); floor = slope 1 / max(w_hat, w_min) (toys); free"""
    reverse: Literal["iterate", "x0"] | None = None
    """noise of variance beta_t and a clip of the noisy iterate, or the posterior's and a clip of z_0 (toys)"""
    w_min: float | None = None
    """lower end of the clips of the weight (1e-4)"""
    w_max: float | None = None
    """upper end (1)"""
    size: Literal["cpu", "paper"] = "cpu"
    """toys of the paper: ours, three minutes on a CPU core, or the released sizes and rates"""
    reward_scale: Literal["range", "none"] | None = None
    """r <- 1000 r / (max return - min return) (locomotion), or as stored"""
    reward_shift: float | None = None
    """added to every stored reward, before the scale (antmaze: -1)"""


SAMPLING = ("rho", "kappa", "N", "select", "beta", "factor", "log", "reverse", "w_min", "w_max")  # of --eval-only
PAPER = dict(
    steps=1_000_000, critic_steps=1_000_000, critic_batch_size=256, critic_lr=3e-4, hidden=(256, 256), tau=0.7,
    polyak=0.005, width=256, blocks=3, dropout=0.1, schedule="vp", T=15, weight_factor=1.0, batch_size=1024,
    lr=3e-4, lr_decay_steps=3_000_000, weight_decay=1e-4, clip_norm=0.0, ema=0.001, unit="one", input_scale=1.0,
    rho=10.0, kappa=0.0, N=1, select="q", beta=5.0, factor="released", log="clip", reverse="iterate", w_min=1e-4,
    w_max=1.0, reward_scale="none", reward_shift=0.0, log_every=1000, eval_every=200_000, eval_episodes=20,
    final_episodes=100, save_every=50_000,
)  # [D7] rho is ours; critic_steps is what the released evaluation loads (its training configuration says 500,000)
_LOCOMOTION = dict(reward_scale="range")
_ANTMAZE = dict(tau=0.9, reward_shift=-1.0)
_BANDIT = dict(  # ours
    steps=8000, critic_steps=4000, critic_lr=1e-3, hidden=(64, 64), polyak=0.02, width=64, blocks=2, dropout=0.0,
    batch_size=512, lr=2e-3, lr_decay_steps=0, ema=0.005, rho=1.0, kappa=1.0, log_every=200,
    eval_every=4000, eval_episodes=1000, final_episodes=2000, save_every=4000)
_TOY = dict(  # ours; with --size paper the released sizes
    steps=16_000, width=192, blocks=4, schedule="cosine", T=100, weight_factor=0.5, lr=1.5e-3, lr_decay_steps=0,
    weight_decay=0.01, clip_norm=3.0, ema=0.005, unit="rms", input_scale=6.0, rho=1.0, kappa=1.0, log="floor",
    reverse="x0", log_every=200, eval_every=8000, eval_episodes=1000, final_episodes=2000, save_every=4000)
TOY_PAPER = dict(steps=200_000, width=512, blocks=6, weight_factor=2.0, lr=2e-5, lr_decay_steps=10**12, ema=0.0005,
                 unit="one", input_scale=1.0, log="free", eval_every=20_000, save_every=20_000, log_every=1000)
PRESETS = {  # what differs from PAPER: docs/swg.md says where each value comes from
    **{f"{task}-{kind}-v2": _LOCOMOTION for task in ("halfcheetah", "hopper", "walker2d")
       for kind in ("medium", "medium-replay", "medium-expert")},
    **{f"antmaze-{maze}-v0": _ANTMAZE for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse",
                                                   "large-play", "large-diverse")},
    **{f"kitchen-{kind}-v0": dict() for kind in ("complete", "partial", "mixed")},
    **{f"{task}-{kind}-v0": dict() for task in ("pen", "hammer", "door", "relocate") for kind in ("human", "cloned")},
    "pendulum-demo": dict(  # ours, sized for a minute on a CPU
        steps=8000, critic_steps=10_000, critic_lr=1e-3, hidden=(64, 64), polyak=0.02, width=64, blocks=2,
        batch_size=256, lr=1e-3, lr_decay_steps=0, ema=0.005, reward_scale="range", log_every=200,
        eval_every=2000, eval_episodes=10, final_episodes=20, save_every=2000),
    "hopper-demo": dict(  # ours, sized for minutes on a CPU
        steps=30_000, critic_steps=30_000, critic_lr=1e-3, hidden=(128, 128), polyak=0.02, width=128, batch_size=256,
        lr=1e-3, lr_decay_steps=0, ema=0.005, rho=1.0, reward_scale="range", eval_every=10_000, save_every=5000),
    **{toy: _TOY if toy in BETA_TOYS else _BANDIT for toy in TOYS},
}


def resolve(args: Args) -> Args:
    """Fills what the command line left at None from PRESETS, else PAPER, and refuses nonsense."""
    preset = PAPER | PRESETS.get(args.env, {}) | (TOY_PAPER if args.size == "paper" else {})
    args = replace(args, **{k: v for k, v in preset.items() if getattr(args, k) is None})
    if args.weight_max is None:
        args = replace(args, weight_max=max(args.tau, 1 - args.tau))
    positive = "critic_steps critic_batch_size critic_lr width T weight_factor lr N w_min input_scale"
    toy = args.env in BETA_TOYS
    least = 2 if args.head == "tap" and not toy else 1
    rules = [
        ("tau", "in (0, 1)", 0 < args.tau < 1),
        ("ema", "in (0, 1]", 0 < args.ema <= 1),
        ("dropout", "in [0, 1)", 0 <= args.dropout < 1),
        ("weight_max", "in (0, 1]", 0 < args.weight_max <= 1),
        ("w_max", "above --w-min", args.w_min < args.w_max < math.inf),
        ("blocks", f">= {least} with --head {args.head}", args.blocks >= least),
        ("beta", "in [0, 24], where the toys' model is trained", not toy or args.beta <= 24),
        ("lr_decay_steps", "0, or >= --steps", args.lr_decay_steps == 0 or args.lr_decay_steps >= args.steps),
        ("reward_shift", "a finite number", math.isfinite(args.reward_shift)),
    ]
    refuse(args, positive, "rho kappa beta weight_decay clip_norm", rules)
    if args.size == "paper" and not toy:
        raise UserError(f"--size paper is for {' and '.join(BETA_TOYS)}; every D4RL name has the released sizes anyway")
    if toy and args.pretrained:
        raise UserError(f"--pretrained shares a critic, and {args.env} has none; leave it out")
    if args.N > 1 and args.kappa == 0:
        raise UserError(f"--N {args.N} with --kappa 0 draws {args.N} times the same candidate; give --kappa 1")
    if toy and args.N > 1 and args.select == "q":
        raise UserError(f"--N {args.N} selects by Q, and {args.env} has no critic; give --select weight")
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
def dense(i: int, o: int) -> nn.Linear:
    """Weights Xavier-uniform, biases 0."""
    layer = nn.Linear(i, o)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Heads(nn.Module):
    """H independent MLPs with ReLU, one batched product per layer.  (B, width) -> (H, B)"""

    def __init__(self, width: int, hidden: tuple[int, ...], H: int):
        super().__init__()
        sizes = (width, *hidden, 1)
        self.weights = nn.ParameterList(torch.empty(H, i, o) for i, o in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(H, 1, o) for o in sizes[1:])
        for w in (w for stack in self.weights for w in stack):
            nn.init.xavier_uniform_(w)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, (w_out, b_out) = zip(self.weights, self.biases)
        x = x.expand(len(w_out), -1, -1)  # (H, B, width)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w).relu_()  # (H, B, width)
        return torch.baddbmm(b_out, x, w_out).squeeze(-1)  # (H, B)


class ValueNet(nn.Sequential):
    """V(s): LayerNorm on the raw state alone, layers with ReLU.  (B, S) -> (B,)"""

    def __init__(self, S: int, hidden: tuple[int, ...], layer_norm: bool):
        layers = [layer for i, o in pairwise((S, *hidden)) for layer in (dense(i, o), nn.ReLU())]
        super().__init__(*([nn.LayerNorm(S, eps=1e-6)] if layer_norm else []), *layers, dense(hidden[-1], 1))

    def forward(self, s: Tensor) -> Tensor:
        return super().forward(s).squeeze(-1)


class Block(nn.Module):
    """x + Dense(SiLU(Dense(LN(Dropout(x))))), four times as wide inside."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.up, self.down):  # LeCun-normal: cut at two standard deviations, then rescaled
            std = layer.in_features**-0.5 / 0.87962566
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(self.dropout(x)))))


class JointNet(nn.Module):
    """eps_theta(z_t, t, s), the noise of action and weight: (B, A) and (B,).  z (B, A + 1), s (B, S), e = embed(t).

    The weight's noise comes from its own two layers after block 2 (head="tap"), else from the last layer.  It leaves
    the net on its own: its gradient then need not pass what lies behind the tap."""

    def __init__(self, S: int, A: int, width: int, blocks: int, head: str, dropout: float):
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(64))
        self.time = nn.Sequential(dense(128, width), nn.SiLU(), dense(width, width))
        self.trunk = dense(A + 1 + S + width, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        tapped = head == "tap"
        self.action = dense(width, A if tapped else A + 1)
        self.weight = nn.Sequential(dense(width, width), nn.SiLU(), dense(width, 1)) if tapped else None

    def embed(self, t: Tensor) -> Tensor:
        """(n,) of 1..T -> (n, width)"""
        u = 2 * math.pi * (t - 1)[:, None] * self.frequencies  # (n, 64); the released code counts from 0
        return self.time(torch.cat([u.cos(), u.sin()], -1))

    def forward(self, z: Tensor, s: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(torch.cat([z, s, e.expand(len(z), -1)], -1))  # (B, width)
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k == 1:
                tap = x
        eps = self.action(F.silu(x))  # (B, A) or (B, A + 1)
        if self.weight is None:
            return eps[:, :-1], eps[:, -1]
        return eps, self.weight(tap).squeeze(-1)


class ToyNet(nn.Module):
    """eps_theta(z_t, t, beta) of the paper's toys, an MLP: (B, 2) and (B,).  z (B, 3), beta (B, 1), e = embed(t)."""

    def __init__(self, width: int, depth: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale  # [D10]
        self.register_buffer("frequencies", torch.exp(-torch.arange(16) * math.log(10_000) / 15))
        self.time, self.beta = (nn.Sequential(nn.Linear(32, 128), nn.Mish(), nn.Linear(128, 32)) for _ in range(2))
        layers = [layer for i, o in pairwise((67, *[width] * depth)) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 3))

    def embed(self, t: Tensor) -> Tensor:
        """(n,) of 1..T -> (n, 32)"""
        return self.time(self.waves((t - 1)[:, None]))

    def waves(self, x: Tensor) -> Tensor:
        u = x * self.frequencies  # (n, 16)
        return torch.cat([u.sin(), u.cos()], -1)

    def forward(self, z: Tensor, beta: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        e = e.expand(len(z), -1)  # (B, 32)
        eps = self.layers(torch.cat([self.scale * z, e, self.beta(self.waves(beta))], -1))  # (B, 3)
        return eps[:, :-1], eps[:, -1]


# --- losses: pure functions, all randomness is an argument ------------------------------------------------
def value_loss(q: Tensor, v: Tensor, tau: float) -> Tensor:
    """Eq. (8):  mean |tau - 1{u <= 0}| u^2,  u = Q - V.   q, v (B,)"""
    u = q - v
    return (torch.where(u > 0, tau, 1 - tau) * u.square()).mean()


def critic_target(r: Tensor, terminal: Tensor, v_next: Tensor, discount: float) -> Tensor:
    """y = r + gamma (1 - terminal) V(s'),  the target of Eq. (9)"""
    return r + discount * (1 - terminal) * v_next


def critic_loss(q: Tensor, y: Tensor) -> Tensor:
    """Eq. (9):  mean over heads and batch of (Q_h(s, a) - y)^2, one target for all heads.   q (2, B), y (B,)"""
    return (q - y).square().mean()


def weight(A: Tensor, kind: str, h: float) -> Tensor:
    """w(s, a) of the advantage A = Q - V.  General form (IDQL): V fitted with a convex loss f, w = |f'(A)| / |A|."""
    if kind == "expectile":  # w of Eq. (8)
        return torch.where(A > 0, h, 1 - h)
    if kind == "smooth-expectile":
        q = torch.sigmoid(3 * A)
        return q * h + (1 - q) * (1 - h)
    if kind == "exponential":
        return (3 * A).exp().clamp(1e-3, 80)
    if kind == "linex":  # h |e^(h A) - 1| / |A|, whose limit at A = 0 is h^2
        return torch.where(A == 0, h * h, h * torch.expm1(h * A) / torch.where(A == 0, 1, A))
    if kind == "dice":  # the ratio of a chi-square divergence, piecewise
        x = A / 0.6
        return torch.where(x >= 0, x / 2 + 1, x.clamp(max=0).exp()).clamp(1e-40, 100)
    return (A >= -0.01).to(A.dtype)  # hard


def joint_loss(eps_a: Tensor, eps_w: Tensor, eps: Tensor, weight_factor: float) -> tuple[Tensor, Tensor]:
    """Eq. (10):  mean_B sum_k (eps_theta(z_t, t, s)_k - eps_k)^2, the weight's times weight_factor.
    eps_a (B, A), eps_w (B,), eps (B, A + 1).   Returns its two parts: action, weight."""
    e_a, e_w = (eps_a - eps[:, :-1]).square(), (eps_w - eps[:, -1]).square()
    return e_a.sum(-1).mean(), weight_factor * e_w.mean()


# --- sampler ----------------------------------------------------------------------------------------------
def guide(w: Tensor, rule: str, low: float, high: float) -> Tensor:
    """Something whose gradient is that of log w: clip = 0 outside of [low, high] (released, D4RL); free = 1 / w for any
    sign of w (released, toys); floor = 1 / max(w, low) [D10]."""
    if rule == "clip":
        return w.clamp(low, high).log()
    return w / (w if rule == "free" else w.clamp(min=low)).detach()


def sample(net, s: Tensor, z: Tensor, noise: Tensor, sched, args) -> Tensor:
    """Reverse chain t = T..1 with the noise of Eq. (7), whose gradient goes through the network, to all of z_t:
    eps~ = eps - rho sigma_t grad_z log w_hat,  w_hat = (z^w - sigma_t eps^w) / sqrt(alpha_t) as
    released, / sqrt(alpha_bar_t) if exact.
    s (B, S);  z (B, A + 1) start and noise (T + 1, B, A + 1), both ~ N(0, I), row t the noise of step t (0, 1 unused);
    sched: its numbers are constants here.   Returns (B, A + 1), action and weight."""
    w_low, A = args.w_min if args.reverse == "iterate" else 0.0, z.shape[-1] - 1
    low = torch.cat([z.new_full((A,), -1.0), z.new_full((1,), w_low)])  # (A + 1,)
    high = torch.cat([z.new_full((A,), 1.0), z.new_full((1,), args.w_max)])
    beta, alpha, alpha_bar = sched.floats
    e = net.embed(torch.arange(sched.T + 1, device=z.device, dtype=z.dtype)).split(1)  # row t for step t
    z = args.kappa * z
    for t in range(sched.T, 0, -1):
        ab, ab_prev, sigma = alpha_bar[t], alpha_bar[t - 1], (1 - alpha_bar[t]) ** 0.5
        with torch.set_grad_enabled(args.rho > 0):
            z_t = z.detach().requires_grad_(args.rho > 0)
            eps_a, eps_w = net(z_t, s, e[t])  # (B, A), (B,)
            w = (z_t[:, -1] - sigma * eps_w) / (alpha[t] if args.factor == "released" else ab) ** 0.5  # (6)
            log_w = guide(w, args.log, args.w_min, args.w_max).sum()
        eps = torch.cat([eps_a.detach(), eps_w.detach()[:, None]], -1)  # (B, A + 1)
        if args.rho > 0:
            eps = eps - args.rho * sigma * torch.autograd.grad(log_w, z_t)[0]  # (7)
        if args.reverse == "iterate":  # the released code for D4RL clips the noisy iterate
            z = (z - beta[t] / sigma * eps) / alpha[t] ** 0.5
            std = beta[t] ** 0.5
        else:  # and for the toys the clean prediction
            z_0 = ((z - sigma * eps) / ab**0.5).clamp(low, high)
            z = (ab_prev**0.5 * beta[t] * z_0 + alpha[t] ** 0.5 * (1 - ab_prev) * z) / (1 - ab)
            std = (beta[t] * (1 - ab_prev) / (1 - ab)) ** 0.5
        if t > 1:
            z = z + args.kappa * std * noise[t]
        if args.reverse == "iterate":
            z = z.clamp(low, high)
    return z


def weight_unit(args: Args, beta: float) -> float:
    """What w = exp(beta (E - 1)) of a toy is divided by [D10]; the exact law at rho = 1 is the same for every unit."""
    if args.unit == "one":
        return 1.0
    E = common.toy_dataset(args.env).r
    return float((2 * beta * (E - 1)).exp().mean().sqrt())


def toy_settings(args: Args, beta: float) -> Args:
    """What a toy of the paper is sampled with.  beta = 0 as released: not guided, the network conditioned on beta = 3,
    where weights still tell positions apart."""
    rho, beta = (args.rho, beta) if beta else (0.0, 3.0)
    return replace(args, beta=beta, rho=rho, w_max=args.w_max / weight_unit(args, beta))


def select(a: Tensor, q: Tensor, n: int, temperature: float = 0.0) -> Tensor:
    """Of n actions per state the one of the largest q, or one drawn with probability softmax(q / temperature).
    a (E n, A), q (E n,) -> (E, A)"""
    a, q = a.view(-1, n, a.shape[-1]), q.view(-1, n)
    k = (q / temperature).softmax(-1).multinomial(1).squeeze(1) if temperature > 0 else q.argmax(-1)  # (E,)
    return a[torch.arange(len(a), device=a.device), k]


def make_act(args: Args, agent: Agent, A: int):
    """act(s): N guided candidates of the averaged model; SWG-R takes the best by Q or by weight.  (E, S) -> (E, A)"""
    net, sched = agent.net_ema.eval(), make_schedule(args)
    if args.env in BETA_TOYS:
        args = toy_settings(args, args.beta)
    chain = per_size(lambda s, z, noise: sample(net, s, z, noise, sched, args), args)

    @torch.no_grad()
    def act(s: Tensor) -> Tensor:
        if args.env in BETA_TOYS:
            s = torch.full_like(s, args.beta)
        s_n = s.repeat_interleave(args.N, 0)  # (E N, S)
        n, device = len(s_n), s.device
        z, noise = torch.randn(n, A + 1, device=device), torch.randn(sched.T + 1, n, A + 1, device=device)
        z = chain(s_n, z, noise)  # (E N, A + 1)
        a, w = z[:, :-1], z[:, -1]
        return a if args.N == 1 else select(a, agent.judge(s_n, a) if args.select == "q" else w, args.N)

    return act


# --- one gradient step: eager = compiled = graphed --------------------------------------------------------
@dataclass
class Agent:
    """Everything that learning changes. `step` counts on the device, for the learning rate.  No critic: BETA_TOYS."""

    value: ValueNet | None
    q: Heads | None
    q_target: Heads | None
    net: nn.Module
    net_ema: nn.Module
    value_opt: torch.optim.Optimizer | None
    q_opt: torch.optim.Optimizer | None
    opt: torch.optim.Optimizer
    step: Tensor

    def judge(self, s: Tensor, a: Tensor) -> Tensor:
        """min_j Qbar_j(s, a).   (B, S), (B, A) -> (B,)"""
        return self.q_target(torch.cat([s, a], -1)).amin(0)


def make_schedule(args: Args):
    makers = {"vp": common.vp_schedule, "cosine": common.cosine_schedule, "linear": common.linear_schedule}
    return makers[args.schedule](args.T)


def make_agent(args: Args, S: int, A: int, device: torch.device) -> Agent:
    value = q = q_target = value_opt = q_opt = None
    if args.env in BETA_TOYS:
        net = ToyNet(args.width, args.blocks, args.input_scale).to(device)
    else:
        value = ValueNet(S, args.hidden, args.layer_norm).to(device)
        q = Heads(S + A, args.hidden, 2).to(device)
        q_target = deepcopy(q).requires_grad_(False)
        value_opt, q_opt = (adam(x.parameters(), args.critic_lr) for x in (value, q))
        net = JointNet(S, A, args.width, args.blocks, args.head, args.dropout).to(device)
    return Agent(
        value=value, q=q, q_target=q_target, net=net, net_ema=deepcopy(net).requires_grad_(False), value_opt=value_opt,
        q_opt=q_opt,
        opt=adam(net.parameters(), args.lr, torch.optim.AdamW, weight_decay=args.weight_decay),
        step=torch.zeros((), device=device, dtype=torch.float64),
    )  # fmt: skip


def adam(params, lr: float, kind=torch.optim.Adam, **options) -> torch.optim.Optimizer:
    """Its learning rate is a tensor: an update changes it in place, also inside a graph."""
    params = list(params)
    device = (params[0]["params"][0] if isinstance(params[0], dict) else params[0]).device
    lr = torch.tensor(lr, device=device)
    return kind(params, lr, fused=True, capturable=device.type == "cuda", **options)


def anneal(opt: torch.optim.Optimizer, lr: float, done: Tensor, lr_end: float = 0.0) -> None:
    """The learning rate goes from lr to lr_end lr by a cosine; done (0-d, 0..1) is the share of the stage."""
    opt.param_groups[0]["lr"].copy_(lr * (lr_end + (1 - lr_end) * 0.5 * (1 + torch.cos(math.pi * done))))


def descend(loss: Tensor, opt: torch.optim.Optimizer, clip_norm: float = 0.0) -> Tensor | None:
    """One step.  clip_norm bounds the norm of the whole gradient; returned is the norm before that."""
    opt.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], clip_norm) if clip_norm else None
    opt.step()
    return norm


def make_critic_update(args: Args, agent: Agent, data):
    """First stage (Algorithm 3): update() is one step of V, Q and target, in this order, on one minibatch; draws on
    the device and returns 0-d tensors."""
    value, q, q_target, B, device = agent.value, agent.q, agent.q_target, args.critic_batch_size, data.a.device

    def update() -> dict[str, Tensor]:
        i = torch.randint(len(data), (B,), device=device)  # [D1]
        s, a, r, s_next, terminal = data.s[i], data.a[i], data.r[i], data.s_next[i], data.terminal[i]
        s_a = torch.cat([s, a], -1)

        # --- V: Eq. (8) ---
        with torch.no_grad():
            q_bar = q_target(s_a).amin(0)  # (B,)
        v = value(s)
        loss_v = value_loss(q_bar, v, args.tau)
        descend(loss_v, agent.value_opt)

        # --- Q: Eq. (9), with the V just updated ---
        with torch.no_grad():
            y = critic_target(r, terminal, value(s_next), args.discount)
        q_a = q(s_a)  # (2, B)
        loss_q = critic_loss(q_a, y)
        descend(loss_q, agent.q_opt)
        average(q_target, q, args.polyak)
        losses = {"value": loss_v, "critic": loss_q, "v_mean": v.mean(), "q_mean": q_a.mean()}
        losses["advantage_std"] = (q_bar - v).std()
        lr = agent.q_opt.param_groups[0]["lr"].clone()
        return {f"losses/{k}": x.detach() for k, x in losses.items()} | {"charts/lr": lr}

    return update


@torch.no_grad()
def weigh(args: Args, agent: Agent, data) -> Tensor:
    """Second stage: w of every row of the dataset, with the target Q and V as they are now; no randomness.   (rows,)"""
    pairs = zip(data.s.split(2**16), data.a.split(2**16))
    A = torch.cat([agent.judge(s, a) - agent.value(s) for s, a in pairs])
    share = (A > 0).float().mean()
    if args.weight not in ("expectile", "hard"):  # [D9] these two ask for the sign of A (nearly) alone
        A = A / A.std()
    w = weight(A, args.weight, args.tau)
    w = w * (args.weight_max / w.max().clamp(min=1e-9))  # [D9] expectile with weight_max = tau: unchanged
    below = 100 * (w < args.w_min).float().mean()
    text = f"mean {w.mean():.3f}, {w.min():.2g} to {w.max():.2g}, {below:.1f} % below w_min"
    print(f"weights ({args.weight}): {text}; A > 0 in {100 * share:.1f} % of {len(w)} rows")
    return w


def make_update(args: Args, agent: Agent, data, w: Tensor | None):
    """Main stage (Algorithm 1): update() is one step of the joint model of z = (a, w).  w: of `weigh`; None for the
    paper's toys, whose w = exp(beta (E - 1)) is made here for beta ~ U{0..24}, beta in the place of the state."""
    net, device, B, T = agent.net, data.a.device, args.batch_size, args.T
    alpha_bar = make_schedule(args).alpha_bar.to(device)
    z_all = data.a if w is None else torch.cat([data.a, w[:, None]], -1)  # (rows, A + 1)
    units = None if w is not None else torch.tensor([weight_unit(args, b) for b in range(25)], device=device)

    def update() -> dict[str, Tensor]:
        i = torch.randint(len(data), (B,), device=device)  # [D1]
        z_0, s = z_all[i], data.s[i]
        if w is None:
            b = torch.randint(25, (B, 1), device=device)
            s, E = b.float(), data.r[i, None]  # (B, 1)
            z_0 = torch.cat([z_0, (s * (E - 1)).exp() / units[b]], -1)  # (B, 3)
        t, eps = torch.randint(1, T + 1, (B,), device=device), torch.randn_like(z_0)
        ab = alpha_bar[t][:, None]  # (B, 1)
        z_t = ab.sqrt() * z_0 + (1 - ab).sqrt() * eps  # (3)
        loss_a, loss_w = joint_loss(*net(z_t, s, net.embed(t.float())), eps, args.weight_factor)

        anneal(agent.opt, args.lr, agent.step / (args.lr_decay_steps or args.steps))
        norm = descend(loss_a + loss_w, agent.opt, args.clip_norm)
        average(agent.net_ema, net, args.ema)  # [D10] at every step, from the first
        agent.step += 1
        losses = {"action": loss_a, "weight": loss_w} | ({"gradient_norm": norm} if args.clip_norm else {})
        lr = agent.opt.param_groups[0]["lr"].clone()
        return {f"losses/{k}": x.detach() for k, x in losses.items()} | {"charts/lr": lr}

    return update


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


def exact_samples(args: Args, scaled, n: int, seed: int) -> Tensor:
    """(n, 2) of pi* ~ w p_data on a bandit: Q is the scaled mean reward, V its tau-expectile, found by bisection."""
    toy, data = TOYS[args.env], common.toy_dataset(args.env)
    r = toy.reward(data.a[: toy.rows]) if toy.noise else data.r  # without the noise
    r = scaled(r).double()
    low, high = float(r.min()), float(r.max())
    for _ in range(60):
        v = (low + high) / 2
        u = r - v
        low, high = (v, high) if (torch.where(u > 0, args.tau, 1 - args.tau) * u).mean() > 0 else (low, v)
    std = 1.0 if args.weight in ("expectile", "hard") else float((r - v).std())
    return common.reweighted_samples(args.env, n, lambda r: weight((scaled(r) - v) / std, args.weight, args.tau), seed)


def main(args: Args) -> None:
    if args.eval_only:
        return reevaluate(args)
    args = resolve(args)
    device = pick_device(args)
    seed_all(args.seed)

    task = task_sizes(args)
    if args.layer_norm is None:  # [D8]
        args = replace(args, layer_norm=task[0] > 4)
    data = load_dataset(args.env, args.data_path, args.data_url).to(device)
    S, A = data.s.shape[1], data.a.shape[1]
    check_task(task, S, A)
    returns = data.returns().cpu().numpy()  # as stored
    factor = reward_scale(data) if args.reward_scale == "range" else 1.0

    def scaled(r: Tensor) -> Tensor:
        return factor * (r + args.reward_shift)

    if args.env not in BETA_TOYS:  # theirs is E itself
        data.r = scaled(data.r)  # not in place: common.py keeps a toy's tensors
        data.a = data.a.clamp(-1 + 1e-5, 1 - 1e-5)  # as released

    agent = make_agent(args, S, A, device)
    critic = {"value": agent.value, "q": agent.q, "q_target": agent.q_target}
    settings = "hidden layer_norm tau discount reward_scale reward_shift"
    taken = borrow(args, critic, ["critic"], settings)  # before the run's folder is touched
    run = Run(args, agent_state(agent), device)
    run.progress["done"] += taken
    announce(args, data, returns, device)

    w = None
    if args.env not in BETA_TOYS:
        update_critic = accelerate(make_critic_update(args, agent, data), args, device)
        run.train("critic", args.critic_steps, lambda i: update_critic())
        w = weigh(args, agent, data)
    update = accelerate(make_update(args, agent, data, w), args, device)
    act = make_act(args, agent, A)
    run.train("train", args.steps, lambda i: update(), act)

    if args.env in BETA_TOYS:
        beta_figure(args, agent, run.folder / "samples.png", device)
    elif args.env in TOYS:
        toy_figure(args, agent, data, run.folder, act, scaled)
    run.finish(returns, act)


@torch.no_grad()
def toy_figure(args: Args, agent: Agent, data, folder: Path, act, scaled) -> None:
    """samples.png of a bandit, and how far samples of the exact case (rho 1, kappa 1, N 1) are from exact ones."""
    s = torch.zeros(4000, 1, device=data.a.device)
    guided = make_act(replace(args, rho=1.0, kappa=1.0, N=1), agent, 2)(s).cpu()
    exact, floor = exact_samples(args, scaled, len(s), 1), exact_samples(args, scaled, len(s), 2)
    distance, least = common.energy_distance(guided, exact), common.energy_distance(floor, exact)
    note = f"distance to exact: {distance:.4f} at rho 1, kappa 1, N 1"
    print(f"energy {note}; between two exact sample sets {least:.4f}")

    def value(a: Tensor) -> Tensor:
        return agent.judge(s[:1].expand(len(a), -1), a)

    plot_toy(folder / "samples.png", args.env, data, value, act(s[:2000]), note)


@torch.no_grad()
def beta_figure(args: Args, agent: Agent, path: Path, device: torch.device, betas=(0, 1, 5, 10, 15)) -> list[dict]:
    """samples.png of the paper's toys (Figs. 2 and 3): per beta 2,000 samples of the model, coloured by the energy
    E = log(w) / beta + 1 of the weight that they came with, above as many exact ones.  Returns and prints, per beta:
    energy distance to exact samples and between two exact sets, mean E by position of both."""
    import matplotlib.pyplot as plt

    toy, sched, rows, n = TOYS[args.env], make_schedule(args), [], 2000
    size = (2.6 * len(betas), 5.2)
    fig, axes = plt.subplots(2, len(betas), figsize=size, layout="constrained", sharex=True, sharey=True)
    for (above, below), beta in zip(axes.T, betas):
        settings = toy_settings(args, beta)
        s = torch.full((n, 1), float(settings.beta), device=device)
        z, noise = torch.randn(n, 3, device=device), torch.randn(sched.T + 1, n, 3, device=device)
        z = sample(agent.net_ema.eval(), s, z, noise, sched, settings).cpu()
        a, w = z[:, :2], z[:, 2] * weight_unit(args, settings.beta)
        exact, floor = (common.tilted_samples(args.env, n, beta, seed) for seed in (1, 2))
        row = {"env": args.env, "beta": beta, "distance": common.energy_distance(a, exact)}
        row |= {"floor": common.energy_distance(floor, exact), "E": float(toy.reward(a).mean())}
        rows.append(row | {"E_exact": float(toy.reward(exact).mean())})
        colour = w.clamp(min=1e-6).log() / (beta + 1e-6) + 1 if beta else torch.zeros(n)
        dots = dict(s=1, cmap="winter", vmin=0, vmax=1)
        above.scatter(*(toy.scale * a.T), c=colour, **dots)
        image = below.scatter(*(toy.scale * exact.T), c=toy.reward(exact) if beta else torch.zeros(n), **dots)
        above.set_title(f"beta = {beta}\ndistance {row['distance']:.4f}, floor {row['floor']:.4f}", fontsize=8)
        print(" ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    axes[0, 0].set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), ylabel=METHOD)
    axes[1, 0].set_ylabel("exact")
    fig.colorbar(image, ax=axes, label="E (above: from the generated weight)", shrink=0.7)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return rows


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
