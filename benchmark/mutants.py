"""Mutation check: does a test fail for every small mistake in a method's mathematics?

    python benchmark/mutants.py [--methods dac swg] [--only TEXT] [--jobs N]

A mutant is a copy of the repository with one mistake in it: a sign, a factor, an index, a missing detach, the online
network for the target. The tests of the method run on the copy, fast ones first, up to the first that fails: the mutant
is caught. One that survives shows a line that no test holds, or a change that changes nothing; the latter do not belong
in the list. The old text must stand in the file exactly once, else nothing runs. Tests of compiled updates are left
out: they compare a script with itself. Exit code 1 if less than 95 % of the mutants of any method are caught.
"""

import ast
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("common.py", "d4rl_envs.py", "dac.py", "diffusion_dice.py", "swg.py", "dydiff.py", "pyproject.toml", "data",
          "tests", "benchmark")  # fmt: skip
METHODS = {  # file that is changed, tests that must notice
    "dac": ("dac.py", "tests/test_dac.py"),
    "diffusion_dice": ("diffusion_dice.py", "tests/test_diffusion_dice.py"),
    "swg": ("swg.py", "tests/test_swg.py"),
    "dydiff": ("dydiff.py", "tests/test_dydiff.py"),
    "common": ("common.py", "tests/test_schedules.py", "tests/test_data.py::test_ends_and_returns_by_hand",
               "tests/test_data.py::test_normalized_score_by_hand"),  # the rest of test_data.py is slow
}  # fmt: skip
MUTANTS: dict[str, list[tuple[str, str]]] = {}  # method -> (old text, new text)

MUTANTS["dac"] = [
    # networks
    ("torch.cat([u.cos(), u.sin()], -1)", "torch.cat([u.sin(), u.cos()], -1)"),
    ("torch.arange(8) / 7)", "torch.arange(8) / 8)"),
    ("slope.add_(v, alpha=-2)", "slope.add_(v, alpha=2)"),
    # losses
    ("return ab.sqrt() * a + (1 - ab).sqrt() * eps", "return ab * a + (1 - ab).sqrt() * eps"),
    ("return ab.sqrt() * a + (1 - ab).sqrt() * eps", "return ab.sqrt() * a - (1 - ab).sqrt() * eps"),
    ("return q.abs().mean() + 1e-6", "return q.mean().abs() + 1e-6"),
    ("q(torch.cat([s, x_t], -1)).mean(0).sum()", "q(torch.cat([s, x_t], -1)).amin(0).sum()"),
    ("q(torch.cat([s, x_t], -1)).mean(0).sum()", "q(torch.cat([s, x_t], -1)).mean()"),
    ("factor = (1 - sched.alpha_bar[t, None]).sqrt()", "factor = sched.alpha_bar[t, None].sqrt()"),
    ("factor = (1 - sched.alpha_bar[t, None]).sqrt()", "factor = (1 - sched.alpha_bar[t - 1, None]).sqrt()"),
    ("push = (factor * g * e).mean()", "push = -(factor * g * e).mean()"),
    ("return eta * bc + push", "return bc + eta * push"),
    ("return -q.mean() / C", "return q.mean() / C"),
    ("(eta + eta_lr * (bc - b)", "(eta - eta_lr * (bc - b)"),
    ("(bc - b).clamp(-1, 1)", "(bc - b)"),
    ("q.mean(-1) if next_value", "q.amax(-1) if next_value"),
    ("else q.amax(-1)", "else q.amin(-1)"),
    ("v.mean(0) - rho *", "v.mean(0) + rho *"),
    ("rho * v.std(0, correction=0)", "rho * v.std(0)"),
    ("discount * (1 - terminal) * V", "discount * V"),
    # sampler
    ("for t in range(sched.T, 0, -1)", "for t in range(sched.T - 1, 0, -1)"),
    ("x_0 = x_0.clamp(-1, 1)", "pass"),
    ("alpha[t] ** 0.5 * (1 - ab_prev) * x)", "alpha[t] ** 0.5 * (1 - ab) * x)"),
    ("beta[t] ** 0.5 * noise[t]", "(beta[t] * (1 - ab_prev) / (1 - ab)) ** 0.5 * noise[t]"),  # the posterior's
    ("if t > 1:", "if t > 0:"),
    ("self.q_target(torch.cat([s, a], -1)).mean(0)", "self.q_target(torch.cat([s, a], -1)).amin(0)"),
    ("else q.argmax(-1)", "else q.argmin(-1)"),
    # update
    ("draw(agent.actor_target, s_n", "draw(actor, s_n"),
    ("[q_target(x) for x", "[q(x) for x"),
    ("descend(loss_q, agent.q_opt, args.clip_norm)\n"
     "        average(q_target, q, args.polyak)\n",
     "average(q_target, q, args.polyak)\n"
     "        descend(loss_q, agent.q_opt, args.clip_norm)\n"),
    ("t = torch.randint(1, sched.T + 1,", "t = torch.randint(1, sched.T,"),
    ("g = value_gradient(q_target, s, x_t, C)", "g = value_gradient(q, s, x_t, C)"),
    ("g = value_gradient(q_target, s, x_t, C)", "g = value_gradient(q_target, s, a, C)"),
    ("bc_new = (actor(s, x_t, t) - eps).square().mean()", "bc_new = bc"),  # of the actor before its step
    ("average(agent.actor_target, actor, args.polyak)", "average(agent.actor_target, actor, 1 - args.polyak)"),
]  # fmt: skip

