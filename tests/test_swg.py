"""SWG's mathematics, checked on a CPU: each test states one fact of the method and how to derive it.

    critic, weights     expectiles, every weight by hand, the vectors of the authors' code
    networks            sizes, initial values, the tap of the weight's head; each one written a second time
    guidance, sampler   exact denoisers: posterior means, chains and laws known in closed form
    acting              candidates, and which of them SWG-R takes
    training            the real networks on a problem with a known answer; all updates written a second time

Letters as in swg.py: B batch, S state, A action, T diffusion steps, N candidates, E episodes.  z = (a, w).
"""

import math
import shutil
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor

import common
import swg
from common import Dataset

CPU = torch.device("cpu")
KINDS = ("expectile", "smooth-expectile", "exponential", "linex", "dice", "hard")


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
    """Everything at once, with rates so high that each mistake shows."""
    args = swg.Args(
        env="hopper-medium-v2", steps=10, critic_steps=9, critic_batch_size=7, critic_lr=0.02, hidden=(5, 4),
        discount=0.9, tau=0.8, polyak=0.1, width=6, blocks=3, dropout=0.0, T=5, weight_factor=1.7, batch_size=12,
        lr=0.03, lr_decay_steps=15, weight_decay=0.3, ema=0.2, rho=2.0, kappa=0.5,
    )  # fmt: skip
    return swg.resolve(replace(args, **settings))


def tiny_data(n=40):
    g = torch.Generator().manual_seed(5)
    s, a, s_next = (torch.randn(n, k, generator=g) for k in (3, 2, 3))
    r, terminal = torch.rand(n, generator=g), (torch.rand(n, generator=g) < 0.4) * 1.0
    return Dataset(s, a.clamp(-1, 1), r, s_next, terminal, terminal.bool())


def same(net, other):
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def randomised(net, std=0.5):
    for p in net.parameters():  # biases and LayerNorm's too: zeros and ones would hide a mistake
        nn.init.normal_(p, std=std)
    return net


# --- the authors' parameters: "fill" of the sheet ---------------------------------------------------------
def sines(*shape):
    """0.05 sin(1 + k), k = 0, 1, ... in row-major order"""
    n = math.prod(shape)
    return (0.05 * torch.sin(1 + torch.arange(n, dtype=torch.float64))).view(shape).float()


@torch.no_grad()
def fill(net):
    """Linear layers are counted in the (in, out) layout; LayerNorm's scales are 1 + that; two heads jointly."""
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and name == "weight":
                p.copy_(sines(*p.shape[::-1]).T)
            else:
                p.copy_(sines(*p.shape) + (isinstance(module, nn.LayerNorm) and name == "weight"))
    for stack in (net.weights, net.biases) if isinstance(net, swg.Heads) else ():
        for p in stack:  # (2, in, out) and (2, 1, out)
            p.copy_(sines(*p.shape))
    return net


# --- Eqs. (8), (9): the critic ----------------------------------------------------------------------------
def test_value_loss_by_hand():
    """u = (2, -1, 0, 0.5), tau = 0.8:  (0.8 * 4 + 0.2 * 1 + 0 + 0.8 * 0.25) / 4 = 0.9"""
    q, v = tensor([3.0, 0.0, 1.0, 1.0]), tensor([1.0, 1.0, 1.0, 0.5])
    close(swg.value_loss(q, v, 0.8), 0.9)
    close(swg.value_loss(q, v, 0.5), (4 + 1 + 0.25) / 8)


def test_a_difference_of_zero_counts_as_not_positive():
    """Curvature 2 |tau - 1{u <= 0}| at u = 1e-3, 0, -1e-3: 1.6, 0.4, 0.4;  weights 0.8, 0.2, 0.2."""
    v, A = torch.zeros(3, requires_grad=True), tensor([1e-3, 0.0, -1e-3])
    (slope,) = torch.autograd.grad(3 * swg.value_loss(A, v, 0.8), v, create_graph=True)
    close(slope, [-2 * 0.8 * 1e-3, 0, 2 * 0.2 * 1e-3], 1e-9)
    close(torch.autograd.grad(slope.sum(), v)[0], [1.6, 0.4, 0.4])
    close(swg.weight(A, "expectile", 0.8), [0.8, 0.2, 0.2])


def expectile(x, tau):
    """Fixed point of v = mean of x with weights tau above v and 1 - tau elsewhere."""
    v = x.double().mean()
    for _ in range(200):
        w = torch.where(x > v, tau, 1 - tau).double()
        v = (w * x).sum() / w.sum()
    return v


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_the_minimiser_of_the_value_loss_is_the_expectile(tau, float64):
    """Of 0 and 1 it is tau; of 0, 0, 1:  tau (1 - v) = 2 (1 - tau) v.  Of many numbers:
    tau E[(x - v)+] = (1 - tau) E[(v - x)+]."""
    for x, want in (
        (tensor([0.0, 1.0]), tau),
        (tensor([0.0, 0.0, 1.0]), tau / (2 - tau)),
        (torch.randn(60), None),
    ):
        v = torch.zeros(1, requires_grad=True)
        for _ in range(500):
            (grad,) = torch.autograd.grad(swg.value_loss(x, v.expand(len(x)), tau), v)
            v.data -= 0.5 * grad
        close(tau * (x - v).clamp(min=0).mean(), (1 - tau) * (v - x).clamp(min=0).mean(), 1e-10)
        close(v[0], expectile(x, tau) if want is None else want, 1e-9)


def test_critic_target_and_loss_by_hand():
    """1 + 0.9 * 10 = 10;  a terminal row keeps its reward alone: 2;  -1 + 0.9 * 30 = 26.  Heads (1, 2) and (3, 6)
    against (1, 4): mean over both heads and the batch, (0 + 4 + 4 + 4) / 4."""
    r, terminal, v_next = tensor([1.0, 2.0, -1.0]), tensor([0.0, 1.0, 0.0]), tensor([10.0, 20.0, 30.0])
    close(swg.critic_target(r, terminal, v_next, 0.9), [10, 2, 26])
    close(swg.critic_loss(tensor([[1.0, 2.0], [3.0, 6.0]]), tensor([1.0, 4.0])), 3)


def test_ten_critic_updates_meet_the_authors_numbers(monkeypatch):
    """Vector 5: V, Q and target of the paper's size, filled; one batch of all four rows, tau 0.7, Adam 3e-4."""
    s = tensor([[0.1, -0.2, 0.3], [1, 0, -1], [0.5, 0.5, -0.2], [-1, 2, 0]])
    a = tensor([[0.5, -0.5], [0, 0.2], [-0.9, 0.9], [0.3, 0.3]])
    s_next = tensor([[0.2, -0.1, 0.3], [1.1, 0, -1], [0.4, 0.5, -0.1], [-1, 1.9, 0.1]])
    terminal = tensor([0.0, 0.0, 1.0, 0.0])
    data = Dataset(s, a, tensor([1.0, 0.0, -1.0, 0.5]), s_next, terminal, terminal.bool())
    args = swg.resolve(swg.Args(env="hopper-medium-v2", critic_batch_size=4, layer_norm=True))
    agent = swg.make_agent(args, 3, 2, CPU)
    for net in (agent.value, agent.q, agent.q_target):
        fill(net)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.arange(4))
    update = swg.make_critic_update(args, agent, data)
    rows = [{k: v.item() for k, v in update().items()} for _ in range(10)]
    wanted = {0: (4.3901e-6, 0.2063940, 0.6584358, 0.2048830), 9: (5.466e-5, 0.1970486, 0.5059147, 0.1858350)}
    for i, want in wanted.items():
        got = [rows[i][f"losses/{k}"] for k in ("value", "v_mean", "critic", "q_mean")]
        assert got[0] == pytest.approx(want[0], rel=5e-4)
        assert got[1:] == pytest.approx(want[1:], abs=1e-6)
    with torch.no_grad():
        close(agent.judge(s, a), [0.2067215, 0.2000419, 0.1999342, 0.2026569])
        close(agent.value(s), [0.2029567, 0.1883129, 0.1887284, 0.1995265])


def test_the_judge_is_the_smaller_of_the_two_target_heads():
    """Linear heads on [s, a]: 1 s + 10 a and 3 s - 2 a; the online Q has no say."""
    agent = swg.make_agent(tiny_args(), 1, 1, CPU)
    agent.q_target = swg.Heads(2, (), 2).requires_grad_(False)
    agent.q_target.weights[0].copy_(tensor([[[1.0], [10.0]], [[3.0], [-2.0]]]))
    nn.init.zeros_(agent.q_target.biases[0])
    close(agent.judge(tensor([[1.0], [2.0]]), tensor([[0.5], [-1.0]])), [2.0, -8.0])


def test_returns_scale_the_rewards():
    """Vector 6: rewards 0..11, episodes that end at rows 4, 8, 11: returns 10, 26, 30, hence 1000 / 20 = 50."""
    end = torch.zeros(12, dtype=torch.bool)
    end[[4, 8, 11]] = True
    r, zero = torch.arange(12.0), torch.zeros(12, 1)
    data = Dataset(zero, zero, r, zero, torch.zeros(12), end)
    assert data.returns().tolist() == [10, 26, 30] and common.reward_scale(data) == 50
    assert (common.reward_scale(data) * r).tolist() == list(range(0, 600, 50))


