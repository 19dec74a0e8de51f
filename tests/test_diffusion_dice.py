"""Diffusion-DICE's mathematics, checked on a CPU: each test states one fact of the method and how to derive it.

    divergences, losses    conjugates on a grid; minimisers, gradients and every term on a few numbers
    networks               sizes, initial values, order of their inputs; each one written a second time
    sampler                its test vector and order; Gaussians whose tilt is known in closed form
    training               the real networks on a problem with a known answer; both updates written a second time

Letters as in diffusion_dice.py: B batch, S state, A action, H heads, M noise draws, K candidates, E episodes.
"""

import math
import shutil
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn, tensor

import common
import diffusion_dice as dd
from common import VPSDE, Dataset, UserError

CPU = torch.device("cpu")
DIVERGENCES = ("piecewise", "reverse-kl", "pearson")


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
    """Everything that a test creates is double: two computations then agree to 1e-10, or they differ."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(got, want, atol=1e-6, rtol=0.0):
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got.detach(), want.detach(), atol=atol, rtol=rtol)


def alpha(t):
    """alpha_t = exp(-0.25 t^2 (20 - 0.1) - 0.5 t 0.1)"""
    return torch.exp(-0.25 * t**2 * 19.9 - 0.05 * t)


def sigma(t):
    """sqrt(1 - alpha_t^2), without cancellation"""
    return torch.sqrt(-torch.expm1(-0.5 * t**2 * 19.9 - 0.1 * t))


def tiny_args(**settings):
    """Everything at once, with rates so high that each mistake shows."""
    args = dd.Args(
        env="hopper-medium-v2", steps=10, behavior_steps=9, behavior_batch_size=7, behavior_lr=0.02, lr=0.03,
        behavior_hidden=(6, 5, 4), batch_size=12, hidden=(5, 4), guidance_hidden=(6, 5), time_scale=1.0, M=3, H=3,
        alpha=0.4, discount=0.9, weight_decay=0.3, polyak=0.1, lr_end=0.1, nfe=5,
    )  # fmt: skip
    return dd.resolve(replace(args, **settings))


def tiny_data(n=40):
    g = torch.Generator().manual_seed(5)
    s, a, s_next = (torch.randn(n, k, generator=g) for k in (3, 2, 3))
    r, terminal = torch.randn(n, generator=g), (torch.rand(n, generator=g) < 0.4) * 1.0
    return Dataset(s, a.clamp(-1, 1), r, s_next, terminal, terminal.bool())


def minimise(loss, x):
    """Minimiser of a convex loss(x), from x on."""
    x = x.clone().requires_grad_()
    opt = torch.optim.LBFGS([x], max_iter=200, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        value = loss(x)
        value.backward()
        return value

    opt.step(closure)
    assert x.grad.abs().max() < 1e-7
    return x.detach()


# --- Eq. (7): the divergence, its conjugate, the ratio ----------------------------------------------------
def f_divergence(x, f):
    """f(x), infinite for x < 0.  Eq. (7):  (x - 1)^2 for x >= 1, x log x - x + 1 below."""
    square, entropy = (x - 1).square(), torch.xlogy(x, x.clamp(min=0)) - x + 1
    y = {"piecewise": torch.where(x >= 1, square, entropy), "reverse-kl": entropy, "pearson": square}[f]
    return torch.where(x >= 0, y, math.inf)


@pytest.mark.parametrize("f", DIVERGENCES)
def test_conjugate_is_the_maximum_of_x_y_minus_f_over_x_from_zero_up(f, float64):
    """On a grid of x with spacing 4e-4 x the maximum is missed by at most (2e-4 x)^2 f''(x) / 2 < 2e-6."""
    x, y = torch.cat([torch.zeros(1), torch.logspace(-6, 2, 50_001)]), torch.linspace(-6, 4, 41)
    close(dd.conjugate(y, f), (y[:, None] * x - f_divergence(x, f)).amax(1), 2e-6)


def test_piecewise_conjugate_is_smooth_where_its_pieces_meet(float64):
    """Slope 1 on both sides of 0; only the curvature jumps, from e^0 = 1 below to 1/2 above."""
    y = tensor([-1e-7, 0.0, 1e-7], requires_grad=True)
    value = dd.conjugate(y, "piecewise")
    (slope,) = torch.autograd.grad(value.sum(), y, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), y)
    close(value, [-1e-7, 0, 1e-7], 1e-13)
    close(slope, [1 - 1e-7, 1, 1 + 0.5e-7], 1e-13)
    close(curvature[[0, 2]], [1, 0.5], 1e-6)


@pytest.mark.parametrize("f", DIVERGENCES)
def test_ratio_inverts_the_slope_of_f_and_is_the_slope_of_the_conjugate(f, float64):
    """f'(w) = x and w = f*'(x), at x = (Q - V) / alpha with alpha = 1/2 and V = 0.7."""
    x = torch.linspace(-1.9 if f == "pearson" else -6, 4.5, 50).requires_grad_()
    w = dd.ratio(0.7 + 0.5 * x, tensor(0.7), 0.5, f)
    close(w, torch.autograd.grad(dd.conjugate(x, f).sum(), x)[0], 1e-12)
    z = w.detach().requires_grad_()
    close(torch.autograd.grad(f_divergence(z, f).sum(), z)[0], x, 1e-12)


def test_ratio_by_hand_is_positive_and_at_most_100():
    """alpha = 2, V = 1, Q = 5, 1, -1: x = 2, 0, -1.  Piecewise reaches 100 at x = 198 and is e^x below 0, until 1e-30;
    e^x reaches 100 at ln 100 = 4.605; pearson would be 0 from -2 down, and so is 1e-30."""
    q, v, zero = tensor([5.0, 1.0, -1.0]), tensor(1.0), tensor(0.0)
    close(dd.ratio(q, v, 2.0, "piecewise"), [2, 1, 0.3678794])
    close(dd.ratio(q, v, 2.0, "reverse-kl"), [7.3890561, 1, 0.3678794])
    close(dd.ratio(q, v, 2.0, "pearson"), [2, 1, 0.5])
    w = dd.ratio(tensor([-1e6, -200.0, -50.0, 197.0, 199.0, 1e6]), zero, 1.0, "piecewise")
    assert (w > 0).all()
    close(w, [1e-30, 1e-30, math.exp(-50), 99.5, 100, 100], 0, 1e-6)
    w = dd.ratio(tensor([-200.0, 4.6, 4.61, 200.0]), zero, 1.0, "reverse-kl")
    close(w, [1e-30, 99.48432, 100, 100], 0, 1e-5)
    close(dd.ratio(tensor([-200.0, -2.0, -1.0, 200.0]), zero, 1.0, "pearson"), [1e-30, 1e-30, 0.5, 100], 0)


def test_the_branch_not_taken_does_not_poison_values_or_gradients():
    """x = 200: e^200 is infinite in float32, and 0 times infinity in backward is NaN.  f* = 200^2/4 + 200, slope 101;
    at x = -200: -1, slope 0."""
    v = tensor([0.0, 0.0], requires_grad=True)
    q = tensor([200.0, -200.0])
    close(dd.conjugate(q, "piecewise"), [10_200, -1])
    dd.value_loss(q, v, 1.0, "piecewise", 1.0).backward()
    close(v.grad, [(1 - 101) / 2, 1 / 2])
    v.grad = None
    dd.ratio(q, v, 1.0, "piecewise").sum().backward()
    assert v.grad.isfinite().all()


# --- Eq. (3): value and critic ----------------------------------------------------------------------------
def test_value_loss_by_hand():
    """alpha = 1/2, Q = (1, -1, 0), V = (0, 0, 1/2): x = (2, -2, -1), f* = (3, e^-2 - 1, e^-1 - 1), and c V / alpha =
    (0, 0, c):  (3 - 0.8646647 - 0.6321206 + c) / 3."""
    q, v = tensor([1.0, -1.0, 0.0]), tensor([0.0, 0.0, 0.5])
    for c in (1.0, 0.25):
        close(dd.value_loss(q, v, 0.5, "piecewise", c), (1.5032147 + c) / 3)


@pytest.mark.parametrize("f", DIVERGENCES)
def test_gradient_of_the_value_loss_is_c_minus_w(f, float64):
    q, v = 4 * torch.rand(40) - 2, torch.rand(40, requires_grad=True)
    for alpha_, c in ((0.8, 1.0), (3.0, 0.01)):
        (grad,) = torch.autograd.grad(dd.value_loss(q, v, alpha_, f, c), v)
        w = dd.ratio(q, v, alpha_, f)
        assert w.max() < 100 and w.std() > 0.1
        close(grad, (c - w) / (alpha_ * 40), 1e-12)


@pytest.mark.parametrize("c", [1.0, 0.3])
@pytest.mark.parametrize("f", DIVERGENCES)
def test_at_the_optimum_the_mean_ratio_is_c_in_every_state(f, c, float64):
    """5 states with 30 actions each; a table V(s), and one V for all."""
    q = torch.randn(5, 30) + torch.arange(5)[:, None]
    V = minimise(lambda V: dd.value_loss(q.flatten(), V.repeat_interleave(30), 0.5, f, c), torch.zeros(5))
    close(dd.ratio(q, V[:, None], 0.5, f).mean(1), [c] * 5, 1e-6)
    assert V[4] > V[0] + 2
    V = minimise(lambda V: dd.value_loss(q.flatten(), V.expand(150), 0.5, f, c), torch.zeros(1))
    close(dd.ratio(q, V, 0.5, f).mean(), c, 1e-6)


def test_critic_target_and_loss_by_hand():
    """1 + 0.9 * 10 = 10;  a terminal row keeps its reward alone: 2;  -1 + 0.9 * 30 = 26.  Heads (1, 2) and (3, 6)
    against (1, 4): means over the batch (0 + 4)/2 = 2 and (4 + 4)/2 = 4, which add up to 6."""
    r, terminal, v_next = tensor([1.0, 2.0, -1.0]), tensor([0.0, 1.0, 0.0]), tensor([10.0, 20.0, 30.0])
    close(dd.critic_target(r, terminal, v_next, 0.9), [10, 2, 26])
    close(dd.critic_loss(tensor([[1.0, 2.0], [3.0, 6.0]]), tensor([1.0, 4.0])), 6)


# --- Eq. (6): guidance ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "g, w, scaled, plain",
    [
        (0.0, 2.0, 2.0, 2.0),  # c = 0
        (-2.0, 1.0, 1 - 2 * math.exp(-2), math.exp(2) - 2),  # c = 2
        (3.0, 1.0, math.exp(-2) + 3 * math.e, math.exp(-3) + 3),  # c = max(-3, -1) = -1
        (-79.0, 0.5, 0.5, 0.5 * math.exp(79) - 79),  # c = 79: not yet bounded
    ],
)
def test_igl_loss_of_one_number(g, w, scaled, plain):
    """e^-c (w e^-g + g) with c = max(-g, -1)"""
    loss = dd.igl_loss(tensor([[g]], dtype=torch.float64), tensor([[w]], dtype=torch.float64))
    close(torch.stack(loss), [scaled, plain], 1e-12, 1e-12)


@pytest.mark.parametrize("shift", [0.0, 5.0, -20.0])
def test_igl_loss_is_equation_6_times_one_factor_per_batch(shift, float64):
    """c = max over the batch of -g, at least -1; with shift 5 every g is above 1."""
    g, w = (torch.randn(6, 4) + shift).requires_grad_(), torch.rand(6, 1) * 3
    loss, plain = dd.igl_loss(g, w)
    want, c = (w * torch.exp(-g) + g).mean(), max(-g.min().item(), -1.0)
    close(torch.stack([loss, plain]), torch.stack([want * math.exp(-c), want]), 1e-10, 1e-10)
    assert not plain.requires_grad and (c == -1) == (shift == 5)
    (grad,) = torch.autograd.grad(loss, g)
    close(grad, math.exp(-c) * (1 - w * torch.exp(-g)) / 24, 1e-10)
    step, i = torch.zeros(6, 4), g.argmax()  # a finite difference, where it leaves c = -min g as it is
    step.view(-1)[i] = 1e-5
    difference = (dd.igl_loss(g + step, w)[0] - dd.igl_loss(g - step, w)[0]) / 2e-5
    close(grad.view(-1)[i], difference, 1e-8, 1e-6)


def test_igl_loss_goes_on_with_slope_one_where_the_exponential_would_overflow():
    """g = -500: the exponent is bounded to 80 = c, so w e^(80 - 80) = w in value and -w in gradient; e^-80 of g."""
    g, w = tensor([[-500.0, 3.0, 0.0, -1.0]], requires_grad=True), tensor([[2.0]])
    loss, plain = dd.igl_loss(g, w)
    (grad,) = torch.autograd.grad(loss, g)
    close(loss, 2 / 4)
    close(grad, [[-2 / 4, 0, 0, 0]])
    assert plain.isfinite() and grad.isfinite().all()
    assert (grad[0, 1:] != 0).all() and grad[0, 1] > 0 > grad[0, 3]  # tiny, and with the right signs


def test_minimiser_of_igl_loss_is_the_log_of_the_mean_ratio_given_the_noisy_action(float64):
    """Three clean actions with w = 0.1, 1, 4, six noisy ones each, of four kinds j: g_j = log E[w | j], e.g. kind 3
    comes once from the first and three times from the third: log((0.1 + 3 * 4) / 4)."""
    w, kind = tensor([[0.1], [1.0], [4.0]]), tensor([[0, 0, 0, 1, 1, 3], [0, 1, 1, 1, 2, 2], [0, 2, 2, 3, 3, 3]])
    total = torch.zeros(4).index_add_(0, kind.flatten(), w.expand(3, 6).flatten())
    want = torch.log(total / kind.flatten().bincount())
    close(want[3], math.log(12.1 / 4))
    g = torch.zeros(4, requires_grad=True)
    for _ in range(400):
        (grad,) = torch.autograd.grad(dd.igl_loss(g[kind], w)[0], g)
        g.data -= 2 * grad
    close(g, want, 1e-8)


def test_cep_loss_by_hand():
    """g = (0, ln 3): softmax (1/4, 3/4).  beta = 1: softmax of (0, ln 2) = (1/3, 2/3), so (ln 4 + 2 ln 4/3) / 3;
    beta = 2: (1/5, 4/5), so (ln 4 + 4 ln 4/3) / 5.  Equal Qs against equal gs: ln 2.  Mean over states."""
    g, q = tensor([[0.0, math.log(3)], [7.0, 7.0]]), tensor([[0.0, math.log(2)], [-5.0, -5.0]])
    close(dd.cep_loss(g[:1], q[:1], 1.0), (math.log(4) + 2 * math.log(4 / 3)) / 3)
    close(dd.cep_loss(g, q, 2.0), ((math.log(4) + 4 * math.log(4 / 3)) / 5 + math.log(2)) / 2)


def test_cep_loss_is_stationary_where_g_is_beta_q_up_to_a_constant_of_the_state(float64):
    q, constant = torch.randn(5, 4), torch.randn(5, 1)
    g = (3 * q + constant).requires_grad_()
    (grad,) = torch.autograd.grad(dd.cep_loss(g, q, 3.0), g)
    close(grad, torch.zeros(5, 4), 1e-12)
    g = minimise(lambda g: dd.cep_loss(g, q, 3.0), constant.expand(5, 4))  # each step leaves the sum of a state as is
    close(g - g.mean(1, keepdim=True), 3 * (q - q.mean(1, keepdim=True)), 1e-5)


# --- the score model's loss, the forward process ----------------------------------------------------------
def test_forward_process_has_one_time_per_row_which_all_noise_draws_of_the_row_share():
    """alpha and sigma of four times, to the digits of the sheet.  a_t = alpha_t a + sigma_t eps"""
    t, zero = tensor([0.001, 0.1, 0.5, 1.0]), torch.zeros(4, 1)
    al, sg = tensor([0.999945, 0.946722, 0.281183, 0.006572]), tensor([0.010485, 0.322053, 0.959654, 0.999978])
    close(dd.diffuse(zero + 1, t, zero, VPSDE())[:, 0], al, 6e-7)
    close(dd.diffuse(zero, t, zero + 1, VPSDE())[:, 0], sg, 6e-7)
    a, eps = torch.randn(4, 2), torch.randn(4, 3, 2)
    a_t = dd.diffuse(a[:, None].expand(-1, 3, -1), t, eps, VPSDE())
    for m in range(3):
        close(dd.diffuse(a, t, eps[:, m], VPSDE()), a_t[:, m])
        for b in range(4):
            close(a_t[b, m], al[b] * a[b] + sg[b] * eps[b, m], 3e-6)


def test_score_loss_by_hand():
    """sigma = 0.322053 and 0.959654.  Sum over the action's components, mean over rows:
    ((0.322053 + 0.5)^2 + (2 * 0.322053 - 1)^2 + (-0.959654)^2 + (0.959654/2 + 1)^2) / 2."""
    score, eps = tensor([[1.0, 2.0], [-1.0, 0.5]]), tensor([[0.5, -1.0], [0.0, 1.0]])
    want = (0.822053**2 + 0.355894**2 + 0.959654**2 + 1.479827**2) / 2
    close(dd.score_loss(score, eps, tensor([0.1, 0.5]), VPSDE()), want, 3e-6)


def test_score_loss_is_least_at_minus_the_mean_noise_over_sigma_and_weighs_all_times_alike(float64):
    """eps = 0.2, 1.0, 1.2 for the same a_t: score = -0.8 / sigma_t, where the loss is the variance of eps at every t,
    (0.36 + 0.04 + 0.16)/3.  Being off by 0.3 / sigma_t costs 0.09 at every t."""
    for t in tensor([0.001, 0.1, 1.0]):

        def loss(score, t=t):
            return dd.score_loss(score.expand(3, 1), tensor([[0.2], [1.0], [1.2]]), t.expand(3), VPSDE())

        score = minimise(loss, torch.zeros(1, 1))
        close(score[0, 0] * sigma(t), -0.8)
        close(torch.stack([loss(score), loss(score + 0.3 / sigma(t))]), [0.56 / 3, 0.56 / 3 + 0.09])


# --- networks ---------------------------------------------------------------------------------------------
def copies(net):
    """Weights and buffers by name, apart from the network; weights learn, the buffer W does not."""
    trained = dict(net.named_parameters())
    return {k: v.detach().clone().requires_grad_(k in trained) for k, v in net.state_dict().items()}


def silu(z):
    return z / (1 + torch.exp(-z))


def line(w, name, z):
    return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def slow_time(w, t):
    """Fourier features of t (B,), then their linear layer."""
    u = 2 * math.pi * t[:, None] * w["time.W"]
    return line(w, "time.out", torch.cat([torch.sin(u), torch.cos(u)], 1))


def slow_score(w, x, t, s):
    """Section 3 of the sheet. e goes through SiLU in every block."""
    e = torch.cat([silu(line(w, "state", s)), slow_time(w, t)], 1)
    e = line(w, "embed.2", silu(line(w, "embed.0", e)))

    def block(name, z):
        h = silu(line(w, f"{name}.first", z)) + line(w, f"{name}.embed", silu(e))
        h = silu(line(w, f"{name}.second", h))
        return h + (line(w, f"{name}.skip", z) if f"{name}.skip.weight" in w else z)

    d1 = block("d1", x)
    d2 = block("d2", d1)
    d3 = block("d3", d2)
    u2 = block("u2", torch.cat([d3, block("m", d3)], 1))
    u1 = block("u1", torch.cat([d2, u2], 1))
    return line(w, "out", torch.cat([d1, u1], 1)) / sigma(t)[:, None]


def slow_guidance(w, a_t, t, s, activation):
    """One noise draw after the other: an MLP on [a_t, time, s]."""
    columns, depth = [], sum(k.startswith("layers") for k in w) // 2
    for m in range(a_t.shape[1]):
        x = torch.cat([a_t[:, m], slow_time(w, t), s], 1)
        for i in range(depth):
            x = line(w, f"layers.{i}", x)
            if i < depth - 1:
                x = silu(x) if activation == "silu" else x.clamp(min=0)
        columns.append(x[:, 0])
    return torch.stack(columns, 1)


def slow_value(w, s):
    """Linear, LayerNorm (variance + 1e-5), ReLU, ..., Linear"""
    depth = max(int(k.split(".")[0]) for k in w)
    for i in range(0, depth, 3):
        s = line(w, str(i), s)
        s = (s - s.mean(1, keepdim=True)) / torch.sqrt(s.var(1, correction=0, keepdim=True) + 1e-5)
        s = (s * w[f"{i + 1}.weight"] + w[f"{i + 1}.bias"]).clamp(min=0)
    return line(w, str(depth), s)[:, 0]


def head_weights(heads):
    """Per head [weight (in, out), bias, weight, bias, ...], apart from the network."""
    layers = list(zip(heads.weights, heads.biases))
    H = range(len(heads.weights[0]))
    return [[p.detach().clone().requires_grad_() for w, b in layers for p in (w[h], b[h, 0])] for h in H]


def slow_head(head, x):
    for i in range(0, len(head), 2):
        x = x @ head[i] + head[i + 1]
        x = x.clamp(min=0) if i < len(head) - 2 else x
    return x[:, 0]


def randomised(net):
    for p in net.parameters():  # biases and LayerNorm's too: zeros and ones would hide a mistake
        nn.init.normal_(p, std=0.5)
    return net


def size(net):
    """Frozen frequencies included"""
    return sum(x.numel() for x in net.state_dict().values()) if net is not None else None


@pytest.mark.parametrize(
    "env, S, A, score, q, value, guidance, ensemble",
    [
        ("hopper-medium-v2", 11, 3, 1_627_955, 139_778, 70_145, 210_737, 698_890),
        ("walker2d-medium-v2", 17, 6, 1_634_294, 144_386, 71_681, 213_041, 721_930),
        ("antmaze-umaze-v2", 29, 8, 1_638_776, 151_554, 74_753, 216_625, None),
    ],
)
def test_networks_have_as_many_parameters_as_the_released_ones(env, S, A, score, q, value, guidance, ensemble):
    agent = dd.make_agent(dd.resolve(dd.Args(env=env)), S, A, CPU)
    got = [size(x) for x in (agent.score, agent.q, agent.q_target, agent.value, agent.guidance, agent.ensemble)]
    assert got == [score, q, q, value, guidance, ensemble]


def test_time_features_are_sines_then_cosines_of_frequencies_drawn_once_saved_and_never_trained():
    """W = (1, 2, 0, ...), t = 1/8 and 1/4: sin(2 pi W t) = (0.7071, 1, 0, ...) and (1, 0, 0, ...).  400 draws of W have
    the standard deviation 30 within 5 / sqrt(2 * 6400)."""
    W = torch.cat([dd.Fourier(30.0).W for _ in range(400)])
    assert abs(W.std() / 30 - 1) < 0.045 and abs(W.mean()) < 5 * 30 / 80 and W.abs().max() > 90
    net, root = dd.Fourier(30.0), math.sqrt(0.5)
    net.W.copy_(tensor([1.0, 2.0, *[0.0] * 14]))
    nn.init.eye_(net.out.weight), nn.init.constant_(net.out.bias, 3.0)
    want = tensor([[root, 1, *[0] * 14, root, 0, *[1] * 14], [1, 0, *[0] * 14, 0, -1, *[1] * 14]])
    close(net(tensor([0.125, 0.25])), want + 3)
    agent = dd.make_agent(tiny_args(time_scale=0.01), 3, 2, CPU)
    for net, opt in ((agent.score, agent.score_opt), (agent.guidance, agent.guidance_opt)):
        assert "time.W" in net.state_dict() and net.time.W.shape == (16,) and net.time.W.abs().max() < 0.05
        assert not net.time.W.requires_grad and all(p is not net.time.W for p in opt.param_groups[0]["params"])


def test_heads_start_uniform_within_one_over_root_fan_in_or_with_fan_out_over_root_of_the_outputs():
    """Widths 9 -> 256 -> 256 -> 1.  In: 1/3, 1/16, 1/16;  out: 1/16, 1/16, and 1 for the last weights and biases."""
    for fan, bounds in (("in", (1 / 3, 1 / 16, 1 / 16)), ("out", (1 / 16, 1 / 16, 1.0))):
        heads = dd.Heads(9, (256, 256), 60, fan)
        for w, b, bound in zip(heads.weights, heads.biases, bounds, strict=True):
            for p in (w, b):
                assert 0.9 * bound < p.abs().max() <= bound and abs(p.std() / (bound / math.sqrt(3)) - 1) < 0.2
            assert (w[0] != w[1]).float().mean() > 0.9
    args = tiny_args(hidden=(64, 64), H=60)
    agent = dd.make_agent(args, 3, 2, CPU)
    assert agent.ensemble.weights[-1].abs().max() > 0.9 and len(agent.ensemble.weights[0]) == 60
    assert 0.1 < agent.q.weights[-1].abs().max() <= 1 / 8 and len(agent.q.weights[0]) == 2


def test_heads_equal_as_many_separate_networks():
    for hidden in ((9, 7), ()):
        heads, x = randomised(dd.Heads(5, hidden, 4)), torch.randn(6, 5)
        q = heads(x)
        assert q.shape == (4, 6)
        for h, head in enumerate(head_weights(heads)):
            close(q[h], slow_head(head, x), 2e-5)


def test_value_network_normalises_every_hidden_layer(float64):
    net, s = randomised(dd.ValueNet(3, (9, 7))), torch.randn(6, 3)
    close(net(s), slow_value(copies(net), s), 1e-10)


def test_score_network_equals_a_second_one_written_from_the_sheet(float64):
    """All widths differ, so that every block but m has a skip layer; also with equal widths, where it is x itself."""
    for widths in ((9, 7, 5), (6, 6, 6), (4, 6, 6)):
        net = randomised(dd.ScoreNet(3, 2, widths, 1.0, VPSDE()))
        x, t, s = torch.randn(6, 2), torch.rand(6).clamp(min=1e-3), torch.randn(6, 3)
        close(net(x, t, s), slow_score(copies(net), x, t, s), 1e-9, 1e-9)
        for i in range(6):  # the sampler gives one t for all rows
            close(net(x, t[i : i + 1], s)[i], net(x, t, s)[i], 1e-10)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_guidance_network_equals_a_plain_one_on_action_time_and_state(activation, float64):
    for hidden in ((9, 7, 5), (4,)):
        net = randomised(dd.GuidanceNet(3, 2, hidden, activation, 1.0))
        a_t, t, s = torch.randn(6, 4, 2), torch.rand(6), torch.randn(6, 3)
        g = net(a_t, t, s)
        assert g.shape == (6, 4)
        close(g, slow_guidance(copies(net), a_t, t, s, activation), 1e-10)
        for i in range(6):
            close(net(a_t, t[i : i + 1], s)[i], g[i], 1e-10)


# --- the sampler ------------------------------------------------------------------------------------------
class Exact:
    """Score of a ~ N(m, v I) under the noise of time t: -(x - alpha m) / (alpha^2 v + sigma^2)."""

    def __init__(self, m, v):
        self.m, self.v, self.sde = m, v, VPSDE()

    def __call__(self, x, t, s):
        return -(x - alpha(t) * self.m) / (alpha(t) ** 2 * self.v + sigma(t) ** 2)

    def posterior(self, x, t):
        """Mean and variance of a_0 given a_t = x"""
        V = alpha(t) ** 2 * self.v + sigma(t) ** 2
        return self.m + alpha(t) * self.v * (x - alpha(t) * self.m) / V, self.v * sigma(t) ** 2 / V

    def tilt(self, k):
        """log E[e^{k a_0} | a_t] = k mean + k^2 variance / 2, for (B, 1, A) actions"""

        def g(a_t, t, s):
            mean, variance = self.posterior(a_t, t)
            return (k * mean + k**2 * variance / 2).sum(-1)

        return g


def ends(score, guidance, nfe, kappa=1.0):
    """Everything is linear in x: mean and standard deviation of the end, from where 0 and 1 go."""
    zero, one = dd.sample(score, guidance, torch.zeros(2, 1), tensor([[0.0], [1.0]]), kappa, nfe).flatten().tolist()
    return [zero, one - zero]


START = [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]
END = [-0.5884500, -0.1446707, 0.2991086, 0.5209983, 0.7428879, 1.1866672]


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_sampler_meets_the_test_vector(dtype, atol):
    """15 calls of the exact score of N(0.3, 0.5^2); at kappa 0, or without a network, guidance costs no call."""

    def forbidden(*inputs):
        raise AssertionError("called")

    for guidance, kappa in ((None, 4.0), (forbidden, 0.0)):
        a = dd.sample(Exact(0.3, 0.25), guidance, torch.zeros(6, 1), tensor(START, dtype=dtype)[:, None], kappa, 15)
        assert a.dtype == dtype
        close(a[:, 0], END, atol)


def test_orders_are_twos_and_then_ones():
    assert dd.orders(15) == [2] * 7 + [1]
    assert [dd.orders(n) for n in (1, 2, 3, 4, 5)] == [[1], [1, 1], [2, 1], [2, 1, 1], [2, 2, 1]]
    assert dd.orders(16) == [2] * 7 + [1, 1]
    assert all(sum(dd.orders(n)) == n for n in range(1, 60))


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5, 6])
def test_solver_equals_the_steps_of_the_sheet_and_calls_the_model_at_every_grid_point_but_the_last(nfe, float64):
    """tau_i = 1 - 0.999 i / nfe.  An order-2 step from tau_i to tau_{i+2} has tau_{i+1} as midpoint."""
    tau, times, start = tensor([1 - 0.999 * i / nfe for i in range(nfe + 1)]), [], torch.randn(5, 2)
    al, sg, lam = alpha(tau), sigma(tau), torch.log(alpha(tau) / sigma(tau))

    def model(x, t):
        assert t.shape == (1,)
        times.append(t.item())
        return torch.sin(3 * x + t)

    def step(x, i, j, D):
        return sg[j] / sg[i] * x - al[j] * (torch.exp(lam[i] - lam[j]) - 1) * D

    got = dd.dpm_solver(model, start, VPSDE(), nfe)
    close(tensor(times), tau[:-1], 1e-12)
    x, i = start, 0
    for order in [2] * ((nfe - 1) // 2) + ([1] if nfe % 2 else [1, 1]):
        D, j = model(x, tau[i : i + 1]), i + order
        end = step(x, i, j, D)
        if order == 2:
            r = (lam[i + 1] - lam[i]) / (lam[j] - lam[i])
            slope = model(step(x, i, i + 1, D), tau[i + 1 : i + 2]) - D
            end = end - 1 / (2 * r) * al[j] * (torch.exp(lam[i] - lam[j]) - 1) * slope
        x, i = end, j
    close(got, x, 1e-9)


def test_solver_converges_to_the_probability_flow_with_order_two(float64):
    """For N(m, v) the flow keeps (x_t - alpha_t m) / sqrt(alpha_t^2 v + sigma_t^2).  Half the step is a quarter of the
    error: early where lambda is linear in t, as here with 3 - 6 t; the paper's schedule gets there as well."""
    linear = SimpleNamespace(lam=lambda t: 3 - 6 * t, alpha=lambda t: torch.sigmoid(6 - 12 * t).sqrt(),
                             sigma=lambda t: torch.sigmoid(12 * t - 6).sqrt())  # fmt: skip

    def error(sde, nfe, m, v):
        def spread(t):
            return sde.alpha(t) ** 2 * v + sde.sigma(t) ** 2

        def x_0(x, t):
            return m + sde.alpha(t) * v / spread(t) * (x - sde.alpha(t) * m)

        x, t, e = tensor([[-2.0], [0.0], [1.0]]), tensor(1.0), tensor(1e-3)
        exact = sde.alpha(e) * m + (x - sde.alpha(t) * m) * (spread(e) / spread(t)).sqrt()
        return float((dd.dpm_solver(x_0, x, sde, nfe) - exact).abs().max())

    for v in (0.25, 4.0):
        errors = [error(linear, nfe, 0.3, v) for nfe in (101, 201, 401)]
        assert all(3.6 < a / b < 4.4 for a, b in pairwise(errors))
    assert error(VPSDE(), 3001, 0.3, 0.25) < 2e-5 < 5e-2 < error(VPSDE(), 15, 0.3, 0.25)


