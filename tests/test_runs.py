"""What a run does: the real command line, evaluation, resuming, re-evaluation, and every error it promises.

`cli` runs dac.py as `python dac.py` does, but in this process; `process` starts it for real, where signals,
limits or a bare folder are the point. Settings are tiny: these tests are about files, not about scores.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import importlib
import io
import json
import math
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import h5py
import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
import tyro

import common
import dac

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
PENDULUM = ROOT / "data" / "pendulum-demo.hdf5"
CPU = torch.device("cpu")
TINY = """--device cpu --steps 40 --batch-size 16 --hidden 16 16 --T 2 --N 1 --H 2 --ema-after 5
          --log-every 10 --eval-every 20 --eval-episodes 2 --final-episodes 3 --save-every 20""".split()
LONG = """--device cpu --steps 400 --batch-size 16 --hidden 16 16 --T 2 --N 1 --H 2 --ema-after 5
          --log-every 50 --eval-every 200 --eval-episodes 2 --final-episodes 3 --save-every 100""".split()
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# --- helpers ----------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the subprocesses: what is compared bit for bit must add up in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cli(*argv) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python dac.py argv`."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["dac.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "dac.py"), run_name="__main__")
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


def refused(*argv, says: list[str], code: int = 2) -> str:
    """stderr of a command that must fail with one line, in which every pattern of `says` is found."""
    got, _, err = cli(*argv)
    assert_one_line(err, says)
    assert got == code
    return err


def assert_one_line(err: str, says: list[str]) -> None:
    assert len(err.splitlines()) == 1 and err.startswith("dac.py: "), err
    for pattern in says:
        assert re.search(pattern, err), f"{pattern!r} is not in {err!r}"


def call_main(*argv) -> None:
    """dac.main in this process, where the test has put something of its own into `dac`."""
    dac.main(tyro.cli(dac.Args, args=[str(x) for x in argv]))


def process(*argv, cwd, script=ROOT / "dac.py", **kwargs) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    extra = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"} | kwargs.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(script), *map(str, argv)]
    return subprocess.Popen(command, cwd=cwd, env=clean | extra, **pipes, **kwargs)


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


def tensors(x, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested dictionaries and lists, by its path."""
    if isinstance(x, torch.Tensor):
        return {path: x}
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    return {k: v for name, y in items for k, v in tensors(y, f"{path}/{name}").items()}


def assert_same_run(a: Path, b: Path) -> None:
    """The same checkpoint bit for bit and the same evaluations; only clocks and folders may differ."""
    x, y = checkpoint(a), checkpoint(b)
    left, right = tensors(x), tensors(y)
    assert left.keys() == right.keys() and len(left) > 40
    for name in ("/rng/cpu", "/state/eta", "/state/step", "/state/actor_opt/state/0/exp_avg"):
        assert name in left
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
    free = {"run_dir", "resume", "overwrite", "log_every", "data_path"}
    assert [k for k in x["args"] if k not in free and x["args"][k] != y["args"][k]] == []
    clocks = {"seconds", "eval_seconds"}
    progress = [{k: v for k, v in content["progress"].items() if k not in clocks} for content in (x, y)]
    assert progress[0] == progress[1]
    assert (a / "eval.csv").read_text() == (b / "eval.csv").read_text()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def parts(folder: Path) -> list[str]:
    """Half-written files."""
    return [p.name for p in folder.rglob("*.part")]


def full_after(saves: int, monkeypatch) -> None:
    """torch.save works `saves` times, then the disk is full: half a file is written, then error 28."""
    real, calls = torch.save, []

    def save(content, path, *args, **kwargs):
        calls.append(path)
        if len(calls) <= saves:
            return real(content, path, *args, **kwargs)
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of 40 steps on pendulum-demo. Not to be changed: `copy` it."""
    run_dir = tmp_path_factory.mktemp("whole")
    trained(*TINY, "--run-dir", run_dir)
    return run_dir / "pendulum-demo" / "dac" / "seed0"


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """The same run, stopped by a full disk when it saves step 40: the checkpoint is of step 20."""
    run_dir = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as monkeypatch:
        full_after(1, monkeypatch)
        assert cli(*TINY, "--run-dir", run_dir)[0] == 1
    return run_dir / "pendulum-demo" / "dac" / "seed0"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A finished run on bandit-two."""
    run_dir = tmp_path_factory.mktemp("toy")
    trained(*TINY, "--env", "bandit-two", "--run-dir", run_dir)
    return run_dir / "bandit-two" / "dac" / "seed0"


def copy(folder: Path, run_dir: Path) -> Path:
    """A run folder copied below another --run-dir."""
    return Path(shutil.copytree(folder, run_dir / folder.parent.parent.name / "dac" / folder.name))


@pytest.fixture
def small_data(tmp_path) -> Path:
    """The first three episodes of pendulum-demo as a D4RL-format file."""
    path = tmp_path / "small.hdf5"
    with h5py.File(PENDULUM) as file, h5py.File(path, "w") as small:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            small[key] = file[key][:600]
    return path


# --- the command line -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def command_lines(tmp_path_factory):
    """The real thing, from another working directory than the repository's: env -> (folder, stdout)."""
    cwd = tmp_path_factory.mktemp("command lines")
    envs = {"pendulum-demo": [], "hopper-demo": ["--env", "hopper-demo", "--seed", "3"]}
    envs |= {"bandit-moons": ["--env", "bandit-moons"]}
    running = {env: process(*TINY, *argv, cwd=cwd) for env, argv in envs.items()}
    results = {}
    for env, child in running.items():
        out, err = child.communicate(timeout=300)
        assert (child.returncode, err) == (0, ""), err
        results[env] = (cwd / "runs" / env / "dac" / ("seed3" if env == "hopper-demo" else "seed0"), out)
    return results


ENVS = pytest.mark.parametrize("env", ["pendulum-demo", "hopper-demo", "bandit-moons"])


