"""Diffusion-DICE: in-sample diffusion guidance (Mao et al., NeurIPS 2024, arXiv 2407.20109).

Offline RL as a divergence-regularised problem over stationary distributions. Its dual gives the ratio w = d*/d_D at
dataset actions, so the optimal policy is the behaviour policy reweighted, pi* ~ w pi_D. A scalar network learns
log E[w | noisy action] from dataset actions alone, and its gradient guides a diffusion model of the behaviour (guide);
of K guided candidates the critic takes one (select). docs/diffusion_dice.md states (1)-(8).

    score     out(a_t, t, s) / sigma_t  || sigma_t score + eps ||^2                       score_loss
    V         V(s)        E[ c V(s) + alpha f*((Q - V) / alpha) ]                          value_loss (3a)
    Q         twin Q(s,a) E[ (r + gamma (1 - terminal) V(s') - Q)^2 ]                      critic_loss (3b)
    w         ratio       (f')^{-1}((Q - V) / alpha)                                       ratio (4), (7)
    guidance  g(a_t,t,s)  E[ w e^{-g} + g ],  at its minimum g = log E[w | a_t, s]         igl_loss (6)
    act       score + kappa grad g, K candidates, argmax (or softmax) of Q                 sample (5), make_act (8)

Differences from the authors' code, each tagged where it happens (reasons and effects: docs/diffusion_dice.md):
  [D1] minibatches are drawn with replacement, not by shuffled passes
  [D2] on CUDA, float32 matrix products may round to TF32
  [D3] bandits: 250 stored draws of the reward noise per action (common.toy_dataset)
  [D4] evaluation: one environment per episode, seeded, all in lock step
  [D5] D4RL's locomotion is evaluated in gymnasium's -v4 tasks (common.ENV_IDS)
  [D6] antmaze: jumps between rows are cut as time-outs (common.cut_jumps); the task is d4rl_envs.py's
  [D7] alpha and K per dataset were never released: the presets have our choice
Shapes: B batch, S state, A action, H ensemble heads, M noise draws per action, K candidates, E episodes.
Run:    python diffusion_dice.py                          (pendulum, no download, minutes on a CPU)
        python diffusion_dice.py --env hopper-medium-v2   (D4RL; the paper's sizes)
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
from common import TOYS, VPSDE, UserError, load_dataset, make_env, normalized_score, reward_scale

METHOD, FORMAT = "diffusion_dice", 1  # FORMAT: of last.pt; raised whenever an older file would not load


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
    """everything is written to <run-dir>/<env>/diffusion_dice/seed<seed>"""
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
    """steps between two evaluations (preset: 40000, as released)"""
    eval_episodes: int | None = None
    """episodes per evaluation during training (preset: 10; antmaze: 50)"""
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
    """gradient steps of the main stage: V, Q, ensemble and guidance together (paper: 1,000,000)"""
    behavior_steps: int | None = None
    """gradient steps of the first stage, the behaviour score model (released code: 600,000)"""
    pretrained: str | None = None
    """run folder whose behaviour model is taken instead of training one: seeds can share it"""
    behavior_batch_size: int | None = None
    """transitions per step of the first stage (4096)"""
    behavior_lr: float | None = None
    """Adam (1e-4)"""
    behavior_hidden: tuple[int, int, int] | None = None
    """widths of the score model's three levels (512 256 128)"""
    batch_size: int | None = None
    """B, transitions per step of the main stage (512)"""
    discount: float = 0.99
    """gamma"""
    hidden: tuple[int, ...] | None = None
    """widths of the hidden layers of V, Q and ensemble (256 256)"""
    guidance_hidden: tuple[int, ...] | None = None
    """widths of the hidden layers of g (256 256 256 256)"""
    guidance_activation: Literal["silu", "relu"] | None = None
    """of g (silu; toys: relu, with silu it stays flat there for many thousand steps)"""
    time_scale: float | None = None
    """standard deviation of the random time frequencies (30; toys: 1, they need it for the same reason)"""
    alpha: float | None = None
    """alpha, weight of the divergence, in units of the scaled reward: small alpha sharpens w (presets: ours)"""
    f: Literal["piecewise", "reverse-kl", "pearson"] = "piecewise"
    """f-divergence of Eq. (7); piecewise is the paper's"""
    v_coefficient: float = 1.0
    """c, weight of V(s) in Eq. (3a): 1 gives E[w] = 1 in every state; the paper writes 1 - gamma"""
    guidance: Literal["igl", "cep", "none"] = "igl"
    """how g is learned: igl = in-sample, Eq. (6); cep = contrastive on generated actions (QGPO); none = select only"""
    M: int | None = None
    """M, noise draws per dataset action in Eq. (6) (16; antmaze: 32); with cep: generated actions per state"""
    cep_beta: float = 3.0
    """beta, inverse temperature of cep: guidance towards behaviour x exp(beta Q)"""
    cep_states: int = 100_000
    """cep: dataset states for which M actions are generated, once, before the main stage"""
    kappa: float | None = None
    """kappa, guidance scale when acting (paper's equation: 1; released settings: 1 to 4); 0 is select-only"""
    K: int | None = None
    """K, candidates per state when acting; 1 is guide-only (presets: ours)"""
    nfe: int | None = None
    """evaluations of the score model per sample: DPM-Solver++, single steps of order 2 (15)"""
    H: int | None = None
    """H, heads of the Q-ensemble that selects (10; antmaze: 0 = the first target Q selects)"""
    temperature: float | None = None
    """0: the candidate of the largest Q acts; else drawn with probability softmax(Q / temperature) (antmaze: 1)"""
    lr: float | None = None
    """AdamW, for V, Q, ensemble and g (3e-4)"""
    weight_decay: float = 1e-4
    """AdamW, main stage only"""
    lr_end: float | None = None
    """share of the learning rates that is left at the end of a stage, cosine in between (1: constant)"""
    polyak: float | None = None
    """tau, averaging rate of the target Q (0.005)"""
    reward_scale: Literal["windows", "range", "none"] | None = None
    """r <- 1000 r / (max return - min return); windows: returns cut every 1000 rows, as released; range: of episodes"""
    reward_shift: float | None = None
    """added to every stored reward, before the scale (antmaze: -1)"""