# --- weights ----------------------------------------------------------------------------------------------
def test_weights_meet_the_authors_numbers():
    """Vector 2, h = 0.7.  At A = 0 linex is NaN there and its limit h^2 = 0.49 here; near 0 their e^x - 1 has lost
    two digits of float32."""
    A = tensor([-2, -0.5, -0.01, 0, 0.01, 0.5, 2])
    close(swg.weight(A, "expectile", 0.7), [0.3] * 4 + [0.7] * 3)
    want = [0.263691, 0.4134367, 0.4882872, 0.49, 0.4917169, 0.5866947, 1.06932]
    close(swg.weight(A, "linex", 0.7), want, 0, 6e-6)
    want = [0.3009891, 0.3729702, 0.4970002, 0.5, 0.5029998, 0.6270298, 0.699011]
    close(swg.weight(A, "smooth-expectile", 0.7), want, 2e-7)
    want = [0.035674, 0.4345982, 0.9834715, 1, 1.0083333, 1.4166666, 2.6666665]
    close(swg.weight(A, "dice", 0.7), want, 2e-7)


@pytest.mark.parametrize(
    "kind, want",
    [
        ("expectile", (0.2, 0.2, 0.8)),
        ("smooth-expectile", (0.0474259 * 0.8 + 0.9525741 * 0.2, 0.5, 0.9525741 * 0.8 + 0.0474259 * 0.2)),
        ("exponential", (math.exp(-3), 1, math.exp(3))),
        ("linex", (0.8 * (1 - math.exp(-0.8)), 0.64, 0.8 * (math.exp(0.8) - 1))),
        ("dice", (math.exp(-1 / 0.6), 1, 1 + 1 / 1.2)),
        ("hard", (0, 1, 1)),
    ],
)
def test_weights_by_hand(kind, want):
    """At A = -1, 0, 1 with h = 0.8; sigmoid(3) = 0.9525741."""
    close(swg.weight(tensor([-1.0, 0.0, 1.0]), kind, 0.8), want, 2e-6)


@pytest.mark.parametrize("kind, low, high", [
    ("expectile", 0.3, 0.7), ("smooth-expectile", 0.3, 0.7), ("exponential", 1e-3, 80), ("linex", 0, math.inf),
    ("dice", 0, 100), ("hard", 0, 1),
])  # fmt: skip
def test_weights_rise_with_the_advantage_within_their_bounds(kind, low, high):
    A = torch.linspace(-60, 120, 7201)
    w = swg.weight(A, kind, 0.7)
    assert (w.diff() >= -1e-6).all() and w[-1] > w[0] and w.dtype == A.dtype
    close(w[[0]], [low], 0.012 if kind == "linex" else 1e-9)
    if high < math.inf:
        close(w[[-1]], [high], 1e-5)
    assert (w >= 0).all() and swg.weight(-500 * torch.ones(1), kind, 0.7).isfinite()


def test_weights_at_the_edges():
    """hard changes at -0.01, which it still counts as good; linex near 0: h^2 (1 + h A / 2), without cancellation;
    the exponential reaches its bounds 80 and 1e-3 at ln(80) / 3 = 1.4607 and -2.3026; dice 100 at A = 118.8."""
    close(swg.weight(tensor([-0.0101, -0.01, 0.0]), "hard", 0.7), [0, 1, 1], 0)
    A = tensor([-1e-4, -1e-7, 0.0, 1e-30, 1e-7, 1e-4])
    close(swg.weight(A, "linex", 0.7), 0.49 * (1 + 0.35 * A), 1e-7)
    want = [math.exp(3 * 1.46), 80, math.exp(-3 * 2.302), 1e-3]
    close(swg.weight(tensor([1.46, 1.47, -2.302, -2.31]), "exponential", 0.7), want, 0, 1e-5)
    close(swg.weight(tensor([118.0, 119.0, -1e4]), "dice", 0.7), [1 + 118 / 1.2, 100, 1e-40], 1e-5)


def stub_critic(A):
    """Row i has s = i: Q - V = A[i], with V = 3 s."""
    index = lambda s: s[:, 0].long()  # noqa: E731
    return SimpleNamespace(judge=lambda s, a: A[index(s)] + 3 * s[:, 0], value=lambda s: 3 * s[:, 0])


def stub_rows(n):
    s = torch.arange(float(n))[:, None]
    return Dataset(s, torch.zeros(n, 1), torch.zeros(n), s, torch.zeros(n), torch.zeros(n).bool())


@pytest.mark.parametrize("kind", KINDS)
def test_weigh_measures_advantages_in_standard_deviations_and_scales_the_largest_weight(kind, capsys):
    """A = (-4, 0, 4, 8): standard deviation sqrt(80 / 3).  Expectile and hard only ask for the sign of A."""
    A = tensor([-4.0, 0.0, 4.0, 8.0])
    args = tiny_args(weight=kind, tau=0.7)
    assert args.weight_max == 0.7
    unit = A if kind in ("expectile", "hard") else A / math.sqrt(80 / 3)
    plain = swg.weight(unit, kind, 0.7)
    for top in (0.7, 0.4):
        got = swg.weigh(replace(args, weight_max=top), stub_critic(A), stub_rows(4))
        close(got, plain * top / plain.max())
        close(got.max(), top)
    if kind == "expectile":  # as released: nothing is scaled
        close(swg.weigh(args, stub_critic(A), stub_rows(4)), [0.3, 0.3, 0.7, 0.7])
    if kind == "hard":  # the bound -0.01 is in units of Q: -0.02 is below it, in standard deviations -0.005 is not
        close(swg.weigh(args, stub_critic(tensor([-0.02, 0.0, 4.0, 8.0])), stub_rows(4)), [0, 0.7, 0.7, 0.7])
    assert "A > 0 in 50.0 % of 4 rows" in capsys.readouterr().out


def test_weigh_goes_through_the_dataset_in_parts():
    """70,000 rows are two parts; the result is that of one."""
    n, sizes = 70_000, []
    A, critic = torch.randn(n), stub_critic(torch.zeros(1))
    critic.value = lambda s: sizes.append(len(s)) or 0 * s[:, 0]
    critic.judge = lambda s, a: A[s[:, 0].long()]
    got = swg.weigh(tiny_args(weight="exponential", tau=0.7), critic, stub_rows(n))
    want = (3 * A / A.std()).exp().clamp(1e-3, 80)
    close(got, 0.7 * want / want.max(), 1e-6, 1e-4)
    assert len(sizes) == 2 and sum(sizes) == n


def test_weigh_uses_the_target_q_and_the_online_v_of_the_real_agent():
    data = tiny_data()
    agent = swg.make_agent(tiny_args(), 3, 2, CPU)
    randomised(agent.q_target), randomised(agent.value)
    q = agent.q_target(torch.cat([data.s, data.a], -1))
    agent.value[-1].bias.data += (torch.minimum(q[0], q[1]) - agent.value(data.s)).median() + 1e-3
    A = torch.minimum(q[0], q[1]) - agent.value(data.s)
    w = swg.weigh(tiny_args(), agent, data)
    assert 15 < (A > 0).sum() < 25 and not w.requires_grad
    close(w, torch.where(A > 0, 0.8, 0.2))
    randomised(agent.q)
    assert torch.equal(w, swg.weigh(tiny_args(), agent, data))


# --- networks ---------------------------------------------------------------------------------------------
def copies(net):
    """Weights and buffers by name, apart from the network; weights learn, buffers do not."""
    trained = dict(net.named_parameters())
    return {k: v.detach().clone().requires_grad_(k in trained) for k, v in net.state_dict().items()}


def silu(z):
    return z / (1 + torch.exp(-z))


def line(w, name, z):
    return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, z):
    z = (z - z.mean(1, keepdim=True)) / torch.sqrt(z.var(1, correction=0, keepdim=True) + 1e-6)
    return z * w[f"{name}.weight"] + w[f"{name}.bias"]


def slow_joint(w, z, s, t, drop=0.0):
    """Section 4.3 of the sheet, t = 1..T; (B, A + 1)."""
    u = 2 * math.pi * (t - 1)[:, None] * w["frequencies"]
    c = line(w, "time.2", silu(line(w, "time.0", torch.cat([torch.cos(u), torch.sin(u)], 1))))
    xs = [line(w, "trunk", torch.cat([z, s, c], 1))]
    while f"blocks.{len(xs) - 1}.up.weight" in w:
        name, x = f"blocks.{len(xs) - 1}", xs[-1]
        h = norm(w, f"{name}.norm", F.dropout(x, drop))
        xs.append(x + line(w, f"{name}.down", silu(line(w, f"{name}.up", h))))
    eps = line(w, "action", silu(xs[-1]))
    if "weight.0.weight" in w:
        eps = torch.cat([eps, line(w, "weight.2", silu(line(w, "weight.0", xs[2])))], 1)
    return eps


def slow_toy(w, z, beta, t, scale=1.0):
    """Section 11, on scale z: sines then cosines of t - 1 and beta, frequencies 10000^(-j/15);  Mish is
    x tanh(log(1 + e^x))."""

    def embed(name, x):
        u = x[:, None] * tensor([10_000 ** (-j / 15) for j in range(16)])
        h = line(w, f"{name}.0", torch.cat([torch.sin(u), torch.cos(u)], 1))
        return line(w, f"{name}.2", h * torch.tanh(torch.log(1 + torch.exp(h))))

    x, depth = torch.cat([scale * z, embed("time", t - 1), embed("beta", beta[:, 0])], 1), 0
    while f"layers.{depth + 1}.weight" in w or f"layers.{depth + 2}.weight" in w:
        x, depth = silu(line(w, f"layers.{depth}", x)), depth + 2
    return line(w, f"layers.{depth}", x)