@ENVS
def test_folder(command_lines, env):
    folder, _ = command_lines[env]
    names = {p.name for p in folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    expected = {"args.json", "eval.csv", "last.pt", "result.json", "curve.png"}
    assert len(events) == 1
    assert names - events == expected | ({"samples.png"} if env in common.TOYS else set())


@ENVS
def test_args_json_holds_the_resolved_arguments(command_lines, env):
    about = json.loads((command_lines[env][0] / "args.json").read_text())
    args = about["args"]
    assert args.keys() == {f.name for f in fields(dac.Args)}
    assert {k for k, v in args.items() if v is None} <= {"data_path", "data_url", "eval_env"}
    given = {
        "steps": 40,
        "batch_size": 16,
        "hidden": [16, 16],
        "T": 2,
        "N": 1,
        "H": 2,
        "ema_after": 5,
        "env": env,
    }
    preset = dac.PAPER | dac.PRESETS[env]
    given |= {
        k: preset[k] for k in ("b", "eta", "eta_lr", "rho", "actor_lr", "clip_x0", "N_a", "reward_scale")
    }
    assert {k: args[k] for k in given} == given
    assert {"torch", "numpy", "gymnasium", "python"} <= about["versions"].keys()
    assert about["versions"]["torch"] == torch.__version__
    assert about["device"] and "git_commit" in about


@ENVS
def test_eval_csv(command_lines, env):
    folder, _ = command_lines[env]
    lines = (folder / "eval.csv").read_text().splitlines()
    assert lines[0] == "step,episode,return,length,normalized_score"
    rows = read_csv(folder / "eval.csv")
    expected = [(0, 0), (0, 1), (20, 0), (20, 1), (40, 0), (40, 1), (40, 2)]  # 2 episodes, 3 at the end
    assert [(int(r["step"]), int(r["episode"])) for r in rows] == expected
    returns = np.array([float(r["return"]) for r in rows])
    scores = np.array([float(r["normalized_score"]) for r in rows])
    np.testing.assert_allclose(scores, common.normalized_score(env, returns), atol=1e-2)
    lengths = {int(r["length"]) for r in rows}
    assert lengths == {"pendulum-demo": {200}, "bandit-moons": {1}}.get(env, lengths)
    assert 1 <= min(lengths) and max(lengths) <= 1000


@ENVS
def test_result_json_and_last_line(command_lines, env):
    folder, out = command_lines[env]
    result = json.loads((folder / "result.json").read_text())
    assert result.keys() >= set(
        """method env seed step normalized_score normalized_score_std episodes
                                   steps_per_second train_seconds eval_seconds device""".split()
    )
    seed = int(folder.name.removeprefix("seed"))
    known = {"method": "dac", "env": env, "seed": seed, "step": 40, "episodes": 3}
    assert {k: result[k] for k in known} == known
    assert min(result[k] for k in ("steps_per_second", "train_seconds", "eval_seconds")) > 0
    final = [float(r["normalized_score"]) for r in read_csv(folder / "eval.csv") if r["step"] == "40"]
    assert result["normalized_score"] == pytest.approx(np.mean(final), abs=1e-2)
    assert result["normalized_score_std"] == pytest.approx(np.std(final), abs=1e-2)
    score, std = result["normalized_score"], result["normalized_score_std"]
    last = f"dac {env} seed {seed}: normalized score {score:.1f} +- {std:.1f} over 3 episodes at step 40 -> "
    assert out.splitlines()[-1] == last + str(folder.relative_to(folder.parents[3]))


@ENVS
def test_output_names_every_resolved_value(command_lines, env):
    folder, out = command_lines[env]
    args = json.loads((folder / "args.json").read_text())["args"]
    shown = dict(re.findall(r"(\w+)=(\(.*?\)|\S+)", out))
    assert shown["b"] == str(args["b"]) and shown["T"] == "2" and shown["hidden"] == "(16, 16)"
    assert {k for k, v in args.items() if v is not None} == shown.keys()


@ENVS
def test_tensorboard(command_lines, env):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = command_lines[env]
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    losses = {f"losses/{k}" for k in "critic actor bc guidance eta C q_mean q_std grad_q".split()}
    evals = {
        f"eval/{k}" for k in ("return", "normalized_score", "normalized_score_std", "normalized_score_last5")
    }
    assert tags == losses | evals | {"charts/steps_per_second", "charts/lr"}
    series = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}
    assert all(list(series[tag]) == [10, 20, 30, 40] for tag in tags - evals)
    assert all(list(series[tag]) == [0, 20, 40] for tag in evals)
    assert all(math.isfinite(v) for values in series.values() for v in values.values())
    lr = json.loads((folder / "args.json").read_text())["args"]["actor_lr"]
    for step, value in series["charts/lr"].items():  # of update number step - 1: cosine from lr to 0 over 40
        assert value == pytest.approx(lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / 40)), rel=1e-5)
    rows = read_csv(folder / "eval.csv")
    means = {
        s: np.mean([float(r["normalized_score"]) for r in rows if r["step"] == str(s)]) for s in (0, 20, 40)
    }
    for step, mean in means.items():
        assert series["eval/normalized_score"][step] == pytest.approx(mean, abs=1e-2)
    last5 = series["eval/normalized_score_last5"]  # of the evaluations so far, five at most
    assert last5[0] == pytest.approx(means[0], abs=1e-2)
    assert last5[40] == pytest.approx(np.mean(list(means.values())), abs=1e-2)


@ENVS
def test_figures(command_lines, env):
    folder, _ = command_lines[env]
    for name in ("curve.png", *(["samples.png"] if env in common.TOYS else [])):
        image = matplotlib.image.imread(folder / name)
        assert min(image.shape[:2]) > 200
        assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20  # not an empty canvas


@ENVS
def test_training_changes_every_parameter(command_lines, env):
    folder, _ = command_lines[env]
    content = checkpoint(folder)
    args = dac.Args(**content["args"])
    S, A = {"pendulum-demo": (3, 1), "hopper-demo": (11, 3), "bandit-moons": (1, 2)}[env]
    with torch.random.fork_rng([]):
        torch.manual_seed(args.seed)
        start = dac.agent_state(dac.make_agent(args, S, A, CPU))
    for net in ("actor", "actor_target", "q", "q_target"):
        before, after = start[net].state_dict(), content["state"][net]
        assert before.keys() == after.keys()
        assert [k for k in before if torch.equal(before[k], after[k])] == []
    assert content["state"]["eta"] != start["eta"]
    assert content["state"]["step"] == content["progress"]["step"] == 40
    for name in ("actor_opt", "q_opt"):
        assert all(state["step"] == 40 for state in content["state"][name]["state"].values())


def test_networks_start_from_the_seed_alone(monkeypatch, tmp_path, small_data):
    """So the comparison above starts from what the run started from."""
    seen, real = [], dac.make_agent

    def make_agent(*args):
        agent = real(*args)
        seen.append({k: v.clone() for k, v in agent.actor.state_dict().items()})
        return agent

    monkeypatch.setattr(dac, "make_agent", make_agent)
    for run_dir, seed in (("a", 5), ("b", 5), ("c", 6)):
        argv = [*TINY, "--steps", 1, "--final-episodes", 1, "--eval-episodes", 1, "--data-path", small_data]
        torch.manual_seed(len(seen))  # whatever was drawn before does not matter
        call_main(*argv, "--seed", seed, "--run-dir", tmp_path / run_dir)
    torch.manual_seed(5)
    alone = real(
        dac.Args(**checkpoint(tmp_path / "a/pendulum-demo/dac/seed5")["args"]), 3, 1, CPU
    ).actor.state_dict()
    for k in alone:
        assert torch.equal(seen[0][k], alone[k]) and torch.equal(seen[0][k], seen[1][k])
    assert not torch.equal(seen[0]["layers.0.weight"], seen[2]["layers.0.weight"])


