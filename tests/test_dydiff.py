"""DyDiff's mathematics, checked on a CPU: each test states one fact of the method and how to derive it.

    networks            sizes, initial bounds, the U-net and the policies written a second time
    diffusion           preconditioning, loss and conditions by hand; the sampler on laws known in closed form
    data                the three frames, windows by hand
    ensemble, reward    bounds, losses, elites, early stopping
    rollouts            known and linear systems, filters, ends of trajectories, the ring
    policies            td3bc, cql, diffql: every update written a second time, one plain network at a time
    training            rates and averages of the diffusion model, SynthER, eager = compiled

Letters as in dydiff.py: B batch, S state, A action, D = S + A, H rows, E networks, b start states.
"""

import itertools
import math
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor

import common
import dydiff

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parent.parent
PAPER = SimpleNamespace(**dydiff.PAPER)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Everything that a test creates is double: two computations then agree to 1e-9, or they differ."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(got, want, atol=1e-6, rtol=0.0):
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got.detach(), want.detach(), atol=atol, rtol=rtol)


def tiny_args(**settings):
    """Small, on the CPU, with rates so high that each mistake shows."""
    args = dydiff.Args(
        env="pendulum-demo", base="td3bc", hidden=(5, 4), policy_hidden=(6, 5), lr=0.02, policy_lr=0.03, discount=0.9,
        polyak=0.1, alpha_bc=1.7, clip_norm=0.05, eta_q=0.8, b=6, H=4, channels=(8, 16), N=3, M=2, capacity=40,
        stop_at_padding=False, dynamics_hidden=(5, 4), reward_hidden=(4,), E=3, elites=2, synther_width=8,
    )  # fmt: skip
    return dydiff.resolve(replace(args, **{"compile": "off", "graph": "off"} | settings))


def randomised(net, std=0.5):
    for p in net.parameters():  # biases and GroupNorm's too: zeros and ones would hide a mistake
        nn.init.normal_(p, std=std)
    return net


def count(net):
    return sum(p.numel() for p in net.parameters())


def frames_of(S, A, **values):
    """Identity in every direction but for the given values; model frame = raw = [-1, 1]."""
    frames = dydiff.Frames(S, A)
    default = dict(mean=0.0, std=1.0, s_low=-1.0, s_span=2.0, a_low=-1.0, a_span=2.0)
    with torch.no_grad():
        for k, v in (default | values).items():
            getattr(frames, k).copy_(torch.as_tensor(v).expand_as(getattr(frames, k)))
    return frames


def same(net, other):
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


# --- networks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("D, want", [(14, 58_751_246), (23, 58_759_319), (6, 58_744_070)])
def test_the_unet_of_the_paper_has_the_authors_number_of_parameters(D, want):
    with torch.device("meta"):
        assert count(dydiff.UNet(D, (128, 512, 1024))) == want


def test_numbers_of_parameters_of_the_other_networks():
    """Ensemble: 7 (14 * 200 + 200 + 3 (200^2 + 200) + 200 * 22 + 22) = 896,154."""
    assert count(dydiff.UNet(4, (16, 32, 64))) == 251_268
    assert count(dydiff.Ensemble(11, 3, (200,) * 4, 7, 5)) == 896_154
    assert count(dydiff.Ensemble(17, 6, (200,) * 4, 7, 5)) == 925_638
    assert count(dydiff.DiffusionPolicy(11, 3, (256,) * 3)) == 141_363


def test_initial_bounds_of_the_ensemble_are_the_authors():
    """1 / sqrt(in * out): 0.0189, 0.005, 0.005, 0.005, 0.0151; biases have the same."""
    heads = dydiff.Ensemble(11, 3, (200,) * 4, 7, 5).heads
    for w, b, want in zip(heads.weights, heads.biases, (0.0188982, 0.005, 0.005, 0.005, 0.0150756), strict=True):
        for p in (w, b):
            assert 0.95 * want < p.abs().max() <= want
        assert abs(w.std().item() / (want / math.sqrt(3)) - 1) < 0.02


def test_the_base_networks_start_with_zero_biases_and_variance_one_over_fan_in():
    args = tiny_args(hidden=(256, 256), policy_hidden=(256, 256), base="cql")
    agent = dydiff.make_agent(args, 11, 3, CPU)
    for heads in (agent.q, agent.policy.net):
        assert all((b == 0).all() for b in heads.biases)
        for w in heads.weights:
            assert abs(w.std().item() * w.shape[1] ** 0.5 - 1) < 4 / math.sqrt(2 * w.numel())
    assert agent.log_alpha.item() == 0 and same(agent.q, agent.q_target)
    assert agent.q.weights[0].shape == (2, 14, 256) and agent.policy.net.weights[-1].shape == (1, 256, 6)
    assert not any(p.requires_grad for p in agent.q_target.parameters())


def test_the_reward_network_starts_as_nn_linear():
    """Uniform within 1 / sqrt(fan-in), weights and biases."""
    heads = dydiff.Heads(14, (256, 256), 1, 1, "relu", "torch")
    for w, b in zip(heads.weights, heads.biases):
        bound = w.shape[1] ** -0.5
        assert 0.9 * bound < w.abs().max() <= bound and b.abs().max() <= bound and (b != 0).any()


def test_heads_are_independent_mlps():
    net = randomised(dydiff.Heads(3, (5, 4), 2, 3, "silu", "normal"))
    x, each = torch.randn(7, 3), torch.randn(3, 7, 3)
    want = [[slow_mlp(q, y, F.silu) for q, y in zip(leaves(net), ys)] for ys in ([x] * 3, each)]
    for got, ys in zip((net(x), net(each)), want):
        close(got, torch.stack(ys))


def leaves(heads):
    """The parameters of each network alone: [[weights..., biases...], ...]"""
    both = (*heads.weights, *heads.biases)
    return [[p[e].detach().clone().requires_grad_() for p in both] for e in range(len(heads.weights[0]))]


def slow_mlp(params, x, act=F.relu):
    n = len(params) // 2
    for i in range(n):
        x = x @ params[i] + params[n + i]
        x = act(x) if i < n - 1 else x
    return x


def test_sinusoidal_embedding_by_hand():
    """Width 4: frequencies 1 and 1/10000, [sin | cos]."""
    want = [[math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]]
    close(dydiff.sinusoidal_embedding(tensor([2.0]), 4), want)