MUTANTS["diffusion_dice"] = [
    # networks
    ("u = 2 * math.pi * t[:, None] * self.W", "u = math.pi * t[:, None] * self.W"),
    ("/ self.sde.sigma(t)[:, None]", "* self.sde.sigma(t)[:, None]"),
    # losses
    ("sde.alpha(t).view(shape) * a + sde", "sde.alpha(t).view(shape) ** 2 * a + sde"),
    ("[:, None] * score + eps)", "[:, None] * score - eps)"),
    ("torch.where(x >= 0, linear, exponential)", "torch.where(x >= 1, linear, exponential)"),
    ("square = y.square() / 4 + y", "square = y.square() / 2 + y"),
    ("torch.where(y >= -2, square, -1.0)", "square"),  # pearson without its bound w >= 0
    ("linear, exponential = x / 2 + 1", "linear, exponential = x + 1"),
    ("w.clamp(1e-30, 100)", "w.clamp(1e-30, 1000)"),
    ("+ c * v / alpha).mean()", "+ v / alpha).mean()"),
    ("(conjugate((q - v) / alpha, f)", "(conjugate((v - q) / alpha, f)"),
    ("discount * (1 - terminal) * v_next", "discount * v_next"),
    ("e = (g + 80).clamp(max=0).detach() - g", "e = (g + 80).clamp(max=0) - g"),
    ("c = e.max().clamp(min=-1).detach()", "c = e.max().clamp(min=-1)"),
    ("(w * (e - c).exp() + (-c).exp() * g)", "(w * (e - c).exp() + g)"),
    ("-((beta * q).softmax(-1) * g.log", "-(q.softmax(-1) * g.log"),
    # sampler
    ("[2] * ((nfe - 1) // 2) + [1] * (2 - nfe % 2)", "[2] * (nfe // 2) + [1] * (nfe % 2)"),
    ("step = -alpha[j] * math.expm1(-h)", "step = -alpha[i] * math.expm1(-h)"),
    ("end = end + step / (2 * r)", "end = end + step / r"),
    ("(x_0(x_u, time[u]) - D)", "(x_0(x_u, time[j]) - D)"),
    ("return (x + sde.sigma(t).square() * total)", "return (x + sde.sigma(t) * total)"),
    ("total = total + kappa * torch", "total = total - kappa * torch"),
    ("else q.argmax(-1)", "else q.argmin(-1)"),
    # update
    ("return 1e-3 + (1 - 1e-3) * torch.rand", "return torch.rand"),
    ("q_bar = q_target(a_s).amin(0)", "q_bar = q_target(a_s).amax(0)"),
    ("q_bar = q_target(a_s).amin(0)", "q_bar = q(a_s).amin(0)"),
    ("y = critic_target(r, terminal, value(s_next),", "y = critic_target(r, terminal, value(s),"),
    ("        descend(loss_v, agent.value_opt)\n\n        # --- Q and ensemble: Eq. (3b), with the V just updated ---\n"
     "        with torch.no_grad():\n            y = critic_target(r, terminal, value(s_next), args.discount)\n",
     "        with torch.no_grad():\n            y = critic_target(r, terminal, value(s_next), args.discount)\n"
     "        descend(loss_v, agent.value_opt)\n"),
    ("y) / args.H", "y)"),
    ("w = ratio(q_target(a_s).amin(0), value(s)", "w = ratio(q_target(a_s).amin(0), v"),  # of V before its step
    ("w = ratio(q_target(a_s).amin(0), value(s)", "w = ratio(q(a_s).amin(0), value(s)"),
    ("a_0 = a[:, None].expand(-1, M, -1)", "a_0 = a[:, None].roll(1, 0).expand(-1, M, -1)"),  # another row's action
    ("s, a_0 = data.s[rows[k]], actions[k]", "s, a_0 = data.s[k], actions[k]"),
    ("s = data.s[part].repeat_interleave(M, 0)", "s = data.s[part].repeat(M, 1)"),
]  # fmt: skip