def test_two_files_are_enough(tmp_path):
    """dac.py and common.py alone in a folder, without git, with a data file from elsewhere."""
    folder, data = tmp_path / "mine", tmp_path / "rows.hdf5"
    folder.mkdir()
    for name in ("dac.py", "common.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(PENDULUM, data)
    argv = [*TINY, "--env", "pendulum-demo", "--data-path", "../rows.hdf5"]
    child = process(*argv, cwd=folder, script="dac.py", env={"PATH": str(tmp_path / "nothing here")})
    out, err = child.communicate(timeout=300)
    assert (child.returncode, err) == (0, "")
    assert re.search(r"^dac pendulum-demo seed 0: normalized score .* at step 40 -> runs/", out, re.M)
    about = json.loads((folder / "runs/pendulum-demo/dac/seed0/args.json").read_text())
    assert not about["git_commit"] and about["args"]["data_path"] == "../rows.hdf5"


def test_demo_without_its_file_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    refused("--run-dir", tmp_path, says=[r"pendulum-demo\.hdf5 is missing", "copy .*data/", "--data-path"])


def test_any_gymnasium_id_with_a_data_file(tmp_path, small_data):
    """Without published reference scores: returns instead, and an empty column."""
    out = trained(*TINY, "--env", "Pendulum-v1", "--data-path", small_data, "--run-dir", tmp_path)
    folder = tmp_path / "Pendulum-v1" / "dac" / "seed0"
    assert re.match(
        r"dac Pendulum-v1 seed 0: return -\d+\.\d \+- \d+\.\d over 3 episodes at", out.splitlines()[-1]
    )
    assert {r["normalized_score"] for r in read_csv(folder / "eval.csv")} == {""}
    result = json.loads((folder / "result.json").read_text())
    assert result["normalized_score"] is None and result["return"] < 0


@pytest.mark.parametrize(
    ("env", "S", "A", "horizon"), [("antmaze-umaze-v0", 29, 8, 700), ("pen-human-v0", 45, 24, 100)]
)
def test_tasks_of_d4rl_envs_train_and_evaluate(tmp_path, env, S, A, horizon):
    """A file of yours, D4RL's task, its scores: 0 and 1 are 0 and 100 in antmaze; a pen ends when dropped or at 100."""
    g, path = np.random.default_rng(0), tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = g.normal(0, 0.1, (60, S)).astype(np.float32)
        file["actions"] = g.uniform(-1, 1, (60, A)).astype(np.float32)
        file["rewards"], file["terminals"] = (np.arange(60) % 20 == 15).astype(np.float32), np.arange(60) % 20 == 15
        file["timeouts"] = np.arange(60) % 30 == 29
    out = trained(*TINY, "--env", env, "--data-path", path, "--reward-shift", -1, "--reward-scale", "none",
                  "--run-dir", tmp_path / "runs")  # fmt: skip
    assert f"dac {env} seed 0: normalized score" in out.splitlines()[-1]
    rows = read_csv(tmp_path / "runs" / env / "dac" / "seed0" / "eval.csv")
    low, high = common.reference(env)
    for row in rows:
        score = 100 * (float(row["return"]) - low) / (high - low)
        assert float(row["normalized_score"]) == pytest.approx(score, abs=1e-3) and 1 <= int(row["length"]) <= horizon
    assert len(rows) == 2 + 2 + 3 and (env != "antmaze-umaze-v0" or {row["length"] for row in rows} == {"700"})
    assert checkpoint(tmp_path / "runs" / env / "dac" / "seed0")["args"]["reward_shift"] == -1


def test_a_task_that_cannot_be_made_ends_the_run_before_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "fetch", lambda *what: pytest.fail("asked for the file first"))
    argv = ["--env", "hopper-medium-v2", "--eval-env", "Nothing-v7", "--run-dir", tmp_path]
    refused(*argv, says=["Nothing", "--eval-env"])


def test_rescaled_rewards_leave_the_score_alone(tmp_path):
    """--reward-scale changes what is learned from, not what is reported."""
    argv = [*TINY, "--env", "bandit-ring", "--steps", 1, "--run-dir"]
    trained(*argv, tmp_path / "a", "--reward-scale", "none")
    trained(*argv, tmp_path / "b", "--reward-scale", "range")
    rows = [read_csv(tmp_path / x / "bandit-ring/dac/seed0/eval.csv") for x in "ab"]
    assert [r for r in rows[0] if r["step"] == "0"] == [r for r in rows[1] if r["step"] == "0"]


# --- evaluation -------------------------------------------------------------------------------------------
def linear_policy(A: int):
    """Deterministic, and the same to the last bit for one row or many."""
    return lambda s: (1.5 * s[:, :A] - s[:, -A:]).clamp(-1, 1)


@pytest.mark.parametrize(("env", "A", "seed"), [("pendulum-demo", 1, 0), ("hopper-demo", 3, 7)])
def test_evaluation_is_a_plain_loop_per_episode(env, A, seed):
    act = linear_policy(A)
    returns, lengths = dac.evaluate(act, dac.Args(env=env, seed=seed), CPU, 4)
    for i in range(4):
        task = common.make_env(env)
        s, _ = task.reset(seed=seed + i)
        total, length, ended = 0.0, 0, False
        while not ended:
            a = act(torch.as_tensor(s, dtype=torch.float32)[None])[0].numpy()
            s, r, terminated, truncated, _ = task.step(a)
            total, length, ended = total + r, length + 1, terminated or truncated
        assert (total, length) == (returns[i], lengths[i])
    assert len(set(returns)) == 4  # different starts
    if env == "hopper-demo":
        assert len(set(lengths)) > 1  # episodes end one by one


class Countdown(gym.Env):
    """Pays 1 a step, ends after `n` steps; a step after the end is an error."""

    observation_space = gym.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    made = 0

    def __init__(self, truncate: bool):
        Countdown.made += 1
        self.n, self.truncate, self.seeds, self.closed = Countdown.made, truncate, [], False

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.n > 0, "stepped after its end"
        self.n -= 1
        return (
            np.full(2, self.n, np.float32),
            1.0,
            self.n == 0 and not self.truncate,
            self.n == 0 and self.truncate,
            {},
        )

    def close(self):
        self.closed = True


@pytest.mark.parametrize("truncate", [False, True])
def test_each_episode_counts_until_its_own_first_end(monkeypatch, truncate):
    envs, batches = [], []

    def make_env(name, eval_env=None):
        envs.append(Countdown(truncate))
        return envs[-1]

    def act(s):
        batches.append(s.clone())
        return torch.full((len(s), 1), 5.0)  # beyond the bounds

    Countdown.made = 0
    monkeypatch.setattr(dac, "make_env", make_env)
    returns, lengths = dac.evaluate(act, dac.Args(env="pendulum-demo", seed=10), CPU, 5)
    assert returns.tolist() == lengths.tolist() == [1, 2, 3, 4, 5]
    assert [env.seeds for env in envs] == [[10], [11], [12], [13], [14]]
    assert all(env.closed for env in envs)
    assert len(batches) == 5 and all(s.dtype == torch.float32 and s.shape == (5, 2) for s in batches)


@pytest.mark.parametrize("env", ["pendulum-demo", "bandit-two"])
def test_evaluation_leaves_random_states_alone_and_depends_on_the_seed_alone(env):
    A = 1 if env == "pendulum-demo" else 2

    def noisy(s):
        return torch.randn(len(s), A)

    def states():
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()

    results = []
    for start, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(start)
        before = states()
        results.append(dac.evaluate(noisy, dac.Args(env=env, seed=seed), CPU, 3)[0])
        assert states() == before
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).all()


def test_toy_evaluation_is_the_known_reward():
    """bandit-two pays -||a - (0.4, -0.4)||: at (0, 0) -0.4 sqrt 2, at (0.4, 0) -0.4, at the peak 0."""
    points = torch.tensor([[0.0, 0.0], [0.4, 0.0], [0.4, -0.4]])
    returns, lengths = dac.evaluate(lambda s: points, dac.Args(env="bandit-two"), CPU, 3)
    np.testing.assert_allclose(returns, [-0.4 * math.sqrt(2), -0.4, 0], atol=1e-6)
    assert lengths.tolist() == [1, 1, 1]