SAMPLING = ("kappa", "K", "nfe", "temperature")  # what --eval-only takes from the command line
PAPER = dict(
    steps=1_000_000, behavior_steps=600_000, behavior_batch_size=4096, behavior_lr=1e-4,
    behavior_hidden=(512, 256, 128), batch_size=512, hidden=(256, 256), guidance_hidden=(256, 256, 256, 256),
    guidance_activation="silu", time_scale=30.0, alpha=0.5, M=16, kappa=4.0, K=8, nfe=15, H=10, temperature=0.0,
    polyak=0.005, lr=3e-4, lr_end=1.0, reward_scale="range", reward_shift=0.0, log_every=1000, eval_every=40_000,
    eval_episodes=10, final_episodes=100, save_every=50_000,
)  # [D7] alpha is the released default, K = 8 ours
_ANTMAZE = dict(
    M=32, H=0, temperature=1.0, reward_scale="none", reward_shift=-1.0, eval_episodes=50, K=4)  # [D7] K = 4 ours
_TOY = dict(  # ours
    steps=8000, behavior_steps=8000, behavior_batch_size=256, behavior_lr=1e-3, behavior_hidden=(128, 64, 64),
    batch_size=1024, hidden=(128, 128), guidance_hidden=(128, 128, 128), guidance_activation="relu", time_scale=1.0,
    alpha=0.2, M=2, kappa=1.0, K=1, H=2, lr=2e-3, lr_end=0.0, reward_scale="none", log_every=200, eval_every=4000,
    eval_episodes=1000, final_episodes=2000, save_every=4000)
PRESETS = {  # what differs from PAPER: docs/diffusion_dice.md says where each value comes from
    **{f"{task}-{kind}-v2": dict(reward_scale="windows", kappa=2.0 if kind == "medium-expert" else 4.0)
       for task in ("hopper", "halfcheetah", "walker2d") for kind in ("medium", "medium-replay", "medium-expert")},
    "antmaze-umaze-v2": _ANTMAZE | dict(kappa=1.0), "antmaze-umaze-diverse-v2": _ANTMAZE | dict(kappa=1.0, K=1),
    "antmaze-medium-play-v2": _ANTMAZE | dict(kappa=2.0), "antmaze-medium-diverse-v2": _ANTMAZE | dict(kappa=2.0),
    "antmaze-large-play-v2": _ANTMAZE, "antmaze-large-diverse-v2": _ANTMAZE,
    "pendulum-demo": dict(  # ours, sized for two minutes on a CPU
        steps=8000, behavior_steps=8000, behavior_batch_size=256, behavior_lr=1e-3, behavior_hidden=(128, 64, 32),
        batch_size=256, hidden=(128, 128), guidance_hidden=(128, 128, 128, 128), alpha=1.0, M=2, kappa=2.0, K=4, H=5,
        lr=1e-3, lr_end=0.1, reward_scale="range", log_every=200, eval_every=2000, final_episodes=20, save_every=2000),
    "hopper-demo": dict(  # ours, sized for minutes on a CPU; a slow target Q would not converge in so few steps
        steps=30_000, behavior_steps=20_000, behavior_batch_size=256, behavior_lr=1e-3, behavior_hidden=(128, 64, 32),
        batch_size=256, hidden=(128, 128), guidance_hidden=(128, 128, 128, 128), alpha=0.2, M=2, kappa=1.0, K=2, H=5,
        lr=1e-3, lr_end=0.1, polyak=0.02, reward_scale="range", eval_every=10_000, save_every=5000),
    **{toy: _TOY for toy in TOYS}, "bandit-ring": _TOY | dict(alpha=0.01, K=16),
}