@pytest.mark.parametrize(
    "m, std, k, few, many",
    [
        (0.3, 0.5, 2.0, (0.7976, 0.4438), (0.7973, 0.4990)),  # tilt: N(0.3 + 2 * 0.25, 0.5^2)
        (0.0, 0.2, 4.0, (0.15985, 0.1350), (0.15978, 0.1981)),  # N(0.16, 0.2^2)
        (-0.4, 0.3, 10.0, (0.4992, 0.2360), (0.4990, 0.2985)),  # N(0.5, 0.3^2)
    ],
)
def test_exact_guidance_turns_a_gaussian_into_its_exponential_tilt(m, std, k, few, many, float64):
    """N(m, std^2) e^{k a} = N(m + k std^2, std^2), up to what 15 or 200 calls leave."""
    score = Exact(m, std**2)
    atol = 6e-5 if m else 6e-6
    got = [ends(score, score.tilt(k), nfe) for nfe in (15, 200)]
    for (mean, spread), want in zip(got, (few, many)):
        assert mean == pytest.approx(want[0], abs=atol) and spread == pytest.approx(want[1], abs=6e-5)
    assert got[1] == pytest.approx([m + k * std**2, std], abs=3e-3)
    # kappa scales the guidance: the exponential tilts of half the rate at twice the scale are the same
    assert ends(score, score.tilt(k / 2), 15, kappa=2.0) == pytest.approx(got[0], abs=1e-9)
    assert ends(score, score.tilt(-k), 15)[0] < m < got[0][0]