def test_toy_actions_are_judged_where_they_are():
    """Samples outside [-1, 1] keep their distance: no clipping flatters an unclipped sampler."""
    returns, _ = dac.evaluate(lambda s: torch.tensor([[3.4, -0.4]]), dac.Args(env="bandit-two"), CPU, 1)
    assert returns[0] == pytest.approx(-3)


# --- resuming ---------------------------------------------------------------------------------------------
def test_save_and_load_in_the_middle_changes_nothing(whole, half, tmp_path):
    """20 steps, a checkpoint, 20 steps = 40 steps."""
    folder = copy(half, tmp_path)
    assert checkpoint(folder)["progress"]["step"] == 20
    out = trained(*TINY, "--run-dir", tmp_path, "--resume")
    assert re.search(r"resuming \S+ at train step 20$", out, re.M)
    assert_same_run(folder, whole)
    assert parts(folder) == []


def test_rows_beyond_the_checkpoint_are_dropped(whole, half, tmp_path):
    folder = copy(half, tmp_path)
    steps = {r["step"] for r in read_csv(folder / "eval.csv")}
    assert steps == {"0", "20", "40"}  # 40 was evaluated, then not saved
    text = (
        (folder / "eval.csv").read_text().replace("\n40,", "\n39,")
    )  # rows that this run will not write again
    (folder / "eval.csv").write_text(text)
    trained(*TINY, "--run-dir", tmp_path, "--resume")
    assert (folder / "eval.csv").read_text() == (whole / "eval.csv").read_text()


def test_tensorboard_after_resuming_has_every_step_once(half, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = copy(half, tmp_path)
    for path in folder.glob(
        "events*"
    ):  # the second file must not sort before the first: names end in a counter
        path.rename(path.with_name("events.out.tfevents.0000000001.host.0.0"))
    trained(*TINY, "--run-dir", tmp_path, "--resume")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("losses/critic")] == [10, 20, 30, 40]
    assert [e.step for e in events.Scalars("eval/return")] == [0, 20, 40]


def test_resuming_a_finished_run_prints_its_result_again(whole, tmp_path, monkeypatch):
    folder = copy(whole, tmp_path)
    before = snapshot(folder)
    result = json.loads(before["result.json"])

    def no_update(*args):
        def fail():
            raise AssertionError("trained")

        return fail, fail

    monkeypatch.setattr(dac, "make_update", no_update)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        call_main(*TINY, "--run-dir", tmp_path, "--resume")
    assert f"normalized score {result['normalized_score']:.1f} +- " in out.getvalue()
    assert json.loads((folder / "result.json").read_text()) == result
    after = snapshot(folder)
    assert after["last.pt"] == before["last.pt"] and after["eval.csv"] == before["eval.csv"]


def test_resume_refuses_another_method_setting(half, tmp_path):
    folder = copy(half, tmp_path)
    before = snapshot(folder)
    says = [r"\bb=0\.3\b.*\b0\.7\b", "same settings", "--run-dir"]
    refused(*TINY, "--run-dir", tmp_path, "--resume", "--b", 0.7, says=says)
    says = [r"T=2\b.*\b3\b", r"hidden=\[16, 16\].*\[16\]"]  # every one is named
    refused(*TINY, "--run-dir", tmp_path, "--resume", "--T", 3, "--hidden", 16, says=says)
    assert snapshot(folder) == before


def test_resume_accepts_another_log_interval(whole, half, tmp_path):
    folder = copy(half, tmp_path)
    trained(*TINY, "--run-dir", tmp_path, "--resume", "--log-every", 7)
    assert_same_run(folder, whole)


def test_resume_with_nothing_saved_starts_at_0_with_a_note(whole, tmp_path):
    out = trained(*TINY, "--run-dir", tmp_path, "--resume")
    folder = tmp_path / "pendulum-demo" / "dac" / "seed0"
    assert re.search(rf"nothing saved yet in {re.escape(str(folder))}: starting at step 0", out)
    assert_same_run(folder, whole)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """400 steps without interruption."""
    run_dir = tmp_path_factory.mktemp("long")
    trained(*LONG, "--run-dir", run_dir)
    return run_dir / "pendulum-demo" / "dac" / "seed0"


def wait_for(child: subprocess.Popen, ready) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_run_resumes_bit_for_bit(long_run, tmp_path, number, code):
    cwd = tmp_path / "a folder"
    cwd.mkdir()
    folder = cwd / "my runs" / "pendulum-demo" / "dac" / "seed0"
    child = process(*LONG, "--run-dir", "my runs", "--overwrite", cwd=cwd)
    awaited = folder / ("last.pt" if number == signal.SIGTERM else "eval.csv")
    wait_for(
        child, lambda: awaited.exists() and len(awaited.read_bytes()) > 60
    )  # eval.csv: rows, not only a header
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (code, "")
    step, command = re.search(
        r"^stopped at train step (\d+) of 400, saved; continue with: (.*)$", out, re.M
    ).groups()
    assert int(step) < 400 and checkpoint(folder)["progress"]["step"] == int(step)
    assert not (folder / "result.json").exists()
    assert parts(folder) == []
    python, script, *argv = shlex.split(command)  # the advice is taken literally
    assert python == "python" and Path(script).name == "dac.py"
    assert "--resume" in argv and "--overwrite" not in argv
    child = process(*argv, cwd=cwd, script=script)
    out, err = child.communicate(timeout=300)
    assert (child.returncode, err) == (0, "")
    assert re.search(rf"at train step {step}$", out, re.M)
    assert_same_run(folder, long_run)


@pytest.mark.parametrize("at", [0, 20, 40])
def test_a_signal_during_an_evaluation(whole, tmp_path, monkeypatch, at):
    """The evaluation is broken off, its step saved; after resuming it is done again and nothing differs."""
    real, calls = dac.evaluate, []

    def evaluate(*args):
        calls.append(0)
        if len(calls) == 1 + at / 20:  # evaluations are of steps 0, 20, 40
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(dac, "evaluate", evaluate)
    with pytest.raises(SystemExit) as stop:
        call_main(*TINY, "--run-dir", tmp_path)
    assert stop.value.code == 143
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    folder = tmp_path / "pendulum-demo" / "dac" / "seed0"
    assert checkpoint(folder)["progress"]["step"] == at
    assert {int(r["step"]) for r in read_csv(folder / "eval.csv")} == set(range(0, at, 20))
    monkeypatch.setattr(dac, "evaluate", real)
    call_main(*TINY, "--run-dir", tmp_path, "--resume")
    assert_same_run(folder, whole)


