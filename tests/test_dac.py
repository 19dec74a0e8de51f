"""DAC's mathematics, checked on a CPU: each test states one fact of the method and shows how to derive it.

    schedule, sampler      numbers of the paper's schedule; chains whose end is known in closed form
    losses                 minimisers, gradients, and every term on a few numbers worked out in the comment
    networks               sizes, initial values, time embedding; all heads at once = one head after the other
    training               the real network on problems with a known answer; one update written a second time
    settings               the published table

Letters as in dac.py: B batch, S state, A action, T diffusion steps, H heads, N actions per state; ab is
alpha_bar.
"""

import math
import shutil
import statistics
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor

import common
import dac
from common import Dataset, vp_schedule

CPU = torch.device("cpu")


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
def float64(monkeypatch):
    """Everything that a test creates is double: two computations then agree to 1e-10, or they differ."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(dac, "vp_schedule", double_schedule)
    yield
    torch.set_default_dtype(torch.float32)


def close(got, want, atol=1e-6, rtol=0.0):
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got.detach(), want.detach(), atol=atol, rtol=rtol)


def vp(T: int):
    """(beta, alpha, ab), lists over t = 0..T:  alpha_t = exp(-0.1/T - 9.9 (2t - 1) / (2 T^2))."""
    alpha = [1.0] + [math.exp(-0.1 / T - 0.5 * 9.9 * (2 * t - 1) / T**2) for t in range(1, T + 1)]
    ab = [math.prod(alpha[: t + 1]) for t in range(T + 1)]
    return [1 - x for x in alpha], alpha, ab


# --- the noise schedule -----------------------------------------------------------------------------------
def test_schedule_of_five_steps_has_the_numbers_of_the_paper():
    sched = vp_schedule(5)
    close(sched.beta, [0, 0.19587456, 0.45881819, 0.63578102, 0.75487819, 0.83503138], 5e-8)
    close(sched.alpha_bar, [1, 0.80412544, 0.43517806, 0.15850011, 0.03885183, 0.00640933], 5e-8)
    close((1 - sched.alpha_bar).sqrt(), [0, 0.44257718, 0.75154637, 0.91733303, 0.98038164, 0.99679018], 1e-7)


def test_schedule_of_many_steps_ends_where_that_of_few_steps_ends():
    """sum_t (2t - 1) = T^2, so ab_T = exp(-0.1 - 9.9/2) = exp(-5.05) at every T."""
    for T in (1, 2, 5, 50, 100, 1000):
        sched = vp_schedule(T)
        assert len(sched.beta) == len(sched.alpha) == len(sched.alpha_bar) == T + 1 == sched.T + 1
        close(sched.alpha_bar[T], math.exp(-5.05), 1e-8)
        close(tensor([sched.beta[0], sched.alpha[0], sched.alpha_bar[0]]), [0, 1, 1], 0)  # t = 0: no noise
        for ours, formula in zip((sched.beta, sched.alpha, sched.alpha_bar), vp(T)):
            assert ours.dtype == torch.float32
            close(ours, tensor(formula), 1e-7)
    close(vp_schedule(50).beta[[1, 50]], [0.00397209, 0.179647], 1e-6)
    close(vp_schedule(100).beta[[1, 100]], [0.00149388, 0.0947146], 1e-7)


def test_forward_process_mixes_action_and_noise_so_that_the_variance_adds_up_to_one():
    """x_t = sqrt(ab_t) a + sqrt(1 - ab_t) eps, row by row:  ab_1 = 0.80412544, ab_2 = 0.43517806 of T = 5."""
    a, eps = tensor([[1.0, -1.0], [1.0, -1.0], [0.5, 0.0]]), tensor([[0.0, 1.0], [2.0, 0.0], [9.0, 9.0]])
    x_t = dac.diffuse(a, tensor([1, 2, 0]), eps, vp_schedule(5))
    close(x_t[0], [0.8967304, -0.8967304 + 0.4425772])  # sqrt(0.80412544) = 0.8967304
    close(x_t[1], [0.6596803 + 2 * 0.7515464, -0.6596803])
    close(x_t[2], [0.5, 0.0])  # t = 0 is the action itself


# --- the sampler ------------------------------------------------------------------------------------------
def always(c, sched):
    """The noise network that is certain of x0 = c:  eps = (x - sqrt(ab) c) / sqrt(1 - ab)."""
    return lambda s, x, t: (x - sched.alpha_bar[t].sqrt() * c) / (1 - sched.alpha_bar[t]).sqrt()


@pytest.mark.parametrize("T", [1, 2, 5, 50])
def test_a_network_that_is_certain_of_the_action_gets_it_clipped_to_the_action_space(T):
    sched, c = vp_schedule(T), tensor([[0.3, 1.7], [-2.5, -0.9]])
    x, z = torch.randn(2, 2), torch.randn(T + 1, 2, 2)
    close(dac.sample(always(c, sched), None, x, z, sched), c.clamp(-1, 1), 1e-5)
    close(dac.sample(always(c, sched), None, x, z, sched, clip=True), c.clamp(-1, 1), 1e-5)
    close(dac.sample(always(c, sched), None, x, z, sched, clip=False), c, 5e-5)


def test_actions_stay_in_the_action_space_whatever_the_network_says():
    sched, s = vp_schedule(5), torch.randn(500, 3)
    a = dac.draw(lambda s, x, t: 10 * torch.randn_like(x), s, 2, sched)
    assert a.shape == (500, 2) and a.abs().max() <= 1 and a.std() > 0.5


def test_without_clipping_the_mean_of_a_step_is_equation_11_of_ddpm():
    """The mean  ( sqrt(ab_{t-1}) beta_t x0 + sqrt(alpha_t) (1 - ab_{t-1}) x ) / (1 - ab_t)  with
    x0 = (x - sqrt(1 - ab_t) e) / sqrt(ab_t)  is  (x - beta_t e / sqrt(1 - ab_t)) / sqrt(alpha_t)."""
    T = 4
    (beta, alpha, ab), sched, calls = vp(T), vp_schedule(T), []
    s, x, z = torch.randn(3, 2), torch.randn(3, 2), torch.randn(T + 1, 3, 2)

    def actor(s_given, x, t):
        calls.append(t.item())
        assert s_given is s and t.shape == (1,)
        return torch.sin(3 * x) + s_given + 0.1 * t

    want = x
    for t in (4, 3, 2, 1):
        e = torch.sin(3 * want) + s + 0.1 * t
        want = (want - beta[t] * e / math.sqrt(1 - ab[t])) / math.sqrt(alpha[t])
        want = want + (math.sqrt(beta[t]) * z[t] if t > 1 else 0)
    close(dac.sample(actor, s, x, z, sched, clip=False), want, 2e-4)
    assert calls == [4, 3, 2, 1]


def test_noise_of_a_step_has_variance_beta_and_not_that_of_the_posterior():
    """With e = 0 and no clipping a step is x <- x / sqrt(alpha_t) + sqrt(beta_t) z_t, so for T = 2
    a = ( x / sqrt(alpha_2) + sqrt(beta_2) z_2 ) / sqrt(alpha_1):  z_1 and z_0 are not used."""
    beta, alpha, ab = vp(2)
    x, z = torch.randn(5, 1), torch.randn(3, 5, 1)
    a = dac.sample(lambda s, x, t: torch.zeros_like(x), None, x, z, vp_schedule(2), clip=False)
    close(a, (x / math.sqrt(alpha[2]) + math.sqrt(beta[2]) * z[2]) / math.sqrt(alpha[1]), 2e-5)
    posterior = beta[2] * (1 - ab[1]) / (1 - ab[2])
    assert math.sqrt(beta[2]) - math.sqrt(posterior) > 0.04  # the difference would be seen


# --- closed form: Gaussian behaviour, linear Q ------------------------------------------------------------
def exact_noise(x, t, m, v, sched):
    """E[eps | x_t = x] for a ~ N(m, v I): x_t ~ N(sqrt(ab) m, V) with V = ab v + 1 - ab, and the covariance
    of eps with x_t is sqrt(1 - ab), hence sqrt(1 - ab) (x - sqrt(ab) m) / V."""
    ab = sched.alpha_bar[t]
    ab = ab[:, None] if ab.ndim else ab
    return (1 - ab).sqrt() * (x - ab.sqrt() * m) / (ab * v + 1 - ab)


def end_of_chain(T, m, v, push, soft=True):
    """Mean and standard deviation of the sampler's end, by recursion over t, for the noise exact - f push,
    f = sqrt(1 - ab_t) (soft) or 1 (hard). It is linear in x, so every step maps a Gaussian to a Gaussian:
        x <- (1 - beta/V) / sqrt(alpha) x + beta / sqrt(alpha) ( sqrt(ab) m / V + f push / sqrt(1 - ab) )."""
    beta, alpha, ab = vp(T)
    mean, var = 0.0, 1.0
    for t in range(T, 0, -1):
        V, f = ab[t] * v + 1 - ab[t], math.sqrt(1 - ab[t]) if soft else 1.0
        slope = (1 - beta[t] / V) / math.sqrt(alpha[t])
        drift = math.sqrt(ab[t]) * m / V + f * push / math.sqrt(1 - ab[t])
        mean = slope * mean + beta[t] / math.sqrt(alpha[t]) * drift
        var = slope**2 * var + (beta[t] if t > 1 else 0)
    return mean, math.sqrt(var)


@pytest.mark.parametrize("T, soft", [(5, True), (5, False), (50, True)])
def test_sampler_on_the_exact_minimiser_ends_at_the_mean_of_the_recursion(T, soft):
    """Behaviour N(m, v I), Q(a) = k a, so Eq. (5) asks for E[eps | x_t] - sqrt(1 - ab_t) k / (2 eta).
    Hard guidance asks for E[eps | x_t] - k / (2 eta)."""
    m, v, k, eta, sched = 0.2, 0.04, 0.3, 0.5, vp_schedule(T)

    def actor(s, x, t):
        factor = (1 - sched.alpha_bar[t]).sqrt() if soft else 1.0
        return exact_noise(x, t[0], m, v, sched) - factor * k / (2 * eta)

    n = 100_000
    a = dac.draw(actor, torch.zeros(n, 1), 1, sched, clip=False)
    mean, std = end_of_chain(T, m, v, k / (2 * eta), soft)
    assert abs(a.mean() - mean) < 5 * std / math.sqrt(n)
    assert abs(a.std() / std - 1) < 5 / math.sqrt(2 * n)


def test_chain_without_guidance_is_the_behaviour_and_soft_guidance_pushes_less_than_hard():
    """Without a push the mean is m; the std of the data is reached by long chains only (T = 5: 0.57 of it).
    The tilt (2) with eta' = 2 eta is N(m + v k / eta', v), here with mean 0.2 + 0.04 * 0.3 = 0.212. Eq. (5)
    adds grad Q(x_t) to the score of every noise level, where the score of the noised tilt has the smaller
    (sqrt(ab_t) v / V_t) grad Q: soft guidance ends beyond the tilt, at 0.2544 for large T, hard further."""
    m, v = 0.2, 0.04
    for T in (5, 50, 1000):
        assert abs(end_of_chain(T, m, v, 0.0)[0] - m) < 1e-4
    assert abs(end_of_chain(5, m, v, 0.0)[1] / 0.2 - 0.57) < 0.005
    assert abs(end_of_chain(2000, m, v, 0.0)[1] / 0.2 - 1) < 0.005
    soft, hard = (end_of_chain(1000, m, v, 0.3, soft)[0] for soft in (True, False))
    assert m + v * 0.3 < soft < hard and abs(soft - 0.2544) < 1e-3


# --- Eq. (5): losses of the actor -------------------------------------------------------------------------
def actor_batch(n=4, A=3, T=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    e, eps, grad = (torch.randn(n, A, generator=g, dtype=dtype) for _ in range(3))
    return e, eps, grad, torch.arange(1, n + 1) % (T + 1), vp_schedule(T)


def test_actor_loss_by_hand():
    """B = 1 row at t = 2 (sqrt(1 - ab) = 0.75154637), A = 2, eta = 2:  e = (1, 3), eps = (0, 1), g = (4, -2).
    bc = (1 + 4)/2 = 2.5,  <g, e> = (4 - 6)/2 = -1,  soft: 5 - 0.7515464, hard: 5 - 1."""
    e, eps, g = tensor([[1.0, 3.0]]), tensor([[0.0, 1.0]]), tensor([[4.0, -2.0]])
    for guidance, push in (("soft", -0.75154637), ("hard", -1.0)):
        loss, bc, got = dac.actor_loss(e, eps, g, tensor([2]), tensor(2.0), vp_schedule(5), guidance)
        close(tensor([loss, bc, got]), [5 + push, 2.5, push])


def test_noise_level_zero_knows_no_soft_guidance_and_each_row_has_its_own_level():
    """sqrt(1 - ab_t) = 0, 0.44257718, 0.99679018 at t = 0, 1, 5;  <g, e> = 1 + 2 = 3 in each row."""
    e, g = tensor([[1.0, 2.0]] * 3), torch.ones(3, 2)
    _, _, push = dac.actor_loss(e, e, g, tensor([0, 1, 5]), tensor(1.0), vp_schedule(5), "soft")
    close(push, 3 * (0 + 0.44257718 + 0.99679018) / 6)
    _, _, push = dac.actor_loss(e[:1], e[:1], g[:1], tensor([0]), tensor(1.0), vp_schedule(5), "soft")
    assert push == 0


def test_gradient_of_the_actor_loss_with_respect_to_the_noise():
    """d L_A / d e = ( 2 eta (e - eps) + f g ) / (B A),  f = sqrt(1 - ab_t) or 1."""
    e, eps, g, t, sched = actor_batch()
    for guidance in ("soft", "hard"):
        e.requires_grad_().grad = None
        dac.actor_loss(e, eps, g, t, tensor(0.7), sched, guidance)[0].backward()
        f = (1 - sched.alpha_bar[t]).sqrt()[:, None] if guidance == "soft" else 1
        close(e.grad, ((2 * 0.7 * (e - eps) + f * g) / e.numel()).detach(), 1e-7)


def test_hard_minus_soft_is_what_the_factor_takes_away():
    e, eps, g, t, sched = actor_batch()
    soft, hard = (dac.actor_loss(e, eps, g, t, tensor(1.0), sched, x)[0] for x in ("soft", "hard"))
    close(hard - soft, (e * g * (1 - (1 - sched.alpha_bar[t]).sqrt()[:, None])).mean(), 1e-7)


@pytest.mark.parametrize("eta", [0.2, 1.0, 3.0])
def test_a_table_trained_on_equation_5_ends_at_its_minimiser(eta):
    """One free vector e per row, gradient descent on the real loss: eps - sqrt(1 - ab_t) g / (2 eta)."""
    e, eps, g, t, sched = actor_batch()
    e.requires_grad_()
    for _ in range(60):  # the Hessian is 2 eta / (B A): this rate takes half of the way
        (grad,) = torch.autograd.grad(dac.actor_loss(e, eps, g, t, tensor(eta), sched, "soft")[0], e)
        e.data -= e.numel() / (4 * eta) * grad
    close(e.detach(), eps - (1 - sched.alpha_bar[t]).sqrt()[:, None] * g / (2 * eta), 1e-6)


def test_denoised_guidance_by_hand():
    """q = (1, 3; 5, 7), C = 8:  - (1 + 3 + 5 + 7)/4 / 8 = -0.5"""
    close(dac.denoised_guidance(tensor([[1.0, 3.0], [5.0, 7.0]]), tensor(8.0)), -0.5)


def test_value_scale_is_the_mean_of_absolute_values_and_not_the_absolute_mean():
    """(|1| + |-3| + |5| + |-7|)/4 = 4, where |mean| would be 1; 1e-6: zeros must not be divided by."""
    assert dac.value_scale(tensor([[1.0, -3.0], [5.0, -7.0]], dtype=torch.float64)).item() == 4 + 1e-6
    assert dac.value_scale(torch.zeros(2, 3, dtype=torch.float64)).item() == 1e-6


class Bowls(nn.Module):
    """Q_h(s, a) = w_h |a - s|^2: its gradient in a is 2 w_h (a - s)."""

    def __init__(self, *w):
        super().__init__()
        self.w = nn.Parameter(tensor(w))

    def forward(self, s_a):
        s, a = s_a.chunk(2, -1)
        return self.w[:, None] * (a - s).square().sum(-1)


def test_value_gradient_is_that_of_the_mean_over_heads_at_the_noisy_action():
    """w = (1, 4): mean 2.5, so g = 2 * 2.5 (x_t - s) / C, row by row, and x_t = 3 is not clipped to 1.
    C = 10:  row (3, -2) - (0, 1) = (3, -3) -> (1.5, -1.5);  row (0.5, 0) - (1, 0) -> (-0.25, 0)."""
    critics, x_t, s = Bowls(1.0, 4.0), tensor([[3.0, -2.0], [0.5, 0.0]]), tensor([[0.0, 1.0], [1.0, 0.0]])
    g = dac.value_gradient(critics, s, x_t, tensor(10.0))
    close(g, [[1.5, -1.5], [-0.25, 0.0]])
    assert critics.w.grad is None and not g.requires_grad  # the actor's loss cannot reach the critics
    assert not x_t.requires_grad and x_t.grad is None


def test_value_gradient_of_the_real_critics_equals_finite_differences(float64):
    critics, s, x_t, C = dac.Heads(5, (7, 5), H=4), torch.randn(6, 3), 2 * torch.randn(6, 2), tensor(0.8)
    g, h = dac.value_gradient(critics, s, x_t, C), 1e-6
    for j in range(2):
        step = h * torch.eye(2)[j]
        ahead, behind = (critics(torch.cat([s, x], -1)).mean(0) for x in (x_t + step, x_t - step))
        difference = (ahead - behind) / (2 * h)
        close(g[:, j], (difference / 0.8).detach(), 1e-8)
    assert all(p.grad is None for p in critics.parameters())


# --- the multiplier ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "eta, bc, b, want",
    [
        (1.0, 0.4, 1.0, 0.9994),  # 1 + 0.001 (0.4 - 1)
        (1.0, 5.0, 1.0, 1.001),  # bc - b = 4 is clipped to 1
        (1.0, 0.0, 7.0, 0.999),  # and -7 to -1
        (0.0015, 0.0, 1.0, 0.001),  # floor
        (99.9995, 3.0, 1.0, 100.0),  # ceiling
        (0.5, 1.3, 1.3, 0.5),  # the constraint holds with equality: nothing moves
    ],
)
def test_dual_step_by_hand(eta, bc, b, want):
    got = dac.dual_step(tensor(eta, dtype=torch.float64), tensor(bc, dtype=torch.float64), b, 0.001)
    close(got, want, 1e-12)


# --- the critic's target and loss -------------------------------------------------------------------------
def target_of(q, r=1.0, terminal=0.0, discount=0.99, rho=1.0, target="lcb", next_value="mean"):
    q = tensor(q, dtype=torch.float64)
    r, terminal = (torch.full(q.shape[1:2], x, dtype=torch.float64) for x in (r, terminal))
    return dac.critic_target(q, r, terminal, discount, rho, target, next_value)


def test_critic_target_by_hand():
    """H = 2 heads, N = 2 next actions, one state: head 1 says 1 and 3, head 2 says 5 and 7.
    r = 1, gamma = 0.99. Over actions first, v = (2, 6); then over heads: mean 4, population std
    sqrt((2^2 + 2^2)/2) = 2 (the sample std would be 2.83).  V = 4 - 2 = 2,  y = 1 + 0.99 * 2 = 2.98."""
    q = [[[1.0, 3.0]], [[5.0, 7.0]]]
    close(target_of(q), [2.98], 1e-12)
    close(target_of(q, next_value="max"), [3.97], 1e-12)  # v = (3, 7), V = 5 - 2 = 3
    close(target_of(q, terminal=1.0), [1.0], 1e-12)
    close(target_of(q, rho=0.0), [1 + 0.99 * 4], 1e-12)
    close(target_of(q, rho=1.5), [1 + 0.99 * 1], 1e-12)
    close(target_of(q, target="mean"), [1 + 0.99 * 4], 1e-12)
    close(target_of(q, target="min"), [1 + 0.99 * 2], 1e-12)
    close(target_of(q, target="min", next_value="max"), [1 + 0.99 * 3], 1e-12)
    close(target_of(q, r=-2.0, discount=0.5), [-2 + 0.5 * 2], 1e-12)


def test_maximum_over_actions_is_taken_by_each_head_for_itself():
    """Heads that disagree about the best action: v = (3, 7), although no single action is worth 3 and 7.
    Two states, to see that their order is kept: the second has v = (2, 6) under either rule."""
    q = [[[1.0, 3.0], [2.0, 2.0]], [[7.0, 5.0], [6.0, 6.0]]]
    close(target_of(q, next_value="max"), [1 + 0.99 * 3, 1 + 0.99 * 2], 1e-12)
    close(target_of(q, next_value="mean"), [1 + 0.99 * 2, 1 + 0.99 * 2], 1e-12)


def test_three_heads_have_the_population_standard_deviation():
    """v = (0, 3, 6): mean 3, variance (9 + 0 + 9)/3 = 6.  V = 3 - sqrt(6)."""
    close(target_of([[[0.0]], [[3.0]], [[6.0]]], r=0.0, discount=1.0), [3 - math.sqrt(6)], 1e-12)


def test_critic_loss_by_hand():
    """Heads (1, 2) and (3, 6) against one y = (1, 4):  (0 + 4 + 4 + 4)/4 = 3."""
    close(dac.critic_loss(tensor([[1.0, 2.0], [3.0, 6.0]]), tensor([1.0, 4.0])), 3.0)


# --- derivatives ------------------------------------------------------------------------------------------
def test_derivatives_of_the_losses_are_those_of_finite_differences(float64):
    e, eps, g, t, sched = actor_batch()
    inputs = [x.requires_grad_() for x in (e, eps, g)] + [tensor(0.7, requires_grad=True)]
    for guidance in ("soft", "hard"):

        def loss(e, eps, g, eta, guidance=guidance):
            return dac.actor_loss(e, eps, g, t, eta, sched, guidance)

        assert torch.autograd.gradcheck(loss, inputs)
    q, y = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    assert torch.autograd.gradcheck(dac.critic_loss, (q, y))
    assert torch.autograd.gradcheck(dac.mish, (2 * torch.randn(4, 5)).requires_grad_())


@pytest.mark.parametrize("mode", ["no_grad", "grad", "compiled"])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_mish_is_mish_in_all_of_its_forms(mode, dtype, atol, monkeypatch):
    """x tanh(softplus(x)) and its slope, also where e^x overflows. 70,001 numbers are three cache blocks."""
    far = tensor([0.0, -1e-3, 19.99, 20.01, 44.5, 88.5, 89.0, 100.0, 800.0, 1e4, -20.0, -100.0, -800.0, -1e4])
    x = torch.cat([far, torch.linspace(-30, 30, 70_001 - len(far))]).to(dtype)
    if mode == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if mode == "no_grad":
        with torch.no_grad():
            y = dac.mish(x.clone())
        close(y, F.mish(x), atol, rtol=1e-6)
        return
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = dac.mish(ours), F.mish(theirs)
    close(y, want, atol, rtol=1e-6)
    close(ours.detach(), x, 0)  # the input is left as it was: backward needs it
    weight = torch.linspace(-1, 1, len(x), dtype=dtype)
    (weight * y).sum().backward()
    (weight * want).sum().backward()
    close(ours.grad, theirs.grad, 3 * atol)
    close(weight, torch.linspace(-1, 1, len(x), dtype=dtype), 0)


def test_mish_takes_tensors_that_are_not_contiguous():
    x = torch.randn(5, 4, 3)
    for view in (x.transpose(0, 2), x[:, 1:3], x[:1].expand(6, 4, 3)):
        v = view.clone().requires_grad_()
        y = dac.mish(v.transpose(0, 1))
        close(y, F.mish(view.transpose(0, 1)), 1e-6)
        y.sum().backward()  # its gradient is one number, expanded
        w = view.clone().requires_grad_()
        F.mish(w).sum().backward()
        close(v.grad, w.grad, 2e-6)


# --- networks ---------------------------------------------------------------------------------------------
def count(net):
    return sum(p.numel() for p in net.parameters())


def test_networks_have_as_many_parameters_as_the_published_ones():
    assert count(dac.NoiseNet(17, 6, (256, 256, 256))) == 149_062
    assert count(dac.Heads(23, (256, 256, 256), H=10)) == 1_379_850


def linears(actor):
    return [actor.time[0], actor.time[2], *actor.layers]


def assert_glorot(w, fan_in, fan_out):
    """Uniform on +-c, c = sqrt(6 / (fan_in + fan_out)): standard deviation c / sqrt(3)."""
    c = math.sqrt(6 / (fan_in + fan_out))
    assert 0.9 * c < w.abs().max() <= c
    assert abs(w.std() / (c / math.sqrt(3)) - 1) < 0.15 and abs(w.mean()) < 5 * c / math.sqrt(3 * w.numel())


def test_weights_start_glorot_uniform_in_every_layer_and_head_and_biases_at_zero():
    torch.manual_seed(0)
    actor, critics = dac.NoiseNet(17, 6, (256, 256)), dac.Heads(23, (256, 128), H=4)
    shapes = [(16, 32), (32, 32), (17 + 6 + 32, 256), (256, 256), (256, 6)]  # the last layer is not special
    for layer, (i, o) in zip(linears(actor), shapes, strict=True):
        assert layer.weight.shape == (o, i) and not layer.bias.any()
        assert_glorot(layer.weight, i, o)
    for w, b, (i, o) in zip(critics.weights, critics.biases, [(23, 256), (256, 128), (128, 1)], strict=True):
        assert w.shape == (4, i, o) and b.shape == (4, 1, o) and not b.any()
        for head in w:
            assert_glorot(head, i, o)
        assert (w[0] != w[1]).float().mean() > 0.99  # heads agree only by learning


def test_time_is_embedded_as_eight_cosines_then_eight_sines_of_the_integer_step():
    """cos(t f_0), ..., cos(t f_7), sin(t f_0), ..., sin(t f_7),  f_k = 10000^(-k/7): from 1 to 1/10000."""
    actor, seen = dac.NoiseNet(3, 2, (8,)), []
    actor.time.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    actor(torch.zeros(2, 3), torch.zeros(2, 2), tensor([1, 37]))
    for row, t in zip(seen[0], (1, 37), strict=True):
        angles = [t * 10_000 ** (-k / 7) for k in range(8)]
        close(row, [math.cos(u) for u in angles] + [math.sin(u) for u in angles], 2e-6)


def plain_mlp(x, layers):
    """layers: [weight (out, in), bias] one after the other; Mish between, nothing after the last."""
    for w, b in layers[:-1]:
        x = F.linear(x, w, b)
        x = x * torch.tanh(F.softplus(x))
    return F.linear(x, *layers[-1])


def randomised(net):
    for p in net.parameters():  # biases too: zeros would hide a mistake
        nn.init.normal_(p, std=0.5)
    return net


def test_noise_network_is_an_mlp_on_state_noisy_action_and_time():
    actor, s, x_t = randomised(dac.NoiseNet(3, 2, (9, 7))), torch.randn(4, 3), torch.randn(4, 2)
    t = tensor([5, 1, 3, 2])
    layers = [(layer.weight, layer.bias) for layer in linears(actor)]
    u = t[:, None] * 10_000 ** (-torch.arange(8) / 7)
    u = plain_mlp(torch.cat([u.cos(), u.sin()], 1), layers[:2])
    close(actor(s, x_t, t), plain_mlp(torch.cat([s, x_t, u], 1), layers[2:]), 2e-5)
    for i in range(4):  # the sampler gives one t for all rows
        close(actor(s, x_t, t[i : i + 1])[i], actor(s, x_t, t)[i], 1e-5)
    with torch.no_grad():
        close(actor(s, x_t, t), plain_mlp(torch.cat([s, x_t, u], 1), layers[2:]), 2e-5)


def test_critics_equal_as_many_separate_networks():
    critics, s, a = randomised(dac.Heads(5, (9, 7), H=4)), torch.randn(5, 3), torch.randn(5, 2)
    q = critics(torch.cat([s, a], -1))
    assert q.shape == (4, 5)
    for h in range(4):
        layers = [(w[h].T, b[h, 0]) for w, b in zip(critics.weights, critics.biases)]
        close(q[h], plain_mlp(torch.cat([s, a], 1), layers)[:, 0], 2e-5)


def test_targets_start_as_copies_that_learn_only_by_averaging():
    agent = dac.make_agent(tiny_args(), 3, 2, CPU)
    for net, copy in ((agent.actor, agent.actor_target), (agent.q, agent.q_target)):
        for p, p_copy in zip(net.parameters(), copy.parameters(), strict=True):
            assert torch.equal(p, p_copy) and p is not p_copy and p.requires_grad and not p_copy.requires_grad
    dac.average(agent.actor_target, deepcopy(agent.actor), 0.005)  # the average of equals
    close(agent.actor_target.layers[0].weight, agent.actor.layers[0].weight.detach())
    one, three = nn.Linear(1, 1), nn.Linear(1, 1)
    for net, value in ((one, 1.0), (three, 3.0)):
        nn.init.constant_(net.weight, value), nn.init.constant_(net.bias, -value)
    dac.average(one, three, 0.005)
    close(torch.cat([one.weight[0], one.bias]), [0.995 * 1 + 0.005 * 3, -1.01])
    close(torch.cat([three.weight[0], three.bias]), [3.0, -3.0])


# --- acting -----------------------------------------------------------------------------------------------
def stub_act(monkeypatch, candidates, head_values, **settings):
    """act() among fixed candidates (E, N_a, A), whose values are head_values(a) -> (H, rows)."""
    seen = {}

    def sample(actor, s, x, noise, sched, clip):
        seen.update(actor=actor, s=s, clip=clip)
        return candidates.flatten(0, 1)

    monkeypatch.setattr(dac, "sample", sample)
    args = replace(tiny_args(), N_a=candidates.shape[1], **{"clip_x0": True} | settings)
    agent = SimpleNamespace(actor="actor", judge=lambda s, a: head_values(a).mean(0))
    return dac.make_act(args, agent, candidates.shape[2]), seen


def test_acting_takes_the_candidate_of_the_largest_mean_value(monkeypatch):
    """Two states, three candidates each. Heads a_1 and 10 a_2: their means are (a_1 + 10 a_2)/2, so candidate
    (0.5, 0.3) with 1.75 beats (0.9, 0.2) with 1.45, the favourite of head 1."""
    candidates = tensor([[[0.9, 0.2], [0.5, 0.3], [0.1, 0.0]], [[-0.1, -0.1], [0.2, -0.5], [-0.3, -0.4]]])
    s = tensor([[1.0], [2.0]])
    heads = lambda a: torch.stack([a[:, 0], 10 * a[:, 1]])  # noqa: E731
    act, seen = stub_act(monkeypatch, candidates, heads, clip_x0=False)
    close(act(s), [[0.5, 0.3], [-0.1, -0.1]], 0)
    assert seen["actor"] == "actor" and seen["clip"] is False
    close(seen["s"].flatten(), [1.0, 1.0, 1.0, 2.0, 2.0, 2.0], 0)  # a state's candidates lie together


def test_with_a_temperature_acting_draws_candidates_by_their_softmax(monkeypatch):
    """Values 1, 2, 4 at temperature 2: probabilities proportional to e^0.5, e^1, e^2."""
    n = 40_000
    candidates = tensor([[[1.0], [2.0], [4.0]]]).expand(n, -1, -1)
    heads = lambda a: torch.stack([a[:, 0] - 3, a[:, 0] + 3])  # noqa: E731
    act, seen = stub_act(monkeypatch, candidates, heads, temperature=2.0)
    a = act(torch.zeros(n, 1))
    weights = [math.exp(0.5), math.exp(1), math.exp(2)]
    for value, weight in zip((1.0, 2.0, 4.0), weights):
        p = weight / sum(weights)
        assert abs((a == value).float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert seen["clip"] is True


def test_acting_with_the_real_networks_is_best_of_n(float64):
    args = tiny_args(N_a=4, clip_x0=False)
    agent, sched, s = dac.make_agent(args, 3, 2, CPU), double_schedule(3), torch.randn(5, 3)
    for net in (agent.actor, agent.q_target):
        randomised(net)
    act = dac.make_act(args, agent, 2)
    torch.manual_seed(7)
    got = act(s)
    torch.manual_seed(7)
    x, z = torch.randn(20, 2), torch.randn(4, 20, 2)
    for i in range(5):
        rows = slice(4 * i, 4 * i + 4)
        s_i = s[i : i + 1].expand(4, -1)
        a = dac.sample(agent.actor, s_i, x[rows], z[:, rows], sched, clip=False)
        close(got[i], a[agent.q_target(torch.cat([s_i, a], -1)).mean(0).argmax()].detach(), 1e-10)


# --- training the real network on problems with a known answer --------------------------------------------
class LinearCritics(nn.Module):
    """Two heads Q(s, a) = k.a +- c: their mean is k.a, and mean |Q| = c where |k.a| < c. So g = k / c."""

    def __init__(self, k, c):
        super().__init__()
        self.k, self.c = nn.Parameter(tensor(k)), c

    def forward(self, s_a):
        a = s_a[:, 1:]
        return torch.stack([a @ self.k + self.c, a @ self.k - self.c])


def train_on_gaussian(eta, eta_lr, b, steps, m=(0.2, -0.3), v=0.04, k=(0.6, -0.3), c=1.5):
    """The real make_update on a ~ N(m, v I), one state, with critics that stay as they are (rate 0)."""
    torch.manual_seed(0)
    n = 100_000
    a = tensor(m) + math.sqrt(v) * torch.randn(n, 2)
    s, one = torch.zeros(n, 1), torch.ones(n)
    data = Dataset(s, a, torch.zeros(n), s, one, one.bool())
    args = dac.resolve(dac.Args(env="bandit-two", steps=steps, batch_size=512, T=5, hidden=(64, 64), eta=eta,
                                eta_lr=eta_lr, b=b, actor_lr=3e-3))  # fmt: skip
    agent, sched = dac.make_agent(args, 1, 2, CPU), vp_schedule(5)
    agent.q, agent.q_target = LinearCritics(k, c), LinearCritics(k, c).requires_grad_(False)
    agent.q_opt = torch.optim.Adam(agent.q.parameters(), tensor(0.0))
    args = replace(args, critic_lr=0.0)
    update, _ = dac.make_update(args, agent, data)
    etas = [update()["losses/eta"].item() for _ in range(steps)]
    return agent, sched, etas


def test_the_real_network_finds_the_guided_gaussian():
    """1,500 real updates at eta = 0.5: the network must become E[eps | x_t] - sqrt(1 - ab_t) g / (2 eta),
    with g = k / c = (0.4, -0.2), and the sampler on it must end where the recursion says: its means move from
    (0.2, -0.3) by 0.164 and -0.082. Cloning, a wrong sign and hard guidance (0.29, -0.14) all miss that."""
    m, v, push = tensor([0.2, -0.3]), 0.04, tensor([0.4, -0.2])  # push = g / (2 eta)
    agent, sched, _ = train_on_gaussian(eta=0.5, eta_lr=0.0, b=1.0, steps=1500)
    with torch.no_grad():
        for t in range(1, 6):  # on the noisy data of each level
            t = torch.full((4000,), t)
            x_t = dac.diffuse(m + math.sqrt(v) * torch.randn(4000, 2), t, torch.randn(4000, 2), sched)
            want = exact_noise(x_t, t, m, v, sched) - (1 - sched.alpha_bar[t]).sqrt()[:, None] * push
            error = agent.actor(torch.zeros(4000, 1), x_t, t) - want
            assert error.square().mean().sqrt() < 0.03 and error.mean(0).abs().max() < 0.02
        a = dac.draw(agent.actor, torch.zeros(50_000, 1), 2, sched, clip=False)
    for j in range(2):
        mean, std = end_of_chain(5, m[j].item(), v, push[j].item())
        assert abs(abs(mean - m[j]) - (0.164, 0.082)[j]) < 1e-3
        assert abs(a[:, j].mean() - mean) < 0.03 and abs(a[:, j].std() - std) < 0.04


def test_the_learned_multiplier_finds_the_value_at_which_the_constraint_binds():
    """At the minimiser of (5) the noise error is what x_t leaves unknown of eps, plus what the push costs:
    bc(eta) = mean_t ab_t v / V_t + mean_t (1 - ab_t) mean_j g_j^2 / (4 eta^2).  Dual ascent must end where
    bc(eta) = b, here at eta = 0.196."""
    b, g2 = 0.5, (0.4**2 + 0.2**2) / 2
    _, _, ab = vp(5)
    unknown = statistics.fmean(x * 0.04 / (x * 0.04 + 1 - x) for x in ab[1:])
    eta = math.sqrt(statistics.fmean(1 - x for x in ab[1:]) * g2 / (4 * (b - unknown)))
    _, _, etas = train_on_gaussian(eta=0.3, eta_lr=0.01, b=b, steps=1000)
    assert abs(eta - 0.1958) < 1e-4 and abs(statistics.fmean(etas[-300:]) / eta - 1) < 0.02


# --- one update, written a second time --------------------------------------------------------------------
def tiny_args(**settings):
    """Everything at once: rates so high that each mistake shows, a norm bound that is met and not met."""
    args = dac.Args(
        env="hopper-medium-v2", steps=16, batch_size=6, T=3, hidden=(5, 4), H=3, N=2, discount=0.9, rho=1.5,
        actor_lr=0.02, critic_lr=0.03, clip_norm=0.6, polyak=0.1, ema_every=2, ema_after=4, eta=0.8, b=0.9,
        eta_lr=0.05, clip_x0=False,  # concerns acting only: whatever training draws is clipped
    )  # fmt: skip
    return dac.resolve(replace(args, **settings))


def double_schedule(T):
    rows = vp(T)
    return common.Schedule(T, *(tensor(x, dtype=torch.float64) for x in rows), rows)


def tiny_data(n=40, one_step=False):
    g = torch.Generator().manual_seed(5)
    s, a, s_next = (torch.randn(n, k, generator=g) for k in (3, 2, 3))
    r, terminal = torch.randn(n, generator=g), (torch.rand(n, generator=g) < (1.1 if one_step else 0.4)) * 1.0
    return Dataset(s, a.clamp(-1, 1), r, s_next, terminal, terminal.bool())


def actor_weights(actor):
    """[weight (in, out), bias, weight, bias, ...]"""
    return [p.detach().clone() for layer in linears(actor) for p in (layer.weight.T, layer.bias)]


def critic_weights(critics):
    """One such list per head."""
    layers, H = list(zip(critics.weights, critics.biases)), len(critics.weights[0])
    return [[p.detach().clone() for w, b in layers for p in (w[h], b[h, 0])] for h in range(H)]


def slow_mlp(x, weights):
    for i in range(0, len(weights), 2):
        x = x @ weights[i] + weights[i + 1]
        if i + 2 < len(weights):
            x = x * torch.tanh(torch.log1p(torch.exp(x)))
    return x


def slow_actor(weights, s, x, t):
    """t: one integer per row"""
    rows = []
    for t_b in t.tolist():
        angles = [t_b * math.exp(-math.log(10_000) * k / 7) for k in range(8)]
        rows.append([math.cos(u) for u in angles] + [math.sin(u) for u in angles])
    time = slow_mlp(tensor(rows), weights[:4])
    return slow_mlp(torch.cat([s, x, time], 1), weights[4:])


def slow_q(head, s, a):
    return slow_mlp(torch.cat([s, a], 1), head)[:, 0]


def slow_draw(weights, s, T):
    """The chain for s as it is, x0 clipped; consumes the same random numbers as dac.draw."""
    beta, alpha, ab = vp(T)
    x, z = torch.randn(len(s), 2), torch.randn(T + 1, len(s), 2)
    for t in range(T, 0, -1):
        e = slow_actor(weights, s, x, torch.full((len(s),), t))
        x0 = torch.clamp((x - math.sqrt(1 - ab[t]) * e) / math.sqrt(ab[t]), -1, 1)
        towards_x0, towards_x = math.sqrt(ab[t - 1]) * beta[t], math.sqrt(alpha[t]) * (1 - ab[t - 1])
        x = (towards_x0 * x0 + towards_x * x) / (1 - ab[t])
        if t > 1:
            x = x + math.sqrt(beta[t]) * z[t]
    return x


class SlowAdam:
    """Kingma & Ba (2015), Algorithm 1. Before it, gradients are scaled: joint norm <= bound."""

    def __init__(self, weights, rate, bound, steps):
        self.weights, self.rate, self.bound, self.steps = weights, rate, bound, steps
        self.m, self.v = ([torch.zeros_like(p) for p in weights] for _ in range(2))
        self.k, self.norms = 0, []

    def descend(self, loss):
        """Rate: half a cosine from `rate` at the first update towards 0 after the last."""
        gradients = torch.autograd.grad(loss, self.weights)
        norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
        self.norms.append(norm)
        rate = self.rate / 2 * (1 + math.cos(math.pi * self.k / self.steps))
        self.k += 1
        with torch.no_grad():
            for p, g, m, v in zip(self.weights, gradients, self.m, self.v):
                g = g * min(1.0, self.bound / (norm + 1e-6))  # torch adds 1e-6
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g**2)
                p -= rate * (m / (1 - 0.9**self.k)) / (torch.sqrt(v / (1 - 0.999**self.k)) + 1e-8)
        return rate


def slow_average(target, source, rate):
    with torch.no_grad():
        for p, q in zip(target, source):
            p.copy_((1 - rate) * p + rate * q)


class Slow:
    """DAC in loops: rows, heads and next actions one by one; every equation as the paper states it."""

    def __init__(self, args, agent, data):
        self.args, self.data, self.eta = args, data, args.eta
        self.actor, self.actor_target = actor_weights(agent.actor), actor_weights(agent.actor)
        self.heads, self.heads_target = critic_weights(agent.q), critic_weights(agent.q)
        all_heads = [p for head in self.heads for p in head]  # one optimiser, one norm
        for p in (*self.actor, *all_heads):
            p.requires_grad_()
        self.actor_adam = SlowAdam(self.actor, args.actor_lr, args.clip_norm, args.steps)
        self.critic_adam = SlowAdam(all_heads, args.critic_lr, args.clip_norm, args.steps)

    def targets(self, r, s_next, terminal):
        """y, one number per row: over the N next actions first, then over heads."""
        args, y = self.args, []
        if bool(self.data.terminal.all()):
            return r
        s_n = torch.stack([s for s in s_next for _ in range(args.N)])
        a_n = slow_draw(self.actor_target, s_n, args.T)
        for row in range(len(r)):
            v = []
            for head in self.heads_target:
                rows = range(row * args.N, (row + 1) * args.N)
                q = [slow_q(head, s_n[j : j + 1], a_n[j : j + 1]).item() for j in rows]
                v.append(max(q) if args.next_value == "max" else statistics.fmean(q))
            value = {"min": min(v), "mean": statistics.fmean(v)}
            value["lcb"] = statistics.fmean(v) - args.rho * statistics.pstdev(v)
            y.append(float(r[row]) + args.discount * (1 - float(terminal[row])) * value[args.target])
        return tensor(y)

    def guidance(self, s, a, x_t, t, e, C):
        """(second term of Eq. (5), g)"""
        args, g = self.args, torch.zeros_like(a)
        if args.guidance == "none":
            return 0.0, g
        if args.guidance == "denoised":
            a_hat = slow_draw(self.actor, s, args.T)  # gradients flow through the whole chain
            return -sum(slow_q(head, s, a_hat).mean() for head in self.heads_target) / args.H / C, g
        for row in range(len(a)):
            x = x_t[row : row + 1].clone().requires_grad_()
            q = sum(slow_q(head, s[row : row + 1], x) for head in self.heads_target) / args.H
            g[row] = torch.autograd.grad(q.sum(), x)[0][0] / C
        _, _, ab = vp(args.T)
        factor = tensor([[math.sqrt(1 - ab[k]) if args.guidance == "soft" else 1.0] for k in t.tolist()])
        return (factor * g * e).sum() / e.numel(), g

    def update(self, i):
        args, data, B = self.args, self.data, self.args.batch_size
        rows = torch.randint(len(data.r), (B,)).tolist()
        columns = (data.s, data.a, data.r, data.s_next, data.terminal)
        s, a, r, s_next, terminal = (torch.stack([x[j] for j in rows]) for x in columns)
        # 1. the critics, towards a target of the old targets; then their targets
        with torch.no_grad():
            y = self.targets(r, s_next, terminal)
        q = [slow_q(head, s, a) for head in self.heads]
        loss_q = sum(((q_h - y) ** 2).sum() for q_h in q) / (args.H * B)
        self.critic_adam.descend(loss_q)
        for head, head_target in zip(self.heads, self.heads_target):
            slow_average(head_target, head, args.polyak)
        # 2. the actor, under the new target critics
        t, eps = torch.randint(1, args.T + 1, (B,)), torch.randn(B, 2)
        _, _, ab = vp(args.T)
        x_t = torch.stack([math.sqrt(ab[t[j]]) * a[j] + math.sqrt(1 - ab[t[j]]) * eps[j] for j in range(B)])
        with torch.no_grad():
            C = sum(slow_q(head, s, a).abs().sum() for head in self.heads_target) / (args.H * B) + 1e-6
        e = slow_actor(self.actor, s, x_t, t)
        bc = ((e - eps) ** 2).sum() / e.numel()
        push, g = self.guidance(s, a, x_t, t, e, C)
        loss_pi = self.eta * bc + push
        lr = self.actor_adam.descend(loss_pi)
        # 3. the multiplier, by the error of the actor just updated
        if args.eta_lr > 0 and args.guidance != "none":
            with torch.no_grad():
                bc_new = float(((slow_actor(self.actor, s, x_t, t) - eps) ** 2).sum()) / e.numel()
            self.eta += args.eta_lr * max(-1.0, min(1.0, bc_new - args.b))
            self.eta = max(0.001, min(100.0, self.eta))
        # 4. the target actor, now and then
        if i % args.ema_every == 0 and i > args.ema_after:
            slow_average(self.actor_target, self.actor, args.polyak)
        q_std = statistics.fmean(statistics.pstdev([q_h[j].item() for q_h in q]) for j in range(B))
        out = {"critic": loss_q, "actor": loss_pi, "bc": bc, "guidance": push, "C": C, "eta": self.eta}
        out |= {"q_mean": sum(q_h.mean() for q_h in q) / args.H, "q_std": q_std, "grad_q": g.abs().mean()}
        return {f"losses/{k}": torch.as_tensor(v).item() for k, v in out.items()} | {"charts/lr": lr}


@pytest.mark.parametrize(
    "settings",
    [
        dict(),  # soft, learned eta, lower confidence bound
        dict(guidance="hard"),
        dict(guidance="denoised"),
        dict(guidance="none"),
        dict(target="min"),
        dict(target="mean"),
        dict(next_value="max"),
        dict(eta_lr=0.0),
        dict(one_step=True),
    ],
    ids=str,
)
def test_twelve_updates_equal_those_of_a_second_slow_implementation(settings, float64):
    """Same initial weights, same random numbers, float64: all losses, weights, averages and eta agree to
    1e-9. The target actor moves after updates 6, 8 and 10 (even, and later than 4)."""
    settings = dict(settings)
    data = tiny_data(one_step=settings.pop("one_step", False))
    args = tiny_args(**settings)
    torch.manual_seed(0)
    agent = dac.make_agent(args, 3, 2, CPU)
    for net, copy in ((agent.actor, agent.actor_target), (agent.q, agent.q_target)):
        copy.load_state_dict(randomised(net).state_dict())
    slow = Slow(args, agent, data)

    update, update_ema = dac.make_update(args, agent, data)
    fast_losses, slow_losses = [], []
    torch.manual_seed(1)
    for i in range(12):
        fast_losses.append(update())
        if i % args.ema_every == 0 and i > args.ema_after:  # as in dac.main, see below
            update_ema()
    torch.manual_seed(1)
    for i in range(12):
        slow_losses.append(slow.update(i))

    for fast, want in zip(fast_losses, slow_losses):  # what an update returned, later ones leave alone
        assert {k: v.item() for k, v in fast.items()} == pytest.approx(want, rel=1e-9, abs=1e-9)
    close(agent.eta, slow.eta, 1e-10)
    pairs = [(actor_weights(agent.actor), slow.actor), (actor_weights(agent.actor_target), slow.actor_target)]
    pairs += zip(critic_weights(agent.q), slow.heads)
    pairs += zip(critic_weights(agent.q_target), slow.heads_target)
    for ours, theirs in pairs:
        for p, p_slow in zip(ours, theirs, strict=True):
            close(p, p_slow.detach(), 1e-9)
    for adam in (slow.critic_adam, slow.actor_adam):  # both sides of the bound were seen
        assert max(adam.norms) > args.clip_norm
    assert (slow.eta == args.eta) == (args.eta_lr == 0 or args.guidance == "none")


# --- order, rates, repeatability --------------------------------------------------------------------------
def test_critic_then_its_target_then_actor_then_eta(monkeypatch):
    """Guidance comes from target critics that have already moved, the actor moves after them, and eta follows
    the error of the actor that has just moved."""
    args, order, bcs = tiny_args(), [], []
    agent = dac.make_agent(args, 3, 2, CPU)
    before = deepcopy(agent)

    def spy(name):
        real = getattr(dac, name)

        def wrapped(*inputs):
            order.append(name)
            if name in ("critic_target", "critic_loss"):
                assert same(agent.q, before.q)
                assert same(agent.q_target, before.q_target)
            if name in ("value_scale", "value_gradient", "actor_loss"):
                assert not same(agent.q, before.q) and same(agent.actor, before.actor)
                moved = deepcopy(before.q_target)
                dac_average(moved, agent.q, args.polyak)
                assert same(agent.q_target, moved)
            if name == "dual_step":
                assert not same(agent.actor, before.actor) and agent.eta == before.eta
                bcs.append(inputs[1])
            out = real(*inputs)
            if name == "actor_loss":
                bcs.append(out[1].detach())
            return out

        monkeypatch.setattr(dac, name, wrapped)

    dac_average = dac.average
    names = "critic_target critic_loss average value_scale value_gradient actor_loss dual_step".split()
    for name in names:
        spy(name)
    dac.make_update(args, agent, tiny_data())[0]()
    assert order == names
    assert bcs[0] != bcs[1] and agent.eta != before.eta and agent.step == 1
    assert same(agent.actor_target, before.actor_target)  # its turn comes in the loop


def same(net, other):
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_learning_rates_fall_as_half_a_cosine_over_the_run():
    """lr_i = lr/2 (1 + cos(pi i / steps)):  3e-4 at i = 0, half of it at half time; at the very last update
    1 + cos(pi - d) = d^2/2 with d = pi / 2e6, hence 1.85e-16: still positive, which float32 would lose."""
    args = tiny_args(steps=2_000_000, actor_lr=3e-4, critic_lr=1e-3)
    agent = dac.make_agent(args, 3, 2, CPU)
    update, _ = dac.make_update(args, agent, tiny_data())
    last = 0.5 * 0.5 * (math.pi / 2e6) ** 2
    for i, share in ((0, 1.0), (500_000, 0.5 + 0.5 * math.sqrt(0.5)), (1_000_000, 0.5), (1_999_999, last)):
        agent.step.fill_(i)
        lr = update()["charts/lr"].item()
        assert lr == pytest.approx(3e-4 * share, rel=1e-3) and 0 < lr
        assert agent.q_opt.param_groups[0]["lr"].item() == pytest.approx(1e-3 * share, rel=1e-3)
        assert agent.step == i + 1
    assert lr < 1e-9 * 3e-4


def test_optimisers_are_adam_with_its_usual_constants():
    agent = dac.make_agent(tiny_args(), 3, 2, CPU)
    for opt, net in ((agent.actor_opt, agent.actor), (agent.q_opt, agent.q)):
        (group,) = opt.param_groups
        assert type(opt) is torch.optim.Adam and (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        assert group["weight_decay"] == 0 and not group["amsgrad"]
        close(group["lr"], 0.02 if net is agent.actor else 0.03)
        assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]


def run_updates(n, wrap=lambda update: update, **settings):
    torch.manual_seed(0)
    args = tiny_args(**settings)
    agent = dac.make_agent(args, 3, 2, CPU)
    update, update_ema = (wrap(fn) for fn in dac.make_update(args, agent, tiny_data()))
    losses = []
    for i in range(n):
        losses.append([v.item() for v in update().values()])
        if i % 2 == 0 and i > 4:
            update_ema()
    return tensor(losses), agent


def test_the_same_seed_gives_the_same_numbers_twice():
    (first, agent), (second, again) = run_updates(12), run_updates(12)
    assert torch.equal(first, second)
    assert same(agent.actor, again.actor) and same(agent.actor_target, again.actor_target)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_updates_are_the_eager_ones():
    """Inductor has random numbers of its own; fallback_random lends it those of eager torch."""
    from torch._inductor import config

    def wrap(fn):
        return dac.accelerate(fn, SimpleNamespace(compile="on", graph="off", steps=20), CPU)

    size = dict(steps=20, hidden=(4,), T=2, H=2, N=1)
    eager, agent = run_updates(20, **size)
    with config.patch({"fallback_random": True, "cpp.simdlen": 0}):  # 0: loops that g++ compiles faster
        compiled, agent_compiled = run_updates(20, wrap, **size)
    torch._dynamo.reset()
    close(compiled, eager, 1e-5)
    for p, q in zip(agent.actor_target.parameters(), agent_compiled.actor_target.parameters(), strict=True):
        close(q, p, 1e-5)
    close(agent_compiled.eta, agent.eta, 1e-6)


# --- the loop of main -------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_main_scales_rewards_clips_actions_delays_the_target_actor_and_acts_online(monkeypatch, tmp_path, shift):
    """Two episodes with returns 1 + 1 (cut by time) and 6: rewards are shifted, then times 1000 / (6 - 2) = 250.
    Every 5th update, later than 10: the target actor moves after updates 15, 20, 25 and 30.
    Actions are drawn from the online actor and chosen by the target critics."""
    s, a = torch.randn(3, 3), tensor([[1.0, -1.0], [0.5, 0.2], [-0.3, 1.0]])
    data = Dataset(s, a, tensor([1.0, 1.0, 6.0]), s, tensor([0.0, 0.0, 1.0]), tensor([False, True, True]))
    seen, moved = {}, []

    class Loop:
        def __init__(self, args, state, device):
            self.folder = tmp_path

        def train(self, stage, steps, update, act):
            for i in range(steps):
                update(i)

        def finish(self, returns, act):
            seen["returns"] = returns

    def make_update(args, agent, data):
        update, update_ema = real_update(args, agent, data)
        seen.update(agent=agent, data=data, start=deepcopy(agent.actor_target))
        assert torch.initial_seed() == 123 and same(agent.actor, agent.actor_target)

        def spy_ema():
            assert same(agent.actor_target, seen["start"]) == (not moved)
            moved.append(int(agent.step) - 1)
            update_ema()

        return update, spy_ema

    def make_act(args, agent, A):
        assert agent is seen["agent"] and A == 2

    real_update = dac.make_update
    for name, stub in (("Run", Loop), ("make_update", make_update), ("make_act", make_act)):
        monkeypatch.setattr(dac, name, stub)
    monkeypatch.setattr(dac, "load_dataset", lambda *where: deepcopy(data))
    monkeypatch.setattr(dac, "check_task", lambda *what: None)
    dac.main(tiny_args(seed=123, steps=31, ema_every=5, ema_after=10, device="cpu", compile="off", reward_shift=shift))
    assert moved == [15, 20, 25, 30]
    assert not same(seen["agent"].actor_target, seen["start"])
    close(seen["data"].r, [250 * (1 + shift), 250 * (1 + shift), 250 * (6 + shift)], 1e-3)
    assert seen["returns"].mean() == pytest.approx(4)  # as stored
    close(seen["data"].a, [[1 - 1e-5, -1 + 1e-5], [0.5, 0.2], [-0.3, 1 - 1e-5]], 1e-7)


# --- settings ---------------------------------------------------------------------------------------------
PAPER_TABLE = """
    dataset                        eta_0  eta_lr  b     rho  next  critic_lr
    walker2d-medium-v2             1      0.001   1     1    mean  3e-4
    walker2d-medium-replay-v2      1      0.001   1     1    mean  3e-4
    walker2d-medium-expert-v2      1      0.001   1     1    mean  3e-4
    hopper-medium-v2               1      0.001   1     1.5  mean  3e-4
    hopper-medium-replay-v2        1      0.001   1     1.5  mean  3e-4
    hopper-medium-expert-v2        1      0.001   0.05  1.5  mean  3e-4
    halfcheetah-medium-v2          1      0.001   1     0    mean  3e-4
    halfcheetah-medium-replay-v2   1      0.001   1     0    mean  3e-4
    halfcheetah-medium-expert-v2   1      0.001   0.1   0    mean  3e-4
    antmaze-umaze-v0               0.1    0       -     1    max   3e-4
    antmaze-umaze-diverse-v0       0.1    0       -     1    max   3e-4
    antmaze-medium-play-v0         0.1    0       -     1    max   3e-4
    antmaze-medium-diverse-v0      0.1    0       -     1    max   3e-4
    antmaze-large-play-v0          0.1    0       -     1.1  max   1e-3
    antmaze-large-diverse-v0       0.1    0       -     1    max   1e-3