MUTANTS["swg"] = [
    # networks
    ("u = 2 * math.pi * (t - 1)[:, None]", "u = 2 * math.pi * t[:, None]"),
    ("if k == 1:", "if k == 0:"),
    ("self.time(self.waves((t - 1)[:, None]))", "self.time(self.waves(t[:, None]))"),
    # critic and weights
    ("torch.where(u > 0, tau, 1 - tau) * u.square()", "torch.where(u > 0, 1 - tau, tau) * u.square()"),
    ("discount * (1 - terminal) * v_next", "discount * v_next"),
    ("return torch.where(A > 0, h, 1 - h)", "return torch.where(A > 0, h, h - 1)"),
    ("(3 * A).exp().clamp(1e-3, 80)", "(3 * A).exp().clamp(1e-3, 100)"),
    ("torch.where(A == 0, h * h,", "torch.where(A == 0, h,"),
    ("(A >= -0.01)", "(A >= 0.01)"),
    ("e_a.sum(-1).mean(), weight_factor", "e_a.mean(), weight_factor"),
    # sampler
    ("return w.clamp(low, high).log()", "return w.clamp(min=low).log()"),
    ("w.clamp(min=low)).detach()", "w.clamp(min=low))"),
    ("w_low, A = args.w_min if args.reverse", "w_low, A = -args.w_max if args.reverse"),
    ("z = args.kappa * z\n", "pass\n"),
    ("w = (z_t[:, -1] - sigma * eps_w)", "w = (z_t[:, -1] + sigma * eps_w)"),
    ("w = (z_t[:, -1] - sigma * eps_w)", "w = (z_t[:, -1] - sigma * eps_w.detach())"),
    ('(alpha[t] if args.factor == "released" else ab)', '(ab if args.factor == "released" else alpha[t])'),
    ("eps = eps - args.rho * sigma", "eps = eps + args.rho * sigma"),
    ("eps = eps - args.rho * sigma", "eps = eps - args.rho"),
    ("z = (z - beta[t] / sigma * eps)", "z = (z - beta[t] * eps)"),
    ("z = (ab_prev**0.5 * beta[t] * z_0", "z = (ab**0.5 * beta[t] * z_0"),
    ("std = (beta[t] * (1 - ab_prev) / (1 - ab)) ** 0.5", "std = beta[t] ** 0.5"),
    ("z = z + args.kappa * std * noise[t]", "z = z + std * noise[t]"),
    ("(2 * beta * (E - 1)).exp().mean().sqrt()", "(beta * (E - 1)).exp().mean()"),
    ("w_max=args.w_max / weight_unit", "w_max=args.w_max * weight_unit"),
    # update
    ("return self.q_target(torch.cat([s, a], -1)).amin(0)", "return self.q_target(torch.cat([s, a], -1)).mean(0)"),
    ("q_bar = q_target(s_a).amin(0)", "q_bar = q(s_a).amin(0)"),
    ("y = critic_target(r, terminal, value(s_next),", "y = critic_target(r, terminal, q_target(s_a).amin(0),"),
    ("agent.judge(s, a) - agent.value(s)", "agent.value(s) - agent.judge(s, a)"),
    ("A = A / A.std()", "pass"),
    ('if args.weight not in ("expectile", "hard"):', 'if args.weight != "expectile":'),
    ("w = w * (args.weight_max / w.max()", "w = w * (args.weight_max / w.mean()"),
    ("(s * (E - 1)).exp() / units[b]", "(s * E).exp() / units[b]"),
    ("t, eps = torch.randint(1, T + 1,", "t, eps = torch.randint(1, T,"),
    ("average(agent.net_ema, net, args.ema)", "average(net, agent.net_ema, args.ema)"),
]  # fmt: skip