def test_one_guided_call_of_the_real_networks_equals_finite_differences(float64):
    """nfe = 1 is one step of order 1 from t = 1:  sigma_e/sigma_1 x - alpha_e (e^-h - 1) x_0  with
    eps = -sigma_1 (score + kappa grad g), x_0 = (x - sigma_1 eps) / alpha_1; the gradient by differences in a_t."""
    net = randomised(dd.ScoreNet(3, 2, (6, 5, 4), 1.0, VPSDE()))
    guidance = randomised(dd.GuidanceNet(3, 2, (6, 5), "silu", 1.0))
    x, s, one, step = torch.randn(4, 2), torch.randn(4, 3), tensor([1.0]), 1e-5
    with torch.no_grad():
        moved = x[:, None] + step * torch.cat([torch.eye(2), -torch.eye(2)])  # (B, 4, A)
        g = slow_guidance(copies(guidance), moved, one.expand(4), s, "silu")
        grad = (g[:, :2] - g[:, 2:]) / (2 * step)
        eps = -sigma(one) * (slow_score(copies(net), x, one.expand(4), s) + 1.7 * grad)
        x_0 = (x - sigma(one) * eps) / alpha(one)
        e = tensor([1e-3])
        h = torch.log(alpha(e) / sigma(e) * sigma(one) / alpha(one))
        want = sigma(e) / sigma(one) * x - alpha(e) * (torch.exp(-h) - 1) * x_0
        got = dd.sample(net, guidance, s, x, 1.7, 1)  # under no_grad, as when acting
    assert not got.requires_grad and all(p.grad is None for p in guidance.parameters())
    assert (1.7 * grad).abs().max() > 0.1
    close(got, want, 1e-5, 1e-7)