def positive(x):
    """ReLU, of slope 0 at 0, where clamp has 1: with zero biases units sit there"""
    return torch.where(x > 0, x, 0 * x)


def slow_value(w, s):
    """Names count all layers, ReLUs and LayerNorm too."""
    first = 0
    if w["0.weight"].dim() == 1:
        s, first = norm(w, "0", s), 1
    last = max(int(k.split(".")[0]) for k in w)
    for i in range(first, last, 2):
        s = positive(line(w, str(i), s))
    return line(w, str(last), s)[:, 0]


def head_weights(heads):
    """Per head [weight (in, out), bias, weight, bias, ...], apart from the network."""
    layers = list(zip(heads.weights, heads.biases))
    H = range(len(heads.weights[0]))
    return [[p.detach().clone().requires_grad_() for w, b in layers for p in (w[h], b[h, 0])] for h in H]


def slow_head(head, x):
    for i in range(0, len(head), 2):
        x = x @ head[i] + head[i + 1]
        x = positive(x) if i < len(head) - 2 else x
    return x[:, 0]


def size(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("S, A, want", [
    (17, 6, 1_816_647), (11, 3, 1_813_572), (29, 8, 1_820_745), (60, 9, 1_829_194), (45, 24, 1_833_049),
])  # fmt: skip
def test_the_joint_model_has_as_many_parameters_as_the_released_one(S, A, want):
    """Q: two heads of (S + A + 1) 256 + 257 * 256 + 257;  V: 2 S of LayerNorm + (S + 1) 256 + 257 * 256 + 257."""
    agent = swg.make_agent(swg.resolve(swg.Args(env="walker2d-medium-v2", layer_norm=True)), S, A, CPU)
    assert size(agent.net) == size(agent.net_ema) == want
    assert size(agent.q) == size(agent.q_target) == 2 * ((S + A + 1) * 256 + 257 * 256 + 257)
    assert size(agent.value) == 2 * S + (S + 1) * 256 + 257 * 256 + 257


def test_the_toy_model_has_as_many_parameters_as_the_released_one():
    args = swg.resolve(swg.Args(env="toy-spiral", size="paper"))
    agent = swg.make_agent(args, 1, 2, CPU)
    assert size(agent.net) == 1_366_339 and (agent.value, agent.q, agent.q_target) == (None, None, None)


@pytest.mark.parametrize("t, want", [
    (0, ((0.0677521, 0.0435903, 0.1967561), (0.0734147, 0.0663998, 0.2021047))),
    (7, ((0.0677442, 0.0435709, 0.1967518), (0.0734141, 0.0663827, 0.2021004))),
    (14, ((0.0677592, 0.0436054, 0.1967592), (0.0734161, 0.0664134, 0.2021080))),
])  # fmt: skip
def test_the_joint_model_meets_the_authors_numbers(t, want):
    """Vector 3; their t counts from 0.  In float64, because printed digits end at 5e-8; a LayerNorm eps of 1e-5 would
    be off by 5e-6."""
    net = fill(swg.JointNet(3, 2, 256, 3, "tap", 0.1)).eval().double()
    s = tensor([[0.1, -0.2, 0.3], [1, 0, -1]], dtype=torch.float64)
    z = tensor([[0.5, -0.5, 0.3], [0, 0.2, 0.7]], dtype=torch.float64)
    a, w = net(z, s, net.embed(tensor([t + 1.0], dtype=torch.float64)))
    assert a.shape == (2, 2) and w.shape == (2,)
    close(torch.cat([a, w[:, None]], 1), want, 1.5e-7, 5e-7)
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    off = (net(z, s, net.embed(tensor([t + 1.0], dtype=torch.float64)))[0] - tensor(want)[:, :2]).abs().max()
    assert off > 1e-6


@pytest.mark.parametrize("head, blocks", [("tap", 2), ("tap", 3), ("tap", 4), ("plain", 1), ("plain", 3)])
def test_the_joint_model_equals_a_second_one_written_from_the_sheet(head, blocks, float64):
    net = randomised(swg.JointNet(3, 2, 6, blocks, head, 0.0))
    z, s, t = torch.randn(5, 3), torch.randn(5, 3), tensor([1.0, 2.0, 3.0, 8.0, 15.0])
    want = slow_joint(copies(net), z, s, t)
    a, w = net(z, s, net.embed(t))
    assert a.shape == (5, 2) and w.shape == (5,)
    close(torch.cat([a, w[:, None]], 1), want, 1e-10, 1e-10)
    for i in range(5):  # the sampler gives one t for all rows
        a, w = net(z, s, net.embed(t[i : i + 1]))
        close(torch.cat([a[i], w[i : i + 1]]), want[i], 1e-10, 1e-10)


@pytest.mark.parametrize("depth, scale", [(1, 1.0), (3, 1.0), (3, 6.0)])
def test_the_toy_model_equals_a_second_one_written_from_the_sheet(depth, scale, float64):
    net = randomised(swg.ToyNet(6, depth, scale))
    z, beta, t = torch.randn(5, 3), torch.rand(5, 1) * 24, tensor([1.0, 2.0, 30.0, 99.0, 100.0])
    a, w = net(z, beta, net.embed(t))
    close(torch.cat([a, w[:, None]], 1), slow_toy(copies(net), z, beta, t, scale), 1e-9, 1e-9)


def test_the_critics_networks_equal_plain_ones(float64):
    for layer_norm, hidden in ((True, (9, 7)), (False, (9, 7)), (True, (4,))):
        net, s = randomised(swg.ValueNet(3, hidden, layer_norm)), torch.randn(6, 3)
        assert isinstance(net[0], nn.LayerNorm) == layer_norm
        close(net(s), slow_value(copies(net), s), 1e-10)
    heads, x = randomised(swg.Heads(5, (9, 7), 2)), torch.randn(6, 5)
    assert heads(x).shape == (2, 6)
    for h, head in enumerate(head_weights(heads)):
        close(heads(x)[h], slow_head(head, x), 1e-10)


def outputs(net, z, s):
    with torch.no_grad():
        return net(z, s, net.embed(tensor([4.0])))


def test_the_tapped_weight_comes_from_the_first_two_blocks_alone():
    """Another block 3, block 4 or action head changes the action only; another weight head the weight only."""
    net, z, s = swg.JointNet(3, 2, 8, 4, "tap", 0.0), torch.randn(5, 3), torch.randn(5, 3)
    a, w = outputs(net, z, s)
    layers = [(net.blocks[0], 1, 1), (net.blocks[1], 1, 1), (net.blocks[2], 1, 0), (net.blocks[3], 1, 0)]
    layers += [(net.action, 1, 0), (net.weight, 0, 1), (net.trunk, 1, 1), (net.time, 1, 1)]
    for layer, moves_a, moves_w in layers:
        before = deepcopy(layer.state_dict())
        randomised(layer)
        a_new, w_new = outputs(net, z, s)
        assert torch.equal(a, a_new) != bool(moves_a) and torch.equal(w, w_new) != bool(moves_w)
        layer.load_state_dict(before)
    plain = swg.JointNet(3, 2, 8, 3, "plain", 0.0)
    _, w = outputs(plain, z, s)
    for layer in (*plain.blocks, plain.action):
        before = deepcopy(layer.state_dict())
        randomised(layer)
        assert not torch.equal(w, outputs(plain, z, s)[1])
        layer.load_state_dict(before)


@pytest.mark.parametrize("head, passed", [("tap", False), ("plain", True)])
def test_the_gradient_of_the_tapped_weight_does_not_pass_what_lies_behind_the_tap(head, passed):
    net, z = swg.JointNet(3, 2, 8, 3, head, 0.0), torch.randn(5, 3, requires_grad=True)
    _, w = net(z, torch.randn(5, 3), net.embed(tensor([4.0])))
    at = [z, net.trunk.weight, net.blocks[1].up.weight, net.blocks[2].up.weight, net.action.weight]
    grads = torch.autograd.grad(w.sum(), at, allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in grads[:3])
    assert [g is not None for g in grads[3:]] == [passed] * 2
    assert (grads[0][:, :2] != 0).any() and (grads[0][:, 2] != 0).any()  # with respect to action and weight


def test_dropout_acts_before_layernorm_in_the_branch_and_only_in_training():
    block, x = randomised(swg.Block(8, 0.4)), torch.randn(5, 8)
    torch.manual_seed(3)
    got = block(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    assert (dropped == 0).any()

    def branch(x):
        return block.down(F.silu(block.up(F.layer_norm(x, (8,), block.norm.weight, block.norm.bias, 1e-6))))

    close(got, x + branch(dropped))
    close(block.eval()(x), x + branch(x))
    args = tiny_args(dropout=0.4)
    agent = swg.make_agent(args, 3, 2, CPU)
    act = swg.make_act(replace(args, kappa=0.0), agent, 2)
    s = torch.randn(4, 3)
    assert torch.equal(act(s), act(s))
    assert agent.net.training and not agent.net_ema.training
    assert [m.p for m in agent.net.modules() if isinstance(m, nn.Dropout)] == [0.4] * 3


def test_initial_values():
    """Xavier-uniform: within sqrt(6 / (in + out)), of standard deviation sqrt(2 / (in + out)).  In the blocks a normal
    distribution cut at two of its standard deviations, whose own is 0.87962566 of that: 1/sqrt(in), at most
    2 / 0.87962566 / sqrt(in)."""
    net = swg.JointNet(11, 3, 256, 3, "tap", 0.1)
    heads, value = swg.Heads(9, (256, 128), 2), swg.ValueNet(9, (256, 128), True)
    xavier = [net.trunk, net.time[0], net.time[2], net.weight[0], value[1], value[3]]
    pairs = [(layer.weight, sum(layer.weight.shape)) for layer in xavier]
    pairs += [(w, sum(w.shape)) for stack in heads.weights[:2] for w in stack]  # each head on its own
    for w, fans in pairs:
        bound = math.sqrt(6 / fans)
        assert 0.98 * bound < w.abs().max() <= bound and abs(w.std() / (bound / math.sqrt(3)) - 1) < 0.03
    for layer in (layer for block in net.blocks for layer in (block.up, block.down)):
        root = layer.in_features**-0.5
        assert abs(layer.weight.std() / root - 1) < 0.01 and 2.25 < layer.weight.abs().max() / root < 2 / 0.8796
    for module in (net, heads, value):
        for name, p in module.named_parameters():
            if "bias" in name:
                assert not p.any()
            if "norm.weight" in name:
                assert (p == 1).all()
    assert not torch.equal(heads.weights[1][0], heads.weights[1][1])
    omega = torch.cat([swg.JointNet(1, 1, 4, 2, "tap", 0.0).frequencies.detach() for _ in range(100)])
    assert abs(omega.std() / 0.2 - 1) < 0.045 and abs(omega.mean()) < 0.0125  # 4 and 5 standard errors
    assert net.frequencies.requires_grad and net.frequencies.shape == (64,)


# --- guidance and sampler ---------------------------------------------------------------------------------
def settings(**changes):
    args = dict(rho=1.0, kappa=1.0, factor="released", log="clip", reverse="iterate", w_min=1e-4, w_max=1.0)
    return SimpleNamespace(**args | changes)


TOY = dict(log="floor", reverse="x0")


class Model:
    """A network given by its data prediction z_0(z_t, s, alpha_bar_t), in the given unit of z; keeps the z_t it saw."""

    def __init__(self, sched, predict, unit=1.0):
        self.alpha_bar, self.predict, self.unit, self.seen = sched.alpha_bar, predict, unit, []

    def embed(self, t):
        return self.alpha_bar.to(t.dtype)[t.long()][:, None]

    def __call__(self, z, s, e):
        self.seen.append(z.detach().clone())
        eps = (z - e.sqrt() * self.unit * self.predict(z / self.unit, s, e)) / (1 - e).sqrt()
        return eps[:, :-1], eps[:, -1]


def mixture(m, v, p, sched):
    """Exact denoiser of z_0 ~ sum_k p_k N(m_k, diag v): m (K, A + 1), v (A + 1,), where 0 makes it finitely many."""

    def predict(z, s, ab):
        spread, off = ab * v + 1 - ab, z[:, None] - ab.sqrt() * m  # (1, A + 1), (B, K, A + 1)
        share = (p.log() - (off**2 / spread).sum(-1) / 2).softmax(-1)  # (B, K)
        return (share[..., None] * (m + ab.sqrt() * v / spread * off)).sum(1)

    return Model(sched, predict)


def draw(net, n, sched, A=2, **changes):
    z, noise = torch.randn(n, A + 1), torch.randn(sched.T + 1, n, A + 1)
    return swg.sample(net, torch.zeros(n, 1), z, noise, sched, settings(**changes))


def few_rows():
    """Five pairs (a, w) and their probabilities."""
    z = torch.cat([torch.rand(5, 2) * 1.8 - 0.9, torch.rand(5, 1) * 0.9 + 0.05], 1)
    return z, torch.rand(5).softmax(0)


def posterior(z_t, rows, p, ab):
    """(B, 5): probability of each row given z_t, one after the other"""
    out = torch.zeros(len(z_t), 5)
    for b in range(len(z_t)):
        for j in range(5):
            out[b, j] = p[j] * torch.exp(-((z_t[b] - math.sqrt(ab) * rows[j]) ** 2).sum() / (2 * (1 - ab)))
    return out / out.sum(1, keepdim=True)


@pytest.mark.parametrize("b", [0.1, 0.5, 3.0])
def test_one_guided_step_from_the_only_noise_level_is_the_posterior_mean_under_the_tilted_law(b, float64):
    """T = 1: Tweedie (5) with the score (4) is E[z_0 | z_1] under p w / Z, in action and weight."""
    (rows, p), sched = few_rows(), common.vp_schedule(1, b, b)
    net, ab = mixture(rows, torch.zeros(3), p, sched), float(sched.alpha_bar[1])
    z = ab**0.5 * rows.repeat(4, 1) + (1 - ab) ** 0.5 * torch.randn(20, 3)
    for rho, q in ((0.0, p), (1.0, p * rows[:, 2] / (p * rows[:, 2]).sum())):
        got = swg.sample(net, torch.zeros(20, 1), z, torch.full((2, 20, 3), math.nan), sched, settings(rho=rho))
        close(got, posterior(z, rows, q, ab) @ rows, 2e-6)
    assert (posterior(z, rows, q, ab) - posterior(z, rows, p, ab)).abs().max() > 0.1


@pytest.mark.parametrize("reverse", ["iterate", "x0"])
@pytest.mark.parametrize("log", ["clip", "floor", "free"])
@pytest.mark.parametrize("rho", [0.0, 1.0, 2.5])
def test_chains_equal_the_steps_of_the_sheet_with_the_gradient_in_closed_form(rho, log, reverse, float64):
    """grad log E[w | z_t] = sqrt(alpha_bar) / sigma^2 (E_tilted[z_0 | z_t] - E[z_0 | z_t]).  Ancestral step: variance
    beta_t, clip of the iterate; or Bayes' q(z_{t-1} | z_t, z_0) with z_0 clipped, whose precision is
    1 / (1 - alpha_bar_{t-1}) + alpha_t / beta_t.  Rows 0 and 1 of the noise have no use."""
    (rows, p), sched, kappa = few_rows(), common.vp_schedule(15), 0.7
    start, noise = torch.randn(6, 3), torch.randn(16, 6, 3)
    args = settings(rho=rho, log=log, reverse=reverse, kappa=kappa, w_min=0.02, w_max=0.96)
    noise[:2], args.factor = math.nan, "exact"
    got = swg.sample(mixture(rows, torch.zeros(3), p, sched), torch.zeros(6, 1), start, noise, sched, args)

    beta, abar = sched.beta.double(), sched.alpha_bar.double()
    tilted, z, low, high = p * rows[:, 2], kappa * start, tensor([-1, -1, 0.02]), tensor([1, 1, 0.96])
    for t in range(15, 0, -1):
        ab, prev, b, sigma = abar[t], abar[t - 1], beta[t], torch.sqrt(1 - abar[t])
        z_0 = posterior(z, rows, p, ab) @ rows
        grad = torch.sqrt(ab) / sigma**2 * (posterior(z, rows, tilted, ab) @ rows - z_0)
        eps = (z - torch.sqrt(ab) * z_0) / sigma - rho * sigma * grad
        if reverse == "iterate":
            z, variance = (z - b / sigma * eps) / torch.sqrt(1 - b), b
        else:
            z_0 = torch.minimum(torch.maximum((z - sigma * eps) / torch.sqrt(ab), low), high)
            if t > 1:
                variance = 1 / (1 / (1 - prev) + (1 - b) / b)
                z = variance * (torch.sqrt(prev) * z_0 / (1 - prev) + torch.sqrt(1 - b) * z / b)
            else:
                z = z_0
        if t > 1:
            z = z + kappa * torch.sqrt(variance) * noise[t]
        if reverse == "iterate":
            z = torch.minimum(torch.maximum(z, low), high)
    close(got, z, 2e-4 if rho else 2e-5)


@pytest.mark.parametrize("head", ["tap", "plain"])
def test_one_guided_step_of_the_real_network_equals_finite_differences(head, float64):
    """eps - rho sigma grad_z log|w_hat| by differences of the second network; w_hat ~ z^w - sigma eps^w."""
    net, sched = randomised(swg.JointNet(3, 2, 6, 3, head, 0.0), 0.3), common.vp_schedule(1, 0.1, 0.1)
    w, z, s, step, one = copies(net), 0.3 * torch.randn(4, 3), torch.randn(4, 3), 1e-6, torch.ones(4)
    sigma, ab = (1 - sched.alpha_bar[1].double()).sqrt(), sched.alpha_bar[1].double()
    args = settings(rho=0.3, log="free", w_min=-9.0, w_max=9.0)
    with torch.no_grad():

        def log_w(z):
            return (z[:, 2] - sigma * slow_joint(w, z, s, one)[:, 2]).abs().log()

        grad = torch.stack([(log_w(z + d) - log_w(z - d)) / (2 * step) for d in step * torch.eye(3)], 1)
        eps = slow_joint(w, z, s, one) - 0.3 * sigma * grad
        want = (z - sigma * eps) / ab.sqrt()
        got = swg.sample(net, s, z, torch.zeros(2, 4, 3), sched, args)  # under no_grad, as when acting
    assert grad.abs().amin() > 1e-3 and want[:, :2].abs().max() < 1
    close(got, want, 1e-6)
    assert not got.requires_grad and all(p.grad is None for p in net.parameters())


def authors_model(sched, unit=1.0):
    """Vector 4: a-part 0.5 tanh(z^a - mean(s)), w-part 0.3 + 0.4 sigmoid(sum sin(2 z^a) + z^w - 0.5)."""

    def predict(z, s, ab):
        a = 0.5 * torch.tanh(z[:, :-1] - s.mean(1, keepdim=True))
        w = 0.3 + 0.4 * torch.sigmoid(torch.sin(2 * z[:, :-1]).sum(1) + z[:, -1] - 0.5)
        return torch.cat([a, w[:, None]], 1)

    return Model(sched, predict, unit)


@pytest.mark.parametrize("factor", ["released", "exact"])
@pytest.mark.parametrize("rho, clip, want", [
    (0.0, True, ((-0.090372, 0.446361), (0.132755, 0.573858))),
    (1.0, True, ((-0.005821, 0.555898), (0.183392, 0.626068))),
    (10.0, True, ((0.113875, 0.659134), (0.252989, 0.673743))),
    (10.0, False, ((0.166085, 0.681456), (0.286343, 0.685047))),
    (30.0, True, ((0.190176, 0.706941), (0.303488, 0.705636))),
])  # fmt: skip
def test_the_sampler_meets_the_authors_numbers(rho, clip, want, factor):
    """T = 15, kappa = 0, three action coordinates, which come out equal.  For the numbers without clips, z counts in
    units of 1/100: none is ever reached, while gradients are 100 times as large where eps is to move by 1/100."""
    s, sched = tensor([[0.3, -0.1], [-0.5, 0.2]]), common.vp_schedule(15)
    unit = 1.0 if clip else 0.01
    args = settings(rho=rho * unit**2, kappa=0.0, factor=factor)
    if not clip:
        args.w_min, args.w_max = -1e9, 1e9
    z = swg.sample(authors_model(sched, unit), s, torch.randn(2, 4), torch.randn(16, 2, 4), sched, args) / unit
    close(z[:, [0, 3]], want, 2e-6)
    close(z[:, 1:3], z[:, :1].expand(-1, 2), 1e-7)


HALVES = SimpleNamespace(T=2, floats=([0, 0.5, 0.5], [1, 0.5, 0.5], [1, 0.5, 0.25]))  # beta_t = 1/2


class Silent:
    """Predicts no noise at all; keeps the z_t that it was shown and which steps they were."""

    def __init__(self):
        self.seen, self.steps = [], []

    def embed(self, t):
        return t[:, None]

    def __call__(self, z, s, e):
        self.seen.append(z.detach().clone())
        self.steps.append(e.item())
        return 0 * z[:, :-1], 0 * z[:, -1]


def test_ancestral_steps_by_hand():
    """beta = 1/2, kappa = 2, no guidance: z = 2 (0.1, 0.05), then z / sqrt(1/2) + 2 sqrt(1/2) noise[2], then
    z / sqrt(1/2) without noise, clipped.  0.2 sqrt2 + sqrt2 * 0.3 = 0.7071068, then 1;  0.1 sqrt2 - sqrt2 * 0.05 =
    0.0707107, then 0.1."""
    net, noise = Silent(), torch.full((3, 1, 2), math.nan)
    noise[2, 0] = tensor([0.3, -0.05])
    z = swg.sample(net, torch.zeros(1, 1), tensor([[0.1, 0.05]]), noise, HALVES, settings(rho=0.0, kappa=2.0))
    assert net.steps == [2, 1]
    close(torch.cat(net.seen), [[0.2, 0.1], [0.7071068, 0.0707107]])
    close(z, [[1.0, 0.1]])


def test_posterior_steps_by_hand():
    """t = 2, z = (0.3, 0.6): z_0 = z / sqrt(1/4) = (0.6, 1.2), clipped to (0.6, 1);  mean (sqrt(1/2)/2 z_0 +
    sqrt(1/2)/2 z) / (3/4) = 0.4714045 (z_0 + z) = (0.4242641, 0.7542472), variance (1/2 * 1/2) / (3/4) = 1/3, and
    kappa 1/2 with noise (0, 3): + sqrt(3)/2.  t = 1: z_0 = z sqrt2 = (0.6, 2.29), clipped, is the result."""
    net, noise = Silent(), torch.full((3, 1, 2), math.nan)
    noise[2, 0] = tensor([0.0, 3.0])
    args = settings(rho=0.0, kappa=0.5, reverse="x0")
    z = swg.sample(net, torch.zeros(1, 1), tensor([[0.6, 1.2]]), noise, HALVES, args)
    close(torch.cat(net.seen), [[0.3, 0.6], [0.4242641, 0.7542472 + 0.8660254]])
    close(z, [[0.6, 1.0]])


def test_the_two_factors_in_w_hat_differ_in_where_the_clip_begins():
    """Without noise w_hat is z^w / sqrt(alpha_t) or z^w / sqrt(alpha_bar_t), with gradient 1 / z^w of the logarithm.
    z^w = 0.6 at t = 2: 0.85, below 1, and guided; or 1.2, and not.  Guided by rho = 0.1: eps~ = -0.1 sigma / 0.6, so
    z = (0.6 + 0.5 * 0.1 / 0.6) / sqrt(1/2) = 0.9663797; else 0.6 / sqrt(1/2) = 0.8485281."""
    for factor, want in (("released", 0.9663797), ("exact", 0.8485281)):
        net = Silent()
        z, zero = tensor([[0.0, 0.6]]), torch.zeros(3, 1, 2)
        swg.sample(net, torch.zeros(1, 1), z, zero, HALVES, settings(rho=0.1, factor=factor))
        close(net.seen[1], [[0, want]])


def test_guidance_rules_by_hand():
    """Vector 8: log clip(w, 1e-4, 1) has slopes 0, 2, 0 at -1, 0.5, 2.  free: 1 / w.  floor: 1 / max(w, 0.1)."""
    w = tensor([-1.0, 0.05, 0.5, 2.0])
    for rule, low, want in (
        ("clip", 1e-4, [0, 20, 2, 0]),
        ("clip", 0.1, [0, 0, 2, 0]),
        ("free", 0.1, [-1, 20, 2, 0.5]),
        ("floor", 0.1, [10, 10, 2, 0.5]),
    ):
        x = w.clone().requires_grad_()
        close(torch.autograd.grad(swg.guide(x, rule, low, 1.0).sum(), x)[0], want, 1e-5)


@pytest.mark.parametrize("w_hat, guided", [(1.5, False), (-0.2, False), (0.5, True)])
def test_a_predicted_weight_outside_the_clip_gives_no_guidance(w_hat, guided):
    """A model whose prediction is w_hat + 0.1 tanh(z^a), always: equal to rho = 0 to the last bit, or not."""
    sched = common.vp_schedule(5)

    def predict(z, s, ab):
        return torch.cat([0 * z[:, :1], w_hat + 0.1 * torch.tanh(z[:, :1])], 1)

    z, noise, s = torch.randn(6, 2), torch.randn(6, 6, 2), torch.zeros(6, 1)
    zero, one = (swg.sample(Model(sched, predict), s, z, noise, sched, settings(rho=rho, factor="exact"))
                 for rho in (0.0, 2.0))  # fmt: skip
    assert torch.equal(zero, one) != guided


def test_the_noisy_iterate_is_clipped_at_every_step_or_never():
    """Wild predictions: [-1, 1] x [w_min, w_max] bounds all that the model sees but the start; reverse x0 bounds only
    the end, to [-1, 1] x [0, w_max]."""
    sched = common.vp_schedule(15)
    for reverse in ("iterate", "x0"):
        net = Model(sched, lambda z, s, ab: 5 * torch.sin(9 * z))
        z = draw(net, 50, sched, rho=0.0, reverse=reverse, w_min=0.25, w_max=0.625)
        later = torch.cat(net.seen[1:])
        assert net.seen[0].abs().max() > 1.5
        for x, bounded in ((later, reverse == "iterate"), (z, True)):
            low = 0.25 if reverse == "iterate" else 0.0  # the toys' clip of the weight begins at 0
            over = (x - x.clamp(tensor([-1, -1, low]), tensor([1, 1, 0.625]))).abs().max()
            assert over < 1e-5 if bounded else over > 0.1  # beta_1 / (1 - alpha_bar_1) is 1 to six digits
        if reverse == "iterate":
            assert (later[:, -1] == 0.625).any() and (later[:, 0] == -1).any()


def test_without_guidance_nothing_is_differentiated(monkeypatch):
    """rho = 0: no call of autograd, and the network runs on tensors that do not ask for it."""

    def forbidden(*args, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    net, sched = swg.JointNet(1, 2, 8, 3, "tap", 0.0), common.vp_schedule(3)
    real, asked = net.forward, []
    net.forward = lambda z, s, e: asked.append(z.requires_grad) or real(z, s, e)
    with torch.no_grad():
        assert not draw(net, 4, sched, rho=0.0).requires_grad
        assert asked == [False] * 3
        with pytest.raises(AssertionError, match="called"):
            draw(net, 4, sched, rho=0.1)


def test_without_temperature_everything_is_deterministic_and_starts_at_zero():
    sched = common.vp_schedule(4)
    net = authors_model(sched)
    a, b = draw(net, 3, sched, kappa=0.0), draw(net, 3, sched, kappa=0.0)
    assert torch.equal(a, b) and torch.equal(a, a[:1].expand_as(a)) and not net.seen[0].any()
    assert not torch.equal(draw(net, 3, sched, kappa=0.3), draw(net, 3, sched, kappa=0.3))


MODES, SPREAD = common._MODES / 4.5, 0.5 / 1.414 / 4.5  # 8 Gaussians


def eight(w, sched):
    """Exact denoiser of the 8 Gaussians, where w only depends on the mode."""
    m, v = torch.cat([MODES, w[:, None]], 1), tensor([SPREAD**2, SPREAD**2, 0.0])
    return mixture(m, v, torch.full((8,), 1 / 8), sched)


def shares(z):
    """(8,) share of each mode among samples"""
    return torch.cdist(z[:, :2], MODES).argmin(1).bincount(minlength=8) / len(z)


GOOD = torch.arange(8) >= 4


@pytest.mark.parametrize("tau, rho, kappa, scale, want, atol", [
    (0.7, 1.0, 1.0, 1.0, 0.69, 0.02),  # exact 0.7
    (0.9, 1.0, 1.0, 1.0, 0.89, 0.015),  # exact 0.9
    (0.7, 5.0, 1.0, 1.0, 0.98, 0.006),  # mu w^5: 0.986
    (0.7, 1.0, 1.0, 0.5, 0.69, 0.02),  # the scale of the weights cancels
    (0.7, 1.0, 1.0, 0.1, 0.69, 0.02),
    (0.7, 0.0, 1.0, 1.0, 0.5, 0.015),  # the behaviour policy
    (0.7, 1.0, 0.5, 1.0, 0.87, 0.02),  # less noise is sharper
])  # fmt: skip
def test_expectile_weights_tilt_the_eight_gaussians(tau, rho, kappa, scale, want, atol):
    """w = scale tau for modes 4 to 7, else scale (1 - tau).  10,000 samples of the released sampler, T = 15: share of
    the good modes, as measured up to four standard errors; nearly all samples are near a mode, with its weight."""
    sched = common.vp_schedule(15)
    w = scale * torch.where(GOOD, tau, 1 - tau)
    z = draw(eight(w, sched), 10_000, sched, rho=rho, kappa=kappa)
    got = shares(z)
    assert abs(got[GOOD].sum() - want) < atol
    k = torch.cdist(z[:, :2], MODES).argmin(1)
    assert ((z[:, 2] - w[k]).abs() < 0.1 * scale).float().mean() > 0.87
    assert ((z[:, :2] - MODES[k]).norm(dim=1) < 5 * SPREAD).float().mean() > 0.98


@pytest.mark.parametrize("beta, mean", [(1, 0.6048), (5, 0.8668), (10, 0.9550), (15, 0.9810)])
def test_the_sampler_of_the_toys_draws_the_tilted_eight_gaussians(beta, mean):
    """w = exp(beta (k / 7 - 1)): mode k with probability softmax(beta k / 7).  8,000 samples, T = 100.  The posterior's
    variance is less than the reverse process would need: modes come out a seventh too narrow."""
    sched, E = common.cosine_schedule(100), torch.arange(8) / 7
    z = draw(eight(torch.exp(beta * (E - 1)), sched), 8000, sched, **TOY)
    want, got = torch.softmax(beta * E, 0), shares(z)
    assert abs(got @ E - mean) < 0.015 and abs(want @ E - mean) < 1e-4
    assert (got - want).abs().sum() / 2 < 0.04
    near = z[torch.cdist(z[:, :2], MODES).argmin(1) == 7][:, :2] - MODES[7]
    assert 0.8 < near.std() / SPREAD < 1


def tilted_gaussian(scale, sched, c=5.0, std=0.25):
    """a ~ N(0, std^2) on a grid of 101 points, with w = scale e^(c a)."""
    a = torch.linspace(-4 * std, 4 * std, 101)
    p = torch.exp(-((a / std) ** 2) / 2)
    return mixture(torch.stack([a, scale * torch.exp(c * a)], 1), torch.zeros(2), p / p.sum(), sched)


def test_an_exponential_weight_moves_a_gaussian_whatever_its_scale():
    """w = e^(5 a): N(0, 1/16) becomes N(5/16, 1/16) at rho = 1.  At rho = 2 the scale of w matters: the
    weight's coordinate has noise of its own."""
    sched, mean = common.cosine_schedule(100), {}
    for rho, scale in ((0, 1.0), (1, 0.1), (1, 3.0), (2, 0.1), (2, 3.0)):
        a = draw(tilted_gaussian(scale, sched), 2000, sched, A=1, rho=float(rho), w_max=99.0, **TOY)[:, 0]
        mean[rho, scale] = a.mean()
        if rho < 2:
            assert abs(a.mean() - 5 / 16 * rho) < 0.024 and 0.85 < a.std() / 0.25 < 1.02
    assert mean[2, 0.1] > mean[2, 3.0] + 0.03 and mean[2, 3.0] > mean[1, 3.0] + 0.03


# --- acting -----------------------------------------------------------------------------------------------
def stub_act(monkeypatch, z, judge=None, A=1, **changes):
    """act() among fixed candidates z (E N, A + 1); what it gave to sample is kept."""
    seen = {}

    def sample(net, s, start, noise, sched, args):
        seen.update(net=net, s=s, z=start, noise=noise, sched=sched, args=args)
        return z

    monkeypatch.setattr(swg, "sample", sample)
    args = tiny_args(**changes)
    agent = SimpleNamespace(net="net", net_ema=nn.Linear(1, 1), judge=judge)
    return swg.make_act(args, agent, A), seen, agent


CANDIDATES = tensor([[1.0, 0.9], [2.0, 0.3], [3.0, 0.5], [-4.0, 0.1], [1.9, 0.2], [0.5, 0.8]])  # (a, w)


def test_swg_r_takes_the_best_candidate_of_each_state_by_q_or_by_its_generated_weight(monkeypatch):
    """Q(s, a) = -|a - s|, so the candidate nearest to its own state; by weight the first and the last."""
    s = tensor([[1.8], [-9.0]])
    act, seen, agent = stub_act(monkeypatch, CANDIDATES, lambda s, a: -(a - s).abs().sum(-1), N=3, select="q")
    close(act(s), [[2.0], [-4.0]], 0)
    close(act(tensor([[9.0], [0.0]])), [[3.0], [0.5]], 0)
    close(seen["s"][:, 0], [9, 9, 9, 0, 0, 0], 0)  # a state's candidates lie together
    assert seen["net"] is agent.net_ema and not agent.net_ema.training and seen["sched"].T == 5
    act, _, _ = stub_act(monkeypatch, CANDIDATES, None, N=3, select="weight")
    close(act(s), [[1.0], [0.5]], 0)


def test_a_single_candidate_is_returned_as_it_is_and_judged_by_nobody(monkeypatch):
    for select in ("q", "weight"):
        act, seen, _ = stub_act(monkeypatch, CANDIDATES, None, N=1, select=select)
        close(act(torch.zeros(6, 1)), CANDIDATES[:, :1], 0)
    act, seen, _ = stub_act(monkeypatch, torch.zeros(60_000, 3), None, A=2, N=20, select="weight")
    act(torch.zeros(3000, 1))
    assert seen["z"].shape == (60_000, 3) and seen["noise"].shape == (6, 60_000, 3)
    for x in (seen["z"], seen["noise"]):
        assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs((seen["z"] * seen["noise"][2]).mean()) < 0.02  # start and steps are independent


def test_on_the_toys_beta_takes_the_place_of_the_state_and_weights_may_have_a_unit(monkeypatch):
    """E = 0 and 1, beta = ln 2: w = 1/2 and 1, root mean square sqrt(5/8).  In that unit the largest weight, 1,
    where it is also clipped, is 1 / sqrt(5/8)."""
    monkeypatch.setattr(common, "toy_dataset", lambda name: SimpleNamespace(r=tensor([0.0, 1.0])))
    for unit, want in (("one", 1.0), ("rms", math.sqrt(5 / 8))):
        args = dict(env="toy-spiral", beta=math.log(2), unit=unit)
        act, seen, _ = stub_act(monkeypatch, torch.zeros(4, 3), None, A=2, **args)
        act(torch.zeros(4, 1))
        close(seen["s"], [[math.log(2)]] * 4)
        assert swg.weight_unit(tiny_args(**args), math.log(2)) == pytest.approx(want)
        assert seen["args"].w_max == pytest.approx(1 / want) and seen["args"].w_min == 1e-4
        assert seen["args"].rho == 2


def test_on_the_toys_beta_zero_is_not_guided_and_uses_the_network_of_beta_three(monkeypatch):
    """As released: w = 1 for beta = 0, and the action's law is the data's whatever beta the network is given."""
    monkeypatch.setattr(common, "toy_dataset", lambda name: SimpleNamespace(r=tensor([0.0, 1.0])))
    act, seen, _ = stub_act(monkeypatch, torch.zeros(4, 3), None, A=2, env="toy-spiral", beta=0.0)
    act(torch.zeros(4, 1))
    assert seen["s"].tolist() == [[3.0]] * 4 and seen["args"].rho == 0
    assert seen["args"].w_max == pytest.approx(math.sqrt(2 / (1 + math.exp(-6))))


def test_acting_uses_the_averaged_network_and_draws_anew():
    args = tiny_args(kappa=1.0)
    agent = swg.make_agent(args, 3, 2, CPU)
    act, s = swg.make_act(args, agent, 2), torch.randn(5, 3)
    torch.manual_seed(1)
    a, b = act(s), act(s)
    assert a.shape == (5, 2) and not torch.equal(a, b) and not a.requires_grad
    randomised(agent.net)
    torch.manual_seed(1)
    assert torch.equal(a, act(s))
    randomised(agent.net_ema)
    torch.manual_seed(1)
    assert not torch.equal(a, act(s))


# --- Eq. (10): training -----------------------------------------------------------------------------------
def test_joint_loss_by_hand():
    """Errors of the actions (1, -2) and (0, 1), of the weights 3 and 1: sums over coordinates 5 and 1, mean 3;
    mean 5 of 9 and 1, times the factor."""
    eps = tensor([[0.5, 1.0, -1.0], [0.2, -0.3, 0.4]])
    eps_a, eps_w = eps[:, :2] + tensor([[1.0, -2.0], [0.0, 1.0]]), eps[:, 2] + tensor([3.0, -1.0])
    for factor in (1.0, 2.0):
        close(torch.stack(swg.joint_loss(eps_a, eps_w, eps, factor)), [3.0, 5.0 * factor])


def test_the_real_network_finds_the_good_mode_of_each_state():
    """a ~ N(+-0.5, 0.1^2), both modes alike, in the states 1 and -1; w = 0.8 where a and s have one sign, else 0.2:
    share 0.8 of the good mode at rho = 1, 1/2 at rho = 0.  700 steps of the real update, then the released sampler."""
    n, steps = 4000, 700
    s, sign = torch.randint(2, (n, 1)) * 2.0 - 1, torch.randint(2, (n, 1)) * 2.0 - 1
    data = Dataset(s, 0.5 * sign + 0.1 * torch.randn(n, 1), torch.zeros(n), s, torch.zeros(n), torch.zeros(n).bool())
    w = torch.where(s * sign > 0, 0.8, 0.2)[:, 0]
    args = tiny_args(steps=steps, lr_decay_steps=steps, width=32, blocks=2, batch_size=256, lr=5e-3, T=15, ema=0.02,
                     weight_decay=1e-4, weight_factor=1.0, rho=1.0, kappa=1.0)  # fmt: skip
    agent = swg.make_agent(args, 1, 1, CPU)
    update = swg.make_update(args, agent, data, w)
    for _ in range(steps):
        update()
    for state in (1.0, -1.0):
        at = torch.full((4000, 1), state)
        share = {}
        for rho in (0.0, 1.0, 4.0):
            a = swg.make_act(replace(args, rho=rho), agent, 1)(at)
            share[rho] = (a * state > 0).float().mean()
            assert ((a.abs() - 0.5).abs() < 0.35).float().mean() > 0.9
        assert abs(share[0.0] - 0.5) < 0.06 and abs(share[1.0] - 0.8) < 0.06 and share[4.0] > 0.95


class SlowAdam:
    """torch's own loop over weights, neither fused nor compiled.  With a decay: AdamW, else Adam."""

    def __init__(self, weights, decay=0.0):
        self.weights = [p for p in weights if p.requires_grad]
        kind = torch.optim.AdamW if decay else torch.optim.Adam
        self.opt = kind(self.weights, 1.0, (0.9, 0.999), 1e-8, weight_decay=decay, foreach=False)

    def descend(self, loss, rate, clip=0.0):
        """Norm of the gradient before the clip"""
        self.opt.param_groups[0]["lr"] = rate
        self.opt.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in self.weights))
        if clip and norm > clip:
            for p in self.weights:
                p.grad *= clip / (norm + 1e-6)  # as torch does
        self.opt.step()
        return norm


def lerp(target, source, rate):
    with torch.no_grad():
        for p, p_new in zip(target, source, strict=True):
            p.copy_((1 - rate) * p + rate * p_new)


def flat(heads):
    return [p for head in heads for p in head]


@pytest.mark.parametrize("layer_norm", [True, False])
def test_eight_critic_updates_equal_those_of_a_second_slow_implementation(layer_norm, float64):
    """Section 2 of the sheet in its order: V by the target Q of the step before, Q by the new V, target by the new Q.
    Same initial weights, same rows, float64: all losses and weights agree to 1e-9.  Nothing else moves."""
    args, data, B = tiny_args(layer_norm=layer_norm), tiny_data(), 7
    agent = swg.make_agent(args, 3, 2, CPU)
    assert same(agent.q, agent.q_target) and not any(p.requires_grad for p in agent.q_target.parameters())
    randomised(agent.q_target)  # so that online and target differ from the first step on
    before = deepcopy(agent)
    value, q, q_target = copies(agent.value), head_weights(agent.q), head_weights(agent.q_target)
    value_adam, q_adam = SlowAdam(value.values()), SlowAdam(flat(q))
    update = swg.make_critic_update(args, agent, data)
    torch.manual_seed(1)
    ours = [update() for _ in range(8)]

    torch.manual_seed(1)
    for fast in ours:
        i = torch.randint(40, (B,)).tolist()
        s, x = data.s[i], torch.cat([data.s[i], data.a[i]], 1)
        v = slow_value(value, s)
        u = torch.minimum(*(slow_head(head, x) for head in q_target)).detach() - v
        loss_v = sum((0.8 if u[b] > 0 else 0.2) * u[b] ** 2 for b in range(B)) / B
        value_adam.descend(loss_v, 0.02)
        y = (data.r[i] + 0.9 * (1 - data.terminal[i]) * slow_value(value, data.s_next[i])).detach()
        q_a = [slow_head(head, x) for head in q]
        loss_q = sum(((q_j - y) ** 2).sum() for q_j in q_a) / (2 * B)
        q_adam.descend(loss_q, 0.02)
        lerp(flat(q_target), flat(q), 0.1)
        want = {"value": loss_v, "critic": loss_q, "v_mean": v.mean(), "q_mean": (q_a[0] + q_a[1]).mean() / 2}
        want = {f"losses/{k}": z.item() for k, z in (want | {"advantage_std": u.std()}).items()}
        want["charts/lr"] = args.critic_lr
        assert {k: z.item() for k, z in fast.items()} == pytest.approx(want, rel=1e-9, abs=1e-9)
        assert not any(z.requires_grad for z in fast.values())
    for k, p in agent.value.state_dict().items():
        close(p, value[k], 1e-9)
    for net, slow in ((agent.q, q), (agent.q_target, q_target)):
        for p, p_slow in zip(flat(head_weights(net)), flat(slow), strict=True):
            close(p, p_slow, 1e-9)
    assert not same(agent.value, before.value) and not same(agent.q, before.q)
    assert same(agent.net, before.net) and same(agent.net_ema, before.net_ema) and agent.step == 0
    assert all(p.grad is None for net in (agent.net, agent.q_target) for p in net.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(dropout=0.3),
        dict(head="plain", blocks=1, lr_decay_steps=0),  # 0: all steps, here 10
        dict(schedule="cosine", clip_norm=0.5, blocks=2),
        dict(schedule="linear", clip_norm=1e3),
        dict(env="toy-spiral", clip_norm=0.5),
        dict(env="toy-8gaussians", unit="one", input_scale=1.0, clip_norm=0.5),
    ],
    ids=str,
)
def test_eight_updates_equal_those_of_a_second_slow_implementation(changes, float64, monkeypatch):
    """Algorithm 1: z_0 = (a, w), z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps, Eq. (10), cosine rate, AdamW,
    clip, average.  Toys: beta ~ U{0..24}, w = exp(beta (E - 1)), as it is or over its root mean square.  The critic
    stays as it was."""
    args, data, B = tiny_args(**changes), tiny_data(), 12
    toy = args.env.startswith("toy")
    monkeypatch.setattr(common, "toy_dataset", lambda name: data)
    agent = swg.make_agent(args, 3, 2, CPU)
    assert same(agent.net, agent.net_ema)
    w_all = None if toy else torch.rand(40)
    slow, ema, before = copies(agent.net), copies(agent.net_ema), deepcopy(agent)
    adam, alpha_bar = SlowAdam(slow.values(), args.weight_decay), swg.make_schedule(args).alpha_bar
    update = swg.make_update(args, agent, data, w_all)
    torch.manual_seed(1)
    ours = [update() for _ in range(8)]

    torch.manual_seed(1)
    for k, fast in enumerate(ours):
        i = torch.randint(40, (B,)).tolist()
        s, w = data.s[i], None if toy else w_all[i]
        if toy:
            s = torch.randint(25, (B, 1)).float()
            w = torch.exp(s[:, 0] * (data.r[i] - 1))
            if args.unit == "rms":
                w /= torch.stack([((data.r - 1) * b).exp().square().mean().sqrt() for b in s[:, 0]])
        t, eps = torch.randint(1, 6, (B,)), torch.randn(B, 3)
        ab = alpha_bar[t]
        z_t = torch.stack([ab.sqrt() * z + (1 - ab).sqrt() * e for z, e in zip((*data.a[i].T, w), eps.T)], 1)
        given = (slow, z_t, s, t.float())
        error = ((slow_toy(*given, args.input_scale) if toy else slow_joint(*given, args.dropout)) - eps) ** 2
        loss_a, loss_w = (error[:, 0] + error[:, 1]).sum() / B, args.weight_factor * error[:, 2].sum() / B
        rate = 0.03 * (1 + math.cos(math.pi * k / (args.lr_decay_steps or 10))) / 2
        norm = adam.descend(loss_a + loss_w, rate, args.clip_norm)
        lerp([ema[n] for n, p in slow.items() if p.requires_grad], adam.weights, 0.2)
        want = {"losses/action": loss_a.item(), "losses/weight": loss_w.item(), "charts/lr": rate}
        if args.clip_norm:
            want["losses/gradient_norm"] = norm
            assert (norm > args.clip_norm) == (args.clip_norm < 1)  # it acts, or never
        assert {n: x.item() for n, x in fast.items()} == pytest.approx(want, rel=1e-7, abs=1e-9)
    for net, theirs in ((agent.net, slow), (agent.net_ema, ema)):
        for n, p in net.state_dict().items():
            close(p, theirs[n], 1e-7)
    assert agent.step == 8 and not same(agent.net, before.net)
    for name in () if toy else ("value", "q", "q_target"):
        assert same(getattr(agent, name), getattr(before, name))
        assert all(p.grad is None for p in getattr(agent, name).parameters())
    assert all(p.grad is None and not p.requires_grad for p in agent.net_ema.parameters())