MUTANTS["dydiff"] = [
    # networks
    ("0.5 - F.softplus(0.5 - raw)", "0.5 - F.softplus(raw - 0.5)"),
    ("log_p = log_p - 2 * (math.log(2)", "log_p = log_p + 2 * (math.log(2)"),
    ("t = (t - 1).float()", "t = t.float()"),
    ("x = x + (beta[t] * (1 - ab_prev) / (1 - ab)) ** 0.5", "x = x + beta[t] ** 0.5"),
    # losses
    ("torch.cat([s_0[:, None], x[:, 1:,", "torch.cat([s_0[:, None], x[:, :-1,"),
    ("c_skip, norm = sd**2 /", "c_skip, norm = sigma**2 /"),
    ("sigma.flatten().log() / 4)", "sigma.flatten().log())"),
    ("* (-log_var).exp()).mean((1, 2)) + log_var", "* (-log_var).exp()).mean((1, 2)) - log_var"),
    ("discount * (1 - terminal) * q_next", "discount * q_next"),
    ("-alpha_bc / q.abs().mean().detach()", "-alpha_bc / q.abs().mean()"),
    ("[q_random - A * math.log(0.5)", "[q_random + A * math.log(0.5)"),
    # sampler
    ("g = min(S_churn / (len(sigmas) - 1)", "g = min(S_churn / len(sigmas)"),
    ("(t_hat**2 - t**2) ** 0.5", "(t_hat - t)"),
    ("d = (x_hat - denoised(x_hat, t_hat)) / t_hat", "d = (x_hat - denoised(x_hat, t)) / t_hat"),
    ("(d + d_next) / 2)", "d_next)"),
    # frames
    ("return s * self.std + self.mean", "return s + self.mean"),
    ("((x.clamp(-1, 1) if clip else x) + 1)", "(x.clamp(-1, 1) + 1)"),
    # rollouts
    ("predict(frames.to_policy(frames.from_model(x)), a)", "predict(frames.to_policy(frames.from_model(x, False)), a)"),
    ("drawn = states_given(s[:, 0], frames.action_to_model(a))", "drawn = states_given(s[:, 0], a)"),
    ("(drawn[:, 1:] + s[:, 1:]) / 2", "drawn[:, 1:]"),
    ("padded = drawn.mean(-1) < -0.95", "padded = s.mean(-1) < -0.95"),
    ("(R >= R.quantile(1 - eta))", "(R >= R.quantile(eta))"),
    ("p = (z / temperature).softmax(0)", "p = (-z / temperature).softmax(0)"),
    ("gone = terminal.cumsum(1) - terminal.long() > 0", "gone = terminal.cumsum(1) > 0"),
    ('clip=args.terminate == "clipped"', "clip=True"),
    # update
    ("lr.copy_(args.model_lr * warm)", "lr.copy_(args.model_lr)"),
    ("            descend(loss, agent.policy_opt)\n            average(q_target, q, args.polyak)\n",
     "            average(q_target, q, args.polyak)\n"),  # td3bc's policy does not learn
    ("td3bc_actor_loss(twin(q, s, a_pi)[0], a_pi", "td3bc_actor_loss(twin(q_target, s, a_pi)[0], a_pi"),
    ("a_next = target.sample(s_next)[0][0]", "a_next = policy.sample(s_next)[0][0]"),
    ("loss_pi = (alpha * log_pi - twin", "loss_pi = (alpha * log_pi + twin"),
    ("grad = (A - log_pi.detach()).mean()", "grad = (-A - log_pi.detach()).mean()"),
    ("log_alpha.clamp(-10, 0.5).exp()", "log_alpha.clamp(-10, 5).exp()"),
    ("a_next = target.act(s_next)", "a_next = policy.act(s_next)"),
    ("q_pi = twin(q, s, policy.clean(a_t, t, eps_hat))", "q_pi = twin(q, s, policy.clean(a_t, t, eps_hat.detach()))"),
    ("loss_pi = loss_bc - args.eta_q * one.mean() / other", "loss_pi = loss_bc - args.eta_q * one.mean() / one"),
]  # fmt: skip