# --- Eq. (8): acting --------------------------------------------------------------------------------------
def test_select_takes_the_largest_value_or_draws_by_softmax():
    """Temperature 2: probabilities of the values 1, 2, 4 in proportion to e^0.5, e^1, e^2."""
    a = tensor([[10.0, 1.0], [20.0, 2.0], [30.0, 3.0], [40.0, 4.0], [50.0, 5.0], [60.0, 6.0]])  # of two states
    close(dd.select(a, tensor([1.0, 5.0, 2.0, -1.0, -3.0, -2.0]), 3), [[20.0, 2.0], [40.0, 4.0]])
    n = 40_000
    got = dd.select(tensor([[0.0], [1.0], [2.0]]).repeat(n, 1), tensor([1.0, 2.0, 4.0]).repeat(n), 3, 2.0)
    assert got.shape == (n, 1)
    weights = [math.exp(0.5), math.exp(1), math.exp(2)]
    for i, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs((got == i).float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    got = dd.select(tensor([[0.0], [1.0]]).repeat(50, 1), tensor([0.0, 900.0]).repeat(50), 2, 1.0)
    assert (got == 1).all()  # e^900 must not overflow


def stub_act(monkeypatch, candidates, judge, **settings):
    """act() among fixed candidates (E, K, A); what it gave to sample is kept."""
    seen = {}

    def sample(score, guidance, s, x, kappa, nfe):
        seen.update(score=score, guidance=guidance, s=s, x=x, kappa=kappa, nfe=nfe)
        return candidates.flatten(0, 1)

    monkeypatch.setattr(dd, "sample", sample)
    args = tiny_args(**{"K": candidates.shape[1], "temperature": 0.0, "kappa": 1.5, "nfe": 7} | settings)
    agent = SimpleNamespace(score="score", guidance="g", judge=judge)
    return dd.make_act(args, agent, candidates.shape[2]), seen


def test_acting_takes_the_best_candidate_of_each_state_by_the_judge_of_that_state(monkeypatch):
    """Q(s, a) = -|a - s|^2: the candidate nearest to its own state."""
    candidates, s = tensor([[[1.0], [2.0], [3.0]], [[-4.0], [1.9], [0.5]]]), tensor([[9.0], [0.0]])
    act, seen = stub_act(monkeypatch, candidates, lambda s, a: -(a - s).square().sum(-1))
    close(act(tensor([[1.8], [-9.0]])), [[2.0], [-4.0]], 0)
    close(act(s), [[3.0], [0.5]], 0)
    assert (seen["score"], seen["guidance"], seen["kappa"], seen["nfe"]) == ("score", "g", 1.5, 7)
    close(seen["s"][:, 0], [9, 9, 9, 0, 0, 0], 0)  # a state's candidates lie together
    act, seen = stub_act(monkeypatch, candidates, lambda s, a: a[:, 0], guidance="none")
    act(s)
    assert seen["guidance"] is None


def test_acting_draws_by_temperature_from_noise_of_its_own_and_judges_no_single_candidate(monkeypatch):
    """Values 1 and 2 at temperature 2: the larger one with probability 1 / (1 + e^-0.5)."""
    n, candidates = 20_000, tensor([[[1.0], [2.0]]])
    act, seen = stub_act(monkeypatch, candidates.expand(n, -1, -1), lambda s, a: a[:, 0], temperature=2.0)
    assert abs((act(torch.zeros(n, 1)) == 2).float().mean() - 1 / (1 + math.exp(-0.5))) < 2 / math.sqrt(n)
    x = seen["x"]
    assert x.shape == (2 * n, 1) and abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs((x[0::2] * x[1::2]).mean()) < 0.03
    for temperature in (0.0, 1.0):
        act, _ = stub_act(monkeypatch, candidates[:, :1], None, temperature=temperature)
        close(act(torch.zeros(1, 1)), [[1.0]], 0)


def test_judge_is_the_mean_of_the_ensemble_or_the_first_target_head():
    """Linear heads on S = A = 1.  Ensemble on [s, a]: s + 10 a and 3 s, mean 2 s + 5 a.  Target heads on [a, s]: the
    first is 7 a - s, the second smaller everywhere and without a say; the online Q has none either."""
    agent = dd.make_agent(tiny_args(H=2), 1, 1, CPU)
    for name in ("q", "q_target", "ensemble"):
        setattr(agent, name, dd.Heads(2, (), 2).requires_grad_(False))
        nn.init.zeros_(getattr(agent, name).biases[0])
    agent.ensemble.weights[0].copy_(tensor([[[1.0], [10.0]], [[3.0], [0.0]]]))
    agent.q_target.weights[0].copy_(tensor([[[7.0], [-1.0]], [[0.0], [0.0]]]))
    agent.q_target.biases[0][1] = -99
    s, a = tensor([[1.0], [2.0]]), tensor([[0.5], [-1.0]])
    close(agent.judge(s, a), [4.5, -1])
    agent.ensemble = None
    close(agent.judge(s, a), [2.5, -9])


# --- training the real networks on a problem with a known answer ------------------------------------------
def test_the_real_networks_find_the_reweighted_gaussian_of_each_state():
    """a ~ N(0.3, 0.5^2) in the states 1 and -1, w = (f')^{-1}(3 s a): 1.5 a + 1 for s a > 0, else e^{3 s a}.  By
    quadrature over a_0: the mean of the reweighted action, E[w a] / E[w] = 0.5599 and -0.1368, and log E[w | a_t].
    1,000 steps of the real losses, then the sampler with 15 calls; without guidance it stays at 0.3."""
    sde, n, steps, lr = VPSDE(), 256, 1000, 8e-3
    score, guidance = dd.ScoreNet(1, 1, (64, 32, 32), 1.0, sde), dd.GuidanceNet(1, 1, (64, 64), "silu", 1.0)
    opts = [torch.optim.Adam(net.parameters(), tensor(lr), fused=True) for net in (score, guidance)]
    for i in range(steps):
        s, a = torch.randint(2, (n, 1)) * 2.0 - 1, 0.3 + 0.5 * torch.randn(n, 1)
        t, eps = dd.draw_t(n, CPU), torch.randn(n, 2, 1)
        a_t = dd.diffuse(a[:, None].expand(-1, 2, -1), t, eps, sde)
        w = dd.ratio(3 * s * a, tensor(0.0), 1.0, "piecewise")
        losses = dd.score_loss(score(a_t[:, 0], t, s), eps[:, 0], t, sde), dd.igl_loss(guidance(a_t, t, s), w)[0]
        for loss, opt in zip(losses, opts):
            dd.anneal(opt, lr, tensor(i / steps), 0.0)
            dd.descend(loss, opt)

    grid = torch.linspace(-3.2, 3.8, 4001, dtype=torch.float64)
    p, x = torch.exp(-2 * (grid - 0.3) ** 2), torch.randn(20_000, 1)
    for state, mean in ((1.0, 0.5599), (-1.0, -0.1368)):
        w = torch.where(state * grid > 0, 1.5 * state * grid + 1, torch.exp(3 * state * grid))
        assert abs((p * w * grid).sum() / (p * w).sum() - mean) < 1e-4
        s = torch.full((20_000, 1), state)
        with torch.no_grad():
            assert abs(dd.sample(score, guidance, s, x, 1.0, 15).mean() - mean) < 0.06
            assert abs(dd.sample(score, None, s, x, 1.0, 15).mean() - 0.3) < 0.04
            for t, atol in ((0.05, 0.15), (0.2, 0.07), (0.5, 0.05)):
                t = tensor([t])
                width = (alpha(t) ** 2 * 0.25 + sigma(t) ** 2).sqrt()
                a_t = alpha(t) * 0.3 + torch.linspace(-1, 1, 21) * width
                kernel = p * torch.exp(-(((a_t[:, None] - alpha(t) * grid) / sigma(t)) ** 2) / 2)
                want = torch.log((kernel * w).sum(1) / kernel.sum(1))
                assert (guidance(a_t[None, :, None], t, s[:1])[0] - want).square().mean().sqrt() < atol


# --- one update, written a second time --------------------------------------------------------------------
def slow_conjugate(x, f):
    """One number: (7), and the other two divergences."""
    if f == "reverse-kl" or (f == "piecewise" and x < 0):
        return torch.exp(x) - 1
    return x**2 / 4 + x if x >= -2 else 0 * x - 1


def slow_ratio(x, f):
    w = math.exp(min(x, 50.0)) if f == "reverse-kl" or (f == "piecewise" and x < 0) else max(0.0, x / 2 + 1)
    return max(1e-30, min(100.0, w))


class SlowAdam:
    """torch's own loop over weights, neither fused nor compiled. The rate: a cosine from lr at the first update towards
    lr_end lr after the last.  With a decay: AdamW, else Adam."""

    def __init__(self, weights, lr, decay, args, steps):
        kind = torch.optim.AdamW if decay else torch.optim.Adam
        self.opt = kind(weights, lr, (0.9, 0.999), 1e-8, weight_decay=decay, foreach=False)
        self.lr, self.lr_end, self.steps, self.k = lr, args.lr_end, steps, 0

    def descend(self, loss):
        rate = self.lr * (self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * self.k / self.steps)) / 2)
        self.opt.param_groups[0]["lr"] = rate
        self.k += 1
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return rate