class Spy(nn.Module):
    """A network of one number, which keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.bias, self.seen = nn.Parameter(torch.zeros(1)), {}

    def embed(self, t):
        self.seen["t"] = t
        return t

    def forward(self, z, s, e):
        self.seen |= {"z": z.detach(), "s": s}
        return 0 * z[:, :-1] + self.bias, 0 * z[:, -1] + self.bias


def spied(args, data, w):
    """What a network is shown in one update of 100,000 rows"""
    agent = swg.make_agent(args, data.s.shape[1], 2, CPU)
    agent.net, agent.net_ema = Spy(), Spy().requires_grad_(False)
    agent.opt = torch.optim.AdamW(agent.net.parameters(), tensor(1e-3))
    swg.make_update(replace(args, batch_size=100_000), agent, data, w)()
    return agent.net.seen


def test_training_shows_the_toys_model_all_betas_and_times_and_the_weight_of_each():
    """One point (0.3, -0.2) with E = 3/4: given beta and t the noisy weight has mean sqrt(alpha_bar) e^(-beta / 4) and
    standard deviation sigma.  4,000 rows per beta, 20,000 per t: five standard errors are 300 and 650."""
    one = torch.ones(1)
    data = Dataset(torch.zeros(1, 1), tensor([[0.3, -0.2]]), 0.75 * one, torch.zeros(1, 1), one, one.bool())
    args = tiny_args(env="toy-spiral", unit="one")
    seen, sched = spied(args, data, None), swg.make_schedule(args)
    assert (seen["s"].flatten().long().bincount(minlength=25) - 4000).abs().max() < 310
    assert seen["s"].shape == (100_000, 1) and (seen["s"] == seen["s"].round()).all() and seen["s"].max() == 24
    assert seen["t"].min() == 1 and (seen["t"].long().bincount(minlength=6)[1:] - 20_000).abs().max() < 650
    for t in range(1, 6):
        ab = sched.alpha_bar[t]
        at = (seen["t"] == t) & (seen["s"][:, 0] == 4)
        off = seen["z"][at] - ab.sqrt() * tensor([0.3, -0.2, math.exp(-1)])
        assert off.mean(0).abs().max() < 5 * (1 - ab).sqrt() / math.sqrt(700)
        assert (off.std(0) / (1 - ab).sqrt() - 1).abs().max() < 0.14


def test_training_shows_the_model_rows_uniformly_with_their_own_state_and_weight():
    """Four rows, of different a, s and w; nearly no noise at t = 1 of a long linear schedule."""
    s, w = torch.arange(4.0)[:, None], tensor([0.1, 0.3, 0.5, 0.7])
    data = Dataset(s, torch.cat([s / 10, -s / 10], 1), torch.zeros(4), s, torch.zeros(4), torch.zeros(4).bool())
    seen = spied(tiny_args(T=1000, schedule="linear"), data, w)
    row = seen["s"][:, 0].long()
    assert (row.bincount() - 25_000).abs().max() < 690
    near = seen["t"] < 4
    want = torch.cat([data.a, w[:, None]], 1)[row[near]]
    assert near.sum() > 200 and (seen["z"][near] - want).abs().max() < 0.12


def test_learning_rates_of_a_full_run():
    """Vector 7: a cosine over 3,000,000 steps, seen at 0, 500,000 and 1,000,000 (3/4 of the first)."""
    args = swg.resolve(swg.Args(env="hopper-medium-v2", width=4, batch_size=2, hidden=(4,)))
    agent = swg.make_agent(args, 3, 2, CPU)
    update = swg.make_update(args, agent, tiny_data(), torch.ones(40))
    for step, want in ((0, 3e-4), (500_000, 2.799038e-4), (1_000_000, 2.25e-4)):
        agent.step.fill_(step)
        before = agent.net.trunk.bias.detach().clone()
        assert update()["charts/lr"].item() == pytest.approx(want, rel=1e-6)
        assert agent.opt.param_groups[0]["lr"].item() == pytest.approx(want, rel=1e-6)
        assert agent.step == step + 1 and not torch.equal(before, agent.net.trunk.bias)


def test_optimisers_are_adam_and_adamw_with_their_usual_constants():
    agent = swg.make_agent(swg.resolve(swg.Args(env="hopper-medium-v2", hidden=(8, 8), width=8)), 3, 2, CPU)
    for opt, net, kind, decay in (
        (agent.value_opt, agent.value, torch.optim.Adam, 0),
        (agent.q_opt, agent.q, torch.optim.Adam, 0),
        (agent.opt, agent.net, torch.optim.AdamW, 1e-4),
    ):
        (group,) = opt.param_groups
        assert type(opt) is kind and (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        assert group["weight_decay"] == decay and not group["amsgrad"] and not group["maximize"]
        close(group["lr"], 3e-4, 1e-10)
        assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]


def test_averages_move_by_their_rate():
    """(1 - 0.25) 2 + 0.25 * 10 = 4"""
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.constant_(a.weight, 2.0), nn.init.constant_(b.weight, 10.0)
    swg.average(a, b, 0.25)
    close(a.weight, torch.full((2, 2), 4.0))
    close(b.weight, torch.full((2, 2), 10.0), 0)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_updates_are_the_eager_ones():
    """Inductor has random numbers of its own; fallback_random lends it those of eager torch."""
    from torch._inductor import config

    args, w = tiny_args(hidden=(4,), blocks=2, dropout=0.1), torch.rand(40)

    def run(wrap):
        torch.manual_seed(0)
        agent = swg.make_agent(args, 3, 2, CPU)
        updates = swg.make_critic_update(args, agent, tiny_data()), swg.make_update(args, agent, tiny_data(), w)
        rows = [[[x.item() for x in update().values()] for _ in range(9)] for update in map(wrap, updates)]
        nets = agent.value, agent.q, agent.q_target, agent.net, agent.net_ema
        return [*map(tensor, rows), agent.step, *(p for net in nets for p in net.parameters())]

    eager = run(lambda update: update)
    with config.patch({"fallback_random": True, "cpp.simdlen": 0}):  # 0: loops that g++ compiles faster
        compiled = run(lambda update: swg.accelerate(update, SimpleNamespace(compile="on", graph="off"), CPU))
    torch._dynamo.reset()
    for x, y in zip(compiled, eager, strict=True):
        close(x, y, 1e-5)


# --- exact answers ----------------------------------------------------------------------------------------
def spy_exact(monkeypatch, args, scaled, n=5000):
    seen, real = {}, common.reweighted_samples

    def spy(env, n, weight, seed):
        seen.update(env=env, weight=weight, seed=seed)
        return real(env, n, weight, seed, pool=100_000)

    monkeypatch.setattr(common, "reweighted_samples", spy)
    a = swg.exact_samples(args, scaled, n, 2)
    assert a.shape == (n, 2) and seen["env"] == args.env and seen["seed"] == 2
    return a, seen["weight"]


@pytest.mark.parametrize("env, tau", [("bandit-ring", 0.7), ("bandit-two", 0.9)])
def test_exact_samples_of_a_bandit_favour_actions_above_the_expectile(env, tau, monkeypatch):
    """Q = 3 r - 1 with r the mean reward; w jumps at V, the tau-expectile of Q over the rows.  With P the share of
    fresh draws above V, that of the samples is tau P / (tau P + (1 - tau) (1 - P)), within five standard errors."""
    args, toy, data = swg.resolve(swg.Args(env=env, tau=tau)), common.TOYS[env], common.toy_dataset(env)
    a, weight = spy_exact(monkeypatch, args, lambda r: 3 * r - 1)
    v = expectile(3 * toy.reward(data.a[: toy.rows]).double() - 1, tau)
    x = (v + tensor([-1.0, -1e-4, 1e-4, 1.0], dtype=torch.float64) + 1) / 3
    close(weight(x), [1 - tau, 1 - tau, tau, tau], 1e-6)
    P = (3 * toy.draw(100_000, torch.Generator().manual_seed(9))[1] - 1 > v).float().mean()
    want = tau * P / (tau * P + (1 - tau) * (1 - P))
    got = (3 * toy.reward(a) - 1 > v).float().mean()
    assert abs(got - want) < 5 * math.sqrt(0.25 / 5000) and want > P + 0.1


def test_exact_samples_of_a_bandit_use_the_weight_that_is_trained(monkeypatch):
    """exponential: w = e^(3 A), A = (Q - V) in units of its standard deviation over the rows."""
    args = swg.resolve(swg.Args(env="bandit-ring", weight="exponential", tau=0.7))
    a, weight = spy_exact(monkeypatch, args, lambda r: 3 * r - 1)
    q = 3 * common.TOYS["bandit-ring"].reward(common.toy_dataset("bandit-ring").a).double() - 1
    r = tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    want = torch.exp(3 * (3 * r - 1 - expectile(q, 0.7)) / q.std()).clamp(1e-3, 80)
    close(weight(r), want, 0, 1e-4)
    fresh = common.TOYS["bandit-ring"].draw(100_000, torch.Generator().manual_seed(9))[1]
    w, got = weight(fresh), common.TOYS["bandit-ring"].reward(a)
    assert abs(got.mean() - (w * fresh).sum() / w.sum()) < 5 * got.std() / math.sqrt(5000)
    assert got.mean() > fresh.mean() + 0.3