def resolve(args: Args) -> Args:
    """Fills what the command line left at None from PRESETS, else PAPER, and refuses nonsense."""
    preset = PAPER | PRESETS.get(args.env, {})
    args = replace(args, **{k: v for k, v in preset.items() if getattr(args, k) is None})
    positive = "behavior_steps behavior_batch_size behavior_lr alpha M cep_beta cep_states K nfe lr time_scale"
    rules = [
        ("lr_end", "in [0, 1]", 0 <= args.lr_end <= 1),
        ("reward_shift", "a finite number", math.isfinite(args.reward_shift)),
        ("M", ">= 2 with --guidance cep, which compares actions", args.M >= 2 or args.guidance != "cep"),
    ]
    refuse(args, positive, "kappa H temperature weight_decay v_coefficient", rules)
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
class Fourier(nn.Module):
    """Time features [sin 2 pi W t, cos 2 pi W t] with fixed W ~ N(0, scale^2), then a linear layer.  (B,) -> (B, 32)"""

    def __init__(self, scale: float):
        super().__init__()
        self.register_buffer("W", scale * torch.randn(16))  # never trained, saved with the weights
        self.out = nn.Linear(32, 32)

    def forward(self, t: Tensor) -> Tensor:
        u = 2 * math.pi * t[:, None] * self.W  # (B, 16)
        return self.out(torch.cat([u.sin(), u.cos()], -1))


class Block(nn.Module):
    """Residual block, conditioned on an embedding e."""

    def __init__(self, i: int, o: int):
        super().__init__()
        self.first, self.second, self.embed = nn.Linear(i, o), nn.Linear(o, o), nn.Linear(128, o)
        self.skip = nn.Linear(i, o) if i != o else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = F.silu(self.first(x)).add_(self.embed(e))
        return F.silu(self.second(h)).add_(self.skip(x))  # (B, o)


class ScoreNet(nn.Module):
    """grad_{a_t} log p_t(a_t | s) of the behaviour = out / sigma_t: a U-net of residual blocks of linear layers."""

    def __init__(self, S: int, A: int, widths: tuple[int, int, int], time_scale: float, sde: VPSDE):
        super().__init__()
        w1, w2, w3 = widths
        self.sde, self.time, self.state = sde, Fourier(time_scale), nn.Linear(S, 32)
        self.embed = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.d1, self.d2, self.d3, self.m = Block(A, w1), Block(w1, w2), Block(w2, w3), Block(w3, w3)
        self.u2, self.u1, self.out = Block(2 * w3, w2), Block(2 * w2, w1), nn.Linear(2 * w1, A)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        time = self.time(t).expand(len(x), -1)  # (B, 32)
        e = self.embed(torch.cat([F.silu(self.state(s)), time], -1))  # (B, 128)
        d1 = self.d1(x, e)
        d2 = self.d2(d1, e)
        d3 = self.d3(d2, e)
        u2 = self.u2(torch.cat([d3, self.m(d3, e)], -1), e)
        u1 = self.u1(torch.cat([d2, u2], -1), e)
        return self.out(torch.cat([d1, u1], -1)) / self.sde.sigma(t)[:, None]  # (B, A)