def flat(heads):
    return [p for head in heads for p in head]


class Slow:
    """The main stage as section 4 of the sheet has it, in its order, with plain networks."""

    def __init__(self, args, agent, data, generated):
        self.args, self.data, self.generated = args, data, generated
        self.value, self.guidance = copies(agent.value), copies(agent.guidance)
        self.q, self.q_target = head_weights(agent.q), head_weights(agent.q_target)
        self.ensemble = head_weights(agent.ensemble) if args.H else []
        nets = {"guidance": [p for p in self.guidance.values() if p.requires_grad], "value": list(self.value.values())}
        nets |= {"q": flat(self.q), "ensemble": flat(self.ensemble)}
        self.adam = {k: SlowAdam(p, args.lr, args.weight_decay, args, args.steps) for k, p in nets.items() if p}

    def bar(self, a, s):
        """min over the two target heads, a number per row"""
        with torch.no_grad():
            return torch.minimum(*(slow_head(head, torch.cat([a, s], 1)) for head in self.q_target))

    def update(self):
        args, data, B, M = self.args, self.data, self.args.batch_size, self.args.M
        i = torch.randint(len(data.r), (B,)).tolist()
        s, a, r, s_next, terminal = (x[i] for x in (data.s, data.a, data.r, data.s_next, data.terminal))
        # 1. V, by the target Q as the step before left it
        v = slow_value(self.value, s)
        x = (self.bar(a, s) - v) / args.alpha
        loss_v = sum(slow_conjugate(x[b], args.f) + args.v_coefficient * v[b] / args.alpha for b in range(B)) / B
        self.adam["value"].descend(loss_v)
        # 2. Q, towards the V just updated; 3. the ensemble, towards the same
        y = (r + args.discount * (1 - terminal) * slow_value(self.value, s_next)).detach()
        q = [slow_head(head, torch.cat([a, s], 1)) for head in self.q]
        loss_q = ((y - q[0]) ** 2 + (y - q[1]) ** 2).mean()
        out = {"value": loss_v, "critic": loss_q, "q_mean": (q[0] + q[1]).mean() / 2, "v_mean": v.mean()}
        lr = self.adam["q"].descend(loss_q)
        if args.H:
            q = [slow_head(head, torch.cat([s, a], 1)) for head in self.ensemble]
            out["ensemble"] = sum(((y - q_e) ** 2).mean() for q_e in q) / args.H
            self.adam["ensemble"].descend(out["ensemble"])
        # 4. the target, with the Q just updated
        with torch.no_grad():
            for p, p_new in zip(flat(self.q_target), flat(self.q)):
                p.copy_(args.polyak * p_new + (1 - args.polyak) * p)
        # 5. guidance, with new V and new target: one t per row, M noises
        x = (self.bar(a, s) - slow_value(self.value, s).detach()) / args.alpha
        w = tensor([slow_ratio(z, args.f) for z in x.tolist()])
        out |= {"w_mean": w.mean(), "w_max": w.max()}
        if args.guidance != "none":
            out |= self.guide(s, a, w, B, M)
        return {f"losses/{k}": z.item() for k, z in out.items()} | {"charts/lr": lr}

    def guide(self, s, a, w, B, M):
        args, a_0 = self.args, torch.stack([a] * M, 1)
        if args.guidance == "cep":
            k = torch.randint(len(self.generated[0]), (B,)).tolist()
            s, a_0 = self.data.s[self.generated[0][k]], self.generated[1][k]
        t = 0.001 + 0.999 * torch.rand(B)
        eps = torch.randn(B, M, 2)
        a_t = torch.stack([alpha(t)[:, None] * a_0[:, m] + sigma(t)[:, None] * eps[:, m] for m in range(M)], 1)
        g = slow_guidance(self.guidance, a_t, t, s, args.guidance_activation)
        if args.guidance == "igl":
            plain = sum(w[b] * torch.exp(-g[b, m]) + g[b, m] for b in range(B) for m in range(M)) / (B * M)
            out, loss = {"igl": plain}, plain * math.exp(-max(-g.min().item(), -1.0))
        else:
            q = torch.stack([self.bar(a_0[:, m], s) for m in range(M)], 1)
            share, log_p = torch.exp(args.cep_beta * q), g - torch.log(torch.exp(g).sum(1, keepdim=True))
            loss = -(share / share.sum(1, keepdim=True) * log_p).sum() / B
            out = {"cep": loss}
        self.adam["guidance"].descend(loss)
        near = g[t < 0.1].detach()
        return out | {"g_std": near.std(correction=0) if near.numel() else tensor(0.0)}


