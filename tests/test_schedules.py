"""Diffusion schedules: numbers of the papers and of the authors' code, and the formulas they come from."""

import math

import numpy as np
import pytest
import torch

from common import VPSDE, Schedule, cosine_schedule, edm_sigmas, linear_schedule, vp_schedule

ALL = {"vp": vp_schedule, "cosine": cosine_schedule, "linear": linear_schedule}


def close(x, want, digits: int = 7):
    """Equal to the number of decimals that the table prints."""
    np.testing.assert_allclose(np.asarray(x, np.float64), want, rtol=0, atol=0.51 * 10**-digits + 6e-8)


# --- discrete ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("T", [1, 2, 5, 15, 100, 1000])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_schedule_has_T_steps_and_starts_without_noise(make, T):
    sched = make(T)
    assert sched.T == T
    for x in (sched.beta, sched.alpha, sched.alpha_bar):
        assert x.shape == (T + 1,) and x.dtype == torch.float32
    assert sched.alpha_bar[0] == 1 and sched.alpha[0] == 1 and sched.beta[0] == 0
    assert (sched.beta[1:] > 0).all() and (sched.beta < 1).all()
    assert (sched.alpha_bar.diff() < 0).all() and (sched.alpha_bar > 0).all()


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_alpha_bar_is_the_product_of_alpha(make):
    """alpha = 1 - beta, and the product is taken in float64: 1,000 float32 factors would cost four digits."""
    sched = make(1000)
    beta = sched.beta.double().numpy()
    np.testing.assert_allclose(sched.alpha, 1 - beta, atol=6e-8)
    np.testing.assert_allclose(sched.alpha_bar, np.cumprod(1 - beta), rtol=2e-5)


def test_vp_with_5_steps_is_dac():
    """T = 5, beta_min 0.1, beta_max 10: the table of the released code."""
    sched = vp_schedule(5)
    close(sched.beta, [0, 0.19587456, 0.45881819, 0.63578102, 0.75487819, 0.83503138], 8)
    close(sched.alpha_bar, [1, 0.80412544, 0.43517806, 0.15850011, 0.03885183, 0.00640933], 8)
    close((1 - sched.alpha_bar).sqrt(), [0, 0.44257718, 0.75154637, 0.91733303, 0.98038164, 0.99679018], 8)


def test_vp_with_15_steps_is_swg():
    sched, i = vp_schedule(15), [1, 2, 4, 8, 12, 15]
    close(sched.beta[i], [0.0282597, 0.0700892, 0.1484241, 0.2858531, 0.4011036, 0.4751625])
    close(sched.alpha_bar[i], [0.9717403, 0.9036318, 0.6847739, 0.2319269, 0.0388518, 0.0064093])
    close((1 - sched.alpha_bar[[1, 15]]).sqrt(), [0.1681062, 0.9967902])


def test_vp_with_50_and_100_steps():
    close(vp_schedule(50).beta[1], 0.00397209, 8)
    close(vp_schedule(50).beta[50], 0.179647, 6)
    close(vp_schedule(100).beta[1], 0.00149388, 8)
    close(vp_schedule(100).beta[100], 0.0947146, 7)


@pytest.mark.parametrize("T", [1, 5, 15, 50, 1000])
def test_vp_ends_at_the_same_noise_for_every_number_of_steps(T):
    """alpha_bar_t = exp(-(0.1 t/T + 4.95 t^2/T^2)), which is exp(-5.05) = 0.00640933 at t = T."""
    alpha_bar = vp_schedule(T).alpha_bar.double().numpy()
    assert alpha_bar[T] == pytest.approx(math.exp(-5.05), rel=1e-6) == pytest.approx(0.00640933, abs=5e-9)
    u = np.arange(T + 1) / T
    np.testing.assert_allclose(alpha_bar, np.exp(-(0.1 * u + 4.95 * u**2)), rtol=1e-6)


def test_vp_takes_other_limits():
    """One step with beta_min = beta_max = b: alpha_1 = exp(-b)."""
    assert float(vp_schedule(1, 2.0, 2.0).alpha_bar[1]) == pytest.approx(math.exp(-2), rel=1e-6)


def cosine(t, T, s=0.008):
    return math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2


@pytest.mark.parametrize("T", [5, 100])
def test_cosine_follows_its_formula_up_to_the_clipped_last_step(T):
    """alpha_bar_t = f(t) / f(0); at t = T f is 0, so beta_T would be 1 and is clipped to 0.999."""
    sched = cosine_schedule(T)
    want = [cosine(t, T) / cosine(0, T) for t in range(T)]
    np.testing.assert_allclose(sched.alpha_bar[:T], want, rtol=1e-6)
    assert float(sched.beta[T]) == pytest.approx(0.999)
    assert float(sched.alpha_bar[T]) == pytest.approx(0.001 * want[-1], rel=1e-5)