def test_the_unet_equals_a_second_slow_one(float64):
    net = randomised(dydiff.UNet(3, (8, 16, 24)), 0.3)
    p, x, c = dict(net.named_parameters()), torch.randn(2, 8, 3), tensor([-0.3, 1.1])

    def conv_block(x, name):
        x = F.conv1d(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"], padding=2)
        return F.mish(F.group_norm(x, 8, p[f"{name}.1.weight"], p[f"{name}.1.bias"]))

    def res_block(x, name):
        h = conv_block(x, f"{name}.first")
        h = h + F.linear(F.mish(e), p[f"{name}.embed.weight"], p[f"{name}.embed.bias"])[:, :, None]
        skip = f"{name}.skip.weight" in p
        x_ = F.conv1d(x, p[f"{name}.skip.weight"], p[f"{name}.skip.bias"]) if skip else x
        return conv_block(h, f"{name}.second") + x_

    k = torch.exp(-torch.arange(4) * math.log(10_000) / 3)
    e = torch.cat([torch.sin(c[:, None] * k), torch.cos(c[:, None] * k)], 1)
    e = F.mish(F.linear(e, p["embed.0.weight"], p["embed.0.bias"]))
    e = F.linear(e, p["embed.2.weight"], p["embed.2.bias"])
    h, kept = x.mT, []
    for i in range(3):
        h = res_block(res_block(h, f"down.{i}.0"), f"down.{i}.1")
        kept.append(h)
        if i < 2:
            h = F.conv1d(h, p[f"shrink.{i}.weight"], p[f"shrink.{i}.bias"], stride=2, padding=1)
    h = res_block(res_block(h, "middle.0"), "middle.1")
    for i in range(2):
        h = res_block(res_block(torch.cat([h, kept[2 - i]], 1), f"up.{i}.0"), f"up.{i}.1")
        h = F.conv_transpose1d(h, p[f"grow.{i}.weight"], p[f"grow.{i}.bias"], stride=2, padding=1)
    want = F.conv1d(conv_block(h, "out.0"), p["out.1.weight"], p["out.1.bias"]).mT
    close(net(x, c), want, 1e-9)
    assert want.std() > 0.1


def test_the_log_probability_of_a_squashed_gaussian_is_that_of_torch():
    net, s = randomised(dydiff.Gaussian(3, 2, (6,))), torch.randn(40, 3)
    a, log_p = net.sample(s, 5)
    mean, log_std = slow_mlp(leaves(net.net)[0], s).chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    law = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    inside = a.abs().amax(-1) < 0.99  # atanh of what is nearly 1 has no digits left
    assert a.shape == (5, 40, 2) and log_p.shape == (5, 40) and inside.sum() > 50
    close(log_p[inside], law.log_prob(a).sum(-1)[inside], 1e-3)
    close(net.act(s), mean.tanh())


def test_the_spread_of_the_gaussian_is_clamped_and_its_samples_reparameterised():
    """log_std 9 is 2 and -30 is -20; d tanh(mean + std eps) / d mean = 1 - a^2."""
    net = dydiff.Gaussian(1, 2, (4,))
    net.net.weights[-1].data.zero_()
    net.net.biases[-1].data.copy_(tensor([0.1, 0.2, 9.0, -30.0]))
    close(net(torch.zeros(1, 1))[1], [[2.0, -20.0]])
    a = net.sample(torch.zeros(1, 1))[0]
    (grad,) = torch.autograd.grad(a[0, 0, 0], net.net.biases[-1])
    close(grad[0, 0, 0], 1 - a[0, 0, 0] ** 2)


BETAS = (0.1959, 0.4588, 0.6358, 0.7549, 0.8350)  # of the sheet
BETA = [1 - math.exp(-0.1 / 5 - 0.5 * 9.9 * (2 * t - 1) / 25) for t in range(1, 6)]  # t = 1..5
ALPHA_BAR = [1.0, *itertools.accumulate((1 - x for x in BETA), lambda x, y: x * y)]


def slow_noise(net, a, t, s):
    """eps(a_t, t, s): [a_t, embedding of t - 1, s] -> Mish MLP.   t (B,)"""
    k = torch.exp(-torch.arange(8) * math.log(10_000) / 7).to(a)
    e = torch.cat([torch.sin((t[:, None] - 1) * k), torch.cos((t[:, None] - 1) * k)], 1)
    p = dict(net.named_parameters())
    e = F.linear(F.mish(F.linear(e, p["time.0.weight"], p["time.0.bias"])), p["time.2.weight"], p["time.2.bias"])
    x = torch.cat([a, e, s], 1)
    for i in range(0, len(net.net) - 1, 2):
        x = F.mish(F.linear(x, p[f"net.{i}.weight"], p[f"net.{i}.bias"]))
    return F.linear(x, p[f"net.{len(net.net) - 1}.weight"], p[f"net.{len(net.net) - 1}.bias"])


def slow_chain(net, x, noise, s):
    """Posterior q(x_{t-1} | x_t, clipped x_0), noise[t] (B, A) but in the last step."""
    for t in (5, 4, 3, 2, 1):
        ab, prev, beta = ALPHA_BAR[t], ALPHA_BAR[t - 1], BETA[t - 1]
        eps = slow_noise(net, x, torch.full((len(s),), t), s)
        x_0 = (x / math.sqrt(ab) - math.sqrt(1 / ab - 1) * eps).clamp(-1, 1)
        x = beta * math.sqrt(prev) / (1 - ab) * x_0 + math.sqrt(1 - beta) * (1 - prev) / (1 - ab) * x
        if t > 1:
            x = x + math.sqrt(beta * (1 - prev) / (1 - ab)) * noise[t]
    return x.clamp(-1, 1)


def test_the_chain_of_diffusion_ql_equals_a_second_slow_one(float64):
    net, s = randomised(dydiff.DiffusionPolicy(3, 2, (6, 5)), 0.4), torch.randn(9, 3)
    close(tensor(BETA), BETAS, 6e-5)
    torch.manual_seed(1)
    got = net.act(s)
    torch.manual_seed(1)
    x, noise = torch.randn(9, 2), {t: torch.randn(9, 2) for t in (5, 4, 3, 2)}
    close(got, slow_chain(net, x, noise, s), 1e-5)  # the schedule is float32
    assert 0 < (got.abs() < 1).float().mean()


# --- preconditioning, loss, conditions --------------------------------------------------------------------
def test_preconditioning_at_sigma_one_half():
    """c_skip 1/2, c_out 0.353553, c_in sqrt(2), c_noise ln(0.5) / 4 = -0.173287."""
    seen = []

    def net(u, c):
        seen.append((u, c))
        return torch.full_like(u, 10.0)

    x = tensor([[[1.0, -2.0]]])
    got = dydiff.denoise(net, x, tensor([0.5]))
    close(got, 0.5 * x + 0.3535534 * 10)
    close(seen[0][0], 1.4142136 * x)
    close(seen[0][1], [-0.1732868])


def test_preconditioning_takes_one_sigma_per_row():
    """sigma 1.2: c_skip 0.25/1.69, c_out 0.6/1.3, c_in 1/1.3."""
    got = dydiff.denoise(lambda u, c: u + c[:, None], tensor([[1.0], [1.0]]), tensor([1.2, 0.5]))
    want = [0.25 / 1.69 + 0.6 / 1.3 * (1 / 1.3 + math.log(1.2) / 4), 0.5 + 0.3535534 * (1.4142136 - 0.1732868)]
    close(got[:, 0], want)


def test_written_conditions_enter_unscaled_but_the_skip_reads_x():
    got = dydiff.denoise(lambda u, c: u, tensor([[3.0, 3.0]]), tensor([0.5]), lambda u: torch.zeros_like(u) + 7)
    close(got, [[1.5 + 0.3535534 * 7] * 2])


def test_edm_loss_by_hand():
    """sigma 0.5: lambda = 0.5 / 0.0625 = 8, squares 1 + 4 + 0 + 9 = 14;  sigma 1.2: 1.69 / 0.36, squares 1."""
    assert abs((0.5**2 + 0.25) / (0.5 * 0.5) ** 2 - 8) < 1e-12
    e = tensor([[[1.0, 2.0], [0.0, 3.0]], [[0.0, 0.0], [1.0, 0.0]]])
    y = torch.randn(2, 2, 2)
    close(dydiff.edm_loss(y + e, y, tensor([0.5, 1.2])), (8 * 14 + 1.69 / 0.36) / 2, 1e-4)
    mask = tensor([[0.0, 0.0], [1.0, 0.0]])  # S = A = 1: states beyond the first
    close(dydiff.edm_loss(y + e, y, tensor([0.5, 1.2]), mask), 1.69 / 0.36 / 2, 1e-5)


def test_condition_by_hand():
    """S = 2, A = 1: first state 7 8, actions 5 6 4, the rest stays."""
    x = torch.arange(9.0).view(1, 3, 3)
    got = dydiff.condition(x, tensor([[7.0, 8.0]]), tensor([[[5.0], [6.0], [4.0]]]))
    close(got, [[[7, 8, 5], [3, 4, 6], [6, 7, 4]]])
    close(x, torch.arange(9.0).view(1, 3, 3))  # not in place


# --- sampler ----------------------------------------------------------------------------------------------
def test_noise_levels_and_churn_of_the_paper():
    """t_0..t_3 = 80, 67.6671, 57.0012, 47.81; churn at i = 3..22 (20 steps), g = sqrt(2) - 1: 60 / 34 is capped."""
    sigmas = common.edm_sigmas(PAPER.N)
    close(sigmas[:4], [80, 67.6671, 57.0012, 47.81], 1e-3)
    close(sigmas[-2:], [0.002, 0], 1e-12)
    g = dydiff.churn(sigmas, 60.0)
    assert len(g) == 34 and [i for i, x in enumerate(g) if x] == list(range(3, 23))
    assert all(abs(x - 0.41421356) < 1e-8 for x in g[3:23]) and sigmas[23] < 0.3302
    assert all(abs(x - 0.1) < 1e-12 for x in dydiff.churn(sigmas, 3.4)[3:23])
    assert not any(dydiff.churn(sigmas, 0.0))


def test_two_steps_of_the_sampler_by_hand():
    """denoised = 0: dx/dt = x / t.  t 4 -> 2: Euler x/2 = exact, d' the same;  2 -> 0: Euler.  With denoised = 1 and
    x_0 = 4 z = 8:  d = 7/4, x' = 4.5, d' = 3.5/2 = 7/4, x = 4.5;  then d = 3.5/2, x = 4.5 - 3.5 = 1."""
    sigmas, seen = tensor([4.0, 2.0, 0.0]), []

    def one(x, t):
        seen.append((float(x), t))
        return torch.ones_like(x)

    close(dydiff.edm_sample(one, tensor([2.0]), sigmas, [0.0, 0.0]), [1.0])
    assert seen == [(8.0, 4.0), (4.5, 2.0), (4.5, 2.0)]  # 2 N - 1 calls


def test_heuns_correction_by_hand():
    """denoised(x, t) = t, z = 2: x = 8, d = (8 - 4)/4 = 1, x' = 6, d' = (6 - 2)/2 = 2, x = 8 - 2 * 1.5 = 5; then
    d = (5 - 2)/2, x = 5 - 3 = 2: no correction.  The last step ends at the denoiser's output from any x, so what it was
    asked for tells whether the step before was right."""
    sigmas, seen = tensor([4.0, 2.0, 0.0]), []

    def denoised(x, t):
        seen.append((float(x), t))
        return 0 * x + t

    close(dydiff.edm_sample(denoised, tensor([2.0]), sigmas, [0.0, 0.0]), [2.0])
    assert seen == [(8.0, 4.0), (6.0, 2.0), (5.0, 2.0)]


def test_churn_raises_sigma_and_adds_its_noise(monkeypatch):
    """g = 0.4 at t = 5: t^ = 7, variance S_NOISE^2 (49 - 25)."""
    monkeypatch.setattr(dydiff, "S_NOISE", 1.5)
    sigmas, seen = tensor([5.0, 0.0]), []

    def zero(x, t):
        seen.append((x, t))
        return 0 * x

    got = dydiff.edm_sample(zero, torch.full((50_000,), 3.0), sigmas, [0.4])
    x, t = seen[0]
    assert abs(t - 7) < 1e-12 and len(seen) == 1
    close(x.mean(), 15.0, 0.15)
    close(x.var(), 24 * 2.25, 1.5)
    close(got, 0 * x, 1e-5)


@pytest.mark.parametrize("N, S_churn, room", [(200, 0.0, 0.02), (34, 60.0, 0.12)])
def test_the_sampler_with_the_exact_denoiser_draws_a_gaussian(N, S_churn, room):
    """D(x; sigma) = m + C (C + sigma^2)^-1 (x - m).  The released churn inflates the variance by some percent."""
    m, C = tensor([0.3, -0.2]).double(), tensor([[0.3, 0.1], [0.1, 0.2]]).double()
    sigmas = common.edm_sigmas(N)

    def denoised(x, t):
        return m + (x - m) @ torch.linalg.solve(C + t**2 * torch.eye(2), C)  # symmetric: they commute

    z = torch.randn(40_000, 2, dtype=torch.float64)
    x = dydiff.edm_sample(denoised, z, sigmas, dydiff.churn(sigmas, S_churn))
    close(x.mean(0), m, 0.012)
    ratio = torch.linalg.eigvals(torch.linalg.solve(C, x.T.cov())).real
    assert (ratio > 0.98).all() and (ratio < 1 + room + 0.015).all()


class Recorder:
    """A network that returns 0 and keeps its inputs and sigmas."""

    def __init__(self):
        self.seen, self.sigmas = [], []

    def __call__(self, u, c):
        self.seen.append(u)
        self.sigmas.append(float((4 * c[0]).exp()))
        return 0 * u


def draw_args(**changes):
    return SimpleNamespace(**vars(PAPER) | dict(dtype="float32") | changes)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("rewrite", [True, False])
def test_conditions_are_bit_exact_whatever_the_network_says(scaled, rewrite, monkeypatch):
    """Row 0 of the states returned, and every row 0 and action that the sampler holds after a step."""
    s_0, a, net, held = torch.randn(3, 2), torch.randn(3, 4, 1), Recorder(), []
    true = dydiff.edm_sample

    def spy(*inputs):
        x = true(*inputs)
        held.append(x)
        return x

    monkeypatch.setattr(dydiff, "edm_sample", spy)
    s = dydiff.draw_states(draw_args(scale_conditions=scaled, rewrite=rewrite), net, s_0, a)
    assert s.shape == (3, 4, 2) and s.dtype == torch.float32 and torch.equal(s[:, 0], s_0)
    assert held[0].dtype == torch.float64 and torch.equal(held[0][..., 2:], a.double())
    assert len(net.seen) == 67 and all(u.dtype == torch.float32 for u in net.seen)


@pytest.mark.parametrize("rewrite", [True, False])
def test_after_the_churn_the_network_sees_conditions_only_with_rewrite(rewrite):
    """Scaled by c_in.  Without rewriting the 20 churned first calls see them under noise, all others clean."""
    s_0, a, net = torch.randn(3, 2), torch.randn(3, 4, 1), Recorder()
    dydiff.draw_states(draw_args(rewrite=rewrite), net, s_0, a)
    dirty = []
    for i, (u, sigma) in enumerate(zip(net.seen, net.sigmas)):
        x = u * math.sqrt(sigma**2 + 0.25)
        off = max(float((x[:, 0, :2] - s_0).abs().max()), float((x[..., 2:] - a).abs().max()))
        if off > 1e-3:
            dirty.append(i // 2)
            assert i % 2 == 0  # calls of step i: 2 i, and Heun's 2 i + 1
    assert dirty == ([] if rewrite else list(range(3, 23)))


def test_at_sigma_80_scaled_conditions_are_a_hundredth_of_what_they_were():
    """c_in = 1 / sqrt(6400.25) = 0.0124998; the rest of the input has variance 6400 / 6400.25."""
    s_0, a = torch.randn(500, 2), torch.randn(500, 4, 1)
    for scaled, factor in ((True, 0.0124998), (False, 1.0)):
        net = Recorder()
        dydiff.draw_states(draw_args(scale_conditions=scaled), net, s_0, a)
        assert abs(net.sigmas[0] - 80) < 1e-3
        close(net.seen[0][:, 0, :2], factor * s_0, 1e-6)
        close(net.seen[0][..., 2:], factor * a, 1e-6)
        assert abs(float(net.seen[0][:, 1:, :2].std()) - 1) < 0.05
        if not scaled:  # in every call, noise or not
            assert all(torch.equal(u[..., 2:], a) and torch.equal(u[:, 0, :2], s_0) for u in net.seen)


@pytest.mark.parametrize("scaled", [True, False])
def test_states_drawn_for_a_linear_system_have_its_law(scaled):
    """s' = 0.8 s + 0.5 a + 0.3 noise: given s_0 and a, mean by the recursion, C = 0.09 L L^T, L_ij = 0.8^(i-j).  The
    network reads both conditions from its own input."""
    L = tensor([[0.8 ** (i - j) if j <= i else 0.0 for j in range(3)] for i in range(3)])
    C, eye = 0.09 * L @ L.T, torch.eye(3)

    def net(u, c):
        sigma = float((4 * c[0]).exp())
        norm = math.sqrt(sigma**2 + 0.25)
        x, read = u * norm, u * norm if scaled else u
        s = [read[:, 0, 0]]
        for t in range(3):
            s.append(0.8 * s[-1] + 0.5 * read[:, t, 1])
        mean, y = torch.stack(s[1:], 1), x[:, 1:, 0]
        D = mean + (y - mean) @ torch.linalg.solve(C + sigma**2 * eye, C)
        out = torch.zeros_like(u)
        out[:, 1:, 0] = (D - 0.25 / norm**2 * y) * norm / (sigma * 0.5)  # so that denoise returns D
        return out

    s_0, a = torch.full((20_000, 1), 0.4), tensor([0.5, -0.3, 0.9, 0.2]).view(1, 4, 1).expand(20_000, 4, 1)
    args = draw_args(scale_conditions=scaled, rewrite=True, S_churn=0.0, N=60)
    s = dydiff.draw_states(args, net, s_0, a)[..., 0]
    close(s.mean(0), [0.4, 0.57, 0.306, 0.6948], 0.012)
    ratio = torch.linalg.eigvals(torch.linalg.solve(C, s[:, 1:].T.cov())).real
    assert (ratio > 0.97).all() and (ratio < 1.06).all()


def test_bfloat16_changes_the_network_alone():
    net = nn.Linear(3, 3)
    s_0, a, seen = torch.randn(2, 2), torch.randn(2, 4, 1), []

    def call(u, c):
        seen.append(net(u).dtype)
        return net(u)

    s = dydiff.draw_states(draw_args(dtype="bfloat16", N=2), call, s_0, a)
    assert set(seen) == {torch.bfloat16} and torch.equal(s[:, 0], s_0)


# --- frames, windows --------------------------------------------------------------------------------------
def fitted(constant=False):
    s, stored_s, stored_a = torch.randn(50, 3), 5 * torch.rand(80, 3) - 1, torch.rand(80, 2) - 0.5
    if constant:
        s[:, 1], stored_s[:, 1], stored_a[:, 0] = 4.0, 4.0, 0.25
    frames = dydiff.Frames(3, 2)
    with torch.no_grad():
        frames.fit(s, stored_s, stored_a)
    return frames, s, stored_s, stored_a


def test_frames_by_hand():
    """Policy: (s - mean) / (population std + 1e-6).  Model: minimum -> -1, maximum -> 1, of the stored rows."""
    frames, s, stored_s, stored_a = fitted()
    close(frames.to_policy(s).mean(0), torch.zeros(3))
    close(frames.std, s.std(0, correction=0) + 1e-6, 1e-7)
    close(frames.to_model(stored_s).amin(0), -torch.ones(3))
    close(frames.to_model(stored_s).amax(0), torch.ones(3))
    close(frames.action_to_model(stored_a).amax(0), torch.ones(2))
    close(frames.to_model((stored_s.amin(0) + stored_s.amax(0)) / 2), torch.zeros(3))


def test_frames_round_trip_and_clip_on_the_way_back_only():
    frames, _, stored_s, stored_a = fitted()
    close(frames.from_model(frames.to_model(stored_s)), stored_s, 1e-5)
    close(frames.action_from_model(frames.action_to_model(stored_a)), stored_a, 1e-5)
    close(frames.from_policy(frames.to_policy(stored_s)), stored_s, 1e-5)
    x = 1.9 * torch.rand(20, 3) - 0.95
    close(frames.to_model(frames.from_model(x)), x, 1e-5)
    out = stored_s.amax(0) + 1
    assert (frames.to_model(out) > 1).all()  # not clipped
    close(frames.from_model(frames.to_model(out)), stored_s.amax(0), 1e-5)
    close(frames.from_model(frames.to_model(out), clip=False), out, 1e-5)
    close(frames.action_from_model(torch.full((2,), -7.0)), stored_a.amin(0), 1e-5)


def test_constant_columns_are_no_division_by_zero():
    """Model frame -1 = the constant; policy frame 0."""
    frames, s, stored_s, stored_a = fitted(constant=True)
    close(frames.to_model(stored_s)[:, 1], -torch.ones(80))
    close(frames.to_policy(s)[:, 1], torch.zeros(50), 1e-3)
    close(frames.from_model(frames.to_model(stored_s)), stored_s, 1e-5)
    assert frames.action_to_model(stored_a).isfinite().all()


def test_frames_are_saved_but_not_trained():
    frames = dydiff.Frames(3, 2)
    assert len(frames.state_dict()) == 6 and not [*frames.parameters()]


def flags(*rows, n):
    return torch.zeros(n).scatter(0, tensor(rows), 1).bool().numpy()


def test_trajectories_are_cut_after_ends_and_the_trailing_rows_dropped():
    """10 rows, terminal at 2, time-out at 6: rows 0-2, 3-6; 7-9 belong to no finished trajectory."""
    got = dydiff.trajectories(flags(2, n=10), flags(6, n=10))
    assert got == [(0, 3), (3, 4)]
    assert dydiff.trajectories(flags(2, 3, n=5), flags(3, n=5)) == [(0, 3), (3, 1)]


def test_windows_by_hand():
    """H = 4.  T = 3 < H: one, padded; T = 4: one; T = 6: three."""
    rows = torch.arange(15.0)[:, None].repeat(1, 2)
    windows = dydiff.make_windows(rows, [(0, 3), (3, 4), (7, 6)], 4)
    assert len(windows) == 5
    got = windows[torch.arange(5)]
    p = -1.0001
    close(got[..., 0], [[0, 1, 2, p], [3, 4, 5, 6], [7, 8, 9, 10], [8, 9, 10, 11], [9, 10, 11, 12]])
    assert got.shape == (5, 4, 2) and torch.equal(got[..., 0], got[..., 1])
    close(dydiff.make_windows(rows, [(14, 1)], 4)[tensor([0])][0, :, 0], [14, p, p, p])  # the end of the file
    assert dydiff.unpadded(windows, 10).tolist() == [1, 2, 3, 4] and dydiff.unpadded(windows, 2).tolist() == [1, 4]


def test_windows_copy_nothing():
    rows = torch.zeros(100, 2)
    windows = dydiff.make_windows(rows, [(0, 100)], 50).to(CPU)
    assert windows.rows.data_ptr() == rows.data_ptr()
    assert len(windows) == 51 and windows.start.numel() + windows.length.numel() == 102
    rows[7] = 3.0
    assert (windows[tensor([0])][0, 7] == 3).all()


# --- ensemble and reward network --------------------------------------------------------------------------
def test_log_variances_are_squashed_into_their_bounds():
    """raw = 0: 0.5 - softplus(0.5) = -0.474077, + 10, softplus, - 10: + ln(1 + e^-9.53) = -0.4740041.  Far out:
    -10, and 0.5 + ln(1 + e^-10.5) = 0.5000275."""
    net = dydiff.Ensemble(1, 1, (2,), 1, 1)
    for p in net.parameters():
        nn.init.zeros_(p)
    for raw, want in ((0.0, -0.4740041), (-1000.0, -10.0), (1000.0, 0.5000275), (-5.0, -4.9972)):
        net.heads.biases[-1].data[..., 1] = raw
        mean, log_var = net(torch.zeros(1, 2))
        first = 0.5 - math.log1p(math.exp(-abs(0.5 - raw))) - max(0.5 - raw, 0)
        second = -10 + math.log1p(math.exp(-abs(first + 10))) + max(first + 10, 0)
        close(log_var[0, 0, 0], second, 1e-5)
        close(log_var[0, 0, 0], want, 3e-3)
        assert mean.shape == (1, 1, 1) and mean == 0


def test_ensemble_loss_by_hand():
    """Network 0: errors 1, 2, log-variances 0, ln 4: (1 + 4/4)/2 + ln(4)/2; network 1: 9 and 0, lv -1: 4.5 e - 1."""
    mean = tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    log_var = tensor([[[0.0], [math.log(4)]], [[-1.0], [-1.0]]])
    close(dydiff.ensemble_loss(mean, log_var, torch.zeros(2, 1)), [1 + math.log(2), 4.5 * math.e - 1], 1e-5)


def test_a_prediction_takes_elites_alone_and_every_row_its_own():
    """Network e predicts s + 10^e; elites 2 and 0 of 4."""
    net = dydiff.Ensemble(2, 1, (3,), 4, 2)
    for p in net.parameters():
        nn.init.zeros_(p)
    net.heads.biases[-1].data[:, 0, :2] = (10.0 ** torch.arange(4))[:, None]
    net.elites.copy_(tensor([2, 0]))
    s = torch.randn(4000, 2)
    move = net.predict(s, torch.zeros(4000, 1)) - s
    close(move[:, 0], move[:, 1], 1e-4)  # a row has one network
    share = (move[:, 0].round() == 100).float().mean()
    assert set(move[:, 0].round().tolist()) == {1.0, 100.0} and abs(share - 0.5) < 0.035


def test_the_optimisers_have_the_authors_rates_and_decays():
    """2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4 on the weights, nothing on the biases; the reward network has none."""
    args = replace(dydiff.resolve(dydiff.Args(env="hopper-medium-v2")), channels=(8,), capacity=10)
    agent = dydiff.make_agent(args, 3, 1, CPU)
    groups = agent.ensemble_opt.param_groups
    assert [g["weight_decay"] for g in groups] == [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4, 0]
    assert all(g["params"][0] is w for g, w in zip(groups, agent.ensemble.heads.weights))
    assert sum(len(g["params"]) for g in groups) == 10
    assert all(abs(float(g["lr"]) - 1e-4) < 1e-9 for g in (*groups, *agent.reward_opt.param_groups))
    assert agent.reward_opt.param_groups[0]["weight_decay"] == 0
    for opt, lr in ((agent.policy_opt, 3e-4), (agent.q_opt, 3e-4), (agent.unet_opt, 1e-3)):
        group = opt.param_groups[0]
        assert abs(float(group["lr"]) - lr) < 1e-9 and group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
        assert group["weight_decay"] == 0


class Two(nn.Module):
    """E = 2 numbers; their loss pulls each up by 1 per SGD step."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2, 1))


def fit_of(script, n=256, steps=100, fit=None, start=0):
    """Runs a fit with hold-out errors from a script; returns net, best, fit, drawn indices, returned losses."""
    net, script, drawn = Two(), iter(script), []
    best = deepcopy(net).requires_grad_(False)
    fit = tensor([math.inf, math.inf, 0.0, 0.0]) if fit is None else fit
    opt = torch.optim.SGD(net.parameters(), lr=2.0)

    def loss(i):
        drawn.append(i)
        return -net.x[:, 0]

    args = SimpleNamespace(compile="off", graph="off")
    update = dydiff.make_fit_update(
        args, "dynamics", steps, net, best, opt, fit, loss, lambda: tensor(next(script)), n, 2
    )
    return net, best, fit, drawn, [update(i) for i in range(start, steps)]


def test_best_weights_are_kept_per_network():
    """Checks after 1, 2, 3 steps, weights 1, 2, 3: network 0 is best at 2, network 1 at 3."""
    net, best, fit, _, _ = fit_of([(5.0, 5.0), (3.0, 6.0), (4.0, 2.0)], steps=3)
    close(best.x[:, 0], [2, 3])
    close(net.x[:, 0], [3, 3])
    close(fit, [3, 2, 0, 0])


def test_a_fit_stops_at_the_eighth_check_without_any_improvement():
    """Improvements at check 1 and, of one network, 4; checks 5..12 have none: 12 steps; equal is no improvement."""
    script = [(5.0, 5.0), (6.0, 5.0), (5.0, 7.0), (5.0, 4.0), *[(5.0, 4.0)] * 100]
    net, best, fit, drawn, out = fit_of(script, steps=40)
    assert len(drawn) == 12
    close(net.x[:, 0], [12, 12])
    close(best.x[:, 0], [1, 4])
    close(fit, [5, 4, 8, 1])
    assert out[-1]["losses/dynamics"] == out[11]["losses/dynamics"] and len(out) == 40


def test_a_stopped_fit_stays_stopped_after_a_resume():
    net, best, _, drawn, _ = fit_of([], steps=40, fit=tensor([5.0, 4.0, 8.0, 1.0]), start=20)
    assert not drawn and (net.x == 0).all() and (best.x == 0).all()


def test_checks_come_once_per_epoch_and_at_the_end():
    """n = 1100 rows: epochs of 4 steps; 10 steps: checks at 4, 8, 10.  A fourth would find the script empty."""
    _, best, fit, _, _ = fit_of([(5.0, 5.0), (4.0, 6.0), (6.0, 3.0)], n=1100, steps=10)
    close(best.x[:, 0], [8, 10])
    close(fit[:2], [4, 3])


def test_every_network_draws_its_own_minibatches_with_replacement():
    _, _, _, drawn, _ = fit_of([(-1.0 * k, 1.0) for k in range(40)], n=300, steps=40)
    i = torch.stack(drawn)
    assert i.shape == (40, 2, 256) and i.min() == 0 and i.max() == 299
    assert not torch.equal(i[:, 0], i[:, 1])
    assert all(len(x.unique()) < 256 for x in i.flatten(0, 1))  # 300 * (1 - e^-0.85) = 172 different ones


def regressions(monkeypatch, known, steps=30):
    """train_regressions on 400 rows with s' = s + 0.1 and r = 1; the successor of terminal rows is elsewhere."""
    args = tiny_args(dynamics_steps=steps, reward_steps=steps, dynamics_lr=0.01)
    agent = dydiff.make_agent(args, 2, 1, CPU)
    s, a, terminal = torch.randn(400, 2), torch.randn(400, 1), (torch.rand(400, 1) < 0.3).float()
    rows = torch.cat([s, a, torch.ones(400, 1), s + 0.1 + 1000 * terminal, terminal], 1)
    calls, true = {}, dydiff.make_fit_update

    def spy(*arguments):
        calls[arguments[1]] = arguments
        return true(*arguments)

    monkeypatch.setattr(dydiff, "make_fit_update", spy)
    run = SimpleNamespace(train=lambda name, steps, update: [update(i) for i in range(steps)])
    dydiff.train_regressions(args, agent, run, rows, 2, 1, known)
    return agent, rows, calls


def test_terminal_rows_teach_the_ensemble_only_if_their_successors_are_known(monkeypatch):
    """Squared targets of 1000^2 are in the hold-out error, or they are not.  320 of 400 rows train the reward."""
    for known in (False, True):
        _, _, calls = regressions(monkeypatch, known)
        error, n, n_reward = calls["dynamics"][8](), calls["dynamics"][9], calls["reward"][9]
        assert n_reward == 320 and (n == 320 if known else 200 < n < 260)
        assert (error > 1e5).all() if known else (error < 5).all()
        assert calls["dynamics"][10] == 3 and calls["reward"][10] == 1
        assert calls["reward"][7](torch.randint(320, (1, 256))).shape == (1,)


def test_the_best_weights_are_restored_and_the_elites_are_the_best_networks(monkeypatch):
    agent, _, calls = regressions(monkeypatch, False)
    assert same(agent.ensemble, agent.ensemble_best) and same(agent.reward, agent.reward_best)
    close(calls["dynamics"][8](), agent.ensemble_fit[:3], 1e-6)
    close(calls["reward"][8](), agent.reward_fit[:1], 1e-6)
    assert agent.ensemble.elites.tolist() == agent.ensemble_fit[:3].argsort()[:2].tolist()


def test_losses_of_the_regressions_by_hand(monkeypatch):
    agent, rows, calls = regressions(monkeypatch, True, steps=1)
    x = torch.cat([rows[:, :2], rows[:, 2:3]], 1)
    mean, delta = agent.ensemble(x)[0], rows[:, 4:6] - rows[:, :2]
    test = calls["dynamics"][8]()
    assert test.shape == (3,)
    order = torch.from_numpy(dydiff.np.random.default_rng(1).permutation(400))[:80]
    close(test, (mean - delta)[:, order].square().mean((1, 2)), 1.0)
    close(calls["reward"][8](), (agent.reward(x)[0, :, 0] - 1)[order].square().mean()[None], 1e-6)


# --- Eq. (11): the filter ---------------------------------------------------------------------------------
def test_hardmax_keeps_what_reaches_the_quantile():
    """(1 - 0.6)-quantile of 0..9 is 3.6: 4..9 stay; of 2048 distinct sums 1229 stay."""
    R = tensor([3.0, 9, 1, 0, 5, 7, 2, 8, 6, 4])
    assert sorted(R[dydiff.keep(R, "hardmax", 0.6, 0.05, None)].tolist()) == [4, 5, 6, 7, 8, 9]
    assert len(dydiff.keep(torch.randn(2048), "hardmax", 0.6, 0.05, None)) == 1229
    assert len(dydiff.keep(R, "hardmax", 1.0, 0.05, None)) == 10


def test_filter_probabilities_by_hand():
    """R = 1..5: z = (R - 3) / sqrt(2), spaced by 0.7071, 14.142 after division by 0.05; floor 1e-6 / 5 = 2e-7."""
    p = dydiff.keep_probabilities(torch.arange(1.0, 6), 0.05)
    close(p[:3], [2.0e-7] * 3, 1e-11)
    close(p[3], 9.2136e-7, 1e-11)
    close(p[4], 0.9999985, 5e-8)
    close(p.sum(), 1.0, 1e-12)
    close(dydiff.keep_probabilities(torch.full((4,), 2.0), 0.05), [0.25] * 4, 1e-12)  # all alike: uniform
    assert dydiff.keep_probabilities(1e4 * torch.randn(50), 1e-4).isfinite().all()


def test_softmax_draws_without_replacement_by_its_law():
    """Two of four: P(i first) = p_i, P(j second) = p_j / (1 - p_i); inclusion by enumeration."""
    R, n = tensor([0.0, 1.0, 2.0, 4.0]), 6000
    p = dydiff.keep_probabilities(R, 1.0)
    want = torch.zeros(4, dtype=torch.float64)
    for i, j in itertools.permutations(range(4), 2):
        want[[i, j]] += p[i] * p[j] / (1 - p[i])
    drawn = torch.stack([dydiff.keep(R, "softmax", 0.5, 1.0, dydiff.gumbel(4, CPU)) for _ in range(n)])
    assert drawn.shape == (n, 2) and (drawn[:, 0] != drawn[:, 1]).all()
    close(F.one_hot(drawn, 4).sum(1).double().mean(0), want, 4 * 0.5 / math.sqrt(n))


def test_softmax_keeps_int_eta_b_of_them_and_nearly_always_the_best():
    R = torch.randn(2048)
    kept = dydiff.keep(R, "softmax", 0.6, 0.05, dydiff.gumbel(2048, CPU))
    assert len(kept) == 1228 and len(kept.unique()) == 1228 and R.argmax() in kept


def test_gumbel_numbers_have_their_law():
    """Mean 0.5772, variance pi^2 / 6."""
    g = dydiff.gumbel(100_000, CPU)
    close(g.mean(), 0.57722, 0.02)
    close(g.var(), math.pi**2 / 6, 0.05)


# --- termination ------------------------------------------------------------------------------------------
def hopper(**changes):
    s = torch.zeros(11)
    s[0] = 1.2
    for k, v in changes.items():
        s[int(k[1:])] = v
    return s


def test_terminated_hopper():
    """Healthy: finite, z > 0.7, |angle| < 0.2, all but z within 100 on both sides."""
    healthy = [hopper(), hopper(_0=0.7001), hopper(_1=0.19), hopper(_1=-0.19), hopper(_5=99.0), hopper(_0=500.0)]
    fallen = [hopper(_0=0.7), hopper(_1=0.2), hopper(_1=-0.21), hopper(_5=100.0), hopper(_10=-100.0)]
    fallen += [hopper(_3=math.nan), hopper(_0=math.inf), hopper(_0=math.nan), hopper(_0=-5.0)]
    for env in ("hopper-medium-v2", "hopper-demo", "Hopper-v5", "mujoco/hopper/expert-v0"):
        assert not dydiff.terminated(env, torch.stack(healthy)).any()
        assert dydiff.terminated(env, torch.stack(fallen)).all()
    assert dydiff.terminated("hopper-medium-v2", torch.zeros(4, 3, 11)).shape == (4, 3)


def test_terminated_walker():
    """Healthy: 0.8 < z < 2, |angle| < 1."""
    s = torch.zeros(9, 17)
    s[:, 0] = 1.2
    s[1, 0], s[2, 0], s[3, 0], s[4, 0], s[5, 1], s[6, 1], s[7, 1], s[8, 0] = 0.8, 2.0, 0.81, 1.99, 1.0, -1.0, 0.9, 0.7
    want = [False, True, True, False, False, True, True, False, True]
    assert dydiff.terminated("walker2d-medium-replay-v2", s).tolist() == want
    assert dydiff.terminated("Walker2d-v5", s).tolist() == want
    s[0, 0] = math.nan
    assert dydiff.terminated("walker2d-medium-replay-v2", s)[0]


def test_terminated_ant():
    """Healthy: finite, 0.2 <= z <= 1."""
    s = torch.zeros(6, 27)
    s[:, 0], s[1, 20] = tensor([0.5, 0.5, 0.19, 0.21, 0.99, 1.01]), math.inf
    for env in ("ant-medium-v2", "Ant-v4", "mujoco/ant/expert-v0"):
        assert dydiff.terminated(env, s).tolist() == [False, True, True, False, False, True]


@pytest.mark.parametrize("env", ["halfcheetah-medium-v2", "pendulum-demo", "maze2d-umaze-v1", "antmaze-umaze-v2"])
def test_the_other_tasks_never_end(env):
    got = dydiff.terminated(env, 1000 * torch.randn(5, 3, 4))
    assert got.shape == (5, 3) and got.dtype == torch.bool and not got.any()


def hopper_frames():
    """Of stored states that are all healthy: z in [0.71, 1.5], angle in [-0.19, 0.19], others in [-5, 5]."""
    low, high = torch.full((11,), -5.0), torch.full((11,), 5.0)
    low[:2], high[:2] = tensor([0.71, -0.19]), tensor([1.5, 0.19])
    return frames_of(11, 3, s_low=low, s_span=high - low)


def ends_args(**changes):
    return SimpleNamespace(**dict(env="hopper-medium-v2", terminate="unclipped", stop_at_padding=False) | changes)


def no_padding(s):
    return torch.zeros(s.shape[:2], dtype=torch.bool)


def test_tested_after_the_clip_nothing_ever_ends():
    """min and max come from healthy states, so that every clipped state is healthy; unclipped most of these are not."""
    s = 3 * torch.randn(500, 20, 11)
    stored, terminal = dydiff.ends(ends_args(terminate="clipped"), hopper_frames(), s, no_padding(s))
    assert stored.all() and not terminal.any()
    stored, terminal = dydiff.ends(ends_args(), hopper_frames(), s, no_padding(s))
    assert terminal.float().mean() > 0.5 and not stored.all()


def test_stored_transitions_stop_at_termination():
    """H = 6, states 0..5: state 3 has fallen.  Transitions 0, 1, 2 are stored, the last with its flag."""
    s = torch.zeros(2, 6, 11)
    s[0, 3, 1] = 1.5  # angle 0.285
    s[0, 4, 1] = 1.5
    stored, terminal = dydiff.ends(ends_args(), hopper_frames(), s, no_padding(s))
    assert stored.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert terminal[stored].tolist() == [False, False, True] + [False] * 5
    s[0, 0, 1] = 1.5  # a start is real data: it ends nothing
    assert dydiff.ends(ends_args(), hopper_frames(), s, no_padding(s))[0].tolist() == stored.tolist()


def test_a_padded_row_ends_its_trajectory_without_a_flag():
    """State 3 is padding: transitions 0 and 1 stay, for the padded row is no state.  Row 0 is never one."""
    s, padded = torch.zeros(2, 6, 11), torch.zeros(2, 6, dtype=torch.bool)
    padded[0, 3] = padded[1, 0] = True
    for on, want in ((True, [[True] * 2 + [False] * 3, [True] * 5]), (False, [[True] * 5] * 2)):
        stored, terminal = dydiff.ends(ends_args(stop_at_padding=on), hopper_frames(), s, padded)
        assert stored.tolist() == want and not terminal.any()
    s[0, 2, 1] = 1.5  # has fallen one step before
    stored, terminal = dydiff.ends(ends_args(stop_at_padding=True), hopper_frames(), s, padded)
    assert stored[0].tolist() == [True] * 2 + [False] * 3 and terminal[0].tolist()[:2] == [False, True]


# --- Eqs. (6)-(9): rollouts -------------------------------------------------------------------------------
def test_autoregress_with_a_known_ensemble():
    """Raw = 2 x + 3 (low 1, span 4), policy frame (raw - 3) / 2 = x.  pi(s) = 0.5 s, s' = s + a: x grows by 1.5, is
    read clipped at 1 and stored unclipped: 0.5, 0.75, 1.125, then 1 + 0.5 = 1.5, and again 1.5."""
    frames, seen = frames_of(1, 1, mean=3.0, std=2.0, s_low=1.0, s_span=4.0), []

    def predict(s, a):
        seen.append((float(s), float(a)))
        return s + a

    s, a = dydiff.autoregress(frames, lambda s: 0.5 * s, SimpleNamespace(predict=predict), tensor([[0.5]]), 5)
    close(s, [[[0.5], [0.75], [1.125], [1.5], [1.5]]])
    close(a, [[[0.25], [0.375], [0.5], [0.5], [0.5]]])
    close(tensor(seen), [(0.5, 0.25), (0.75, 0.375), (1, 0.5), (1, 0.5)])  # H - 1 of them


def corrections(how, M, drawn):
    """s (1, 3, 1) = 0.8, 0.2, 0.4, a = 0; the k-th draw is constant drawn[k], row 0 included; pi(s) = 0.5 raw s."""
    seen, drawn = [], iter(drawn)

    def given(s_0, a):
        seen.append((s_0.clone(), a.clone()))
        return torch.full((1, 3, 1), next(drawn))

    frames = frames_of(1, 1, a_low=-2.0, a_span=4.0)  # a in the model's frame: a / 2
    s = tensor([[[0.8], [0.2], [0.4]]])
    args = SimpleNamespace(M=M, correction=how)
    s, a, padded = dydiff.correct(args, frames, lambda s: 0.5 * s, given, s, torch.ones(1, 3, 1))
    return s, a, seen, padded[0].tolist()


def test_corrections_by_hand():
    """Average, draws 0.6 and -0.2: 0.4, 0.5, then 0.1, 0.15.  Replace: -0.2.  Row 0 stays exact; the actions are those
    of the last states, and the draws are given the actions before, in the model's frame."""
    s, a, seen, _ = corrections("average", 2, [0.6, -0.2])
    close(s[0, :, 0], [0.8, 0.1, 0.15])
    close(a[0, :, 0], [0.4, 0.05, 0.075])
    close(seen[0][1][0, :, 0], [0.5] * 3)
    close(seen[1][1][0, :, 0], [0.2, 0.1, 0.125])
    assert all(torch.equal(s_0, tensor([[0.8]])) for s_0, _ in seen)
    s, a, seen, _ = corrections("replace", 2, [0.6, -0.2])
    close(s[0, :, 0], [0.8, -0.2, -0.2])
    close(a[0, :, 0], [0.4, -0.1, -0.1])
    close(seen[1][1][0, :, 0], [0.2, 0.15, 0.15])


def test_two_averages_weigh_the_draws_a_half_a_quarter_a_quarter():
    """1/2 s_2 + 1/4 s_1 + 1/4 s_AR."""
    s, _, _, _ = corrections("average", 2, [0.7, 0.3])
    close(s[0, 1, 0], 0.5 * 0.3 + 0.25 * 0.7 + 0.25 * 0.2)


def test_no_correction_is_the_ensembles_rollout():
    s, a, seen, _ = corrections("average", 0, [])
    close(s[0, :, 0], [0.8, 0.2, 0.4])
    assert not seen and (a == 1).all()


def test_the_policy_reads_clipped_states_in_a_correction():
    s, a, _, _ = corrections("replace", 1, [1.4])
    close(s[0, 1:, 0], [1.4, 1.4])
    close(a[0, 1:, 0], [0.5, 0.5])


def test_padding_is_seen_in_the_last_draw_though_an_average_hides_it():
    """Drawn -1 and -1: the average is at -0.7.  Without corrections there is none."""
    s, _, _, padded = corrections("average", 2, [-1.0, -1.0])
    assert padded[1:] == [True, True] and s[0, 1, 0] > -0.95
    assert corrections("average", 2, [-1.0, -0.94])[3] == [False] * 3
    assert corrections("average", 2, [0.3, -0.96])[3][1:] == [True] * 2
    assert corrections("replace", 0, [])[3] == [False] * 3


def linear(H=6, gain=-1.3):
    """s' = 0.7 s + 0.6 a, pi(s) = gain s / 2; the model gives the states of any actions exactly."""

    def given(s_0, a):
        s = [s_0]
        for t in range(H - 1):
            s.append(0.7 * s[-1] + 0.6 * a[:, t])
        return torch.stack(s, 1)

    act = lambda s: 0.5 * gain * s  # noqa: E731
    s = [tensor([[0.3]])]
    for _ in range(H - 1):
        s.append(0.7 * s[-1] + 0.6 * act(s[-1]))
    return given, act, torch.stack(s, 1)


def error_after(M, how, H=6, gain=-1.3):
    given, act, truth = linear(H, gain)
    wrong = torch.cat([truth[:, :1], 0.1 * torch.randn(1, H - 1, 1)], 1)
    args = SimpleNamespace(M=M, correction=how)
    s, a, _ = dydiff.correct(args, frames_of(1, 1), act, given, wrong, act(wrong))
    close(a, act(s), 1e-12)
    return (s - truth).abs()[0, :, 0]


def test_replacement_reaches_the_fixed_point_of_a_causal_model_row_by_row(float64):
    """ "Model after policy" is strictly lower triangular: k corrections make rows 0..k exact, whatever the gain."""
    for gain in (-1.3, -2.0, 0.8):
        for k in range(6):
            e = error_after(k, "replace", gain=gain)
            assert e[: k + 1].max() < 1e-12 and (k == 5 or e[k + 1] > 1e-6)


def test_averaging_converges_to_the_same_fixed_point_at_rate_one_half(float64):
    """(1 + N)^k / 2^k with N^3 = 0 has ratios (k + 1) / (k - 1) / 2 in the end."""
    errors = []
    for k in (30, 31, 60):
        torch.manual_seed(3)
        errors.append(float(error_after(k, "average", H=4).max()))
    assert 0.49 < errors[1] / errors[0] < 0.56 and 0 < errors[2] < 1e-10


# --- Algorithm 1: the ring --------------------------------------------------------------------------------
def test_the_ring_is_first_in_first_out_and_wraps_around():
    agent = SimpleNamespace(
        ring=torch.zeros(5, 1), place=torch.zeros((), dtype=torch.float64), filled=torch.zeros((), dtype=torch.float64)
    )
    want = {3: ([1, 2, 3, 0, 0], 3), 6: ([6, 2, 3, 4, 5], 5), 13: ([11, 12, 13, 9, 10], 5)}
    for start, end in ((1, 3), (4, 6), (7, 13)):
        dydiff.push(agent, torch.arange(start, end + 1.0)[:, None])
        if end < 13:
            assert (agent.ring[:, 0].tolist(), int(agent.filled)) == want[end]
    assert sorted(agent.ring[:, 0].tolist()) == [9, 10, 11, 12, 13] and int(agent.filled) == 5
    at = int(agent.place)  # the oldest is overwritten next
    dydiff.push(agent, tensor([[14.0]]))
    assert agent.ring[at, 0] == 14 and sorted(agent.ring[:, 0].tolist()) == [10, 11, 12, 13, 14]
    dydiff.push(agent, torch.zeros(0, 1))
    assert sorted(agent.ring[:, 0].tolist()) == [10, 11, 12, 13, 14] and int(agent.filled) == 5


def roller(S=3, A=2, **settings):
    """A small agent with random networks and frames, b = 6 starts of 20."""
    args = tiny_args(**settings)
    agent = dydiff.make_agent(args, S, A, CPU)
    torch.manual_seed(11)  # whatever networks there are
    for net in (agent.policy, agent.ensemble, agent.reward):
        randomised(net, 0.3)
    with torch.no_grad():
        agent.frames.fit(2 * torch.randn(30, S) + 1, 3 * torch.randn(40, S), 2 * torch.rand(40, A) - 1)
    starts = 2 * torch.rand(20, S) - 1
    return args, agent, starts, dydiff.Roller(args, agent, starts)


@pytest.mark.parametrize("base", ["td3bc", "diffql"])
@pytest.mark.parametrize("L", [3, 2])
def test_stored_transitions_chain_and_are_on_policy(base, L):
    """int(0.6 * 6) = 3 trajectories of L rows: s' of one is s of the next, s_0 a start, rewards the network's, actions
    tanh(mean); the raw U-net and the targets have no part in it."""
    _, agent, starts, roll = roller(base=base, L=L, policy_hidden=(6, 5))
    for net in (agent.unet, agent.policy_target, agent.q, agent.q_target):
        for p in net.parameters():
            nn.init.constant_(p, math.nan)
    stats = roll()
    rows = agent.ring[: 3 * L]
    assert int(agent.filled) == 3 * L and (agent.ring[3 * L :] == 0).all() and rows.isfinite().all()
    s, a, r, s_next, terminal = dydiff.split(rows, 3, 2)
    chain = s.view(3, L, 3)
    close(s_next.view(3, L, 3)[:, :-1], chain[:, 1:], 1e-7)
    begin = agent.frames.to_policy(agent.frames.from_model(starts))
    assert (torch.cdist(chain[:, 0], begin).amin(1) < 1e-4).all() and (terminal == 0).all()
    close(r, agent.reward(torch.cat([s, a], 1))[0, :, 0], 1e-5)
    if base == "td3bc":
        close(a, agent.policy(s)[0].tanh(), 1e-5)
    assert (a.abs() <= 1).all()
    assert stats["rollout/rows"] == 3 * L and stats["rollout/filled"] == 3 * L and stats["rollout/terminal"] == 0
    assert stats["rollout/network_calls"] == 2 * (2 * 3 - 1)
    assert stats["rollout/gflop"] > 0 and 0 < stats["rollout/share_of_time"] <= 1 and stats["rollout/seconds"] > 0
    assert stats["rollout/reward_sum_kept"] != stats["rollout/reward_sum"]
    assert all(v.numel() == 1 and v.isfinite() for v in stats.values())


def test_without_corrections_dydiff_is_the_single_step_rollout():
    rings = []
    for settings in (dict(M=0), dict(augment="single-step")):
        _, agent, _, roll = roller(**settings)
        torch.manual_seed(5)
        stats = roll()
        assert stats["rollout/network_calls"] == 0 and stats["rollout/gflop"] == 0
        rings.append(agent.ring.clone())
    assert torch.equal(*rings) and (rings[0] != 0).any()
    _, agent, _, roll = roller(M=1)
    torch.manual_seed(5)
    roll()
    assert not torch.equal(agent.ring, rings[0])


def test_the_best_sums_stay_and_all_rows_count_in_them():
    """hardmax: what is stored is the upper part of the sums over all H rows, though L = 1 row of each is stored."""
    _, agent, starts, roll = roller(filter="hardmax", L=1, augment="single-step", b=20, E=1, elites=1, capacity=100)
    torch.manual_seed(5)
    stats = roll()
    torch.manual_seed(5)
    s_0 = starts[torch.randint(20, (20,))]
    with torch.no_grad():
        s, a = dydiff.autoregress(agent.frames, agent.policy.act, agent.ensemble, s_0, 4)
        s = agent.frames.to_policy(agent.frames.from_model(s))
        R = agent.reward(torch.cat([s, a], -1).view(80, 5))[0].view(20, 4).sum(1)
    kept = R >= R.quantile(0.4)
    close(agent.ring[: kept.sum(), :3], s[kept, 0], 1e-5)
    close(stats["rollout/reward_sum"], R.mean(), 1e-5)
    close(stats["rollout/reward_sum_kept"], R[kept].mean(), 1e-5)


def test_trajectories_are_stored_in_the_order_of_their_starts_not_by_rank():
    """A ring that is too small drops the first ones: these must not be the best."""
    _, agent, starts, roll = roller(L=1, augment="single-step", b=20)
    torch.manual_seed(5)
    roll()
    torch.manual_seed(5)
    s_0 = agent.frames.to_policy(agent.frames.from_model(starts[torch.randint(20, (20,))]))
    at = [(s_0 - s).abs().amax(1).lt(1e-5).nonzero()[:, 0].tolist() for s in agent.ring[:12, :3]]
    first = [x[0] for x in at]  # a start may have been drawn twice
    last = [x[-1] for x in at]
    assert all(max(first[: k + 1]) <= last[k] for k in range(12))


def test_the_terminating_transition_is_stored_with_its_flag():
    """An ensemble that turns the hopper by 10 raw units per step: the first transition ends every trajectory."""
    args, agent, _, roll = roller(S=11, A=3, env="hopper-demo", augment="single-step", H=4, channels=(8,), L=3)
    for p in agent.ensemble.parameters():
        nn.init.zeros_(p)
    agent.ensemble.heads.biases[-1].data[:, 0, 1] = 10.0
    with torch.no_grad():
        low, span = torch.full((11,), -5.0), torch.full((11,), 10.0)
        low[:2], span[:2] = tensor([0.8, -0.1]), tensor([0.5, 0.2])
        for p, x in zip(agent.frames.buffers(), (torch.zeros(11), torch.ones(11), low, span)):
            p.copy_(x)
    stats = roll()
    assert stats["rollout/rows"] == 3 and stats["rollout/terminal"] == 3
    assert (agent.ring[:3, -1] == 1).all() and (agent.ring[3:] == 0).all()
    roll.args = replace(args, terminate="clipped")
    assert roll()["rollout/rows"] == 9 and (agent.ring[3:12, -1] == 0).all()


# --- batches ----------------------------------------------------------------------------------------------
def batches(filled, monkeypatch, steps=1, **settings):
    """The batches of the main stage; first column: 0 real, 1 synthetic, 2 in the unused part of the ring."""
    args, seen = tiny_args(batch_size=256, capacity=200, rollout_every=3, **settings), []
    agent = dydiff.make_agent(args, 2, 1, CPU)
    if agent.ring is not None:
        agent.ring[:], agent.ring[:filled] = 2.0, 1.0
        agent.filled.fill_(filled)

    def learn(s, a, r, s_next, terminal, actor, ema):
        seen.append((torch.cat([s, a, r[:, None], s_next, terminal[:, None]], 1), actor, ema))
        return {"critic": s.sum()}

    monkeypatch.setattr(dydiff, "make_base_update", lambda args, agent: learn)
    rolls = []
    update = dydiff.make_update(args, agent, torch.zeros(30, 7), 2, 1, lambda: rolls.append(len(seen)) or {"roll": 1})
    out = [update(i) for i in range(steps)]
    return seen, rolls, out


def test_153_of_256_rows_are_real(monkeypatch):
    """int(0.6 * 256) = 153, the other 103 from the rows of the ring that are in use."""
    for filled in (103, 150, 200):
        ((rows, _, _),), _, _ = batches(filled, monkeypatch)
        assert rows.shape == (256, 7) and [(rows[:, 0] == k).sum() for k in (0, 1, 2)] == [153, 103, 0]


def test_a_ring_with_too_few_rows_is_not_used(monkeypatch):
    for filled in (0, 102):
        ((rows, _, _),), _, _ = batches(filled, monkeypatch)
        assert rows.shape == (256, 7) and (rows == 0).all()
    ((rows, _, _),), _, _ = batches(0, monkeypatch, augment="none")
    assert rows.shape == (256, 7)


def test_rollouts_come_before_the_first_and_every_third_step(monkeypatch):
    _, rolls, out = batches(150, monkeypatch, steps=7)
    assert rolls == [0, 3, 6] and all("roll" in x and "losses/critic" in x for x in out)


def test_rows_of_the_ring_are_drawn_uniformly_and_anew():
    args = tiny_args(batch_size=10, real_ratio=0.0, capacity=20)
    agent, seen = dydiff.make_agent(args, 2, 1, CPU), []
    agent.ring[:, 0] = torch.arange(20.0)
    agent.filled.fill_(10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dydiff, "make_base_update", lambda *x: lambda s, *rest: seen.append(s[:, 0]) or {})
        update = dydiff.make_update(args, agent, torch.zeros(5, 7), 2, 1)
        for i in range(1000):
            update(i)
    n = torch.cat(seen).long().bincount(minlength=20)
    assert n[10:].sum() == 0 and (n[:10] - 1000).abs().max() < 140  # 4.6 standard deviations


def test_policy_and_targets_of_td3bc_move_at_every_second_step(monkeypatch):
    seen, _, _ = batches(150, monkeypatch, steps=8)
    actor = [x[1] for x in seen]
    assert actor == [False, True] * 4  # the second, the fourth, ...
    seen, _, _ = batches(150, monkeypatch, steps=3, base="cql")
    assert all(x[1] for x in seen)


def test_the_average_of_diffusion_ql_starts_at_step_1000_and_moves_every_five(monkeypatch):
    seen, _, _ = batches(150, monkeypatch, steps=1020, base="diffql")
    at = [i for i, x in enumerate(seen) if x[2]]
    assert at == [1000, 1005, 1010, 1015]
    assert all(x[1] for x in seen)
    seen, _, _ = batches(150, monkeypatch, steps=1020)
    assert not any(x[2] for x in seen)


# --- base algorithms --------------------------------------------------------------------------------------
def test_critic_target_by_hand():
    """1 + 0.9 * 2 and, where the episode ends, 1."""
    close(dydiff.critic_target(tensor([1.0, 1.0]), tensor([0.0, 1.0]), tensor([2.0, 2.0]), 0.9), [2.8, 1.0])


def test_td3bc_actor_loss_by_hand():
    """q = 1, -3: mean |q| 2, lambda 2.5 / 2, -1.25 * (-1) + 0.5 * (0.04 + 0 + 0 + 0.16) / 4."""
    q, a = tensor([1.0, -3.0], requires_grad=True), torch.zeros(2, 2)
    a_pi = tensor([[0.2, 0.0], [0.0, -0.4]])
    loss = dydiff.td3bc_actor_loss(q, a_pi, a, 2.5)
    close(loss, 1.25 + 0.5 * 0.2 / 4)
    close(torch.autograd.grad(loss, q)[0], [-0.625, -0.625])  # lambda is a constant


def test_conservative_by_hand():
    """A = 2: ln of e^1 / 0.25 + e^2 / e^0.5 + e^3 / e^-1 = ln(10.8731 + 4.4817 + 54.5982)."""
    x = [tensor([[v]], requires_grad=True) for v in (1.0, 2.0, 3.0, 0.5, -1.0)]
    got = dydiff.conservative(*x, 2)
    close(got, [math.log(10.8731273 + 4.4816891 + 54.5981500)], 1e-5)
    got.sum().backward()
    assert x[3].grad is None and x[4].grad is None
    close(sum(v.grad for v in x[:3])[0, 0], 1.0)


def test_many_actions_in_the_conservative_term_are_summed_not_averaged():
    """ln(3 n) + q where every density is 1 and all Q are q (A = 0: no volume)."""
    zero, q = torch.zeros(10, 4), torch.full((10, 4), 0.7)
    close(dydiff.conservative(q, q, q, zero, zero, 0), [math.log(30) + 0.7] * 4, 1e-5)


def batch(B=7, S=3, A=2):
    return (
        torch.randn(B, S), 2 * torch.rand(B, A) - 1, torch.randn(B), torch.randn(B, S), (torch.rand(B) < 0.3).double()
    )  # fmt: skip


def base_agent(base, **settings):
    args = tiny_args(base=base, policy_hidden=(6, 5), augment="none", **settings)
    agent = dydiff.make_agent(args, 3, 2, CPU)
    for net in (agent.q, agent.policy, agent.q_target, agent.policy_target):
        randomised(net, 0.5)
    for name, net, lr in (("q", agent.q, args.lr), ("policy", agent.policy, args.policy_lr)):
        setattr(agent, f"{name}_opt", torch.optim.SGD(net.parameters(), lr))  # Adam would hide factors
    if base == "cql":
        agent.alpha_opt = torch.optim.SGD([agent.log_alpha], args.policy_lr)
    return args, agent


class Slow:
    """The two critics, their targets and the policy as plain separate networks, each with its own optimiser."""

    def __init__(self, args, agent):
        self.args, self.q, self.q_bar = args, leaves(agent.q), leaves(agent.q_target)
        self.q_opts = [self.sgd(q, args.lr) for q in self.q]
        if args.base == "diffql":
            self.pi, self.pi_bar = deepcopy(agent.policy), deepcopy(agent.policy_target)
            self.pi_opt = self.sgd(self.pi.parameters(), args.policy_lr)
        else:
            (self.pi,), (self.pi_bar,) = leaves(agent.policy.net), leaves(agent.policy_target.net)
            self.pi_opt = self.sgd(self.pi, args.policy_lr)

    def sgd(self, params, lr):
        return torch.optim.SGD(params, lr, foreach=False)

    def value(self, params, s, a):
        return slow_mlp(params, torch.cat([s, a], 1))[:, 0]

    def draw(self, params, s, n=1):
        """Actions (n, B, A) by the noise that the script draws, and their log-probabilities (n, B)."""
        mean, log_std = slow_mlp(params, s).chunk(2, -1)
        u = mean + log_std.clamp(-20, 2).exp() * torch.randn(n, *mean.shape)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        return u.tanh(), (normal.log_prob(u) - torch.log(1 - u.tanh() ** 2)).sum(-1)

    def target(self, r, s_next, terminal, a_next):
        with torch.no_grad():
            q = torch.minimum(*(self.value(q, s_next, a_next) for q in self.q_bar))
            return torch.where(terminal > 0, r, r + self.args.discount * q)

    def descend(self, loss, opt, clip=None):
        opt.zero_grad()
        loss.backward(retain_graph=True)
        if clip:
            params = opt.param_groups[0]["params"]
            norm = torch.sqrt(sum((p.grad**2).sum() for p in params))
            for p in params:
                p.grad *= min(1.0, clip / (float(norm) + 1e-6))
            self.clipped = getattr(self, "clipped", 0) + (float(norm) > clip)
        opt.step()

    @torch.no_grad()
    def average(self, bar, source):
        for x, y in zip(bar, source, strict=True):
            x += self.args.polyak * (y - x)

    def check(self, agent, tol=1e-8):
        for heads, slow in ((agent.q, self.q), (agent.q_target, self.q_bar)):
            for k, p in enumerate((*heads.weights, *heads.biases)):
                close(p, torch.stack([x[k] for x in slow]), tol)
        for net, slow in ((agent.policy, self.pi), (agent.policy_target, self.pi_bar)):
            if isinstance(slow, nn.Module):
                for p, x in zip(net.parameters(), slow.parameters(), strict=True):
                    close(p, x, tol)
            else:
                for p, x in zip((*net.net.weights, *net.net.biases), slow, strict=True):
                    close(p[0], x, tol)


def test_four_updates_of_td3bc_equal_a_second_slow_implementation(float64):
    """0.5 MSE per critic against r + gamma (1 - d) min; sampled target action; the actor follows the updated Q_1."""
    args, agent = base_agent("td3bc")
    slow, update = Slow(args, agent), dydiff.make_base_update(args, agent)
    for k in range(4):
        s, a, r, s_next, terminal = batch()
        before = [p.clone() for p in (*agent.policy.parameters(), *agent.q_target.parameters())]
        torch.manual_seed(k)
        out = update(s, a, r, s_next, terminal, k % 2 == 1, False)
        torch.manual_seed(k)
        y = slow.target(r, s_next, terminal, slow.draw(slow.pi_bar, s_next)[0][0])
        for q, opt in zip(slow.q, slow.q_opts):
            loss = 0.5 * F.mse_loss(slow.value(q, s, a), y)
            slow.descend(loss, opt)
        if k % 2:
            a_pi = slow.draw(slow.pi, s)[0][0]
            q = slow.value(slow.q[0], s, a_pi)
            loss = -args.alpha_bc / q.abs().mean().item() * q.mean() + 0.5 * F.mse_loss(a_pi, a)
            slow.descend(loss, slow.pi_opt)
            close(out["actor"], loss, 1e-8)
            for bar, q in zip(slow.q_bar, slow.q):
                slow.average(bar, q)
            slow.average(slow.pi_bar, slow.pi)
        else:
            assert all(map(torch.equal, before, (*agent.policy.parameters(), *agent.q_target.parameters())))
        slow.check(agent)


def test_four_updates_of_cql_equal_a_second_slow_implementation(float64):
    """alpha, then the policy with the new alpha, then the critics with the new policy.  Loss of the temperature: minus
    the raw log alpha times (log pi - A); used is exp of it, clipped to [-10, 0.5].  10 actions of each kind."""
    for start in (0.0, 2.0, -11.0):  # beyond the clip it must still be able to move
        args, agent = base_agent("cql", policy_lr=0.1)
        agent.log_alpha.fill_(start)
        slow, update = Slow(args, agent), dydiff.make_base_update(args, agent)
        log_alpha = tensor(start, requires_grad=True)
        alpha_opt = slow.sgd([log_alpha], args.policy_lr)
        for k in range(4):
            s, a, r, s_next, terminal = batch()
            torch.manual_seed(k)
            update(s, a, r, s_next, terminal, True, False)
            torch.manual_seed(k)
            (a_pi,), (log_pi,) = slow.draw(slow.pi, s)
            slow.descend(-(log_alpha * (log_pi.detach() - 2)).mean(), alpha_opt)
            close(agent.log_alpha, log_alpha, 1e-7)
            alpha = math.exp(min(max(float(log_alpha), -10), 0.5))
            q_pi = torch.minimum(*(slow.value(q, s, a_pi) for q in slow.q))
            slow.descend((alpha * log_pi - q_pi).mean(), slow.pi_opt)
            with torch.no_grad():
                y = slow.target(r, s_next, terminal, slow.draw(slow.pi, s_next)[0][0])
                (a_k, log_k), (next_k, log_next) = slow.draw(slow.pi, s, 10), slow.draw(slow.pi, s_next, 10)
                u = 2 * torch.rand(10, 7, 2) - 1
            for q, opt in zip(slow.q, slow.q_opts):
                values = [slow.value(q, s, x) - 2 * math.log(0.5) for x in u]
                values += [slow.value(q, s, x) - log for x, log in zip(next_k, log_next)]
                values += [slow.value(q, s, x) - log for x, log in zip(a_k, log_k)]
                at_data = slow.value(q, s, a)
                gap = torch.logsumexp(torch.stack(values), 0).mean() - at_data.mean()
                slow.descend(F.mse_loss(at_data, y) + args.cql_weight * gap, opt)
            for bar, q in zip(slow.q_bar, slow.q):
                slow.average(bar, q)
            slow.check(agent)


def test_updates_of_diffusion_ql_equal_a_second_slow_implementation(float64, monkeypatch):
    """Target action: full chain of the averaged policy.  Policy: MSE of the noise - eta mean Q_i / mean |Q_j| at the
    one-step x_0, i and j at random.  Each of the three networks' gradients is clipped on its own."""
    args, agent = base_agent("diffql", clip_norm=1.0)
    for schedule in (agent.policy, agent.policy_target):  # the script's schedule is float32
        schedule.alpha_bar = tensor(ALPHA_BAR)
        schedule.floats = [0.0, *BETA], [1.0, *(1 - x for x in BETA)], ALPHA_BAR
    slow, update = Slow(args, agent), dydiff.make_base_update(args, agent)
    firsts, ab_of = set(), tensor(ALPHA_BAR)
    for k in range(6):
        s, a, r, s_next, terminal = batch()
        torch.manual_seed(k)
        out = update(s, a, r, s_next, terminal, True, k >= 3)
        torch.manual_seed(k)
        with torch.no_grad():
            x, noise = torch.randn(7, 2), {t: torch.randn(7, 2) for t in (5, 4, 3, 2)}
            y = slow.target(r, s_next, terminal, slow_chain(slow.pi_bar, x, noise, s_next))
        for q, opt in zip(slow.q, slow.q_opts):
            slow.descend(F.mse_loss(slow.value(q, s, a), y), opt, args.clip_norm)
        t, eps = torch.randint(1, 6, (7,)), torch.randn(7, 2)
        ab = ab_of[t][:, None]
        a_t = ab.sqrt() * a + (1 - ab).sqrt() * eps
        eps_hat = slow_noise(slow.pi, a_t, t, s)
        x_0 = ((a_t - (1 - ab).sqrt() * eps_hat) / ab.sqrt()).clamp(-1, 1)
        i = 0 if torch.rand(()) < 0.5 else 1
        firsts.add(i)
        q = [slow.value(q, s, x_0) for q in slow.q]
        cloning = F.mse_loss(eps_hat, eps)
        loss = cloning - args.eta_q * q[i].mean() / float(q[1 - i].abs().mean())
        slow.descend(loss, slow.pi_opt, args.clip_norm)
        close(out["actor"], loss, 1e-8)
        close(out["cloning"], cloning, 1e-8)
        for bar, q in zip(slow.q_bar, slow.q):
            slow.average(bar, q)
        if k >= 3:
            slow.average(slow.pi_bar.parameters(), slow.pi.parameters())
        slow.check(agent)
    assert firsts == {0, 1} and slow.clipped > 6


def test_the_policy_of_the_paper_at_evaluation():
    """tanh(mean) of normalised states; diffql: candidate k with probability softmax(min Q): 1/4 and 3/4 for ln 3."""
    args = tiny_args(candidates=2, base="diffql")
    frames, calls = frames_of(1, 1, mean=4.0, std=2.0), []

    def act(s):
        calls.append(s)
        return torch.arange(2.0).repeat(len(s) // 2)[:, None]  # candidates 0, 1 of every state

    def q(x):
        return torch.stack([x[:, 1:] * math.log(3), 5 + 0 * x[:, 1:]])  # the smaller one counts

    agent = SimpleNamespace(frames=frames, policy=SimpleNamespace(act=act), q_target=q)
    agent.judge = lambda s, a: dydiff.Agent.judge(agent, s, a)
    a = dydiff.make_act(args, agent, 1)(torch.full((8000, 1), 6.0))
    assert a.shape == (8000, 1) and abs(float(a.mean()) - 0.75) < 0.02 and (calls[0] == 1).all()
    args, agent = base_agent("td3bc")
    s = torch.randn(5, 3)
    with torch.no_grad():
        agent.frames.fit(torch.randn(9, 3), torch.randn(9, 3), torch.randn(9, 2))
    close(dydiff.make_act(args, agent, 2)(s), agent.policy(agent.frames.to_policy(s))[0].tanh())


# --- training of the diffusion models ---------------------------------------------------------------------
class Scale(nn.Module):
    """F = w u, keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.ones(3)), []

    def forward(self, u, c_noise):
        self.seen.append((u.detach(), c_noise))
        return self.w * u


def model_agent(**settings):
    args = tiny_args(model_batch_size=4, model_lr=0.1, model_warmup=40, model_cosine=False, ema_half_life=2, **settings)
    net = Scale()
    opt = torch.optim.Adam(net.parameters(), torch.tensor(0.1), fused=True)
    ema = deepcopy(net).requires_grad_(False)
    return args, SimpleNamespace(unet=net, unet_ema=ema, unet_opt=opt, seen=torch.zeros((), dtype=torch.float64))


def test_warm_up_rate_and_average_of_the_diffusion_model_by_hand():
    """Batches of 4: after n steps 4 n windows; rate 0.1 min(4 n / 40, 1); half-life min(2, 0.05 * 4 n) windows, weight
    of the past 0.5^(4 / half-life): n = 1: 2^-20, from n = 10 on 2^-2."""
    args, agent = model_agent()
    update = dydiff.make_model_update(args, agent, lambda: torch.randn(4, 5, 3), None, 2)
    ema = agent.unet_ema.w.clone()
    for n in range(1, 16):
        out = update()
        close(out["charts/lr"], 0.1 * min(4 * n / 40, 1), 1e-7)
        close(agent.unet_opt.param_groups[0]["lr"], out["charts/lr"], 0)
        past = 0.5 ** (4 / min(2, 0.2 * n))
        ema = past * ema + (1 - past) * agent.unet.w
        close(agent.unet_ema.w, ema, 1e-6)
    assert agent.seen == 60 and not torch.allclose(agent.unet_ema.w, agent.unet.w, atol=1e-4)


def test_the_averages_of_the_paper():
    """At 3,000k windows: half-life 5 % = 150k, 0.5^(8 / 150,000) = 0.999963; rate 3e-4.  At 20,000k: 500k."""
    args, agent = model_agent()
    for k in ("model_lr", "model_warmup", "ema_half_life"):
        setattr(args, k, dydiff.PAPER[k])
    for seen, half_life, lr in ((3e6, 150_000, 3e-4), (2e7, 500_000, 1e-3)):
        agent.seen.fill_(seen - 8)
        agent.unet_ema.w.fill_(50.0)
        out = dydiff.make_model_update(args, agent, lambda: torch.randn(8, 5, 3), None, 2)()
        close(out["charts/lr"], lr, 1e-8)
        w = agent.unet.w.detach()
        close((50 - agent.unet_ema.w) / (50 - w), torch.full((3,), 1 - 0.5 ** (8 / half_life)), 3e-7)


def test_the_cosine_ends_at_zero():
    """Half way: cos(pi / 2) = 0: half the rate."""
    args, agent = model_agent(model_steps=100)
    args.model_cosine, args.model_warmup = True, 8
    update, rates = dydiff.make_model_update(args, agent, lambda: torch.randn(4, 5, 3), None, 2), []
    for _ in range(100):
        rates.append(float(update()["charts/lr"]))
    assert abs(rates[49] - 0.05) < 1e-6 and rates[99] < 1e-4 and max(rates) < 0.1


def test_gradients_that_are_no_numbers_are_mended():
    """NaN -> 0, inf -> 1e5, -inf -> -1e5."""
    args, agent = model_agent()
    agent.unet.w.register_hook(lambda g: tensor([math.nan, math.inf, -math.inf]))
    dydiff.make_model_update(args, agent, lambda: torch.randn(4, 5, 3), None, 2)()
    close(agent.unet.w.grad, [0, 1e5, -1e5])
    close(agent.unet.w, [1, 1 - 0.01, 1 + 0.01], 1e-6)  # lr 0.1 * 4 / 40


def test_training_noise_is_lognormal_one_per_window_and_spares_the_conditions():
    """ln sigma ~ N(-1.2, 1.2^2);  c_noise = ln(sigma) / 4;  u = c_in (y + sigma n), the conditions c_in y."""
    args, agent = model_agent(scale_conditions=True)
    y = torch.randn(20_000, 5, 3)
    dydiff.make_model_update(args, agent, lambda: y, None, 2)()
    ((u, c),) = agent.unet.seen
    log_sigma = 4 * c.double()
    assert c.shape == (20_000,)
    close(log_sigma.mean(), -1.2, 0.035)
    close(log_sigma.std(), 1.2, 0.025)
    sigma = log_sigma.exp().float()[:, None, None]
    x = u * (sigma**2 + 0.25).sqrt()
    close(x[:, 0, :2], y[:, 0, :2], 1e-4)
    close(x[..., 2], y[..., 2], 1e-4)
    noise = ((x - y) / sigma)[:, 1:, :2]
    close(noise.mean(), 0.0, 0.02)
    close(noise.std(), 1.0, 0.02)


def test_training_without_scaled_conditions_shows_them_as_they_are():
    args, agent = model_agent(scale_conditions=False)
    y = torch.randn(6, 5, 3)
    dydiff.make_model_update(args, agent, lambda: y, None, 2)()
    u = agent.unet.seen[0][0]
    assert torch.equal(u[:, 0, :2], y[:, 0, :2]) and torch.equal(u[..., 2], y[..., 2])
    args, agent = model_agent(scale_conditions=True)
    dydiff.make_model_update(args, agent, lambda: y, None, 2)()
    assert not torch.allclose(agent.unet.seen[0][0][..., 2], y[..., 2], atol=1e-2)


def test_the_loss_of_the_update_is_that_of_its_parts():
    args, agent = model_agent(scale_conditions=True)
    y, mask = torch.randn(6, 5, 3), torch.zeros(5, 3)
    mask[1:, :2] = 1
    for m in (None, mask):
        torch.manual_seed(2)
        w = agent.unet.w.detach().clone()
        loss = dydiff.make_model_update(args, agent, lambda: y, m, 2)()["losses/diffusion"]
        torch.manual_seed(2)
        sigma = torch.exp(1.2 * torch.randn(6) - 1.2)[:, None, None]
        x = y + sigma * torch.randn(6, 5, 3)
        x[:, 0, :2], x[..., 2] = y[:, 0, :2], y[..., 2]
        n = sigma**2 + 0.25
        D = 0.25 / n * x + sigma * 0.5 / n.sqrt() * w * x / n.sqrt()
        e = (D - y) ** 2 * (1 if m is None else m)
        close(loss, (n / (0.5 * sigma) ** 2 * e).sum() / 6, 1e-3, 1e-5)


def test_the_real_network_learns_a_linear_system():
    """s' = 0.9 s + 0.4 a: 500 steps of a small U-net; states drawn for new actions beat the data's mean by far."""
    args = tiny_args(
        model_lr=5e-3, model_warmup=640, model_cosine=True, model_steps=500, ema_half_life=1000, H=4, channels=(16, 32),
        scale_conditions=False, rewrite=True, N=8, S_churn=0.0,
    )  # fmt: skip

    def sample(n=64):
        s, a = [0.8 * torch.rand(n) - 0.4], 2 * torch.rand(n, 4) - 1
        for t in range(3):
            s.append(0.9 * s[-1] + 0.4 * a[:, t])
        return torch.stack([torch.stack(s, 1), a], -1)

    agent = dydiff.make_agent(args, 1, 1, CPU)
    update = dydiff.make_model_update(args, agent, sample, None, 1)
    for _ in range(500):
        update()
    y = sample(200)
    with torch.no_grad():
        s = dydiff.draw_states(args, agent.unet_ema, y[:, 0, :1], y[..., 1:])
    error = (s - y[..., :1])[:, 1:].square().mean()
    assert error < 0.3 * y[:, 1:, :1].var()


# --- SynthER ----------------------------------------------------------------------------------------------
def synther(monkeypatch, rows, **settings):
    args = tiny_args(augment="synther", model_steps=1, batch_size=50, capacity=80_000, **settings)
    agent, captured = dydiff.make_agent(args, 3, 2, CPU), {}

    def spy(args, agent, sample, mask, S):
        captured.update(sample=sample, mask=mask, S=S)
        return lambda: {}

    monkeypatch.setattr(dydiff, "make_model_update", spy)
    run = SimpleNamespace(train=lambda name, steps, update: update(0))
    return dydiff.train_synther(args, agent, run, rows, 3, 2), captured, args


def transitions(n=300):
    rows = torch.randn(n, 10) * torch.arange(1, 11) + 3
    rows[:, -1] = (torch.rand(n) < 0.3).float()
    return rows


def test_synther_trains_on_columns_of_standard_deviation_one_half(monkeypatch):
    rows = transitions()
    _, captured, _ = synther(monkeypatch, rows, synther_rows=10)
    x = torch.cat([captured["sample"]() for _ in range(200)])
    assert captured["S"] is None and captured["mask"] is None and x.shape == (10_000, 10)
    close(x.mean(0), torch.zeros(10), 0.03)
    close(x.std(0), torch.full((10,), 0.5), 0.03)


def test_synther_maps_back_rounds_the_terminal_flag_and_clips_the_actions(monkeypatch):
    """A sampler that returns known standardised rows: they come back, flags of 0.3 and 0.8 as 0 and 1."""
    rows = transitions()
    synthesize, _, _ = synther(monkeypatch, rows, synther_rows=4)
    want = rows[:4].clone()
    want[:, -1] = tensor([0.3, 0.8, 0.0, 1.2])
    x = 0.5 * (want - rows.mean(0)) / rows.std(0)
    monkeypatch.setattr(dydiff, "edm_sample", lambda *a: x.double())
    got = synthesize()
    want[:, 3:5] = want[:, 3:5].clamp(-1, 1)
    close(got[:, :-1], want[:, :-1], 1e-4)
    assert got[:, -1].tolist() == [0, 1, 0, 1] and got.dtype == torch.float32


@pytest.mark.parametrize("n, want", [(70_000, 70_000), (90_000, 80_000), (5, 5)])
def test_synther_generates_as_many_rows_as_asked_for_and_the_ring_holds(n, want, monkeypatch):
    synthesize, _, _ = synther(monkeypatch, transitions(), synther_rows=n)
    parts = []
    monkeypatch.setattr(dydiff, "edm_sample", lambda denoised, x, *a: parts.append(len(x)) or 0 * x)
    assert synthesize().shape == (want, 10) and max(parts) <= 2**16


def test_synther_generates_the_same_rows_again_and_leaves_the_generator_alone(monkeypatch):
    synthesize, _, _ = synther(monkeypatch, transitions(), synther_rows=20)
    before = torch.get_rng_state()
    first = synthesize()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(77)
    assert torch.equal(first, synthesize()) and first[0, 0] != first[1, 0]


# --- eager = compiled -------------------------------------------------------------------------------------
def compiled_or_not(base, wrap):
    torch.manual_seed(0)
    args, agent = base_agent(base)
    update = wrap(dydiff.make_base_update(args, agent))
    for k in range(2):
        torch.manual_seed(k)
        update(*(x.float() for x in batch()), True, True)
    return torch.cat([p.flatten() for net in (agent.q, agent.policy, agent.q_target) for p in net.parameters()])


@pytest.mark.parametrize("base", ["td3bc", "cql", "diffql"])
def test_a_traced_update_of_the_policy_is_the_eager_one(base):
    eager = compiled_or_not(base, lambda update: update)
    close(compiled_or_not(base, lambda update: torch.compile(update, backend="aot_eager")), eager, 1e-5)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_compiled_update_of_the_diffusion_model_is_the_eager_one():
    from torch._inductor import config

    def run(wrap):
        torch.manual_seed(0)
        args, agent = model_agent(scale_conditions=True)
        y = torch.randn(4, 5, 3)
        agent.unet.forward = lambda u, c: agent.unet.w * u + c[:, None, None]  # no list that grows
        update = wrap(dydiff.make_model_update(args, agent, lambda: y, None, 2))
        losses = [update()["losses/diffusion"].clone() for _ in range(3)]
        return torch.cat([torch.stack(losses), agent.unet.w.detach(), agent.unet_ema.w, agent.seen.float()[None]])

    eager = run(lambda update: update)
    with config.patch({"fallback_random": True, "cpp.simdlen": 0}):  # 0: loops that g++ compiles faster
        compiled = run(lambda update: dydiff.accelerate(update, SimpleNamespace(compile="on", graph="off"), CPU))
    close(compiled, eager, 1e-4)


# --- figures ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env, steps, bound", [("pendulum-demo", 20, 1e-9), ("hopper-demo", 5, 1e-2)])
def test_the_simulator_of_figure_3_repeats_what_was_recorded(env, steps, bound):
    """Set to a recorded state and given the recorded actions, it returns the recorded states: to float32 on
    Pendulum, nearly on Hopper, whose contact forces are not stored.  Other actions lead elsewhere."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    from dydiff_fig3 import simulate

    raw = common.load_raw(env)
    at = torch.tensor([first for first, T in dydiff.trajectories(raw.terminal, raw.timeout) if T > steps][:10])
    at = at[:, None] + torch.arange(steps + 1)  # (10, steps + 1)
    s, a = torch.from_numpy(raw.s)[at], torch.from_numpy(raw.a)[at]
    task, std = common.make_env(env), torch.from_numpy(raw.s).std(0)
    error = lambda a: float(((simulate(task, s[:, 0], a[:, :-1]) - s) / std).square().mean())  # noqa: E731
    assert error(a) < bound
    assert error(-a) > 10 * bound


def test_the_simulator_of_figure_3_stops_where_the_episode_ends():
    """A Hopper that only ever pushes with full force falls; nothing is reported after the fall."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    from dydiff_fig3 import simulate

    raw = common.load_raw("hopper-demo")
    s = simulate(common.make_env("hopper-demo"), torch.from_numpy(raw.s[:1]), torch.ones(1, 200, 3))[0]  # (201, S)
    healthy = ~dydiff.terminated("hopper-demo", s)
    end = int(s.isfinite().all(-1).sum())
    assert 2 < end < 200 and healthy[: end - 1].all() and not healthy[end - 1] and s[end:].isnan().all()