@pytest.mark.parametrize(
    "settings",
    [
        dict(),  # piecewise, in-sample guidance, an ensemble
        dict(f="reverse-kl", guidance_activation="relu"),
        dict(f="pearson", v_coefficient=0.1),
        dict(H=0, M=1),
        dict(guidance="cep"),
        dict(guidance="none"),
    ],
    ids=str,
)
def test_eight_updates_equal_those_of_a_second_slow_implementation(settings, float64):
    """Same initial weights, same random numbers, float64: all losses and weights agree to 1e-9."""
    args, data = tiny_args(**settings), tiny_data()
    agent = dd.make_agent(args, 3, 2, CPU)
    for p, p_target in zip(agent.q.parameters(), agent.q_target.parameters(), strict=True):
        assert torch.equal(p, p_target) and p is not p_target and p.requires_grad and not p_target.requires_grad
    randomised(agent.q_target)  # so that online and target differ from the first step on
    generated = (torch.randperm(40)[:15], torch.randn(15, args.M, 2)) if args.guidance == "cep" else None
    slow, before = Slow(args, agent, data, generated), deepcopy(agent)
    update, ours, theirs = dd.make_update(args, agent, data, generated), [], []
    torch.manual_seed(1)
    for _ in range(8):
        ours.append(update())
    torch.manual_seed(1)
    for _ in range(8):
        theirs.append(slow.update())

    for fast, want in zip(ours, theirs):  # what an update returned, later ones leave alone
        assert {k: v.item() for k, v in fast.items()} == pytest.approx(want, rel=1e-9, abs=1e-9)
    if args.guidance != "none":
        assert max(want["losses/g_std"] for want in theirs) > 0 and not same(agent.guidance, before.guidance)
    else:
        assert same(agent.guidance, before.guidance)
    for name in ("value", "guidance"):
        for k, p in getattr(agent, name).state_dict().items():
            close(p, getattr(slow, name)[k], 1e-9)
    for name in ("q", "q_target") + (("ensemble",) if args.H else ()):
        for p, p_slow in zip(flat(head_weights(getattr(agent, name))), flat(getattr(slow, name)), strict=True):
            close(p, p_slow, 1e-9)
    assert same(agent.score, before.score) and agent.behavior_step == 0 and agent.step == 8