class Heads(nn.Module):
    """H independent MLPs with ReLU, one batched product per layer.  (B, width) -> (H, B)

    Weights and biases start uniform within 1 / sqrt(fan-in), torch's default for linear layers; fan="out": the
    released ensemble's habit of taking the number of outputs instead (its last layer starts within +-1)."""

    def __init__(self, width: int, hidden: tuple[int, ...], H: int, fan: str = "in"):
        super().__init__()
        sizes = (width, *hidden, 1)
        self.weights = nn.ParameterList(torch.empty(H, i, o) for i, o in pairwise(sizes))
        self.biases = nn.ParameterList(torch.empty(H, 1, o) for o in sizes[1:])
        for w, b in zip(self.weights, self.biases):
            bound = w.shape[1 if fan == "in" else 2] ** -0.5
            nn.init.uniform_(w, -bound, bound)
            nn.init.uniform_(b, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, (w_out, b_out) = zip(self.weights, self.biases)
        x = x.expand(len(w_out), -1, -1)  # (H, B, width)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w).relu_()  # (H, B, width)
        return torch.baddbmm(b_out, x, w_out).squeeze(-1)  # (H, B)


class ValueNet(nn.Sequential):
    """V(s): layers of Linear, LayerNorm, ReLU.  (B, S) -> (B,)"""

    def __init__(self, S: int, hidden: tuple[int, ...]):
        layers = [(nn.Linear(i, o), nn.LayerNorm(o), nn.ReLU()) for i, o in pairwise((S, *hidden))]
        super().__init__(*(layer for group in layers for layer in group), nn.Linear(hidden[-1], 1))

    def forward(self, s: Tensor) -> Tensor:
        return super().forward(s).squeeze(-1)


class GuidanceNet(nn.Module):
    """g(a_t, t, s), one number: MLP on [a_t, time, s].  (B, M, A), (B,), (B, S) -> (B, M)"""

    def __init__(self, S: int, A: int, hidden: tuple[int, ...], activation: str, time_scale: float):
        super().__init__()
        self.time, self.activation = Fourier(time_scale), getattr(F, activation)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise((A + 32 + S, *hidden, 1)))

    def forward(self, a_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        A, (first, *hidden, last) = a_t.shape[-1], self.layers
        c = torch.cat([self.time(t).expand(len(s), -1), s], -1)  # (B, 32 + S), the same for all M
        c = F.linear(c, first.weight[:, A:], first.bias)  # (B, width)
        x = F.linear(a_t, first.weight[:, :A]) + c[:, None]  # (B, M, width)
        for layer in hidden:
            x = layer(self.activation(x))
        return last(self.activation(x)).squeeze(-1)  # (B, M)


# --- losses: pure functions, all randomness is an argument ------------------------------------------------
def diffuse(a: Tensor, t: Tensor, eps: Tensor, sde: VPSDE) -> Tensor:
    """Forward process:  a_t = alpha_t a + sigma_t eps.   a, eps (B, ..., A), t (B,)"""
    shape = (-1, *(1,) * (a.dim() - 1))
    return sde.alpha(t).view(shape) * a + sde.sigma(t).view(shape) * eps


def score_loss(score: Tensor, eps: Tensor, t: Tensor, sde: VPSDE) -> Tensor:
    """mean_B sum_A (sigma_t score + eps)^2:  at its minimum score = -E[eps | a_t] / sigma_t.   score, eps (B, A)"""
    return (sde.sigma(t)[:, None] * score + eps).square().sum(-1).mean()


def conjugate(y: Tensor, f: str) -> Tensor:
    """f*(y) = max_{x >= 0} x y - f(x).  Eq. (7):  y^2/4 + y for y >= 0, e^y - 1 below."""
    if f == "reverse-kl":
        return y.exp() - 1
    square = y.square() / 4 + y
    if f == "pearson":
        return torch.where(y >= -2, square, -1.0)
    return torch.where(y >= 0, square, y.clamp(max=1).exp() - 1)  # clamp: the branch not taken must stay finite


def ratio(q: Tensor, v: Tensor, alpha: float, f: str) -> Tensor:
    """Eq. (4):  w = max(0, (f')^{-1}(x)), x = (Q - V) / alpha.  Eq. (7):  x/2 + 1 for x >= 0, e^x below: never 0.
    Bounded above by 100, as released, and below by 1e-30 (released: 1e-40, subnormal in float32)."""
    x = (q - v) / alpha
    linear, exponential = x / 2 + 1, x.clamp(max=10).exp()  # e^10 is beyond the bound of 100
    w = {"piecewise": torch.where(x >= 0, linear, exponential), "reverse-kl": exponential, "pearson": linear}[f]
    return w.clamp(1e-30, 100)


def value_loss(q: Tensor, v: Tensor, alpha: float, f: str, c: float) -> Tensor:
    """Eq. (3a) / alpha:  mean[ f*((Q - V) / alpha) + c V / alpha ];  gradient in V(s_i):  (c - w_i) / (alpha B)."""
    return (conjugate((q - v) / alpha, f) + c * v / alpha).mean()


def critic_target(r: Tensor, terminal: Tensor, v_next: Tensor, discount: float) -> Tensor:
    """y = r + gamma (1 - terminal) V(s'),  the target of Eq. (3b)"""
    return r + discount * (1 - terminal) * v_next


def critic_loss(q: Tensor, y: Tensor) -> Tensor:
    """Eq. (3b):  sum over heads of the mean over the batch of (Q_h(s, a) - y)^2.   q (H, B), y (B,)"""
    return (q - y).square().mean(-1).sum()


def igl_loss(g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (6):  mean[ w e^{-g} + g ], times e^{-c} so that no exponential overflows, c = max(max -g, -1) in effect;
    for g < -80 the exponent stays at 80, its gradient at -1.   g (B, M), w (B, 1).   Returns (loss, Eq. (6) itself)."""
    e = (g + 80).clamp(max=0).detach() - g  # min(-g, 80), with gradient -1
    c = e.max().clamp(min=-1).detach()
    loss = (w * (e - c).exp() + (-c).exp() * g).mean()
    return loss, loss.detach() * c.exp()


def cep_loss(g: Tensor, q: Tensor, beta: float) -> Tensor:
    """Contrastive energy prediction (QGPO, Lu et al., 2023):  - sum_i softmax(beta q)_i log softmax(g)_i over the M
    actions that the behaviour model generated for one state.   g, q (B, M)"""
    return -((beta * q).softmax(-1) * g.log_softmax(-1)).sum(-1).mean()


# --- sampler ----------------------------------------------------------------------------------------------
def orders(nfe: int) -> list[int]:
    """Orders of the steps that spend nfe evaluations: 2, 2, ..., 2, 1 (an even number ends with 1, 1)."""
    return [2] * ((nfe - 1) // 2) + [1] * (2 - nfe % 2)


def dpm_solver(x_0, x: Tensor, sde: VPSDE, nfe: int) -> Tensor:
    """DPM-Solver++ (Lu et al., 2022), single step, data prediction, from t = 1 to 0.001 on an even grid of nfe steps in
    t.  x_0(x, t) predicts the clean action, t (1,); x (B, A) ~ N(0, I).  A step of order 2 has the grid point it passes
    as midpoint.  No clipping, no last denoising step."""
    grid = torch.linspace(1, 1e-3, nfe + 1, dtype=torch.float64)
    alpha, sigma, lam = (fn(grid).tolist() for fn in (sde.alpha, sde.sigma, sde.lam))
    on_device = torch.linspace(1, 1e-3, nfe + 1, dtype=torch.float64, device=x.device)  # a copy could not be recorded
    time = on_device.to(x.dtype)[:, None]  # (nfe + 1, 1)
    i = 0
    for order in orders(nfe):
        j = i + order  # from grid point i to j
        h, D = lam[j] - lam[i], x_0(x, time[i])
        step = -alpha[j] * math.expm1(-h)
        end = sigma[j] / sigma[i] * x + step * D
        if order == 2:
            u = i + 1
            r = (lam[u] - lam[i]) / h
            x_u = sigma[u] / sigma[i] * x - alpha[u] * math.expm1(-r * h) * D
            end = end + step / (2 * r) * (x_0(x_u, time[u]) - D)
        x, i = end, j
    return x


def sample(score: ScoreNet, guidance, s: Tensor, x: Tensor, kappa: float, nfe: int) -> Tensor:
    """Eq. (5):  eps(x, t) = -sigma_t (score(x, t, s) + kappa grad_x g(x, t, s)),  x_0 = (x - sigma_t eps) / alpha_t.
    guidance: a GuidanceNet, or None.   s (B, S), x (B, A) start ~ N(0, I).   Returns (B, A), not clipped."""
    sde = score.sde

    def x_0(x: Tensor, t: Tensor) -> Tensor:
        total = score(x, t, s)
        if guidance is not None and kappa > 0:
            with torch.enable_grad():
                x_t = x.detach().requires_grad_()
                g = guidance(x_t[:, None], t, s)  # (B, 1)
                total = total + kappa * torch.autograd.grad(g.sum(), x_t)[0]
        return (x + sde.sigma(t).square() * total) / sde.alpha(t)

    return dpm_solver(x_0, x, sde, nfe)


def select(a: Tensor, q: Tensor, n: int, temperature: float = 0.0) -> Tensor:
    """Of n actions per state the one of the largest q, or one drawn with probability softmax(q / temperature).
    a (E n, A), q (E n,) -> (E, A)"""
    a, q = a.view(-1, n, a.shape[-1]), q.view(-1, n)
    k = (q / temperature).softmax(-1).multinomial(1).squeeze(1) if temperature > 0 else q.argmax(-1)  # (E,)
    return a[torch.arange(len(a), device=a.device), k]


def make_act(args: Args, agent: Agent, A: int):
    """act(s): K guided candidates, of which the ensemble mean (else the first target Q) selects.  (E, S) -> (E, A)"""
    guidance = None if args.guidance == "none" else agent.guidance
    chain = per_size(lambda s, x: sample(agent.score, guidance, s, x, args.kappa, args.nfe), args)

    @torch.no_grad()
    def act(s: Tensor) -> Tensor:
        s_k = s.repeat_interleave(args.K, 0)  # (E K, S)
        a = chain(s_k, torch.randn(len(s_k), A, device=s.device))  # (E K, A)
        return a if args.K == 1 else select(a, agent.judge(s_k, a), args.K, args.temperature)  # (8)

    return act


# --- one gradient step: eager = compiled = graphed --------------------------------------------------------
@dataclass
class Agent:
    """Everything that learning changes. The two counters are for the learning rates, on the device."""

    score: ScoreNet
    value: ValueNet
    q: Heads
    q_target: Heads
    ensemble: Heads | None
    guidance: GuidanceNet
    score_opt: torch.optim.Optimizer
    value_opt: torch.optim.Optimizer
    q_opt: torch.optim.Optimizer
    ensemble_opt: torch.optim.Optimizer | None
    guidance_opt: torch.optim.Optimizer
    behavior_step: Tensor
    step: Tensor

    def judge(self, s: Tensor, a: Tensor) -> Tensor:
        """Q for the selection: mean of the ensemble, which reads [s, a], else the first target Q, [a, s].   (B,)"""
        if self.ensemble is None:
            return self.q_target(torch.cat([a, s], -1))[0]
        return self.ensemble(torch.cat([s, a], -1)).mean(0)


def make_agent(args: Args, S: int, A: int, device: torch.device) -> Agent:
    score = ScoreNet(S, A, args.behavior_hidden, args.time_scale, VPSDE()).to(device)
    value, q = ValueNet(S, args.hidden).to(device), Heads(A + S, args.hidden, 2).to(device)
    ensemble = Heads(S + A, args.hidden, args.H, fan="out").to(device) if args.H else None
    guidance = GuidanceNet(S, A, args.guidance_hidden, args.guidance_activation, args.time_scale).to(device)

    def adamw(net):
        return adam(net.parameters(), args.lr, torch.optim.AdamW, weight_decay=args.weight_decay)

    return Agent(
        score=score, value=value, q=q, q_target=deepcopy(q).requires_grad_(False), ensemble=ensemble, guidance=guidance,
        score_opt=adam(score.parameters(), args.behavior_lr), value_opt=adamw(value), q_opt=adamw(q),
        ensemble_opt=adamw(ensemble) if args.H else None, guidance_opt=adamw(guidance),
        behavior_step=torch.zeros((), device=device, dtype=torch.float64),
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


def draw_t(B: int, device: torch.device) -> Tensor:
    """(B,) t ~ U[0.001, 1], in both stages"""
    return 1e-3 + (1 - 1e-3) * torch.rand(B, device=device)


def make_behavior_update(args: Args, agent: Agent, data):
    """First stage: update() is one step of the score model; draws on the device and returns 0-d tensors."""
    score, B, device = agent.score, args.behavior_batch_size, data.a.device
    rows = 1024 if device.type == "cpu" else B  # a CPU is a tenth faster on blocks that stay in cache (docs/speed.md)

    def update() -> dict[str, Tensor]:
        i = torch.randint(len(data), (B,), device=device)  # [D1]
        s, a, t = data.s[i], data.a[i], draw_t(B, device)
        eps = torch.randn_like(a)
        a_t, total = diffuse(a, t, eps, score.sde), 0.0
        agent.score_opt.zero_grad(set_to_none=True)
        for a_k, t_k, s_k, eps_k in zip(*(x.split(rows) for x in (a_t, t, s, eps))):
            loss = score_loss(score(a_k, t_k, s_k), eps_k, t_k, score.sde) * (len(t_k) / B)
            loss.backward()
            total = total + loss.detach()
        anneal(agent.score_opt, args.behavior_lr, agent.behavior_step / args.behavior_steps, args.lr_end)
        agent.score_opt.step()
        agent.behavior_step += 1
        return {"losses/score": total, "charts/lr": agent.score_opt.param_groups[0]["lr"].clone()}

    return update


@torch.no_grad()
def generate(args: Args, agent: Agent, data) -> tuple[Tensor, Tensor]:
    """For cep: rows (n,) of the dataset, and M actions of the behaviour model for the state of each, (n, M, A).  They
    depend on the seed and the model alone, so that a resumed run has the same."""
    device, A, M = data.a.device, data.a.shape[1], args.M
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        rows = torch.randperm(len(data), device=device)[: args.cep_states]
        actions = []
        for part in tqdm(rows.split(2**14 // M + 1), desc="generate", unit="batch", disable=None, leave=False):
            s = data.s[part].repeat_interleave(M, 0)  # (n M, S)
            x = torch.randn(len(s), A, device=device)
            actions.append(sample(agent.score, None, s, x, 0.0, args.nfe).view(-1, M, A))
    return rows, torch.cat(actions)


def make_update(args: Args, agent: Agent, data, generated=None):
    """Main stage: update() is one step of V, Q, ensemble, target and guidance, in this order, on one minibatch; draws
    on the device and returns 0-d tensors.  generated: of `generate`, for cep."""
    value, q, q_target, guidance, sde = agent.value, agent.q, agent.q_target, agent.guidance, agent.score.sde
    B, M, device = args.batch_size, args.M, data.a.device
    opts = [opt for opt in (agent.value_opt, agent.q_opt, agent.ensemble_opt, agent.guidance_opt) if opt]

    def update() -> dict[str, Tensor]:
        i = torch.randint(len(data), (B,), device=device)  # [D1]
        s, a, r, s_next, terminal = data.s[i], data.a[i], data.r[i], data.s_next[i], data.terminal[i]
        a_s = torch.cat([a, s], -1)
        for opt in opts:
            anneal(opt, args.lr, agent.step / args.steps, args.lr_end)

        # --- V: Eq. (3a) ---
        with torch.no_grad():
            q_bar = q_target(a_s).amin(0)  # (B,)
        v = value(s)
        loss_v = value_loss(q_bar, v, args.alpha, args.f, args.v_coefficient)
        descend(loss_v, agent.value_opt)

        # --- Q and ensemble: Eq. (3b), with the V just updated ---
        with torch.no_grad():
            y = critic_target(r, terminal, value(s_next), args.discount)
        q_a = q(a_s)  # (2, B)
        loss_q = critic_loss(q_a, y)
        descend(loss_q, agent.q_opt)
        losses = {"value": loss_v, "critic": loss_q, "q_mean": q_a.detach().mean(), "v_mean": v.detach().mean()}
        if agent.ensemble is not None:
            losses["ensemble"] = critic_loss(agent.ensemble(torch.cat([s, a], -1)), y) / args.H
            descend(losses["ensemble"], agent.ensemble_opt)
        average(q_target, q, args.polyak)

        # --- guidance: Eq. (6), with the V and target Q just updated; cep: on generated actions ---
        with torch.no_grad():
            w = ratio(q_target(a_s).amin(0), value(s), args.alpha, args.f)[:, None]  # (B, 1)
        losses |= {"w_mean": w.mean(), "w_max": w.max()}
        if args.guidance != "none":
            a_0 = a[:, None].expand(-1, M, -1)  # (B, M, A), M times the same
            if args.guidance == "cep":
                rows, actions = generated
                k = torch.randint(len(rows), (B,), device=device)
                s, a_0 = data.s[rows[k]], actions[k]  # (B, S), (B, M, A)
            t = draw_t(B, device)
            g = guidance(diffuse(a_0, t, torch.randn_like(a_0), sde), t, s)  # (B, M)
            if args.guidance == "igl":
                loss_g, losses["igl"] = igl_loss(g, w)
            else:
                with torch.no_grad():
                    q_0 = q_target(torch.cat([a_0, s[:, None].expand(-1, M, -1)], -1).flatten(0, 1)).amin(0)
                loss_g = losses["cep"] = cep_loss(g, q_0.view(B, M), args.cep_beta)
            descend(loss_g, agent.guidance_opt)
            near, g = (t < 0.1).float()[:, None] / (t < 0.1).sum().clamp(min=1) / M, g.detach()  # (B, 1), (B, M)
            losses["g_std"] = (near * (g - (near * g).sum()).square()).sum().sqrt()  # at small t; 0 while untrained
        agent.step += 1
        lr = agent.q_opt.param_groups[0]["lr"].clone()
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


def window_scale(r: Tensor, terminal: Tensor, length: int = 1000) -> float:
    """1000 / (max return - min return) as released: rows are added up until a terminal one or until there are 1000;
    what is left over at the end does not count.  Windows drift across time-outs, whose rows are dropped."""
    returns, total, n = [], 0.0, 0
    for reward, end in zip(r.tolist(), terminal.tolist()):
        total, n = total + reward, n + 1
        if end or n == length:
            returns.append(total)
            total, n = 0.0, 0
    if len(set(returns)) < 2:
        raise UserError("--reward-scale windows: the data has no two returns that differ; give --reward-scale none")
    return 1000 / (max(returns) - min(returns))


def exact_samples(args: Args, scaled, n: int, seed: int) -> Tensor:
    """(n, 2) of pi* ~ w p_data on a toy: Q is the scaled mean reward, V solves E[w] = c, found by bisection."""
    toy, data = TOYS[args.env], common.toy_dataset(args.env)
    r = toy.reward(data.a[: toy.rows]) if toy.noise else data.r  # without the noise
    r = scaled(r).double()
    low, high = float(r.min()) - 100 * args.alpha, float(r.max()) + 100 * args.alpha
    for _ in range(60):
        v = (low + high) / 2
        low, high = (v, high) if ratio(r, v, args.alpha, args.f).mean() > args.v_coefficient else (low, v)
    return common.reweighted_samples(args.env, n, lambda r: ratio(scaled(r), v, args.alpha, args.f), seed)


def main(args: Args) -> None:
    if args.eval_only:
        return reevaluate(args)
    args = resolve(args)
    device = pick_device(args)
    seed_all(args.seed)

    task = task_sizes(args)
    data = load_dataset(args.env, args.data_path, args.data_url).to(device)
    S, A = data.s.shape[1], data.a.shape[1]
    check_task(task, S, A)
    returns = data.returns().cpu().numpy()  # as stored
    scale = {"windows": lambda: window_scale(data.r, data.terminal), "range": lambda: reward_scale(data)}
    factor = scale.get(args.reward_scale, lambda: 1.0)()

    def scaled(r: Tensor) -> Tensor:
        return factor * (r + args.reward_shift)

    data.r = scaled(data.r)  # not in place: common.py keeps a toy's tensors

    agent = make_agent(args, S, A, device)
    taken = borrow(args, {"score": agent.score}, ["behavior"], "behavior_hidden")  # before the run's folder is touched
    run = Run(args, agent_state(agent), device)
    run.progress["done"] += taken
    announce(args, data, returns, device)

    update_behavior = accelerate(make_behavior_update(args, agent, data), args, device)
    run.train("behavior", args.behavior_steps, lambda i: update_behavior())
    generated = generate(args, agent, data) if args.guidance == "cep" else None
    update = accelerate(make_update(args, agent, data, generated), args, device)
    act = make_act(args, agent, A)
    run.train("train", args.steps, lambda i: update(), act)

    if args.env in TOYS:
        toy_figure(args, agent, data, run.folder, act, scaled)
    run.finish(returns, act)


@torch.no_grad()
def toy_figure(args: Args, agent: Agent, data, folder: Path, act, scaled) -> None:
    """samples.png, and how far guided samples (kappa 1, K 1) are from exact ones of pi*."""
    s, note = torch.zeros(4000, 1, device=data.a.device), ""
    if args.guidance == "igl":  # cep aims at another target, none has no g
        guided = make_act(replace(args, kappa=1.0, K=1), agent, 2)(s).cpu()
        exact, floor = exact_samples(args, scaled, len(s), 1), exact_samples(args, scaled, len(s), 2)
        distance, least = common.energy_distance(guided, exact), common.energy_distance(floor, exact)
        note = f"distance to exact: {distance:.4f} at kappa 1, K 1"
        print(f"energy {note}; between two exact sample sets {least:.4f}")

    def value(a: Tensor) -> Tensor:
        return agent.judge(s[:1].expand(len(a), -1), a)

    plot_toy(folder / "samples.png", args.env, data, value, act(s[:2000]), note)


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
