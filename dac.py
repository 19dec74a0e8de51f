"""DAC: Diffusion Actor-Critic (Fang et al., ICLR 2025, arXiv 2405.20555).

Offline RL as constrained policy iteration: maximise Q under KL(pi || behaviour) <= eps_b. The solution
pi* ~ pi_b exp(Q / eta) suggests a target for the noise of a diffusion model, so the actor is trained by
plain regression on dataset actions plus one gradient of Q with respect to its input; nothing is back-propagated
through the denoising chain. docs/dac.md states equations (1)-(5).

    actor   eps_theta(s, x_t, t)  eta ||eps_theta - eps||^2 + sqrt(1 - ab_t) <eps_theta, grad Q>  actor_loss (5)
    eta     Lagrange multiplier   eta <- eta + eta_lr (bc - b),  bc the noise error               dual_step
    critic  Q_1..Q_H(s, a)        y = r + gamma (1 - terminal) LCB_h[ Qbar_h(s', a') ]            critic_target
    act     N_a samples of the diffusion model, argmax of the ensemble mean                       make_act

Differences from the authors' code, each tagged where it happens (reasons and effects: docs/dac.md):
  [D1] minibatches are drawn with replacement, not by shuffled passes
  [D2] on CUDA, float32 matrix products may round to TF32
  [D3] bandits: 250 stored draws of the reward noise per action, not one per visit (common.toy_dataset)
  [D4] evaluation: one environment per episode, seeded, all in lock step
  [D5] D4RL's locomotion is evaluated in gymnasium's -v4 tasks (common.ENV_IDS)
  [D6] antmaze: jumps between rows are cut as time-outs (common.cut_jumps); the task is d4rl_envs.py's
Shapes: B batch, S state, A action, T diffusion steps, H critic heads, N next actions and N_a candidates per state,
        E episodes.
Run:    python dac.py                          (pendulum, no download, about a minute on a CPU)
        python dac.py --env hopper-medium-v2   (D4RL; the paper's settings)
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

from common import TOYS, UserError, load_dataset, make_env, normalized_score, reward_scale, vp_schedule

METHOD, FORMAT = "dac", 3  # FORMAT: of last.pt; raised whenever an older file would not load


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
    """everything is written to <run-dir>/<env>/dac/seed<seed>"""
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
    """steps between two evaluations (preset: 10000, as in the paper)"""
    eval_episodes: int | None = None
    """episodes per evaluation during training (preset: 10, as in the paper)"""
    final_episodes: int | None = None
    """episodes of the last evaluation, and of --eval-only (preset: 100)"""
    save_every: int | None = None
    """steps between two checkpoints (preset: 50000)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the update; auto: on CUDA, if a C++ compiler is found"""
    graph: Literal["auto", "on", "off"] = "auto"
    """record updates and samplers as CUDA graphs and replay them; auto: on CUDA"""

    # --- the method; None takes the preset of --env, whose default is the paper's value ---
    steps: int | None = None
    """gradient steps, one of the critic and one of the actor each (paper: 2,000,000)"""
    batch_size: int | None = None
    """B, transitions per gradient step (paper: 256)"""
    discount: float = 0.99
    """gamma"""
    T: int | None = None
    """T, diffusion steps (paper: 5; bandits: 50)"""
    hidden: tuple[int, ...] | None = None
    """widths of the hidden layers of actor and critics (paper: 256 256 256)"""
    guidance: Literal["soft", "hard", "denoised", "none"] = "soft"
    """how Q steers the noise: soft = Eq. (5); hard, denoised = the paper's ablations; none = cloning"""
    eta: float | None = None
    """eta, or its start where eta_lr > 0: weight of the behaviour term in Eq. (5)"""
    eta_lr: float | None = None
    """step size of the dual ascent on eta; 0 keeps eta fixed"""
    b: float | None = None
    """b, bound on the mean squared noise error: small b stays near the data, b >= 1 hardly binds"""
    H: int | None = None
    """H, critic heads (paper: 10)"""
    N: int | None = None
    """N, next actions drawn per state for the critic target (paper: 10)"""
    target: Literal["lcb", "min", "mean"] = "lcb"
    """value target over the heads: lower confidence bound mean - rho std, minimum, mean"""
    rho: float | None = None
    """rho, width of the lower confidence bound"""
    next_value: Literal["mean", "max"] | None = None
    """value of a next state over its N actions, per head (paper: mean; antmaze: max)"""
    N_a: int | None = None
    """N_a, candidates per state when acting (paper: 10)"""
    temperature: float | None = None
    """0: the candidate of the largest mean Q acts; else drawn with probability softmax(Q / temperature)"""
    clip_x0: bool | None = None
    """clip the denoised action to [-1, 1] in every sampler step when acting (paper: True; bandits: False)"""
    actor_lr: float | None = None
    """Adam, cosine decay to 0 over the run"""
    critic_lr: float | None = None
    """Adam, cosine decay to 0 over the run"""
    clip_norm: float = 1.0
    """bound on the global gradient norm, one norm over the actor, one jointly over all heads"""
    polyak: float = 0.005
    """tau, averaging rate of target critics and target actor"""
    ema_every: int = 5
    """the target actor moves after updates i with i % ema_every == 0 and i > ema_after, i = 0, 1, 2, ..."""
    ema_after: int | None = None
    """see ema_every (paper: 1000; bandits: 10)"""
    reward_scale: Literal["range", "none"] | None = None
    """range: r <- 1000 r / (max return - min return), the paper's rule; none: as stored"""
    reward_shift: float = 0.0
    """added to every stored reward, before the scale (paper: 0; IQL on antmaze: -1 with --reward-scale none)"""