# --- stages -----------------------------------------------------------------------------------------------
class Clock:
    """Stands still but for what an update (`seconds`) or a look at the policy (100) adds."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(dac.time, "perf_counter", lambda: self.now)

    def update(self, seconds: float):
        def update(i):
            self.now += seconds
            return {"losses/x": torch.tensor(float(i))}

        return update

    def act(self, s):
        self.now += 100
        return torch.zeros(len(s), 2)


def staged(run_dir: Path, **settings) -> dac.Run:
    tiny = dict(steps=6, log_every=2, eval_every=3, eval_episodes=2, final_episodes=2, save_every=2)
    args = dac.resolve(dac.Args(env="bandit-two", run_dir=str(run_dir), **tiny | settings))
    return dac.Run(args, {"x": torch.zeros(3)}, CPU)


def test_stages_have_seconds_of_their_own(tmp_path, monkeypatch):
    """Four updates of 1 s, six of 10 s, three evaluations of 100 s: the speed is of one stage, the result has all."""
    clock = Clock(monkeypatch)
    run = staged(tmp_path)
    run.train("first", 4, clock.update(1))
    assert run.steps_per_second() == 1
    run.train("train", 6, clock.update(10), clock.act)
    assert run.progress["seconds"] == {"first": 4, "train": 60} and run.progress["eval_seconds"] == 300
    run.finish(np.zeros(2), None)
    result = json.loads((run.folder / "result.json").read_text())
    assert [result[k] for k in ("steps_per_second", "train_seconds", "eval_seconds")] == [0.1, 64, 300]


def test_stages_without_a_policy_log_to_a_subfolder(tmp_path, monkeypatch):
    """So that step 2 of one is not step 2 of the other."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clock = Clock(monkeypatch)
    run = staged(tmp_path)
    run.train("first", 4, clock.update(1))
    run.train("train", 6, clock.update(10), clock.act)
    expected = {"first": [2, 4], ".": [2, 4, 6]}
    for where, steps in expected.items():
        events = EventAccumulator(str(run.folder / where))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars("losses/x")] == [(i, i - 1) for i in steps]
        assert ("eval/return" in events.Tags()["scalars"]) == (where == ".")
    assert sorted(p.parent for p in run.folder.rglob("events*")) == [run.folder, run.folder / "first"]


def test_a_new_stage_has_rows_of_its_own(tmp_path, monkeypatch):
    """Step 3 of an earlier stage is no evaluation of this one."""
    run = staged(tmp_path)
    update = Clock(monkeypatch).update(1)
    run.train("first", 6, update, lambda s: torch.zeros(len(s), 2))
    first = (run.folder / "eval.csv").read_text()
    run.train("train", 4, update, lambda s: torch.ones(len(s), 2))
    rows = read_csv(run.folder / "eval.csv")
    assert [r["step"] for r in rows] == ["0", "0", "3", "3", "4", "4"]
    assert {r["return"] for r in rows} == {str(round(-math.hypot(0.6, 1.4), 4))}
    assert "-0.5657" in first and (run.progress["stage"], run.progress["step"]) == ("train", 4)


def test_stages_that_are_done_are_not_run_again(tmp_path, monkeypatch):
    """Resumed between two stages, with rows that the second had written before its first checkpoint."""
    clock = Clock(monkeypatch)
    run = staged(tmp_path)
    run.train("first", 4, clock.update(1))
    run.rows = [{"step": 0, "episode": 0, "return": -7, "length": 1, "normalized_score": -7}]
    run.write_evaluations()
    run = staged(tmp_path, resume=True)
    assert run.progress["done"] == ["first"] and run.progress["seconds"] == {"first": 4}
    run.train("first", 4, lambda i: pytest.fail("trained again"))
    run.train("train", 6, clock.update(10), clock.act)
    assert run.progress["seconds"] == {"first": 4, "train": 60} and run.progress["done"] == ["first", "train"]
    rows = read_csv(run.folder / "eval.csv")
    assert [r["step"] for r in rows] == ["0", "0", "3", "3", "6", "6"] and "-7" not in {r["return"] for r in rows}


# --- re-evaluation ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("env", ["pendulum-demo", "bandit-two"])
def test_eval_only(request, tmp_path, env):
    folder = copy(request.getfixturevalue("whole" if env == "pendulum-demo" else "toy"), tmp_path)
    before = snapshot(folder)
    argv = ["--env", env, "--run-dir", tmp_path, "--device", "cpu", "--eval-only"]
    settings = [("1", "0.0", "True", 5), ("4", "0.5", "False", 3)]
    outs = [
        trained(*argv, "--N-a", n, "--temperature", temp, "--clip-x0", clip, "--final-episodes", episodes)
        for n, temp, clip, episodes in settings
    ]
    after = snapshot(folder)
    rows = read_csv(folder / "reeval.csv")
    assert {k: v for k, v in after.items() if k != "reeval.csv"} == before  # nothing else is touched
    got = [(r["N_a"], r["temperature"], r["clip_x0"], int(r["episodes"])) for r in rows]
    assert got == settings
    assert {(r["env"], r["seed"], r["step"]) for r in rows} == {(env, "0", "40")}
    for out, row in zip(outs, rows):
        score, std = float(row["normalized_score"]), float(row["normalized_score_std"])
        text = f"dac {env} seed 0: normalized score {score:.1f} +- {std:.1f} over {row['episodes']} episodes"
        assert out.splitlines()[-1] == f"{text} at step 40 -> {folder}"
    content = checkpoint(folder)  # the numbers are those of this policy under these settings
    S, A = (3, 1) if env == "pendulum-demo" else (1, 2)
    for row in rows:
        args = dac.Args(
            **content["args"] | {"N_a": int(row["N_a"]), "temperature": float(row["temperature"])}
        )
        args.clip_x0 = row["clip_x0"] == "True"
        with torch.random.fork_rng([]):
            agent = dac.make_agent(args, S, A, CPU)
            agent.actor.load_state_dict(content["state"]["actor"])
            agent.q_target.load_state_dict(content["state"]["q_target"])
            act = dac.make_act(args, agent, A)
            returns, _ = dac.evaluate(act, args, CPU, int(row["episodes"]))
        assert float(row["return"]) == pytest.approx(returns.mean(), rel=1e-6)


@pytest.mark.parametrize("env", ["pendulum-demo", "bandit-two"])
def test_eval_only_without_settings_repeats_the_last_evaluation(request, tmp_path, env):
    folder = copy(request.getfixturevalue("whole" if env == "pendulum-demo" else "toy"), tmp_path)
    out = trained("--env", env, "--run-dir", tmp_path, "--device", "cpu", "--eval-only")
    result = json.loads((folder / "result.json").read_text())
    row = read_csv(folder / "reeval.csv")[0]
    assert float(row["return"]) == pytest.approx(result["return"], abs=1e-3)
    assert "over 3 episodes at step 40" in out


def test_eval_only_without_a_run(tmp_path):
    says = [r"no checkpoint \S+seed9/last\.pt", "train first", "--seed", "--run-dir"]
    refused("--eval-only", "--seed", 9, "--run-dir", tmp_path, says=says)
    assert list(tmp_path.iterdir()) == []


def test_eval_only_ignores_overwrite(toy, tmp_path):
    folder = copy(toy, tmp_path)
    before = snapshot(folder)
    cli("--env", "bandit-two", "--run-dir", tmp_path, "--device", "cpu", "--eval-only", "--overwrite")
    assert {k: v for k, v in snapshot(folder).items() if k != "reeval.csv"} == before


def test_eval_only_in_a_task_of_other_sizes(whole, tmp_path):
    copy(whole, tmp_path)
    argv = ["--run-dir", tmp_path, "--device", "cpu", "--eval-only", "--eval-env", "Hopper-v5"]
    refused(*argv, says=[r"\b3\b", r"\b11\b", "--eval-env"])


# --- an existing run --------------------------------------------------------------------------------------
def test_an_existing_run_is_not_touched(toy, tmp_path):
    folder = copy(toy, tmp_path)
    before = snapshot(folder)
    says = [re.escape(str(folder)), "--resume", "--overwrite", "--run-dir"]
    refused(*TINY, "--env", "bandit-two", "--run-dir", tmp_path, says=says)
    assert snapshot(folder) == before