""".strip().splitlines()[1:]


@pytest.mark.parametrize("row", PAPER_TABLE, ids=lambda row: row.split()[0])
def test_presets_are_the_published_settings(row):
    name, eta, eta_lr, b, rho, next_value, critic_lr = row.split()
    args = dac.resolve(dac.Args(env=name))
    assert (args.eta, args.eta_lr) == (float(eta), float(eta_lr))
    assert (args.rho, args.critic_lr) == (float(rho), float(critic_lr))
    assert args.next_value == next_value and (b == "-" or args.b == float(b))
    common_values = dict(
        steps=2_000_000, batch_size=256, discount=0.99, T=5, hidden=(256, 256, 256), H=10, N=10, N_a=10,
        actor_lr=3e-4, clip_norm=1.0, polyak=0.005, ema_every=5, ema_after=1000, guidance="soft",
        target="lcb", temperature=0.0, clip_x0=True, reward_scale="range", eval_every=10_000,
        eval_episodes=10,
    )  # fmt: skip
    assert {k: getattr(args, k) for k in common_values} == common_values


def test_the_table_has_all_fifteen_datasets_of_the_paper():
    assert len(PAPER_TABLE) == 15
    assert {row.split()[0] for row in PAPER_TABLE} == {k for k in dac.PRESETS if "-v" in k}


@pytest.mark.parametrize("name", ["bandit-two", "bandit-three", "bandit-moons", "bandit-circles"])
def test_bandits_have_the_settings_of_figure_2(name):
    args = dac.resolve(dac.Args(env=name))
    want = dict(
        steps=20_000, batch_size=128, T=50, hidden=(64, 64, 64), H=5, N=10, N_a=1, eta=1.0, eta_lr=0.01,
        b=1.3, actor_lr=1e-3, critic_lr=1e-3, ema_after=10, clip_x0=False, reward_scale="none",
    )  # fmt: skip
    assert {k: getattr(args, k) for k in want} == want


def test_a_dataset_outside_the_paper_takes_the_common_values_and_the_command_line_wins():
    args = dac.resolve(dac.Args(env="ant-medium-v2", rho=0.3, T=7))
    assert (args.eta, args.eta_lr, args.b, args.next_value) == (1.0, 1e-3, 1.0, "mean")
    assert (args.rho, args.T) == (0.3, 7)
    assert dac.resolve(dac.Args(env="halfcheetah-medium-expert-v2", b=0.4)).b == 0.4