def same(net, other):
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("B", [7, 2500])
def test_behaviour_updates_equal_those_of_a_second_implementation_also_in_blocks(B, float64):
    """2,500 rows are three blocks of at most 1,024, of unequal size: one gradient all the same.  Plain Adam."""
    args, data = tiny_args(behavior_batch_size=B), tiny_data()
    agent = dd.make_agent(args, 3, 2, CPU)
    w, before = copies(agent.score), deepcopy(agent)
    adam = SlowAdam([p for p in w.values() if p.requires_grad], args.behavior_lr, 0.0, args, args.behavior_steps)
    update = dd.make_behavior_update(args, agent, data)
    torch.manual_seed(1)
    ours = [update() for _ in range(5)]
    torch.manual_seed(1)
    for got in ours:
        i = torch.randint(40, (B,))
        s, a, t = data.s[i], data.a[i], 0.001 + 0.999 * torch.rand(B)
        eps = torch.randn(B, 2)
        a_t = alpha(t)[:, None] * a + sigma(t)[:, None] * eps
        loss = ((sigma(t)[:, None] * slow_score(w, a_t, t, s) + eps) ** 2).sum() / B
        want = {"losses/score": loss.item(), "charts/lr": adam.descend(loss)}
        assert {k: v.item() for k, v in got.items()} == pytest.approx(want, rel=1e-9)
    for k, p in agent.score.state_dict().items():
        close(p, w[k], 1e-9)
    assert not same(agent.score, before.score) and agent.behavior_step == 5 and agent.step == 0
    for name in ("value", "q", "q_target", "guidance", "ensemble"):
        assert same(getattr(agent, name), getattr(before, name))


def test_optimisers_are_adam_and_adamw_with_their_usual_constants():
    agent = dd.make_agent(dd.resolve(dd.Args(env="hopper-medium-v2", hidden=(8, 8), guidance_hidden=(8,))), 3, 2, CPU)
    for name in ("score", "value", "q", "ensemble", "guidance"):
        opt, net = getattr(agent, f"{name}_opt"), getattr(agent, name)
        (group,) = opt.param_groups
        kind, lr, decay = (torch.optim.Adam, 1e-4, 0) if name == "score" else (torch.optim.AdamW, 3e-4, 1e-4)
        assert type(opt) is kind and (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        assert group["weight_decay"] == decay and not group["amsgrad"] and not group["maximize"]
        close(group["lr"], lr, 1e-10)
        assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]


