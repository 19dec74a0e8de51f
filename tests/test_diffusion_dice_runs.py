"""What a run of diffusion_dice.py does: two stages, a borrowed behaviour model, generated actions, sampler settings.

The text that dac.py has too (Run, save, load, evaluate ...) is tested in test_runs.py; here stands what is new.
`cli` runs the script as `python diffusion_dice.py` does, but in this process; `call_main` calls `main` of the module,
where a test has put something of its own. Most runs are evaluated in a Pendulum of five steps.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import h5py
import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
import tyro
from test_runs import check_command, checkpoint, documented, full_after, process, read_csv, snapshot, tensors, wait_for

import common
import dac
import diffusion_dice as dd

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "diffusion_dice.py"
PENDULUM = ROOT / "data" / "pendulum-demo.hdf5"
CPU = torch.device("cpu")
NETS = ("score", "value", "q", "q_target", "ensemble", "guidance")
TINY = """--device cpu --steps 30 --behavior-steps 20 --behavior-hidden 16 8 8 --hidden 16 --guidance-hidden 16
          --batch-size 16 --behavior-batch-size 16 --M 2 --K 2 --H 2 --nfe 3 --cep-states 50 --log-every 5
          --eval-every 15 --eval-episodes 2 --final-episodes 3 --save-every 10""".split()


class Short(gym.Env):
    """Five steps, sizes of antmaze; pays the first action."""

    observation_space = gym.spaces.Box(-10, 10, (29,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (8,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(0, 0.1, 29).astype(np.float32), {}

    def step(self, action):
        return self.np_random.normal(0, 0.1, 29).astype(np.float32), float(action[0]), False, False, {}


if "ShortPendulum-v0" not in gym.registry:
    pendulum = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
    gym.register("ShortPendulum-v0", entry_point=pendulum, max_episode_steps=5)
    gym.register("ShortAnt-v0", entry_point=Short, max_episode_steps=5)
SHORT = [*TINY, "--eval-env", "ShortPendulum-v0"]


# --- helpers ----------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """What is compared bit for bit must add up in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cli(*argv) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python diffusion_dice.py argv`."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["diffusion_dice.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def trained(*argv) -> str:
    """stdout of a command that must succeed without a word on stderr."""
    code, out, err = cli(*argv)
    assert (code, err) == (0, "")
    return out


def refused(*argv, says: list[str], code: int = 2) -> None:
    """A command that must fail with one line, in which every pattern of `says` is found."""
    got, _, err = cli(*argv)
    assert len(err.splitlines()) == 1 and err.startswith("diffusion_dice.py: "), err
    for pattern in says:
        assert re.search(pattern, err), f"{pattern!r} is not in {err!r}"
    assert got == code


def parsed(*argv) -> dd.Args:
    return tyro.cli(dd.Args, args=[str(x) for x in argv])


def call_main(*argv) -> str:
    """stdout of dd.main in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        dd.main(parsed(*argv))
    return out.getvalue()


def folder_of(run_dir: Path, env: str = "pendulum-demo", seed: int = 0) -> Path:
    return run_dir / env / "diffusion_dice" / f"seed{seed}"


def copy(folder: Path, run_dir: Path) -> Path:
    """A run folder copied below another --run-dir."""
    return Path(shutil.copytree(folder, folder_of(run_dir, folder.parents[1].name)))


def same(a: dict, b: dict) -> bool:
    left, right = tensors(a), tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def assert_same_run(a: Path, b: Path) -> None:
    """The same checkpoint bit for bit and the same evaluations; only clocks and folders may differ."""
    x, y = checkpoint(a), checkpoint(b)
    left, right = tensors(x), tensors(y)
    assert left.keys() == right.keys()
    names = """/rng/cpu /state/step /state/behavior_step /state/score/out.weight /state/score_opt/state/0/exp_avg
               /state/guidance/layers.0.weight /state/guidance_opt/state/0/exp_avg /state/value_opt/state/0/exp_avg
               /state/q_opt/state/0/exp_avg /state/ensemble_opt/state/0/exp_avg /state/q_target/weights.0"""
    assert set(names.split()) <= left.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
    free = {"run_dir", "resume", "overwrite"}
    assert [k for k in x["args"] if k not in free and x["args"][k] != y["args"][k]] == []
    clocks = {"seconds", "eval_seconds"}
    progress = [{k: v for k, v in content["progress"].items() if k not in clocks} for content in (x, y)]
    assert progress[0] == progress[1]
    assert x["progress"]["seconds"].keys() == y["progress"]["seconds"].keys()
    assert (a / "eval.csv").read_text() == (b / "eval.csv").read_text()


def events(folder: Path) -> dict[str, dict[int, float]]:
    """tag -> {step: value} of the event files in one folder (not below it)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    series = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    assert all(len({e.step for e in values}) == len(values) for values in series.values())  # every step once
    return {tag: {e.step: e.value for e in values} for tag, values in series.items()}


def fresh_agent(args: dd.Args, S: int, A: int) -> dd.Agent:
    """What a run of these arguments starts from."""
    with torch.random.fork_rng([]):
        torch.manual_seed(args.seed)
        return dd.make_agent(args, S, A, CPU)


def saved_agent(folder: Path, S: int, A: int) -> tuple[dd.Args, dd.Agent]:
    content = checkpoint(folder)
    agent = fresh_agent(dd.Args(**content["args"]), S, A)
    with torch.random.fork_rng([]):
        dd.restore(dd.agent_state(agent), content)
    return dd.Args(**content["args"]), agent


def interrupt(monkeypatch, maker: str, call: int, number=signal.SIGTERM) -> None:
    """A signal arrives during call `call` (from 1) of the update that dd.<maker> makes."""
    real, calls = getattr(dd, maker), []

    def make(*args):
        update = real(*args)

        def interrupted():
            calls.append(0)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return update()

        return interrupted

    monkeypatch.setattr(dd, maker, make)


def stopped(*argv, code: int) -> str:
    """stdout of a run that a signal ends."""
    out = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(out):
        dd.main(parsed(*argv))
    assert stop.value.code == code
    return out.getvalue()


def head() -> str:
    """Commit of the repository that the script stands in, "" if it stands in none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def stop_after_saves(saves: int, *argv) -> None:
    """A full disk ends the run: nothing is saved after this many checkpoints."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        full_after(saves, monkeypatch)
        assert cli(*argv)[0] == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """Finished runs, evaluated in five steps: guidance -> folder. Not to be changed: `copy` them."""
    run_dir = tmp_path_factory.mktemp("whole")
    for guidance in ("igl", "cep"):
        trained(*SHORT, "--eval-every", 5, "--guidance", guidance, "--run-dir", run_dir / guidance)
    return {guidance: folder_of(run_dir / guidance) for guidance in ("igl", "cep")}


@pytest.fixture(scope="module")
def between(tmp_path_factory) -> dict[str, Path]:
    """The same runs, killed in the main stage before its first checkpoint: last.pt is of the end of the first stage."""
    run_dir = tmp_path_factory.mktemp("between")
    for guidance in ("igl", "cep"):
        argv = ["--eval-every", 5, "--guidance", guidance, "--run-dir", run_dir / guidance]
        stop_after_saves(2, *SHORT, *argv)
    return {guidance: folder_of(run_dir / guidance) for guidance in ("igl", "cep")}


@pytest.fixture(scope="module")
def inside(tmp_path_factory) -> Path:
    """A run killed in the behaviour stage, before step 20: last.pt is of step 10."""
    run_dir = tmp_path_factory.mktemp("inside")
    stop_after_saves(1, *SHORT, "--eval-every", 5, "--run-dir", run_dir)
    return folder_of(run_dir)


@pytest.fixture
def small_data(tmp_path) -> Path:
    """The first three episodes of pendulum-demo."""
    path = tmp_path / "small.hdf5"
    with h5py.File(PENDULUM) as file, h5py.File(path, "w") as small:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            small[key] = file[key][:600]
    return path


@pytest.fixture(scope="module")
def ant_data(tmp_path_factory) -> Path:
    """Four episodes of random rows in antmaze's sizes."""
    g, path = np.random.default_rng(0), tmp_path_factory.mktemp("ant") / "ant.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = g.normal(0, 0.1, (120, 29)).astype(np.float32)
        file["actions"] = g.uniform(-1, 1, (120, 8)).astype(np.float32)
        file["rewards"], file["terminals"] = (np.arange(120) % 30 == 15).astype(np.float32), np.arange(120) % 60 == 45
        file["timeouts"] = np.arange(120) % 30 == 29
    return path


# --- three runs, their folders and their output -----------------------------------------------------------
ENVS = ("pendulum-demo", "bandit-ring", "toy-8gaussians")
UNTOUCHED = """alpha kappa lr lr_end behavior_lr reward_scale reward_shift temperature guidance_activation
               time_scale""".split()  # what TINY leaves to the preset
EACH = pytest.mark.parametrize("env", ENVS)
SIZES = {"pendulum-demo": (3, 1), "bandit-ring": (1, 2), "toy-8gaussians": (1, 2)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """env -> (folder, stdout). Pendulum's is a process, with nothing beside the script but common.py and no git."""
    cwd = tmp_path_factory.mktemp("command lines")
    for name in ("diffusion_dice.py", "common.py"):
        shutil.copy(ROOT / name, cwd)
    argv = [*TINY, "--data-path", PENDULUM]
    child = process(*argv, cwd=cwd, script="diffusion_dice.py", env={"PATH": str(cwd / "nothing here")})
    out, err = child.communicate(timeout=300)
    assert (child.returncode, err) == (0, ""), err
    results = {"pendulum-demo": (folder_of(cwd / "runs"), out)}
    for env in ENVS[1:]:
        out = trained(*TINY, "--env", env, "--run-dir", cwd / "runs")
        results[env] = (folder_of(cwd / "runs", env), out)
    return results


@EACH
def test_folder(runs, env):
    folder, _ = runs[env]
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    logs = {name for name in names if "events.out.tfevents" in name}
    assert sorted(str(Path(name).parent) for name in logs) == [".", "behavior"]
    expected = {"args.json", "eval.csv", "last.pt", "result.json", "curve.png"}
    assert names - logs == expected | (set() if env == "pendulum-demo" else {"samples.png"})


@EACH
def test_args_json_holds_the_resolved_arguments(runs, env):
    about = json.loads((runs[env][0] / "args.json").read_text())
    args, S = about["args"], SIZES[env][0]
    assert about["method"] == "diffusion_dice" and args.keys() == {f.name for f in fields(dd.Args)}
    assert {k for k, v in args.items() if v is None} <= {"data_path", "data_url", "eval_env", "pretrained"}
    given = dict(env=env, steps=30, behavior_steps=20, behavior_hidden=[16, 8, 8], hidden=[16], guidance_hidden=[16],
                 batch_size=16, behavior_batch_size=16, M=2, K=2, H=2, nfe=3)  # fmt: skip
    preset = dd.PAPER | dd.PRESETS[env]
    assert preset["alpha"] != dd.PAPER["alpha"] and preset["guidance_activation"] == ("relu" if S == 1 else "silu")
    expected = given | {k: preset[k] for k in UNTOUCHED}
    assert {k: args[k] for k in expected} == expected
    assert about["git_commit"] == ("" if env == "pendulum-demo" else head())  # the copy is in no repository


@EACH
def test_output_names_every_resolved_value(runs, env):
    folder, out = runs[env]
    args = json.loads((folder / "args.json").read_text())["args"]
    shown = dict(re.findall(r"(\w+)=(\(.*?\)|\S+)", out.splitlines()[1]))
    assert shown.keys() == {k for k, v in args.items() if v is not None}
    assert shown["behavior_hidden"] == "(16, 8, 8)" and shown["alpha"] == str(args["alpha"])


@EACH
def test_output_begins_with_the_data_as_stored(runs, env):
    """Whatever is done to the rewards: --reward-scale range multiplies Pendulum's."""
    data = common.load_dataset(env)
    returns = data.returns().numpy()
    score = common.normalized_score(env, returns).mean()
    first = runs[env][1].splitlines()[0]
    text = f"average return {returns.mean():.1f} (normalized score {score:.1f})"
    assert first.startswith(f"{env}: {len(data)} transitions in {len(returns)} episodes, {text}; ")


@EACH
def test_eval_csv_is_of_the_main_stage(runs, env):
    folder, _ = runs[env]
    assert (folder / "eval.csv").read_text().splitlines()[0] == "step,episode,return,length,normalized_score"
    rows = read_csv(folder / "eval.csv")
    expected = [(0, 0), (0, 1), (15, 0), (15, 1), (30, 0), (30, 1), (30, 2)]  # 2 episodes, 3 at the end
    assert [(int(r["step"]), int(r["episode"])) for r in rows] == expected
    returns = np.array([float(r["return"]) for r in rows])
    scores = np.array([float(r["normalized_score"]) for r in rows])
    np.testing.assert_allclose(scores, common.normalized_score(env, returns), atol=2e-2)
    assert {r["length"] for r in rows} == {"200" if env == "pendulum-demo" else "1"}


@EACH
def test_result_json_and_last_line(runs, env):
    folder, out = runs[env]
    result = json.loads((folder / "result.json").read_text())
    keys = """method env seed step normalized_score normalized_score_std return return_std normalized_score_last5
              episodes steps_per_second train_seconds eval_seconds device"""
    assert result.keys() == set(keys.split())
    known = {"method": "diffusion_dice", "env": env, "seed": 0, "step": 30, "episodes": 3}
    assert {k: result[k] for k in known} == known
    final = [float(r["normalized_score"]) for r in read_csv(folder / "eval.csv") if r["step"] == "30"]
    score, std = result["normalized_score"], result["normalized_score_std"]
    assert (score, std) == (pytest.approx(np.mean(final), abs=1e-2), pytest.approx(np.std(final), abs=1e-2))
    last = f"diffusion_dice {env} seed 0: normalized score {score:.1f} +- {std:.1f} over 3 episodes at step 30 -> "
    where = folder.relative_to(folder.parents[3]) if env == "pendulum-demo" else folder
    assert out.splitlines()[-1] == last + str(where)
    seconds = checkpoint(folder)["progress"]["seconds"]  # of both stages; the speed is of the main one
    assert list(seconds) == ["behavior", "train"] and min(seconds.values()) > 0
    assert result["train_seconds"] == pytest.approx(sum(seconds.values()))
    assert result["steps_per_second"] == pytest.approx(30 / seconds["train"])


def test_pendulum_says_what_to_try_next(runs):
    for env, (_, out) in runs.items():
        found = re.findall(r"^next: (python .*?)  ", out, re.M)
        assert len(found) == (env == "pendulum-demo")
        for command in found:
            check_command(shlex.split(command))


@EACH
def test_tensorboard_of_both_stages(runs, env):
    folder, _ = runs[env]
    main, first = events(folder), events(folder / "behavior")
    assert first.keys() == {"losses/score", "charts/lr", "charts/steps_per_second"}
    names = "value critic ensemble q_mean v_mean w_mean w_max igl g_std"
    logged = {f"losses/{k}" for k in names.split()} | {"charts/lr", "charts/steps_per_second"}
    evals = {f"eval/{k}" for k in ("return", "normalized_score", "normalized_score_std", "normalized_score_last5")}
    assert main.keys() == logged | evals
    assert all(list(series) == [5, 10, 15, 20] for series in first.values())
    assert all(list(main[tag]) == [5, 10, 15, 20, 25, 30] for tag in logged)
    assert all(list(main[tag]) == [0, 15, 30] for tag in evals)
    assert all(math.isfinite(v) for x in (main, first) for series in x.values() for v in series.values())
    args = checkpoint(folder)["args"]
    for series, key, steps in ((first, "behavior_lr", 20), (main, "lr", 30)):
        lr, end = args[key], args["lr_end"]
        for step, value in series["charts/lr"].items():  # of update number step - 1
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            assert value == pytest.approx(lr * (end + (1 - end) * cosine), rel=1e-5)


@EACH
def test_figures(runs, env):
    folder, _ = runs[env]
    for name in ("curve.png", *(["samples.png"] if env in common.TOYS else [])):
        image = matplotlib.image.imread(folder / name)
        assert min(image.shape[:2]) > 200
        assert len(np.unique(image[::5, ::5].reshape(-1, image.shape[2]), axis=0)) > 20  # not an empty canvas


@EACH
def test_training_changes_every_parameter(runs, env):
    folder, _ = runs[env]
    content = checkpoint(folder)
    start = dd.agent_state(fresh_agent(dd.Args(**content["args"]), *SIZES[env]))
    assert content["state"].keys() == start.keys()
    fixed = {"score": {"time.W"}, "guidance": {"time.W"}}
    if env in common.TOYS:  # the state is 0: what multiplies it has no gradient, and the score net no weight decay
        fixed["score"] |= {"state.weight"}
    for net in NETS:
        before, after = start[net].state_dict(), content["state"][net]
        assert before.keys() == after.keys()
        assert {k for k in before if torch.equal(before[k], after[k])} == fixed.get(net, set()), net
    assert (content["state"]["behavior_step"], content["state"]["step"]) == (20, 30)
    for net in ("score", "value", "q", "ensemble", "guidance"):
        steps = {float(x["step"]) for x in content["state"][f"{net}_opt"]["state"].values()}
        assert steps == {20.0 if net == "score" else 30.0}, net
    done = content["progress"]
    assert (done["stage"], done["step"], done["done"]) == ("train", 30, ["behavior", "train"])


# --- toys: the distance to exact samples ------------------------------------------------------------------
def weights(r: np.ndarray, alpha: float, f: str, c: float) -> np.ndarray:
    """w of Eq. (4) and (7) for rewards r that are all of the data, V by bisection of mean w = c."""

    def w(v):
        x = (r - v) / alpha
        exponential, linear = np.exp(np.minimum(x, 20)), np.maximum(x / 2 + 1, 0)
        return {"piecewise": np.where(x >= 0, linear, exponential), "reverse-kl": exponential, "pearson": linear}[f]

    low, high = r.min() - 10, r.max() + 10
    while high - low > 1e-9:
        v = (low + high) / 2
        low, high = (v, high) if w(v).mean() > c else (low, v)
    return w(low)


@pytest.mark.parametrize(
    ("f", "alpha", "c"), [("piecewise", 0.2, 1), ("reverse-kl", 0.5, 1), ("pearson", 1.0, 1), ("piecewise", 1.0, 0.3)]
)
def test_exact_samples_of_eight_gaussians(monkeypatch, f, alpha, c):
    """Mode k of eight pays k / 7, here scaled: it must hold the share w(k) / sum w of the samples."""
    monkeypatch.setattr(common, "reweighted_samples", functools.partial(common.reweighted_samples, pool=200_000))
    data = common.toy_dataset("toy-8gaussians")
    part = common.Dataset(**{field.name: getattr(data, field.name)[:200_000] for field in fields(data)})
    monkeypatch.setattr(common, "toy_dataset", lambda name: part)
    args = dd.Args(env="toy-8gaussians", alpha=alpha, f=f, v_coefficient=c)
    x = dd.exact_samples(args, lambda r: 2 * (r + 0.5), 100_000, 1)
    w = weights(2 * (np.arange(8) / 7 + 0.5), alpha, f, c)
    k = torch.round(torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4) - 2) % 8  # from (0, 1) counter-clockwise
    shares = np.bincount(k.int(), minlength=8) / len(x)
    np.testing.assert_allclose(shares, w / w.sum(), atol=0.01)
    assert x.shape == (100_000, 2) and shares[7] > 0.15


def test_exact_samples_take_stored_rewards_where_they_carry_no_noise(monkeypatch):
    asked, spiral = [], common.TOYS["toy-spiral"]

    def reward(a):
        asked.append(len(a))
        return torch.linspace(0, 1, len(a))

    monkeypatch.setattr(common, "reweighted_samples", functools.partial(common.reweighted_samples, pool=1000))
    monkeypatch.setitem(common.TOYS, "toy-spiral", replace(spiral, reward=reward))
    dd.exact_samples(dd.resolve(dd.Args(env="toy-spiral")), lambda r: r, 10, 1)
    assert max(asked, default=0) < 100_000


@pytest.mark.parametrize("env", ENVS[1:])
def test_toys_print_the_distance_to_exact_samples_and_its_floor(runs, env):
    """Again from the checkpoint, with other noise and weights of our own."""
    folder, out = runs[env]
    pattern = r"^energy distance to exact: (\S+) at kappa 1, K 1; between two exact sample sets (\S+)$"
    ((distance, floor),) = re.findall(pattern, out, re.M)
    assert abs(float(floor)) < 0.01
    args, agent = saved_agent(folder, 1, 2)
    data, g = common.toy_dataset(env), torch.Generator().manual_seed(5)
    w = torch.from_numpy(weights(common.TOYS[env].reward(data.a).double().numpy(), args.alpha, "piecewise", 1))
    exact = data.a[torch.multinomial(w[:500_000], 4000, replacement=True, generator=g)]
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(6)
        x = dd.sample(agent.score, agent.guidance, torch.zeros(4000, 1), torch.randn(4000, 2), 1.0, args.nfe)
    assert float(distance) == pytest.approx(common.energy_distance(x, exact), rel=0.1)
    assert float(distance) > 1  # thirty steps teach nothing


def test_figure_of_a_toy(tmp_path, monkeypatch):
    """Samples as the run is told to act, the distance at kappa 1 and K 1, the value field of the judge."""
    settings, plots, real = [], [], dd.make_act

    def make_act(args, agent, A):
        settings.append((args.kappa, args.K))
        act = real(args, agent, A)
        return lambda s: act(s) if args.K == 1 else torch.full((len(s), 2), 0.25)

    monkeypatch.setattr(dd, "make_act", make_act)
    monkeypatch.setattr(dd, "plot_toy", lambda *what: plots.append(what))
    monkeypatch.setattr(common, "reweighted_samples", lambda name, n, weight, seed: torch.full((n, 2), float(seed)))
    out = call_main(*TINY, "--steps", 2, "--env", "bandit-ring", "--kappa", 3, "--run-dir", tmp_path)
    folder = folder_of(tmp_path, "bandit-ring")
    assert settings == [(3.0, 2), (1.0, 1)]
    ((path, env, _, value, samples, note),) = plots
    assert (path, env) == (folder / "samples.png", "bandit-ring") and note in out
    assert samples.shape == (2000, 2) and (samples == 0.25).all()
    _, agent = saved_agent(folder, 1, 2)
    a = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
    torch.testing.assert_close(value(a), agent.ensemble(torch.cat([torch.zeros(2, 1), a], 1)).mean(0).detach())
    # two point masses at (1, 1) and (2, 2): 2 sqrt 2, minus nothing within
    assert re.search(rf"between two exact sample sets {2 * math.sqrt(2):.4f}$", out, re.M)


# --- interrupted in any stage -----------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", ["igl", "cep"])
@pytest.mark.parametrize(
    ("stage", "call"), [("behavior", 1), ("behavior", 13), ("behavior", 20), ("train", 1), ("train", 14), ("train", 30)]
)
def test_a_signal_inside_a_stage(whole, tmp_path, monkeypatch, guidance, stage, call):
    """Saved at once; the run that goes on from there is the uninterrupted one, bit for bit."""
    argv = [*SHORT, "--eval-every", 5, "--guidance", guidance, "--run-dir", tmp_path]
    maker = {"behavior": "make_behavior_update", "train": "make_update"}[stage]
    number, code = (signal.SIGTERM, 143) if call % 2 else (signal.SIGINT, 130)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt(patch, maker, call, number)
        out = stopped(*argv, code=code)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    total = {"behavior": 20, "train": 30}[stage]
    assert f"stopped at {stage} step {call} of {total}, saved; continue with: " in out
    progress = checkpoint(folder_of(tmp_path))["progress"]
    done = [] if stage == "behavior" else ["behavior"]
    assert (progress["stage"], progress["step"], progress["done"]) == (stage, call, done)
    steps = {int(r["step"]) for r in read_csv(folder_of(tmp_path) / "eval.csv")}
    assert steps == (set(range(0, call, 5)) if stage == "train" else set())  # the first stage evaluates nothing
    assert f"at {stage} step {call}\n" in call_main(*argv, "--resume")
    assert_same_run(folder_of(tmp_path), whole[guidance])
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("guidance", ["igl", "cep"])
def test_killed_between_the_stages(whole, between, tmp_path, guidance):
    """The last checkpoint is of the end of the first stage: the main one begins again, with none of its old rows."""
    folder = copy(between[guidance], tmp_path)
    content = checkpoint(folder)
    state = content["progress"]
    assert (state["stage"], state["step"], state["done"]) == ("behavior", 20, ["behavior"])
    assert content["state"]["behavior_step"] == 20 and content["state"]["step"] == 0
    rows = (folder / "eval.csv").read_text()
    assert {r["step"] for r in read_csv(folder / "eval.csv")} == {"0", "5", "10"}
    (folder / "eval.csv").write_text(re.sub(r"^(\d+,\d+),[^,]+", r"\1,-1", rows, flags=re.M))
    argv = [*SHORT, "--eval-every", 5, "--guidance", guidance, "--run-dir", tmp_path, "--resume"]
    out = trained(*argv)
    assert re.search(r"resuming \S+ at behavior step 20$", out, re.M)
    assert_same_run(folder, whole[guidance])
    assert {k: v for k, v in checkpoint(folder)["progress"]["seconds"].items() if k == "behavior"} == state["seconds"]


def test_events_after_resuming_the_first_stage(inside, tmp_path):
    """Steps 15 and 20 were logged, then lost with the checkpoint, and are logged again: every step once."""
    folder = copy(inside, tmp_path)
    for path in (folder / "behavior").glob("events*"):  # the second file must not sort before the first
        path.rename(path.with_name("events.out.tfevents.0000000001.host.0.0"))
    assert checkpoint(folder)["progress"]["step"] == 10 and list(events(folder / "behavior")["losses/score"])[-1] == 20
    before = checkpoint(folder)["progress"]["seconds"]
    assert list(before) == ["behavior"]
    trained(*SHORT, "--eval-every", 5, "--run-dir", tmp_path, "--resume")
    assert list(events(folder / "behavior")["losses/score"]) == [5, 10, 15, 20]
    assert list(events(folder)["losses/igl"]) == [5, 10, 15, 20, 25, 30]
    assert checkpoint(folder)["progress"]["seconds"]["behavior"] > before["behavior"]


def test_both_stages_are_killed_for_real(tmp_path, monkeypatch):
    """Ctrl-C in the first stage; the advice is followed; SIGTERM in the second; followed again."""
    argv = [*TINY, "--behavior-steps", 500, "--steps", 250, "--save-every", 50, "--eval-every", 250, "--nfe", 1]
    trained(*argv, "--run-dir", tmp_path / "whole")
    cwd = tmp_path / "a folder"
    cwd.mkdir()
    folder = folder_of(cwd / "my runs")
    child = process(*argv, "--run-dir", "my runs", "--overwrite", cwd=cwd, script=SCRIPT)
    for number, code, stage, total in ((signal.SIGINT, 130, "behavior", 500), (signal.SIGTERM, 143, "train", 250)):
        awaited = folder / ("last.pt" if stage == "behavior" else "eval.csv")  # eval.csv: rows, not only a header
        wait_for(child, lambda awaited=awaited: awaited.exists() and len(awaited.read_bytes()) > 60)
        child.send_signal(number)
        out, err = child.communicate(timeout=120)
        assert (child.returncode, err) == (code, "")
        pattern = rf"^stopped at {stage} step (\d+) of {total}, saved; continue with: (.*)$"
        step, command = re.search(pattern, out, re.M).groups()
        progress = checkpoint(folder)["progress"]
        assert (progress["stage"], progress["step"]) == (stage, int(step)) and int(step) < total
        python, script, *advice = shlex.split(command)
        assert python == "python" and Path(script).name == "diffusion_dice.py"
        assert "--resume" in advice and "--overwrite" not in advice
        if stage == "behavior":
            child = process(*advice, cwd=cwd, script=script)
    monkeypatch.chdir(cwd)
    trained(*advice)
    assert_same_run(folder, folder_of(tmp_path / "whole"))


@pytest.mark.parametrize("states", [50, 10_000])
def test_generated_actions_are_the_same_after_resuming(tmp_path, small_data, monkeypatch, states):
    """M actions for each of --cep-states states, at most all; from the seed and the finished behaviour model alone."""
    seen, real = [], dd.generate

    def generate(args, agent, data):
        torch.rand(len(seen))  # whatever was drawn before does not matter
        before = torch.get_rng_state()
        seen.append((real(args, agent, data), len(data)))
        assert torch.equal(torch.get_rng_state(), before)
        return seen[-1][0]

    monkeypatch.setattr(dd, "generate", generate)
    argv = [*SHORT, "--data-path", small_data, "--guidance", "cep", "--M", 3, "--cep-states", states]
    with monkeypatch.context() as patch:
        interrupt(patch, "make_update", 3)
        stopped(*argv, "--run-dir", tmp_path / "a", code=143)
    call_main(*argv, "--run-dir", tmp_path / "a", "--resume")
    (((rows, actions), n), ((rows_again, actions_again), _)) = seen
    assert torch.equal(rows, rows_again) and torch.equal(actions, actions_again)
    assert rows.shape == (min(n, states),) and len(rows.unique()) == len(rows) and int(rows.max()) < n
    assert actions.shape == (len(rows), 3, 1) and len(actions.unique()) > 0.9 * actions.numel()
    call_main(*argv, "--seed", 1, "--pretrained", folder_of(tmp_path / "a"), "--run-dir", tmp_path / "b")
    assert not torch.equal(seen[2][0][0], rows)  # another seed generates for other states


def test_only_cep_generates(tmp_path, monkeypatch):
    monkeypatch.setattr(dd, "generate", lambda *args: pytest.fail("generated"))
    for guidance in ("igl", "none"):
        call_main(*SHORT, "--steps", 2, "--guidance", guidance, "--run-dir", tmp_path / guidance)


@pytest.mark.parametrize(
    ("maker", "says"),
    [("make_behavior_update", r"losses/score is nan at behavior step 15\b.*last good checkpoint: \S+last\.pt"),
     ("make_update", r"losses/\w+ is nan at train step 15\b.*last good checkpoint: \S+last\.pt")],
)  # fmt: skip
def test_a_loss_that_turns_nan_stops_either_stage(tmp_path, monkeypatch, maker, says):
    """Update 13 breaks weights; the next row of losses is of step 15, the last checkpoint of step 10."""
    real, calls = getattr(dd, maker), []

    def make(args, agent, *rest):
        update = real(args, agent, *rest)

        def poisoned():
            calls.append(0)
            if len(calls) == 13:
                net = agent.score.out.weight if maker == "make_behavior_update" else agent.value[0].weight
                net.data.fill_(math.nan)
            return update()

        return poisoned

    monkeypatch.setattr(dd, maker, make)
    with pytest.raises(common.UserError, match=says) as stop:
        call_main(*SHORT, "--run-dir", tmp_path)
    assert stop.value.code == 1
    content = checkpoint(folder_of(tmp_path))
    assert content["progress"]["step"] == 10
    assert all(v.isfinite().all() for v in tensors(content["state"]).values())


# --- the behaviour model of another run -------------------------------------------------------------------
@pytest.mark.parametrize("donor", ["whole", "between"])
def test_pretrained_takes_the_behaviour_model_and_leaves_it_alone(request, tmp_path, donor):
    donor = copy(request.getfixturevalue(donor)["igl"], tmp_path / "donor")
    theirs, before = checkpoint(donor), snapshot(donor)
    trained(*SHORT, "--seed", 1, "--pretrained", donor, "--run-dir", tmp_path)
    folder = folder_of(tmp_path, seed=1)
    content = checkpoint(folder)
    assert same(content["state"]["score"], theirs["state"]["score"])
    assert content["state"]["behavior_step"] == 0 and content["state"]["score_opt"]["state"] == {}
    assert content["progress"]["done"] == ["behavior", "train"] and list(content["progress"]["seconds"]) == ["train"]
    assert not (folder / "behavior").exists()
    assert {r["step"] for r in read_csv(folder / "eval.csv")} == {"0", "15", "30"}
    start = dd.agent_state(fresh_agent(dd.Args(**content["args"]), 3, 1))  # the rest is of this run's own seed
    other = dd.agent_state(fresh_agent(dd.Args(**content["args"] | {"seed": 0}), 3, 1))
    assert not same(start["value"].state_dict(), other["value"].state_dict())
    for net in NETS[1:]:
        before_training, after = start[net].state_dict(), content["state"][net]
        changed = {k for k in after if not torch.equal(after[k], before_training[k])}
        assert changed == after.keys() - {"time.W"}
        assert max(float((after[k] - before_training[k]).abs().max()) for k in changed) < 0.1  # 30 steps of 1e-3
    assert snapshot(donor) == before


def test_pretrained_is_needed_once(whole, tmp_path, monkeypatch):
    """A resumed run has the behaviour model in its own checkpoint; the donor may be gone."""
    donor = copy(whole["igl"], tmp_path / "donor")
    argv = [*SHORT, "--seed", 0, "--pretrained", donor]
    call_main(*argv, "--run-dir", tmp_path / "a")
    with monkeypatch.context() as patch:
        interrupt(patch, "make_update", 14)
        stopped(*argv, "--run-dir", tmp_path / "b", code=143)
    shutil.rmtree(donor)
    call_main(*argv, "--run-dir", tmp_path / "b", "--resume")
    a, b = (checkpoint(folder_of(tmp_path / x)) for x in "ab")
    assert same(a["state"], b["state"]) and torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
    assert (folder_of(tmp_path / "a") / "eval.csv").read_text() == (folder_of(tmp_path / "b") / "eval.csv").read_text()


def test_pretrained_expands_the_home_folder(whole, tmp_path, monkeypatch):
    copy(whole["igl"], tmp_path / "donor")
    monkeypatch.setenv("HOME", str(tmp_path))
    trained(*SHORT, "--pretrained", "~/donor/pendulum-demo/diffusion_dice/seed0", "--run-dir", tmp_path / "runs")


@pytest.fixture
def wrong_donor(request, whole, inside, tmp_path):
    """kind -> (folder, further arguments, what the message says)."""
    kind = request.param
    if kind == "nothing":
        return tmp_path / "nowhere", [], [r"no checkpoint \S+nowhere/last\.pt"]
    if kind == "not done":
        return inside, [], [rf"{inside}/last\.pt has not done behavior; give a run that has, or --resume that one"]
    if kind == "other widths":
        says = ["--behavior-hidden 16 8 8, here 16 8 4; give the same"]
        return whole["igl"], ["--behavior-hidden", 16, 8, 4], says
    if kind == "other env":
        says = [r"is of diffusion_dice \(format \d\) on pendulum-demo; expected .* on bandit-two"]
        return whole["igl"], ["--env", "bandit-two"], says
    dac_run = "--device cpu --steps 2 --batch-size 16 --hidden 16 --T 2 --N 1 --H 2 --eval-episodes 1".split()
    more = ["--final-episodes", "1", "--eval-env", "ShortPendulum-v0", "--run-dir", str(tmp_path / "dac")]
    with contextlib.redirect_stdout(io.StringIO()):
        dac.main(tyro.cli(dac.Args, args=[*dac_run, *more]))
    folder = tmp_path / "dac" / "pendulum-demo" / "dac" / "seed0"
    return folder, [], [r"is of dac \(format \d+\) on pendulum-demo; expected diffusion_dice"]


WRONG = pytest.mark.parametrize(
    "wrong_donor", ["nothing", "not done", "other widths", "other env", "a run of dac.py"], indirect=True
)


@WRONG
def test_pretrained_refuses(wrong_donor, tmp_path):
    folder, argv, says = wrong_donor
    argv = [*(TINY if "bandit-two" in argv else SHORT), *argv, "--pretrained", folder]
    refused(*argv, "--run-dir", tmp_path / "runs", says=says)


def test_pretrained_refuses_before_it_writes(tmp_path):
    refused(*SHORT, "--pretrained", tmp_path / "nowhere", "--run-dir", tmp_path / "runs", says=["no checkpoint"])
    assert not (tmp_path / "runs").exists()


def test_overwrite_with_a_wrong_pretrained_deletes_nothing(whole, tmp_path):
    folder = copy(whole["igl"], tmp_path)
    before = snapshot(folder)
    argv = ["--run-dir", tmp_path, "--overwrite"]
    refused(*SHORT, "--pretrained", tmp_path / "nowhere", *argv, says=["no checkpoint"])
    assert snapshot(folder) == before


def test_overwrite_a_run_with_its_own_behaviour_model(whole, tmp_path):
    """The main stage again, with other settings: the model is read before the folder is deleted."""
    folder = copy(whole["igl"], tmp_path)
    before = checkpoint(folder)["state"]["score"]
    trained(*SHORT, "--alpha", 3, "--pretrained", folder, "--run-dir", tmp_path, "--overwrite")
    content = checkpoint(folder)
    assert same(content["state"]["score"], before) and content["args"]["alpha"] == 3
    assert content["progress"]["done"] == ["behavior", "train"] and not (folder / "behavior").exists()


def test_pretrained_of_other_sizes(whole, tmp_path):
    """--data-path and --eval-env can make another task of the same name."""
    argv = ["--data-path", ROOT / "data" / "hopper-demo.hdf5", "--eval-env", "Hopper-v5"]
    refused(*SHORT, *argv, "--pretrained", whole["igl"], "--run-dir", tmp_path, says=["size|--pretrained"])


def test_resume_refuses_another_pretrained(between, tmp_path):
    folder = copy(between["igl"], tmp_path)
    before = snapshot(folder)
    argv = ["--eval-every", 5, "--pretrained", between["igl"], "--run-dir", tmp_path, "--resume"]
    refused(*SHORT, *argv, says=["pretrained=None, not ", "same settings"])
    assert snapshot(folder) == before


# --- re-evaluation ----------------------------------------------------------------------------------------
REEVAL = ("kappa", "K", "nfe", "temperature")


def returns_of(folder: Path, S: int, A: int, episodes: int, **settings) -> np.ndarray:
    """Of the policy in this checkpoint, under these settings of the sampler."""
    args, agent = saved_agent(folder, S, A)
    for k, v in settings.items():
        setattr(args, k, v)
    return dd.evaluate(dd.make_act(args, agent, A), args, CPU, episodes)[0]


@pytest.mark.parametrize("env", ["pendulum-demo", "toy-8gaussians"])
def test_eval_only(request, whole, tmp_path, env):
    """One row per call: the sampler's settings are those given, everything else is the run's."""
    source = whole["igl"] if env == "pendulum-demo" else request.getfixturevalue("runs")[env][0]
    folder = copy(source, tmp_path)
    before = snapshot(folder)
    argv = ["--env", env, "--run-dir", tmp_path, "--device", "cpu", "--eval-only"]
    n = 30 if env == "pendulum-demo" else 1000
    settings = [(0.0, 1, 3, 0.0, n + 1), (3.5, 4, 3, 0.0, n), (3.5, 4, 5, 0.0, n), (3.5, 4, 5, 2.0, n)]
    ignored = ["--H", 5, "--hidden", 32, "--guidance", "none", "--alpha", 9, "--batch-size", 3, "--steps", 7,
               "--time-scale", 2, "--f", "pearson", "--pretrained", "nowhere"]  # fmt: skip
    outs = []
    for i, (*values, episodes) in enumerate(settings):
        given = [word for k, v in zip(REEVAL, values) for word in (f"--{k}", v)]
        outs.append(trained(*argv, *given, "--final-episodes", episodes, *(ignored if i % 2 else [])))
    after, rows = snapshot(folder), read_csv(folder / "reeval.csv")
    assert {k: v for k, v in after.items() if k != "reeval.csv"} == before  # nothing else is touched
    got = [(float(r["kappa"]), int(r["K"]), int(r["nfe"]), float(r["temperature"]), int(r["episodes"])) for r in rows]
    assert got == settings
    assert {(r["env"], r["seed"], r["step"]) for r in rows} == {(env, "0", "30")}
    assert len({r["return"] for r in rows}) == 4  # every setting counts
    for out, row, (*values, episodes) in zip(outs, rows, settings):
        score, std = float(row["normalized_score"]), float(row["normalized_score_std"])
        text = f"diffusion_dice {env} seed 0: normalized score {score:.1f} +- {std:.1f} over {episodes} episodes"
        assert out.splitlines()[-1] == f"{text} at step 30 -> {folder}"
        returns = returns_of(folder, *SIZES[env], episodes, **dict(zip(REEVAL, values)))
        assert float(row["return"]) == pytest.approx(returns.mean(), rel=1e-6)
        assert float(row["return_std"]) == pytest.approx(returns.std(), rel=1e-6, abs=1e-9)
        assert float(row["length"]) == (5 if env == "pendulum-demo" else 1)


def test_eval_only_without_settings_repeats_the_last_evaluation(whole, tmp_path):
    folder = copy(whole["igl"], tmp_path)
    out = trained("--run-dir", tmp_path, "--device", "cpu", "--eval-only")
    (row,) = read_csv(folder / "reeval.csv")
    result = json.loads((folder / "result.json").read_text())
    assert float(row["return"]) == pytest.approx(result["return"], rel=1e-6)
    assert (row["kappa"], row["K"], row["nfe"], row["temperature"]) == ("2.0", "2", "3", "0.0")
    assert row["eval_env"] == "ShortPendulum-v0" and "over 3 episodes at step 30" in out


@pytest.mark.parametrize("stage", ["inside", "between"])
def test_eval_only_of_a_run_without_a_policy(request, tmp_path, stage):
    source = request.getfixturevalue(stage)
    folder = copy(source["igl"] if stage == "between" else source, tmp_path)
    before = snapshot(folder)
    says = [f"{folder} has no policy yet", "main stage has not begun", "--resume"]
    refused("--run-dir", tmp_path, "--device", "cpu", "--eval-only", says=says)
    assert snapshot(folder) == before


def test_eval_only_of_a_run_stopped_in_the_main_stage(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, "make_update", 3)
        stopped(*SHORT, "--run-dir", tmp_path, code=143)
    out = trained("--run-dir", tmp_path, "--device", "cpu", "--eval-only")
    assert "over 3 episodes at step 3 -> " in out


@pytest.mark.parametrize(
    ("option", "value"),
    [("kappa", -1), ("kappa", "inf"), ("K", 0), ("nfe", 0), ("temperature", "nan"), ("final-episodes", 0)],
)
def test_numbers_that_make_no_sense_to_eval_only(whole, tmp_path, option, value):
    folder = copy(whole["igl"], tmp_path)
    before = snapshot(folder)
    argv = ["--eval-only", "--device", "cpu", "--run-dir", tmp_path, f"--{option}", value]
    refused(*argv, says=[f"--{option} is .*; expected "])
    assert snapshot(folder) == before


# --- every guidance, divergence and rule of selection -----------------------------------------------------
GUIDANCES, DIVERGENCES = ("igl", "cep", "none"), ("piecewise", "reverse-kl", "pearson")
RULES = {"softmax of Q": ["--H", 0, "--temperature", 1], "ensemble": ["--H", 2, "--temperature", 0]}


@pytest.fixture(scope="module")
def combination(tmp_path_factory, ant_data):
    """(guidance, f, rule) -> folder of a run, made when asked for."""
    run_dir = tmp_path_factory.mktemp("combinations")

    @functools.cache
    def made(guidance: str, f: str, rule: str) -> Path:
        argv = [*TINY, "--env", "antmaze-umaze-v2", "--data-path", ant_data, "--eval-env", "ShortAnt-v0"]
        argv += ["--steps", 10, "--behavior-steps", 5, "--eval-every", 10, "--save-every", 10]
        here = run_dir / f"{guidance} {f} {rule}"
        trained(*argv, "--guidance", guidance, "--f", f, *RULES[rule], "--run-dir", here)
        return folder_of(here, "antmaze-umaze-v2")

    return made


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("f", DIVERGENCES)
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_every_combination_runs(combination, guidance, f, rule):
    folder = combination(guidance, f, rule)
    content = checkpoint(folder)
    args = content["args"]
    H, temperature = RULES[rule][1::2]
    assert (args["guidance"], args["f"], args["H"], args["temperature"]) == (guidance, f, H, temperature)
    start = dd.agent_state(fresh_agent(dd.Args(**args), 29, 8))
    assert content["state"].keys() == start.keys()
    assert ("ensemble" in start, "ensemble_opt" in start) == (H > 0, H > 0)
    for net in NETS:
        if net in start:
            before, after = start[net].state_dict(), content["state"][net]
            kept = {k for k in before if torch.equal(before[k], after[k])}
            untouched = net == "guidance" and guidance == "none"
            assert kept == (before.keys() if untouched else before.keys() & {"time.W"}), net
    assert bool(content["state"]["guidance_opt"]["state"]) == (guidance != "none")
    names = {"value", "critic", "q_mean", "v_mean", "w_mean", "w_max"} | ({"ensemble"} if H else set())
    names |= {"none": set(), "igl": {"igl", "g_std"}, "cep": {"cep", "g_std"}}[guidance]
    logged = events(folder)
    assert {tag.removeprefix("losses/") for tag in logged if tag.startswith("losses/")} == names
    assert all(math.isfinite(v) for series in logged.values() for v in series.values())
    assert len(read_csv(folder / "eval.csv")) == 5


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_each_divergence_trains_another_value(combination, guidance):
    nets = [checkpoint(combination(guidance, f, "ensemble"))["state"]["value"] for f in DIVERGENCES]
    assert not (same(nets[0], nets[1]) or same(nets[0], nets[2]) or same(nets[1], nets[2]))


def test_without_guidance_kappa_changes_nothing_and_with_it_it_does(combination):
    for guidance in GUIDANCES:
        args, agent = saved_agent(combination(guidance, "piecewise", "ensemble"), 29, 8)
        actions = []
        for args.kappa in (0.0, 5.0):
            torch.manual_seed(0)
            actions.append(dd.make_act(args, agent, 8)(torch.zeros(5, 29)))
        assert torch.equal(*actions) == (guidance == "none"), guidance


def test_the_first_target_q_draws_by_softmax_where_there_is_no_ensemble(combination):
    """Temperature 1 is a draw, 0 the best of the candidates: on the same candidates."""
    args, agent = saved_agent(combination("igl", "piecewise", "softmax of Q"), 29, 8)
    assert agent.ensemble is None and args.temperature == 1
    args.K = 64
    s = torch.zeros(50, 29)
    mean = {}
    for temperature in (0.0, 1.0, 1e6):
        args.temperature = temperature
        torch.manual_seed(0)
        mean[temperature] = float(agent.judge(s, dd.make_act(args, agent, 8)(s)).mean())
    assert mean[0.0] > mean[1.0] > mean[1e6]


def test_antmaze_itself(tmp_path, ant_data):
    """D4RL's maze with its preset: no ensemble, softmax, rewards minus 1; the score is the share of episodes solved."""
    argv = """--device cpu --steps 4 --behavior-steps 4 --behavior-hidden 16 8 8 --hidden 16 --guidance-hidden 16
              --batch-size 16 --behavior-batch-size 16 --nfe 3 --eval-every 4 --eval-episodes 1""".split()
    argv += ["--final-episodes", 1, "--env", "antmaze-umaze-v2", "--data-path", ant_data]
    out = trained(*argv, "--run-dir", tmp_path)
    folder = folder_of(tmp_path, "antmaze-umaze-v2")
    args = checkpoint(folder)["args"]
    expected = dict(H=0, temperature=1.0, M=32, K=4, kappa=1.0, reward_scale="none", reward_shift=-1.0, eval_episodes=1)
    assert {k: args[k] for k in expected} == expected
    for row in read_csv(folder / "eval.csv"):
        assert row["length"] == "700" and float(row["normalized_score"]) == 100 * float(row["return"])
    assert out.splitlines()[-1].startswith("diffusion_dice antmaze-umaze-v2 seed 0: normalized score ")


# --- rewards ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """3,000 rows, terminal at 700, time-outs at 1200 and 2800: a file, and its rewards."""
    g, path = np.random.default_rng(1), tmp_path_factory.mktemp("uneven") / "x.hdf5"
    r = g.uniform(-1, 3, 3000).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = g.normal(size=(3000, 3)), g.uniform(-1, 1, (3000, 1))
        file["rewards"], file["terminals"] = r, np.arange(3000) == 700
        file["timeouts"] = np.isin(np.arange(3000), [1200, 2800])
    return path, r


def rewards_seen(monkeypatch, *argv) -> np.ndarray:
    """data.r as the main stage gets it."""
    seen = []

    def make_update(args, agent, data, generated=None):
        seen.append(data.r.numpy().copy())
        raise InterruptedError

    monkeypatch.setattr(dd, "make_update", make_update)
    with pytest.raises(InterruptedError):
        call_main(*SHORT, "--behavior-steps", 1, *argv)
    return seen[0]


@pytest.mark.parametrize("shift", [0.0, -1.5])
@pytest.mark.parametrize("rule", ["windows", "range", "none"])
def test_rewards(uneven, tmp_path, monkeypatch, rule, shift):
    path, r = uneven
    kept = np.setdiff1d(np.arange(2999), [1200, 2800])  # rows at time-outs and the last one are dropped
    r64 = r.astype(float)
    if rule == "windows":  # rows 0..700 end terminal; then 1000 kept rows, across the time-out; what is left: nothing
        sums = [r64[:701].sum(), r64[kept[701:1701]].sum()]
    else:  # episodes, without the rows at their time-outs; the last one is cut off by the end of the file
        sums = [r64[:701].sum(), r64[701:1200].sum(), r64[1201:2800].sum(), r64[2801:2999].sum()]
    factor = 1.0 if rule == "none" else 1000 / (max(sums) - min(sums))
    argv = ["--data-path", path, "--reward-scale", rule, "--reward-shift", shift, "--run-dir", tmp_path]
    got = rewards_seen(monkeypatch, *argv)
    np.testing.assert_allclose(got, factor * (r64[kept] + shift), rtol=1e-5, atol=1e-5)
    assert rule == "none" or abs(factor - 1) > 0.1


def test_the_scale_changes_neither_the_toy_nor_what_is_reported(tmp_path, monkeypatch):
    """common.py keeps a toy's tensors for all who ask."""
    before = common.toy_dataset("bandit-ring").r.clone()
    argv = ["--env", "bandit-ring", "--eval-env", None, "--reward-shift", 3, "--reward-scale", "range"]
    got = rewards_seen(monkeypatch, *argv, "--run-dir", tmp_path)
    assert torch.equal(common.toy_dataset("bandit-ring").r, before)
    span = float(before.max() - before.min())
    np.testing.assert_allclose(got, 1000 / span * (before.numpy() + 3), rtol=1e-5)


@pytest.mark.parametrize("rule", ["windows", "range"])
@pytest.mark.parametrize("content", ["equal", "short"])
def test_returns_that_do_not_differ(tmp_path, rule, content):
    """3,000 rows that all pay 1 (windows: three of 1000), or one episode: no span to divide by."""
    n = 3000 if content == "equal" else 500
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["observations"], file["actions"] = np.random.normal(size=(n, 3)), np.zeros((n, 1))
        file["rewards"], file["terminals"] = np.ones(n), np.zeros(n)
        file["timeouts"] = np.zeros(n)
    argv = [*SHORT, "--data-path", tmp_path / "x.hdf5", "--reward-scale", rule, "--run-dir", tmp_path / "runs"]
    refused(*argv, says=["--reward-scale windows" if rule == "windows" else "episode", "--reward-scale none"])
    assert not (tmp_path / "runs").exists()


# --- bad input --------------------------------------------------------------------------------------------
NONSENSE = """steps 0, steps -5, behavior-steps 0, behavior-steps -1, behavior-batch-size 0, behavior-lr 0,
behavior-lr nan, behavior-lr inf, behavior-hidden 16 0 8, behavior-hidden 16 8 -8, batch-size 0, batch-size -1,
discount 1.5, discount -0.1, discount nan, hidden 0, hidden 16 -1, guidance-hidden 0, guidance-hidden 16 -3,
time-scale 0, time-scale nan, time-scale inf, alpha 0, alpha -1, alpha nan, alpha inf, v-coefficient -1,
v-coefficient nan, v-coefficient inf, M 0, M -2, cep-beta 0, cep-beta nan, cep-beta inf, cep-states 0, kappa -1,
kappa nan, kappa inf, K 0, K -1, nfe 0, nfe -3, H -1, temperature -1, temperature nan, temperature inf, lr 0,
lr -1e-3, lr nan, weight-decay -1, weight-decay nan, lr-end -0.1, lr-end 1.1, lr-end nan, polyak 0, polyak 1.1,
polyak nan, reward-shift nan, reward-shift inf, seed -1, seed 4294967296, log-every 0, eval-every 0,
eval-episodes 0, final-episodes -2, save-every 0"""
NONSENSE = re.split(r",\s+", NONSENSE)


@pytest.mark.parametrize("text", NONSENSE)
def test_numbers_that_make_no_sense(tmp_path, text):
    flag, *values = f"--{text}".split()
    refused(*TINY, flag, *values, "--run-dir", tmp_path, says=[f"{flag} is .*; expected "])
    assert list(tmp_path.iterdir()) == []


def test_every_number_is_among_them():
    """0 is nonsense or a limit of every numeric option: none may be forgotten."""
    numeric = {f.name for f in fields(dd.Args) if re.search(r"\b(int|float)\b", f.type)}
    assert numeric == {text.split()[0].replace("-", "_") for text in NONSENSE}


def test_limits_are_allowed():
    limits = dict(discount=1.0, polyak=1.0, lr_end=0.0, kappa=0.0, H=0, temperature=0.0, weight_decay=0.0, K=1, nfe=1,
                  v_coefficient=0.0, M=1, seed=2**32 - 1, reward_shift=-1e3)  # fmt: skip
    args = dd.resolve(dd.Args(**limits))
    assert {k: getattr(args, k) for k in limits} == limits
    assert dd.resolve(dd.Args(discount=0.0, lr_end=1.0)).discount == 0


@pytest.mark.parametrize(
    "argv",
    [["--f", "kl"], ["--guidance", "strong"], ["--reward-scale", "iqr"], ["--guidance-activation", "tanh"],
     ["--behavior-hidden", 16, 8], ["--steps", "many"], ["--pretraind", "x"]],
)  # fmt: skip
def test_words_that_do_not_parse(tmp_path, argv):
    code, _, err = cli(*argv, "--run-dir", tmp_path)
    assert code == 2 and "Traceback" not in err
    assert argv[0] in err and "--help" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("env", "near"), [("hopper-meduim-v2", "hopper-medium-v2"), ("antmaze-umaze-v3", "antmaze-umaze-v2")]
)
def test_unknown_env(tmp_path, env, near):
    refused("--env", env, "--run-dir", tmp_path, says=[f"unknown --env '{env}'", "nearest names", near])
    assert list(tmp_path.iterdir()) == []


def test_bad_data_files(tmp_path, ant_data):
    bad, short = tmp_path / "bad.hdf5", tmp_path / "short.hdf5"
    bad.write_bytes(ant_data.read_bytes()[:5000])
    argv = [*SHORT, "--run-dir", tmp_path / "runs", "--data-path"]
    refused(*argv, bad, says=[re.escape(str(bad)), "truncated", "expected .*observations"])
    refused(*argv, tmp_path / "none.hdf5", says=["no such file", r"none\.hdf5"])
    refused(*argv, ant_data, says=[r"data has sizes .*29, 8", r"task \(3, 1\)", "--env"])
    shutil.copy(ant_data, short)
    with h5py.File(short, "r+") as file:
        file["observations"][3] = np.nan
    refused(*argv, short, says=["observations has NaN", "in 1 of 120 rows"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("mode", ["--resume", "--eval-only"])
def test_a_checkpoint_of_dac_in_this_folder(whole, tmp_path, mode):
    folder = copy(whole["igl"], tmp_path)
    torch.save(checkpoint(folder) | {"method": "dac"}, folder / "last.pt")
    before = snapshot(folder)
    says = [r"is of dac \(format 1\)", r"expected diffusion_dice \(format 1\) on pendulum-demo"]
    refused(*SHORT, "--eval-every", 5, "--run-dir", tmp_path, mode, says=says)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    "argv", [["--behavior-steps", 25], ["--guidance", "cep"], ["--kappa", 1], ["--behavior-hidden", 16, 8, 4]]
)
def test_resume_refuses_other_settings(inside, tmp_path, argv):
    folder = copy(inside, tmp_path)
    before = snapshot(folder)
    says = [argv[0][2:].replace("-", "_") + "=.*, not ", "same settings"]
    refused(*SHORT, "--eval-every", 5, *argv, "--run-dir", tmp_path, "--resume", says=says)
    assert snapshot(folder) == before


# --- presets ----------------------------------------------------------------------------------------------
KAPPA = {  # the released guidance scales
    "hopper-medium-v2": 4, "hopper-medium-replay-v2": 4, "hopper-medium-expert-v2": 2,
    "halfcheetah-medium-v2": 4, "halfcheetah-medium-replay-v2": 4, "halfcheetah-medium-expert-v2": 2,
    "walker2d-medium-v2": 4, "walker2d-medium-replay-v2": 4, "walker2d-medium-expert-v2": 2,
    "antmaze-umaze-v2": 1, "antmaze-umaze-diverse-v2": 1, "antmaze-medium-play-v2": 2,
    "antmaze-medium-diverse-v2": 2, "antmaze-large-play-v2": 4, "antmaze-large-diverse-v2": 4,
}  # fmt: skip


def test_the_presets_are_of_the_datasets_of_the_paper():
    assert KAPPA.keys() == {name for name in common.FILES if re.fullmatch(common.PAPERS["Diffusion-DICE"], name)}
    assert dd.PRESETS.keys() == KAPPA.keys() | set(common.DEMOS) | set(common.TOYS)


@pytest.mark.parametrize("env", KAPPA)
def test_presets_of_the_paper(env):
    """As released, with the sizes of the paper; alpha is the release's default, K (but umaze-diverse's) our choice."""
    args = dd.resolve(dd.Args(env=env))
    expected = dict(
        kappa=KAPPA[env], steps=1_000_000, behavior_steps=600_000, behavior_batch_size=4096, behavior_lr=1e-4,
        behavior_hidden=(512, 256, 128), batch_size=512, hidden=(256, 256), guidance_hidden=(256, 256, 256, 256),
        guidance_activation="silu", time_scale=30, alpha=0.5, nfe=15, lr=3e-4, lr_end=1, weight_decay=1e-4,
        discount=0.99, polyak=0.005, f="piecewise", guidance="igl", v_coefficient=1, eval_every=40_000)  # fmt: skip
    locomotion = dict(M=16, H=10, temperature=0, eval_episodes=10, reward_scale="windows", reward_shift=0, K=8)
    antmaze = dict(M=32, H=0, temperature=1, eval_episodes=50, reward_scale="none", reward_shift=-1, K=4)
    expected |= antmaze if env.startswith("antmaze") else locomotion
    if env == "antmaze-umaze-diverse-v2":
        expected["K"] = 1
    assert {k: getattr(args, k) for k in expected} == expected


@pytest.mark.parametrize("env", dd.PRESETS)
def test_every_preset_names_known_fields_and_the_command_line_wins(env):
    names = {f.name: f for f in fields(dd.Args)}
    assert dd.PRESETS[env].keys() <= dd.PAPER.keys() <= names.keys()
    assert all(names[k].default is None for k in dd.PAPER)  # else a preset would never be read
    args = dd.resolve(dd.Args(env=env))
    for k, v in (dd.PAPER | dd.PRESETS[env]).items():
        assert getattr(args, k) == v and f"{type(v).__name__}" in names[k].type.replace("Literal", "str")
    empty = {k for k in names if getattr(args, k) is None}
    assert empty == {"data_path", "data_url", "eval_env", "pretrained"}
    given = dict(alpha=0.123, steps=77, K=3, reward_shift=0.5, temperature=0.7, hidden=(5,), reward_scale="range", H=1)
    args = dd.resolve(dd.Args(env=env, **given))
    assert {k: getattr(args, k) for k in given} == given


# --- documentation ----------------------------------------------------------------------------------------
def help_texts() -> dict[str, str]:
    """field -> the string below it in class Args, from the source."""
    body = SCRIPT.read_text().split("class Args:")[1].split("\n\n\n")[0]
    return dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""$', body, re.M | re.S))


def test_help_explains_every_field():
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|\s", "", out)  # without colours, frames and line breaks
    texts = help_texts()
    assert list(texts) == [f.name for f in fields(dd.Args)]
    for name, text in texts.items():
        assert len(text) > 4 and f"--{name.replace('_', '-')}" in plain
        assert re.sub(r"\s", "", text) in plain, f"the help text of {name} is not shown"


def test_documented_commands_parse():
    ours = [words for _, words in documented() if Path(words[1]).name == "diffusion_dice.py"]
    in_docstring = re.findall(r"python diffusion_dice\.py[^(\n]*", dd.__doc__)
    assert ours and len(in_docstring) == 2
    for words in [*ours, *map(shlex.split, in_docstring)]:
        check_command(words)


def test_settings_of_eval_only_are_options():
    assert dd.SAMPLING == REEVAL and set(REEVAL) <= {f.name for f in fields(dd.Args)}