SAMPLING = ("N_a", "temperature", "clip_x0")  # what --eval-only takes from the command line
PAPER = dict(
    steps=2_000_000, batch_size=256, T=5, hidden=(256, 256, 256), eta=1.0, eta_lr=1e-3, b=1.0, H=10, N=10,
    rho=1.0, next_value="mean", N_a=10, temperature=0.0, clip_x0=True, actor_lr=3e-4, critic_lr=3e-4,
    ema_after=1000, reward_scale="range", log_every=1000, eval_every=10_000, eval_episodes=10,
    final_episodes=100, save_every=50_000,
)
_ANTMAZE = dict(eta=0.1, eta_lr=0.0, rho=1.0, next_value="max")
_TOY = dict(  # Fig. 2; the toys that are not DAC's take the same
    steps=20_000, batch_size=128, T=50, hidden=(64, 64, 64), eta_lr=0.01, b=1.3, H=5, N_a=1, clip_x0=False,
    actor_lr=1e-3, critic_lr=1e-3, ema_after=10, reward_scale="none", eval_every=5000, eval_episodes=1000,
    final_episodes=2000, save_every=5000,
)
PRESETS = {  # what differs from PAPER: docs/dac.md says where each value comes from
    "walker2d-medium-v2": dict(), "walker2d-medium-replay-v2": dict(), "walker2d-medium-expert-v2": dict(),
    "hopper-medium-v2": dict(rho=1.5), "hopper-medium-replay-v2": dict(rho=1.5),
    "hopper-medium-expert-v2": dict(rho=1.5, b=0.05),
    "halfcheetah-medium-v2": dict(rho=0.0), "halfcheetah-medium-replay-v2": dict(rho=0.0),
    "halfcheetah-medium-expert-v2": dict(rho=0.0, b=0.1),
    "antmaze-umaze-v0": _ANTMAZE, "antmaze-umaze-diverse-v0": _ANTMAZE,
    "antmaze-medium-play-v0": _ANTMAZE, "antmaze-medium-diverse-v0": _ANTMAZE,
    "antmaze-large-play-v0": _ANTMAZE | dict(rho=1.1, critic_lr=1e-3),
    "antmaze-large-diverse-v0": _ANTMAZE | dict(critic_lr=1e-3),
    "pendulum-demo": dict(  # ours, sized for a minute on a CPU
        steps=10_000, batch_size=128, hidden=(64, 64), H=2, N=1, b=0.3, actor_lr=1e-3, critic_lr=1e-3,
        log_every=200, eval_every=2000, final_episodes=20, save_every=2000),
    "hopper-demo": dict(  # ours, sized for minutes on a CPU: smaller networks, one next action, two candidates
        steps=60_000, batch_size=128, hidden=(128, 128), N=1, N_a=2, eta=0.1, b=0.1, save_every=5000),
    **{toy: _TOY for toy in TOYS},
}