def test_overwrite_replaces_the_run(toy, tmp_path):
    folder = copy(toy, tmp_path)
    (folder / "reeval.csv").write_text("of the old run\n")
    trained(*TINY, "--env", "bandit-two", "--run-dir", tmp_path, "--overwrite", "--b", 0.5)
    assert checkpoint(folder)["args"]["b"] == 0.5
    assert not (folder / "reeval.csv").exists() and len(list(folder.glob("events*"))) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data-path", "no such file.hdf5"], "no such file"),
        (["--env", "pendulum-dem"], "unknown --env"),
        (["--eval-env", "Hopper-v5"], "sizes"),
        (["--steps", "0"], "--steps"),
        (["--device", "nonsense"], "--device"),
    ],
)
def test_overwrite_with_a_mistake_deletes_nothing(whole, tmp_path, argv, says):
    folder = copy(whole, tmp_path)
    before = snapshot(folder)
    refused(*TINY, "--run-dir", tmp_path, "--overwrite", *argv, says=[says])
    assert snapshot(folder) == before


def test_overwrite_and_resume_contradict_each_other(half, tmp_path):
    folder = copy(half, tmp_path)
    before = snapshot(folder)
    refused(*TINY, "--run-dir", tmp_path, "--overwrite", "--resume", says=["--overwrite", "--resume"])
    assert snapshot(folder) == before


# --- bad input: one line, what to do, exit code 2 -----------------------------------------------------------
@pytest.mark.parametrize(
    ("env", "near"),
    [("hopper-meduim-v2", "hopper-medium-v2"), ("pendulum", "pendulum-demo"), ("bandit-moon", "bandit-moons"),
     ("xyz", "pendulum-demo"), ("", "pendulum-demo"), ("Pendulum-v1", "--data-path")],
)  # fmt: skip
def test_unknown_env(tmp_path, env, near):
    refused("--env", env, "--run-dir", tmp_path, says=[f"unknown --env '{env}'", "nearest names", near])
    assert list(tmp_path.iterdir()) == []


def test_unknown_evaluation_task(tmp_path):
    refused("--eval-env", "Pendulum-v77", "--run-dir", tmp_path, says=["Pendulum-v77|Pendulum", "--eval-env"])
    assert list(tmp_path.iterdir()) == []


def test_bad_data_file(tmp_path):
    bad = tmp_path / "bad.hdf5"
    bad.write_text("not HDF5")
    says = [re.escape(str(bad)), "not HDF5", "expected .*observations"]
    refused("--data-path", bad, "--run-dir", tmp_path / "runs", says=says)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "argv",
    [["--env", "hopper-demo", "--data-path", PENDULUM], ["--env", "bandit-two", "--data-path", PENDULUM],
     ["--eval-env", "Hopper-v5"]],
)  # fmt: skip
def test_task_of_other_sizes_than_the_data(tmp_path, argv):
    says = [r"data has .*3, 1", "task", "--env|--eval-env"]
    refused(*TINY, *argv, "--run-dir", tmp_path, says=says)
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:1"):
        says = [f"--device {name}: ", "sees 0 CUDA devices", "--device cpu"]
        refused(*TINY, "--device", name, "--run-dir", tmp_path, says=says)


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:", "cuda:-1", "cuda:x", "meta", "cpu:1"])
def test_nonsense_device(tmp_path, name):
    refused("--device", name, "--run-dir", tmp_path, says=["--device", "expected auto, cpu, cuda or cuda:n"])


def test_graph_on_a_cpu(tmp_path):
    refused(*TINY, "--graph", "on", "--run-dir", tmp_path, says=["--graph", "CUDA", "CPU", "auto"])


NONSENSE = """steps 0, steps -5, batch-size -1, batch-size 0, discount 1.5, discount -0.1, discount nan,
polyak 0, polyak 1.1, polyak nan, temperature -1, temperature nan, eta nan, eta 0, eta inf, eta-lr -1,
eta-lr nan, b -1, b nan, rho -1, hidden 0, hidden 16 -1, T 0, H 0, N 0, N-a 0, seed -1,
seed 99999999999999999999, actor-lr 0, actor-lr -1e-3, critic-lr nan, critic-lr inf, clip-norm 0, ema-every 0,
ema-after -1, log-every 0, eval-every 0, eval-episodes 0, final-episodes -2, save-every 0,
reward-shift nan, reward-shift inf"""


@pytest.mark.parametrize("text", re.split(r",\s", NONSENSE))
def test_numbers_that_make_no_sense(tmp_path, text):
    flag, *values = f"--{text}".split()
    refused(*TINY, flag, *values, "--run-dir", tmp_path, says=[f"{flag} is .*; expected "])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["--final-episodes", 0], ["--N-a", 0], ["--temperature", "nan"]])
def test_numbers_that_make_no_sense_to_eval_only(toy, tmp_path, argv):
    folder = copy(toy, tmp_path)
    before = snapshot(folder)
    argv = ["--env", "bandit-two", "--eval-only", "--device", "cpu", "--run-dir", tmp_path, *argv]
    refused(*argv, says=[f"{argv[-2]} is .*; expected "])
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["--steps", "abc"], "--steps"), (["--guidance", "strong"], "--guidance"), (["--seeed", "1"], "--seeed"),
     (["--hidden", "64", "wide"], "--hidden")],
)  # fmt: skip
def test_words_that_do_not_parse(tmp_path, argv, says):
    """One line that names the option and where help is."""
    done = subprocess.run([sys.executable, "dac.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("dac.py: ") and says in line and line.endswith("dac.py --help")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["--resume", "--eval-only"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "swg"}, [r"is of swg", r"expected dac"]),
        ({"format": 99}, [r"format 99", rf"expected dac \(format {dac.FORMAT}\)"]),
        ({"args": {"env": "bandit-three"}}, [r"on bandit-three", r"expected .* on bandit-two"]),
    ],
)
def test_checkpoint_of_something_else(toy, tmp_path, mode, change, says):
    folder = copy(toy, tmp_path)
    content = checkpoint(folder)
    content |= {k: content[k] | v if k == "args" else v for k, v in change.items()}
    torch.save(content, folder / "last.pt")
    before = snapshot(folder)
    says = [*says, re.escape(str(folder / "last.pt")), "--run-dir|--overwrite"]
    refused(*TINY, "--env", "bandit-two", "--run-dir", tmp_path, mode, says=says)
    assert snapshot(folder) == before