def test_learning_rates_fall_by_a_cosine_to_a_share_of_themselves():
    """lr (e + (1 - e) (1 + cos(pi x)) / 2) with lr = 2, e = 0.1 at x = 0, 1/4, 1/2, 1; e = 1 is constant."""
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], tensor(0.0))
    for x, want in ((0, 2), (0.25, 2 * (0.1 + 0.9 * 0.8535534)), (0.5, 1.1), (1, 0.2)):
        dd.anneal(opt, 2.0, tensor(x, dtype=torch.float64), 0.1)
        close(opt.param_groups[0]["lr"], want)
        dd.anneal(opt, 2.0, tensor(x, dtype=torch.float64), 1.0)
        close(opt.param_groups[0]["lr"], 2)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_updates_are_the_eager_ones():
    """Inductor has random numbers of its own; fallback_random lends it those of eager torch."""
    from torch._inductor import config

    args = tiny_args(hidden=(4,), guidance_hidden=(4,), M=2, H=1)

    def run(wrap):
        torch.manual_seed(0)
        agent = dd.make_agent(args, 3, 2, CPU)
        updates = dd.make_behavior_update(args, agent, tiny_data()), dd.make_update(args, agent, tiny_data())
        rows = [[[x.item() for x in update().values()] for _ in range(9)] for update in map(wrap, updates)]
        nets = agent.score, agent.value, agent.q, agent.q_target, agent.guidance, agent.ensemble
        return [*map(tensor, rows), agent.behavior_step, agent.step, *(p for net in nets for p in net.parameters())]

    eager = run(lambda update: update)
    with config.patch({"fallback_random": True, "cpp.simdlen": 0}):  # 0: loops that g++ compiles faster
        compiled = run(lambda update: dd.accelerate(update, SimpleNamespace(compile="on", graph="off"), CPU))
    torch._dynamo.reset()
    for x, y in zip(compiled, eager, strict=True):
        close(x, y, 1e-5)


# --- generated actions, rewards, exact answers ------------------------------------------------------------
def test_generated_actions_are_of_the_behaviour_model_in_the_states_of_their_rows(float64):
    """M = 5,000 actions per state are made 16384 // 5000 + 1 = 4 states at a time: 2 parts for 6 of the 40 rows.  The
    seed decides, and training's random numbers stay as they were."""
    args, data = tiny_args(M=5000, cep_states=6, kappa=9.0, seed=3, nfe=2), tiny_data()
    agent, before = dd.make_agent(args, 3, 2, CPU), torch.get_rng_state()
    rows, actions = dd.generate(args, agent, data)
    assert torch.equal(torch.get_rng_state(), before) and actions.shape == (6, 5000, 2) and not actions.requires_grad
    torch.manual_seed(3)
    assert torch.equal(rows, torch.randperm(40)[:6])
    s, x = data.s[rows].repeat_interleave(5000, 0), torch.cat([torch.randn(n, 2) for n in (20_000, 10_000)])
    close(actions.flatten(0, 1), dd.sample(agent.score, None, s, x, 0.0, 2), 1e-9, 1e-9)
    assert torch.equal(actions, dd.generate(args, agent, data)[1])
    assert not torch.equal(rows, dd.generate(replace(args, seed=4, M=1), agent, data)[0])
    assert sorted(dd.generate(replace(args, cep_states=99, M=1), agent, data)[0].tolist()) == list(range(40))


def test_windows_of_the_reward_scale_end_at_terminal_rows_or_when_full():
    """Windows of 3: 1 + 2 + 3 = 6;  4 + 5 = 9, then the task ended;  6 + 7 + 8 = 21, terminal on its last row, which is
    one end and not two;  -9 is left over.  1000 / (21 - 6).  A time-out is not seen: windows run across it."""
    r = tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, -9.0])
    terminal = tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    assert dd.window_scale(r, terminal, 3) == pytest.approx(1000 / 15)
    # two episodes of 999 rows at 1 and 3 per row, both cut by time: windows of 1000 and, left over, 998 rows
    r = torch.cat([torch.full((999,), 1.0), torch.full((999,), 3.0), torch.full((3,), 5.0)])
    end = torch.zeros(2001)
    assert dd.window_scale(r, end) == pytest.approx(1000 / ((998 * 3 + 2 * 5) - (999 + 3)))
    for n in (1999, 5):  # one window, and none
        with pytest.raises(UserError, match="no two returns that differ"):
            dd.window_scale(r[:n], end[:n])
    with pytest.raises(UserError, match="no two returns that differ"):
        dd.window_scale(torch.ones(3000), torch.zeros(3000))


@pytest.mark.parametrize("f, c", [("piecewise", 1.0), ("reverse-kl", 0.3)])
def test_exact_samples_are_the_data_reweighted_by_a_ratio_of_mean_c(f, c, monkeypatch):
    """On the ring with Q = 3 r - 1 and alpha = 0.4: mean w = c over the rows, and up to 5 standard errors over fresh
    draws; the mean reward of the samples is E[w r] / E[w]."""
    seen, real = {}, common.reweighted_samples

    def spy(env, n, weight, seed):
        seen.update(env=env, weight=weight)
        return real(env, n, weight, seed, pool=100_000)

    monkeypatch.setattr(common, "reweighted_samples", spy)
    args = dd.resolve(dd.Args(env="bandit-ring", alpha=0.4, f=f, v_coefficient=c))
    a = dd.exact_samples(args, lambda r: 3 * r - 1, 5000, 2)
    assert a.shape == (5000, 2) and seen["env"] == "bandit-ring"
    toy = common.TOYS["bandit-ring"]
    close(seen["weight"](toy.reward(common.toy_dataset("bandit-ring").a)).mean(), c, 1e-5)
    r = toy.draw(100_000, torch.Generator().manual_seed(9))[1]
    w = seen["weight"](r)
    assert abs(w.mean() - c) < 5 * w.std() / math.sqrt(1500)
    mean = (w * r).mean() / w.mean()
    assert abs(toy.reward(a).mean() - mean) < 5 * (toy.reward(a).std() / math.sqrt(5000)) < mean - r.mean()


def test_borrowing_takes_the_behaviour_model_of_another_run_of_the_same_kind(tmp_path):
    args = tiny_args(pretrained=str(tmp_path), time_scale=30.0)
    ours, theirs = dd.make_agent(args, 3, 2, CPU), dd.make_agent(args, 3, 2, CPU)

    def offer(args, **progress):
        progress = {"stage": "train", "step": 0, "done": ["behavior"]} | progress
        dd.save(tmp_path / "last.pt", dd.agent_state(theirs), progress, args)

    before = deepcopy(ours)
    for taken, done, words in (
        (dict(env="hopper-expert-v2"), ["behavior"], "expected"),
        (dict(behavior_hidden=(6, 5, 3)), ["behavior"], "behavior-hidden"),
        (dict(), [], "has not done behavior"),
    ):
        offer(replace(args, **taken), done=done)
        with pytest.raises(UserError, match=words):
            dd.borrow(args, {"score": ours.score}, ["behavior"], "behavior_hidden")
    assert same(ours.score, before.score)
    offer(args)
    assert dd.borrow(args, {"score": ours.score}, ["behavior"], "behavior_hidden") == ["behavior"]
    assert dd.borrow(replace(args, pretrained=None), {}, ["behavior"], "") == []
    assert same(ours.score, theirs.score) and torch.equal(ours.score.time.W, theirs.score.time.W)
    assert all(same(getattr(ours, k), getattr(before, k)) for k in ("value", "q", "q_target", "ensemble", "guidance"))