def resolve(args: Args) -> Args:
    """Fills what the command line left at None from PRESETS, else PAPER, and refuses nonsense."""
    preset = PAPER | PRESETS.get(args.env, {})
    args = replace(args, **{k: v for k, v in preset.items() if getattr(args, k) is None})
    positive = "T H N N_a eta actor_lr critic_lr clip_norm ema_every"
    rules = [("reward_shift", "a finite number", math.isfinite(args.reward_shift))]
    refuse(args, positive, "eta_lr b rho temperature ema_after", rules)
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
class NoiseNet(nn.Module):
    """eps_theta(s, x_t, t): MLP on [s, x_t, time], Mish between.  Glorot-uniform weights, zero biases."""

    def __init__(self, S: int, A: int, hidden: tuple[int, ...]):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 32))
        sizes = (S + A + 32, *hidden, A)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.register_buffer("freq", torch.exp(-math.log(10_000) * torch.arange(8) / 7), persistent=False)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, s: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        u = t[:, None].float() * self.freq  # (B or 1, 8)  t is the integer 1..T, not t/T
        u = self.time(torch.cat([u.cos(), u.sin()], -1))  # (B or 1, 32)
        x = torch.cat([s, x_t, u.expand(len(x_t), -1)], -1)  # (B, S + A + 32)
        for layer in self.layers[:-1]:
            x = mish(layer(x))
        return self.layers[-1](x)  # (B, A)