@pytest.mark.parametrize("mode", ["--resume", "--eval-only"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "another content"])
def test_damaged_checkpoint(toy, tmp_path, mode, damage):
    folder = copy(toy, tmp_path)
    path = folder / "last.pt"
    good = path.read_bytes()
    if damage == "another content":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes({"truncated": good[: len(good) // 2], "empty": b"", "text": b"hello"}[damage])
    before = snapshot(folder)
    says = [re.escape(str(path)), "damaged", "--overwrite"]
    refused(*TINY, "--env", "bandit-two", "--run-dir", tmp_path, mode, says=says)
    assert snapshot(folder) == before


def test_checkpoint_runs_no_code(toy, tmp_path):
    """A last.pt from a stranger is data, not a program."""

    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    folder = copy(toy, tmp_path)
    torch.save(checkpoint(folder) | {"progress": Harm()}, folder / "last.pt")
    refused("--env", "bandit-two", "--run-dir", tmp_path, "--eval-only", says=["damaged or not a checkpoint"])
    assert not (tmp_path / "harm").exists()


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    says = [r"cannot write to \S+file/runs/pendulum-demo", "Not a directory", "--run-dir"]
    refused(*TINY, "--run-dir", tmp_path / "file" / "runs", says=says)
    assert (tmp_path / "file").read_text() == "in the way"


# --- a full disk ------------------------------------------------------------------------------------------
def test_full_disk_while_saving(half, whole, tmp_path):
    """A real limit on file sizes, below a checkpoint's: the old one survives, the run goes on from it."""
    folder = copy(half, tmp_path)
    before = (folder / "last.pt").read_bytes()
    limit = len(before) // 2

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    child = process(*TINY, "--run-dir", tmp_path, "--resume", cwd=tmp_path, preexec_fn=limited)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 1
    assert_one_line(err, [rf"cannot write {re.escape(str(folder))}/last\.pt", "is kept", "--resume"])
    assert (folder / "last.pt").read_bytes() == before
    assert parts(folder) == []
    trained(*TINY, "--run-dir", tmp_path, "--resume")
    assert_same_run(folder, whole)


def test_full_disk_before_the_first_checkpoint(tmp_path, monkeypatch):
    full_after(0, monkeypatch)
    says = [r"cannot write \S+last\.pt \(.*No space left on device", "there is no earlier one", "--resume"]
    refused(*TINY, "--env", "bandit-two", "--run-dir", tmp_path, says=says, code=1)
    folder = tmp_path / "bandit-two" / "dac" / "seed0"
    assert [p.name for p in folder.iterdir() if p.suffix in (".part", ".pt")] == []


@pytest.mark.parametrize("name", ["eval.csv", "result.json"])
def test_full_disk_while_writing_anything_else(half, tmp_path, monkeypatch, name):
    folder = copy(half, tmp_path)
    real = Path.write_text
    before = (folder / "eval.csv").read_text()

    def write_text(path, text, *args, **kwargs):
        if path.name.startswith(name) and (name != "eval.csv" or "\n40," in text):
            real(path, text[:10])
            raise OSError(28, "No space left on device")
        return real(path, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    says = [rf"cannot write \S+{re.escape(name)}", "No space left on device", "--resume"]
    refused(*TINY, "--run-dir", tmp_path, "--resume", says=says, code=1)
    assert parts(folder) == []
    if name == "eval.csv":  # the old one survives, without the rows beyond the checkpoint
        assert (folder / "eval.csv").read_text() == before[: before.index("40,0,")]


# --- a loss that is not finite ----------------------------------------------------------------------------
def test_data_that_overflows(tmp_path, small_data):
    """Rewards of 1e25 are finite, their squares are not."""
    with h5py.File(small_data, "r+") as file:
        file["rewards"][:] = 1e25 * file["rewards"][:]
    says = [r"losses/critic is inf at train step 10\b", "there is no checkpoint", "learning rate"]
    argv = [*TINY, "--data-path", small_data, "--reward-scale", "none", "--run-dir", tmp_path]
    refused(*argv, says=says, code=1)
    assert not (tmp_path / "pendulum-demo/dac/seed0/last.pt").exists()


@pytest.mark.parametrize(
    ("log_every", "save_every", "seen_at", "saved_at"),
    [(5, 20, 30, 20), (1000, 20, 40, 20), (1000, 15, 30, 15)],
)
def test_a_loss_that_turns_nan_stops_the_run(tmp_path, monkeypatch, log_every, save_every, seen_at, saved_at):
    """Update 26 breaks the actor, after a checkpoint: seen at the next log, at the next evaluation, and
    before the next save."""
    real, calls = dac.make_update, []

    def make_update(args, agent, data):
        update, update_ema = real(args, agent, data)

        def poisoned():
            calls.append(0)
            if len(calls) == 26:
                agent.actor.layers[0].weight.data.fill_(math.nan)
            return update()

        return poisoned, update_ema

    monkeypatch.setattr(dac, "make_update", make_update)
    with pytest.raises(common.UserError) as stop:
        call_main(*TINY, "--log-every", log_every, "--save-every", save_every, "--run-dir", tmp_path)
    folder = tmp_path / "pendulum-demo" / "dac" / "seed0"
    message = str(stop.value)
    assert stop.value.code == 1 and "\n" not in message
    assert re.match(rf"losses/(actor|critic) is nan at train step {seen_at}\b", message)
    assert re.search(rf"last good checkpoint\D+{re.escape(str(folder / 'last.pt'))}", message)
    content = checkpoint(folder)
    assert content["progress"]["step"] == saved_at
    assert [k for k, v in tensors(content).items() if v.is_floating_point() and not v.isfinite().all()] == []
    assert {r["step"] for r in read_csv(folder / "eval.csv")} == {"0", "20"}


# --- documentation ----------------------------------------------------------------------------------------
def blocks(markdown: str) -> list[str]:
    """Fenced code blocks, and inline code outside of them; without $ prompts."""
    fenced = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", markdown, re.M | re.S)
    rest = re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.M | re.S)
    return [re.sub(r"^\$ ", "", text, flags=re.M) for text in fenced + re.findall(r"`([^`]+)`", rest)]


def commands(text: str) -> list[list[str]]:
    """The words of every `python <script>.py ...` in shell text: continued lines joined, `for` unrolled,
    comments and redirections dropped. A command with a <placeholder> or an ellipsis is left out."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"(^|\s)#.*$", r"\1", text, flags=re.M))
    text = re.sub(r"<[^<>\n]+>|\.\.\.", "…", text)
    text = re.sub(r"\d?>>?\s*(&\d|\S+)", "", text).replace("\n", " ; ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError:  # an open quote: prose, Python or JSON, no command
        return []
    return [c for c in unroll(words, {}) if is_python_script(c)]


def is_python_script(words: list[str]) -> bool:
    python = len(words) > 1 and Path(words[0]).name in ("python", "python3") and words[1].endswith(".py")
    return python and not any("…" in word for word in words)


def unroll(words: list[str], values: dict[str, str]) -> list[list[str]]:
    """Simple commands of a list of words, with the variables of the loops around them put in."""
    found, current, i = [], [], 0
    while i < len(words):
        word = words[i]
        if word == "for" and not current and i + 2 < len(words) and words[i + 2] == "in":
            do = words.index("do", i)
            depth, done = 1, do
            while depth:
                done += 1
                depth += {"do": 1, "done": -1}.get(words[done], 0)
            choices = [w for w in words[i + 3 : do] if w != ";"]
            for choice in choices:
                found += unroll(words[do + 1 : done], values | {words[i + 1]: choice})
            i = done + 1
            continue
        if word in (";", "&", "&&", "||", "|", ";;"):
            found.append(current)
            current = []
        elif current or "=" not in word:  # VARIABLE=value in front of a command
            current.append(re.sub(r"\$\{?(\w+)\}?", lambda m: values.get(m[1], m[0]), word))
        i += 1
    return [c for c in [*found, current] if c]


def documented() -> list[tuple[str, list[str]]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [(page.name, text) for page in pages if page.exists() for text in blocks(page.read_text())]
    return [(name, words) for name, text in texts for words in commands(text)]


def test_commands_are_found_in_markdown():
    page = """Prose with `python dac.py --resume` and `--seed`, and `python <script>.py`.

```bash
pip install -r requirements.txt && .venv/bin/python dac.py   # trains, and python dac.py is no command here
for env in hopper walker2d; do
  for seed in 0 1; do python dac.py --env $env-medium-v2 --seed ${seed}; done
done
CUDA_VISIBLE_DEVICES=1 python dac.py --eta 0.1 \\
    --hidden 64 64 > log.txt 2>&1
python dac.py --run-dir "my runs" & python data/make_pendulum.py --score; python dac.py --env <name>
```
It's `python -m pytest`, and that's all.
"""
    found = [words for text in blocks(page) for words in commands(text)]
    loop = [
        ["python", "dac.py", "--env", f"{e}-medium-v2", "--seed", s]
        for e in ("hopper", "walker2d")
        for s in "01"
    ]
    expected = [[".venv/bin/python", "dac.py"], *loop]
    expected += [["python", "dac.py", "--eta", "0.1", "--hidden", "64", "64"]]
    expected += [["python", "dac.py", "--run-dir", "my runs"], ["python", "data/make_pendulum.py", "--score"]]
    expected += [["python", "dac.py", "--resume"]]
    assert found == expected


def check_command(words: list[str]) -> None:
    """The script exists; if it has Args, tyro takes the rest, the values make sense, --env exists."""
    script = ROOT / words[1]
    assert script.exists(), words
    if script.parent != ROOT or not re.search(r"^class Args\b", script.read_text(), re.M):
        return
    module = importlib.import_module(script.stem)
    if {"-h", "--help"} & set(words):
        return
    try:
        args = tyro.cli(module.Args, args=words[2:])
    except SystemExit as stop:
        raise AssertionError(f"{shlex.join(words)} does not parse") from stop
    module.resolve(args)
    names = {*common.FILES, *common.DEMOS, *common.TOYS}
    assert (
        args.env in names
        or common.MINARI_ID.fullmatch(args.env)
        or (args.data_path and args.env in gym.registry)
    )


def test_every_documented_command_parses():
    found = documented()
    assert {"dac.py", "diffusion_dice.py"} <= {words[1] for _, words in found}
    for page, words in found:
        try:
            check_command(words)
        except (AssertionError, common.UserError) as error:
            raise AssertionError(f"{page}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize(
    "line",
    ["dac.py --sed 0", "dac.py --steps many", "dac.py --eta -1", "dac.py --env hopper-medium", "dac.py --seed $seed",
     "diffusion_dice.py --eta 1", "diffusion_dice.py --alpha 0", "diffusion_dice.py --env hopper-medium"],
)  # fmt: skip
def test_a_wrong_documented_command_is_found(line, capsys):
    with pytest.raises((AssertionError, common.UserError)):
        check_command(["python", *line.split()])


def help_texts() -> dict[str, str]:
    """field -> the string below it in class Args."""
    tree = ast.parse((ROOT / "dac.py").read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    texts = {}
    for field, below in zip(body, [*body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
            texts[field.target.id] = text or ""
    return texts


def test_help_explains_every_field():
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|\s", "", out)  # without colours, frames and line breaks
    texts = help_texts()
    assert list(texts) == [f.name for f in fields(dac.Args)]
    for name, text in texts.items():
        assert len(text) > 4, f"{name} has no help text"
        assert f"--{name.replace('_', '-')}" in plain
        assert re.sub(r"\s", "", text) in plain, f"the help text of {name} is not shown"


def test_shared_options_come_first_and_in_order():
    order = """env data_path seed device run_dir resume overwrite log_every eval_every eval_episodes
               final_episodes save_every compile graph""".split()
    names = [f.name for f in fields(dac.Args)]
    assert [n for n in names if n in order] == order
    assert set(names[: names.index("graph") + 1]) <= {
        *order,
        "data_url",
        "eval_env",
        "eval_only",
        "video",
        "pretrained",
    }


def test_every_preset_names_known_fields_and_makes_sense():
    assert set(common.TOYS) | set(common.DEMOS) <= dac.PRESETS.keys()
    for env, preset in dac.PRESETS.items():
        args = dac.resolve(dac.Args(env=env))
        assert preset.keys() <= dac.PAPER.keys()
        assert {f.name for f in fields(args) if getattr(args, f.name) is None} == {
            "data_path",
            "data_url",
            "eval_env",
        }
        given = dac.resolve(dac.Args(env=env, b=0.123, steps=77))  # the command line wins
        assert (given.b, given.steps) == (0.123, 77)


# --- CUDA -------------------------------------------------------------------------------------------------
def cuda_agent(temperature: float = 0.0):
    args = dac.resolve(dac.Args(env="pendulum-demo", batch_size=64, hidden=(32, 32), H=3, N=2, T=3, steps=100,
                                temperature=temperature, reward_scale="none", graph="off"))  # fmt: skip
    device, g = torch.device("cuda"), torch.Generator().manual_seed(0)
    s, a, r = (
        torch.randn(500, 3, generator=g),
        torch.rand(500, 1, generator=g) * 2 - 1,
        torch.randn(500, generator=g),
    )
    end = torch.arange(500) % 50 == 49
    data = common.Dataset(s, a, r, s.roll(-1, 0), end.float(), end).to(device)
    torch.manual_seed(0)
    return args, dac.make_agent(args, 3, 1, device), data


@NEEDS_CUDA
def test_graphed_update_is_the_eager_one():
    """20 updates, 15 of them replayed, on the same draws."""
    torch.set_float32_matmul_precision("highest")
    results = []
    for wrap in (lambda fn: fn, dac.Graphed):
        args, agent, data = cuda_agent()
        update, update_ema = (wrap(fn) for fn in dac.make_update(args, agent, data))
        torch.manual_seed(1)
        losses = []
        for _ in range(20):
            out = update()
            update_ema()
            losses.append(torch.stack([out[k].float() for k in sorted(out)]).clone())
        state = {
            k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in dac.agent_state(agent).items()
        }
        results.append((torch.stack(losses), tensors(state)))
    (eager_losses, eager), (graph_losses, graphed) = results
    assert graphed["/step"] == 20
    torch.testing.assert_close(graph_losses, eager_losses, rtol=1e-5, atol=1e-5)
    for k in eager:
        torch.testing.assert_close(graphed[k], eager[k], rtol=1e-5, atol=1e-5)


@NEEDS_CUDA
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_graphed_act_reads_its_input_and_draws_anew(temperature):
    args, agent, data = cuda_agent(temperature)
    act = dac.make_act(args, agent, 1)
    graphed = dac.Graphed(act)
    for _ in range(6):
        graphed(data.s[:8])
    for rows in (data.s[8:16], data.s[16:24]):
        torch.manual_seed(3)
        expected = act(rows)
        torch.manual_seed(3)
        first = graphed(rows).clone()
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(graphed(rows), first)


@NEEDS_CUDA
@pytest.mark.parametrize(("first", "second"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_resumes_on_another_device(tmp_path, monkeypatch, first, second):
    argv = [*TINY, "--compile", "off", "--run-dir", tmp_path]
    with monkeypatch.context() as patch:
        full_after(1, patch)
        assert cli(*argv, "--device", first)[0] == 1
    trained(*argv, "--resume", "--device", second)
    folder = tmp_path / "pendulum-demo" / "dac" / "seed0"
    assert checkpoint(folder)["state"]["step"] == 40
    for device in ("cpu", "cuda"):
        trained(*argv, "--device", device, "--eval-only", "--N-a", 2)
    assert [r["N_a"] for r in read_csv(folder / "reeval.csv")] == ["2", "2"]