def test_cosine_by_hand():
    """T = 2, s = 0: f = cos^2(0), cos^2(pi/4), cos^2(pi/2) = 1, 1/2, 0; beta = 1/2 and 1, clipped to 0.9."""
    sched = cosine_schedule(2, s=0.0, max_beta=0.9)
    np.testing.assert_allclose(sched.beta, [0, 0.5, 0.9], rtol=1e-6)
    np.testing.assert_allclose(sched.alpha_bar, [1, 0.5, 0.05], rtol=1e-6)


def test_linear_follows_its_formula():
    """beta_t = 1e-4 + (t - 1)/(T - 1) (0.02 - 1e-4); with T = 1000 DDPM ends at alpha_bar = 4.04e-5."""
    sched = linear_schedule(1000)
    t = np.arange(1, 1001)
    np.testing.assert_allclose(sched.beta[1:], 1e-4 + (t - 1) / 999 * (0.02 - 1e-4), rtol=1e-6)
    assert float(sched.alpha_bar[1000]) == pytest.approx(4.036e-5, rel=1e-3)
    np.testing.assert_allclose(linear_schedule(3, 0.1, 0.3).alpha_bar, [1, 0.9, 0.72, 0.504], rtol=1e-6)


def test_a_schedule_moves_as_a_whole():
    moved = vp_schedule(5).to("meta")
    assert isinstance(moved, Schedule) and moved.T == 5
    assert {x.device.type for x in (moved.beta, moved.alpha, moved.alpha_bar)} == {"meta"}


# --- continuous time --------------------------------------------------------------------------------------
@pytest.mark.parametrize("t, alpha, sigma, lam", [
    (0.001, 0.999945, 0.010485, 4.557715),
    (0.1, 0.946722, 0.322053, 1.078291),
    (0.5, 0.281183, 0.959654, -1.227568),
    (1.0, 0.006572, 0.999978, -5.024978),
])  # fmt: skip
def test_vpsde_at_four_times(t, alpha, sigma, lam):
    sde, t = VPSDE(), torch.tensor(t, dtype=torch.float64)
    close([sde.alpha(t), sde.sigma(t), sde.lam(t)], [alpha, sigma, lam], 6)


def test_vpsde_follows_its_formulas():
    """log alpha = -t^2 (b1 - b0)/4 - t b0/2; alpha^2 + sigma^2 = 1; lambda = log alpha - log sigma."""
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    for b0, b1 in ((0.1, 20.0), (0.5, 3.0)):
        sde = VPSDE(b0, b1)
        np.testing.assert_allclose(sde.alpha(t), (-0.25 * t**2 * (b1 - b0) - 0.5 * t * b0).exp())
        np.testing.assert_allclose(sde.alpha(t) ** 2 + sde.sigma(t) ** 2, 1)
        np.testing.assert_allclose(sde.lam(t), (sde.alpha(t) / sde.sigma(t)).log())


def test_vpsde_inverse_round_trip():
    """lambda falls in t, and t_of_lam undoes it, down to the shortest time of the training, 1e-3."""
    t = torch.tensor([1e-5, 1e-3, 2e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    for sde in (VPSDE(), VPSDE(0.5, 3.0)):
        lam = sde.lam(t)
        assert (lam.diff() < 0).all()
        np.testing.assert_allclose(sde.t_of_lam(lam), t, rtol=1e-9)
        np.testing.assert_allclose(sde.lam(sde.t_of_lam(lam)), lam, rtol=0, atol=1e-9)


def test_vpsde_keeps_its_digits_in_float32():
    """1 - alpha^2 is 1.1e-4 at t = 1e-3: taken as a difference, sigma would lose three digits."""
    sde, t = VPSDE(), torch.tensor([1e-3, 0.01, 0.1, 1.0])
    np.testing.assert_allclose(sde.sigma(t), sde.sigma(t.double()), rtol=3e-7)
    np.testing.assert_allclose(sde.t_of_lam(sde.lam(t)), t, rtol=1e-5)


# --- EDM --------------------------------------------------------------------------------------------------
def test_edm_sigmas_of_dydiff():
    """N = 34, from 80 to 0.002 with rho 7, then 0; churn between 0.37 and 52.2 covers i = 3..22."""
    sigma = edm_sigmas(34)
    assert sigma.shape == (35,) and sigma.dtype == torch.float64
    np.testing.assert_allclose(sigma[:4], [80, 67.6671, 57.0012, 47.81], atol=6e-5)
    assert float(sigma[33]) == pytest.approx(0.002) and sigma[34] == 0
    assert (sigma.diff() < 0).all()
    churned = [i for i in range(34) if 0.3699492132558657 <= sigma[i] <= 52.241950650433864]
    assert churned == list(range(3, 23))
    assert float(sigma[23]) == pytest.approx(0.3301, abs=5e-5)  # the last 11 steps are deterministic


def test_edm_sigmas_by_hand():
    """rho = 1 is evenly spaced: 5, 3, 1, 0. With rho = 2 the roots are: sqrt 9, 2, 1 -> 9, 4, 1, 0."""
    np.testing.assert_allclose(edm_sigmas(3, 1.0, 5.0, 1.0), [5, 3, 1, 0])
    np.testing.assert_allclose(edm_sigmas(3, 1.0, 9.0, 2.0), [9, 4, 1, 0])