class Heads(nn.Module):
    """Q_1..Q_H: H independent MLPs, one batched product per layer; initialised as NoiseNet is.  (B, S + A) -> (H, B)"""

    def __init__(self, width: int, hidden: tuple[int, ...], H: int):
        super().__init__()
        sizes = (width, *hidden, 1)
        self.weights = nn.ParameterList(torch.empty(H, i, o) for i, o in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(H, 1, o) for o in sizes[1:])
        for w in self.weights:
            for head in w:
                nn.init.xavier_uniform_(head)

    def forward(self, s_a: Tensor) -> Tensor:
        *hidden, (w_out, b_out) = zip(self.weights, self.biases)
        x = s_a.expand(len(w_out), -1, -1)  # (H, B, S + A)
        for w, b in hidden:
            x = mish(torch.baddbmm(b, x, w))  # (H, B, width)
        return torch.baddbmm(b_out, x, w_out).squeeze(-1)  # (H, B)


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)) = x n / (n + 2), n = e^x (e^x + 2): one exponential where F.mish takes three functions.
    On a CPU it is half of the time of an update, hence Mish below; without gradients it overwrites x."""
    if torch.compiler.is_compiling():
        e = x.clamp(max=20).exp()
        return x * (e * (e + 2) / (e * (e + 2) + 2))
    if x.is_cuda:
        return F.mish(x)
    return Mish.apply(x) if torch.is_grad_enabled() else Mish.into(x, x)


class Mish(torch.autograd.Function):
    """mish on a CPU, in blocks that stay in cache:  x - 2 x v,  v = 1 / (1 + u^2),  u = 1 + e^x."""

    @staticmethod
    def into(x: Tensor, y: Tensor) -> Tensor:
        one = torch.ones((), dtype=x.dtype)
        for x_k, y_k in zip(x.view(-1).split(2**15), y.view(-1).split(2**15)):
            u = x_k.exp().add_(1)
            torch.addcdiv(x_k, x_k, torch.addcmul(one, u, u), value=-2, out=y_k)
        return y

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return Mish.into(x, torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """1 - 2 v + 4 x v (1 - v) sigmoid(x),  sigmoid(x) = 1 - 1 / u."""
        (x,) = ctx.saved_tensors
        one, out = torch.ones((), dtype=x.dtype), torch.empty_like(x)
        for x_k, g_k, out_k in zip(*(y.view(-1).split(2**15) for y in (x, grad.contiguous(), out))):
            u = x_k.exp().add_(1)
            v = torch.addcmul(one, u, u).reciprocal_()
            slope = u.reciprocal_().sub_(1).mul_(x_k).mul_(v).mul_(v - 1).mul_(4)  # (1/u - 1) x v (v - 1) 4
            torch.mul(g_k, slope.add_(v, alpha=-2).add_(1), out=out_k)
        return out


# --- losses: pure functions, all randomness is an argument ------------------------------------------------
def diffuse(a: Tensor, t: Tensor, eps: Tensor, sched) -> Tensor:
    """Forward process:  x_t = sqrt(ab_t) a + sqrt(1 - ab_t) eps.   a, eps (B, A), t (B,)"""
    ab = sched.alpha_bar[t, None]  # (B, 1)
    return ab.sqrt() * a + (1 - ab).sqrt() * eps


def value_scale(q: Tensor) -> Tensor:
    """C = mean over heads and batch of |Qbar_h(s, a)| at dataset actions, + 1e-6.   q (H, B)"""
    return q.abs().mean() + 1e-6


def value_gradient(q: Heads, s: Tensor, x_t: Tensor, C: Tensor) -> Tensor:
    """g = grad_{x_t} [ mean_h Qbar_h(s, x_t) ] / C,  (B, A), at the noisy and unclipped x_t."""
    x_t = x_t.detach().requires_grad_()
    return torch.autograd.grad(q(torch.cat([s, x_t], -1)).mean(0).sum(), x_t)[0] / C


def actor_loss(e: Tensor, eps: Tensor, g: Tensor, t: Tensor, eta: Tensor, sched, guidance: str):
    """Eq. (5):  eta ||e - eps||^2 + sqrt(1 - ab_t) <e, g>,  both as means over (B, A);  its minimiser is
    e = eps - sqrt(1 - ab_t) g / (2 eta).  hard drops sqrt(1 - ab_t); none and denoised come with g = 0.
    Returns (loss, bc, guidance)."""
    bc = (e - eps).square().mean()
    factor = (1 - sched.alpha_bar[t, None]).sqrt() if guidance == "soft" else 1.0  # (B, 1)
    push = (factor * g * e).mean()  # minimised: e moves along -g, the denoised action along +g
    return eta * bc + push, bc, push


def denoised_guidance(q: Tensor, C: Tensor) -> Tensor:
    """As in Diffusion-QL:  - mean_{h,B} Qbar_h(s, a_hat) / C,  a_hat from a whole reverse chain.  q (H, B)"""
    return -q.mean() / C


def dual_step(eta: Tensor, bc: Tensor, b: float, eta_lr: float) -> Tensor:
    """eta <- clip( eta + eta_lr clip(bc - b, -1, 1), 0.001, 100 ):  grows while bc exceeds its bound b."""
    return (eta + eta_lr * (bc - b).clamp(-1, 1)).clamp(0.001, 100)


def critic_target(
    q: Tensor, r: Tensor, terminal: Tensor, discount: float, rho: float, target: str, next_value: str
) -> Tensor:
    """y = r + gamma (1 - terminal) V,  V = mean_h v_h - rho std_h v_h  (population std),  v_h = mean or max
    over the N next actions of Qbar_h(s', a'_n): over actions first, then over heads.   q (H, B, N) -> (B,)"""
    v = q.mean(-1) if next_value == "mean" else q.amax(-1)  # (H, B)
    if target == "lcb":
        V = v.mean(0) - rho * v.std(0, correction=0)  # (B,)
    else:
        V = v.amin(0) if target == "min" else v.mean(0)
    return r + discount * (1 - terminal) * V


def critic_loss(q: Tensor, y: Tensor) -> Tensor:
    """mean over heads and batch of (Q_h(s, a) - y)^2: one target for all heads.   q (H, B), y (B,)"""
    return (q - y).square().mean()


# --- sampler ----------------------------------------------------------------------------------------------
def sample(actor: NoiseNet, s: Tensor, x: Tensor, noise: Tensor, sched, clip: bool = True) -> Tensor:
    """Reverse chain t = T..1 with noise sqrt(beta_t), not the posterior's.  s (B, S);  x (B, A) start and noise
    (T + 1, B, A), both ~ N(0, I), row t the noise of step t (0, 1 unused);  sched: its numbers are constants here.
    Returns (B, A); with clip in [-1, 1]."""
    beta, alpha, alpha_bar = sched.floats
    for t in range(sched.T, 0, -1):
        ab, ab_prev = alpha_bar[t], alpha_bar[t - 1]
        eps_hat = actor(s, x, torch.full((1,), t, device=x.device))
        x_0 = (x - (1 - ab) ** 0.5 * eps_hat) / ab**0.5
        if clip:
            x_0 = x_0.clamp(-1, 1)
        x = (ab_prev**0.5 * beta[t] * x_0 + alpha[t] ** 0.5 * (1 - ab_prev) * x) / (1 - ab)  # x_0 itself at t = 1
        if t > 1:
            x = x + beta[t] ** 0.5 * noise[t]
    return x


def draw(actor: NoiseNet, s: Tensor, A: int, sched, clip: bool = True) -> Tensor:
    """One action per row of s, with fresh noise.   (B, S) -> (B, A)"""
    x = torch.randn(len(s), A, device=s.device)
    return sample(actor, s, x, torch.randn(sched.T + 1, len(s), A, device=s.device), sched, clip)


def select(a: Tensor, q: Tensor, n: int, temperature: float = 0.0) -> Tensor:
    """Of n actions per state the one of the largest q, or one drawn with probability softmax(q / temperature).
    a (E n, A), q (E n,) -> (E, A)"""
    a, q = a.view(-1, n, a.shape[-1]), q.view(-1, n)
    k = (q / temperature).softmax(-1).multinomial(1).squeeze(1) if temperature > 0 else q.argmax(-1)  # (E,)
    return a[torch.arange(len(a), device=a.device), k]


def make_act(args: Args, agent: Agent, A: int):
    """act(s): N_a candidates of the online actor, of which the ensemble mean selects.  (E, S) -> (E, A)"""
    sched = vp_schedule(args.T)
    chain = per_size(lambda s, x, noise: sample(agent.actor, s, x, noise, sched, args.clip_x0), args)

    @torch.no_grad()
    def act(s: Tensor) -> Tensor:
        s_n = s.repeat_interleave(args.N_a, 0)  # (E N_a, S)
        n, device = len(s_n), s.device
        x, noise = torch.randn(n, A, device=device), torch.randn(sched.T + 1, n, A, device=device)
        a = chain(s_n, x, noise)  # (E N_a, A)
        return a if args.N_a == 1 else select(a, agent.judge(s_n, a), args.N_a, args.temperature)

    return act


# --- one gradient step: eager = compiled = graphed --------------------------------------------------------
@dataclass
class Agent:
    """Everything that learning changes. `step` counts updates on the device, for the learning rate."""

    actor: NoiseNet
    actor_target: NoiseNet
    q: Heads
    q_target: Heads
    actor_opt: torch.optim.Optimizer
    q_opt: torch.optim.Optimizer
    eta: Tensor
    step: Tensor

    def judge(self, s: Tensor, a: Tensor) -> Tensor:
        """mean_h Qbar_h(s, a).   (B, S), (B, A) -> (B,)"""
        return self.q_target(torch.cat([s, a], -1)).mean(0)


def make_agent(args: Args, S: int, A: int, device: torch.device) -> Agent:
    actor, q = NoiseNet(S, A, args.hidden).to(device), Heads(S + A, args.hidden, args.H).to(device)
    return Agent(
        actor=actor, actor_target=deepcopy(actor).requires_grad_(False), q=q,
        q_target=deepcopy(q).requires_grad_(False), actor_opt=adam(actor.parameters(), args.actor_lr),
        q_opt=adam(q.parameters(), args.critic_lr),
        eta=torch.tensor(args.eta, device=device), step=torch.zeros((), device=device, dtype=torch.float64),
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


def make_update(args: Args, agent: Agent, data):
    """update(): one step of the critic, its target, the actor and eta, in this order; draws on the device and
    returns 0-d tensors.  update_ema(): one step of the target actor, called by the loop when it is due."""
    actor, q, q_target, sched = agent.actor, agent.q, agent.q_target, vp_schedule(args.T).to(data.a.device)
    B, N, A, device = args.batch_size, args.N, data.a.shape[1], data.a.device
    one_step = bool(data.terminal.all())  # bandits: y = r, no next action is drawn
    rows = B if device.type == "cpu" else B * N  # a CPU is a fifth faster on blocks that stay in cache (docs/speed.md)

    def update() -> dict[str, Tensor]:
        i = torch.randint(len(data), (B,), device=device)  # [D1]
        s, a, r, s_next, terminal = data.s[i], data.a[i], data.r[i], data.s_next[i], data.terminal[i]
        s_a = torch.cat([s, a], -1)
        for opt, lr in ((agent.q_opt, args.critic_lr), (agent.actor_opt, args.actor_lr)):
            anneal(opt, lr, agent.step / args.steps)

        # --- critic: target actor and target critics as they stand before this step ---
        with torch.no_grad():
            y = r
            if not one_step:
                s_n = s_next.repeat_interleave(N, 0)  # (B N, S)
                s_a_n = torch.cat([s_n, draw(agent.actor_target, s_n, A, sched)], -1)  # (B N, S + A)
                q_n = torch.cat([q_target(x) for x in s_a_n.split(rows)], 1).view(-1, B, N)  # (H, B, N)
                y = critic_target(q_n, r, terminal, args.discount, args.rho, args.target, args.next_value)
        q_a = q(s_a)  # (H, B)
        loss_q = critic_loss(q_a, y)
        descend(loss_q, agent.q_opt, args.clip_norm)
        average(q_target, q, args.polyak)

        # --- actor: the new target critics ---
        t = torch.randint(1, sched.T + 1, (B,), device=device)
        eps = torch.randn_like(a)
        x_t = diffuse(a, t, eps, sched)
        eps_hat = actor(s, x_t, t)  # (B, A)
        with torch.no_grad():
            C = value_scale(q_target(s_a))
        g = torch.zeros_like(a)
        if args.guidance in ("soft", "hard"):
            g = value_gradient(q_target, s, x_t, C)
        loss_pi, bc, push = actor_loss(eps_hat, eps, g, t, agent.eta, sched, args.guidance)
        if args.guidance == "denoised":
            push = denoised_guidance(q_target(torch.cat([s, draw(actor, s, A, sched)], -1)), C)
            loss_pi = loss_pi + push
        descend(loss_pi, agent.actor_opt, args.clip_norm)

        # --- eta: the error of the actor just updated, on the same noise ---
        if args.eta_lr > 0 and args.guidance != "none":
            with torch.no_grad():
                bc_new = (actor(s, x_t, t) - eps).square().mean()
                agent.eta.copy_(dual_step(agent.eta, bc_new, args.b, args.eta_lr))
        agent.step += 1
        losses = {"critic": loss_q, "actor": loss_pi, "bc": bc, "guidance": push, "C": C, "eta": agent.eta.clone()}
        losses |= {"q_mean": q_a.mean(), "q_std": q_a.std(0, correction=0).mean(), "grad_q": g.abs().mean()}
        lr = agent.actor_opt.param_groups[0]["lr"].clone()
        return {f"losses/{k}": x.detach() for k, x in losses.items()} | {"charts/lr": lr}

    def update_ema() -> None:
        average(agent.actor_target, actor, args.polyak)

    return update, update_ema


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


# --- main -------------------------------------------------------------------------------------------------
def agent_state(agent: Agent) -> dict:
    return {f.name: getattr(agent, f.name) for f in fields(agent) if getattr(agent, f.name) is not None}


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
    factor = reward_scale(data) if args.reward_scale == "range" else 1.0
    data.r = factor * (data.r + args.reward_shift)  # not in place: common.py keeps a toy's tensors
    data.a = data.a.clamp(-1 + 1e-5, 1 - 1e-5)  # as released

    agent = make_agent(args, S, A, device)
    run = Run(args, agent_state(agent), device)
    announce(args, data, returns, device)

    update, update_ema = (accelerate(fn, args, device) for fn in make_update(args, agent, data))
    act = make_act(args, agent, A)

    def step(i: int) -> dict[str, Tensor]:
        losses = update()
        if i % args.ema_every == 0 and i > args.ema_after:
            update_ema()
        return losses

    run.train("train", args.steps, step, act)

    if args.env in TOYS:
        toy_figure(args, agent, data, run.folder, act)
    run.finish(returns, act)


@torch.no_grad()
def toy_figure(args: Args, agent: Agent, data, folder: Path, act) -> None:
    """samples.png"""
    s = torch.zeros(2000, 1, device=data.a.device)

    def value(a: Tensor) -> Tensor:
        return agent.judge(s[:1].expand(len(a), -1), a)

    plot_toy(folder / "samples.png", args.env, data, value, act(s))


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