MUTANTS["common"] = [
    ("(beta_max - beta_min) * (2 * t - 1) / T**2", "(beta_max - beta_min) * (2 * t + 1) / T**2"),
    ("torch.exp(-beta_min / T -", "torch.exp(-beta_min -"),
    ("/ (1 + s) * math.pi / 2) ** 2", "/ (1 + s) * math.pi / 2)"),
    ("(1 - f[1:] / f[:-1]).clamp(max=max_beta)", "1 - f[1:] / f[:-1]"),
    ("torch.linspace(beta_start, beta_end, T,", "torch.linspace(beta_end, beta_start, T,"),
    ("(-torch.expm1(2 * self.log_alpha(t))).sqrt()", "(1 - self.alpha(t) ** 2).sqrt()"),  # loses digits at small t
    ("return self.log_alpha(t) - self.sigma(t).log()", "return 2 * (self.log_alpha(t) - self.sigma(t).log())"),
    ("torch.logaddexp(-2 * lam,", "torch.logaddexp(-lam,"),
    ("dtype=torch.float64) / (N - 1)", "dtype=torch.float64) / N"),
    ("torch.cat([sigma, sigma.new_zeros(1)])", "torch.cat([sigma, sigma[-1:]])"),
    ("self.r.double().cumsum(0)[self.end]", "self.r.double().cumsum(0)[self.terminal > 0]"),
    ("return total.diff(prepend=total.new_zeros(1))", "return total"),
    ("span = float(returns.max() - returns.min())", "span = float(returns.max())"),
    ("100 * (np.asarray(returns) - pair[0])", "100 * np.asarray(returns)"),
]  # fmt: skip

# what a fresh interpreter spends most of its time on is imported once, then forked
PRELOAD = """torch torch._dynamo torch.testing torch.utils.tensorboard gymnasium h5py matplotlib.pyplot minari mujoco
             pytest tyro tqdm""".split()


@dataclass
class Args:
    methods: tuple[Literal["dac", "diffusion_dice", "swg", "dydiff", "common"], ...] = tuple(METHODS)
    """whose mutants"""
    only: str = ""
    """only mutants in whose old or new text this stands"""
    jobs: int = 1
    """mutants at a time, one thread each"""


def mutate(method: str, old: str, new: str) -> str:
    """The text of the method's file with the mistake in it; what cannot be a mutant ends the check."""
    file = METHODS[method][0]
    source = (ROOT / file).read_text()
    if source.count(old) != 1:
        sys.exit(f"mutants.py: {file} has {old!r} {source.count(old)} times, expected 1: mend the list of {method}")
    source = source.replace(old, new)
    try:
        ast.parse(source)
    except SyntaxError as error:
        sys.exit(f"mutants.py: {new!r} in {file} is no Python ({error.msg}): mend the list of {method}")
    return source


class FastFirst:
    """pytest plugin: tests in the order of their times in `file`, a dict in json, if there is one; else writes it."""

    def __init__(self, file: Path):
        self.file, self.known, self.times = file, json.loads(file.read_text()) if file.exists() else {}, {}

    def pytest_collection_modifyitems(self, items) -> None:
        items.sort(key=lambda item: self.known.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report) -> None:
        self.times[report.nodeid] = self.times.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        if not self.known:
            self.file.write_text(json.dumps(self.times))


def run_tests(folder: str, tests: list[str], times: Path) -> None:
    """In a process of its own: what it prints goes to a file, how it ended is its exit code."""
    import pytest

    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.dont_write_bytecode = True
    options = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-k", "not compiled"]
    sys.exit(int(pytest.main([*options, *tests], plugins=[FastFirst(times)])))


def check(context, method: str, source: str, seconds: float, times: str) -> tuple[int, float, str]:
    """(0 if all tests passed, seconds, first test that failed) of a copy of the repository with another source.
    times: folder for the times of the tests."""
    file, *tests = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder)
        Path(folder, file).write_text(source)
        clock = time.perf_counter()
        process = context.Process(target=run_tests, args=(folder, tests, Path(times, method)))
        process.start()
        process.join(seconds)
        if process.is_alive():  # a mistake may also never end
            process.kill()
            process.join()
            return 1, time.perf_counter() - clock, "time limit"
        log = Path(folder, "log.txt").read_text()
    failed = re.search(r"^(?:FAILED|ERROR) \S+?(?:::(\w+)|$| )", log, re.M)
    return process.exitcode, time.perf_counter() - clock, (failed and failed[1]) or log.strip().split("\n")[-1]


def main(args: Args) -> None:
    todo = [(m, old, new, mutate(m, old, new)) for m in METHODS for old, new in MUTANTS[m]]  # the whole list is checked
    todo = [x for x in todo if x[0] in args.methods and (args.only in x[1] or args.only in x[2])]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    context, clock = multiprocessing.get_context("forkserver"), time.perf_counter()
    context.set_forkserver_preload(PRELOAD)

    def judge(mutant) -> bool:
        method, old, new, source = mutant
        code, seconds, failed = check(context, method, source, limits[method], folder)
        change = re.sub(r"\s*\n\s*", "; ", f"{old.strip()}  ->  {new.strip()}")
        end = f"caught   {seconds:4.0f} s  {change}  by {failed}" if code else f"SURVIVED {seconds:4.0f} s  {change}"
        print(f"{method:15} {end}", flush=True)
        return code != 0

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        limits = {}
        for method in dict.fromkeys(m for m, *_ in todo):
            source = (ROOT / METHODS[method][0]).read_text()
            code, seconds, failed = check(context, method, source, 3600, folder)
            print(f"{method:15} unchanged {seconds:3.0f} s  {failed}", flush=True)
            if code:
                sys.exit(f"mutants.py: the tests of {method} fail without any change: mend them first")
            limits[method] = 60 + 5 * seconds
        caught = list(pool.map(judge, todo))

    print(f"\n{'method':15} {'mutants':>7} {'caught':>7} {'share':>7}")
    good = True
    for method in limits:
        found = [c for c, (m, *_) in zip(caught, todo) if m == method]
        good &= sum(found) >= 0.95 * len(found)
        print(f"{method:15} {len(found):7} {sum(found):7} {100 * sum(found) / len(found):5.0f} %")
    print(f"{time.perf_counter() - clock:.0f} s")
    for c, (method, old, new, _) in zip(caught, todo):
        if not c:
            line = (ROOT / METHODS[method][0]).read_text().split(old)[0].count("\n") + 1
            print(f"\nsurvivor, {METHODS[method][0]}:{line}\n- {old}\n+ {new}")
    sys.exit(not good)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
