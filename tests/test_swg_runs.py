"""What a run of swg.py does: critic, weights, joint model, a borrowed critic, sampler settings, the toys of the paper.

The text that dac.py has too (Run, save, load, evaluate ...) is tested in test_runs.py; here stands what is new.
`cli` runs the script as `python swg.py` does, but in this process; `call_main` calls `main` of the module, where a
test has put something of its own. Most runs are evaluated in tasks of five steps (test_diffusion_dice_runs.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import test_diffusion_dice_runs as dice
import torch
import tyro
from test_diffusion_dice_runs import events, same
from test_runs import check_command, checkpoint, documented, full_after, process, read_csv, snapshot, tensors, wait_for

import common
import swg

ROOT = Path(__file__).resolve().parent.parent
PENDULUM, HOPPER = (ROOT / "data" / f"{name}-demo.hdf5" for name in ("pendulum", "hopper"))
CPU = torch.device("cpu")
CRITIC = ("value", "q", "q_target")
TINY = """--device cpu --steps 30 --critic-steps 20 --hidden 16 --width 8 --blocks 2 --T 3 --batch-size 16
          --critic-batch-size 16 --log-every 5 --eval-every 15 --eval-episodes 2 --final-episodes 3
          --save-every 10""".split()
SHORT = [*TINY, "--eval-env", "ShortPendulum-v0", "--rho", "3", "--kappa", "0.5", "--N", "2"]
ANT = "antmaze-umaze-v0"
SIZES = {"pendulum-demo": (3, 1), "bandit-moons": (1, 2), "toy-8gaussians": (1, 2), ANT: (29, 8)}
EACH = pytest.mark.parametrize("env", SIZES)
one_thread, ant_data, uneven = dice.one_thread, dice.ant_data, dice.uneven  # fixtures


# --- helpers ----------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True, scope="module")
def small_pools():
    """Exact samples come from 50,000 draws instead of a million."""
    real = common.reweighted_samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common, "reweighted_samples", lambda name, n, weight, seed=0, pool=0: real(name, n, weight, seed, 50_000)
        )
        yield


def cli(*argv) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python swg.py argv`."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["swg.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "swg.py"), run_name="__main__")
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
    assert len(err.splitlines()) == 1 and err.startswith("swg.py: "), err
    for pattern in says:
        assert re.search(pattern, err), f"{pattern!r} is not in {err!r}"
    assert got == code


def parsed(*argv) -> swg.Args:
    return tyro.cli(swg.Args, args=[str(x) for x in argv])


def call_main(*argv) -> str:
    """stdout of swg.main in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        swg.main(parsed(*argv))
    return out.getvalue()


def interrupt(monkeypatch, maker: str, call: int, number: int) -> None:
    """A signal arrives during call `call` (from 1) of the update that swg.<maker> makes."""
    real, calls = getattr(swg, maker), []

    def make(*args):
        update = real(*args)

        def interrupted():
            calls.append(0)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return update()

        return interrupted

    monkeypatch.setattr(swg, maker, make)


def stop_after_saves(saves: int, *argv) -> None:
    """A full disk ends the run: nothing is saved after this many checkpoints."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        full_after(saves, monkeypatch)
        assert cli(*argv)[0] == 1


def folder_of(run_dir: Path, env: str = "pendulum-demo", seed: int = 0) -> Path:
    return run_dir / env / "swg" / f"seed{seed}"


def copy(folder: Path, run_dir: Path) -> Path:
    """A run folder copied below another --run-dir."""
    return Path(shutil.copytree(folder, folder_of(run_dir, folder.parents[1].name)))


def fresh_agent(args: swg.Args, S: int, A: int) -> swg.Agent:
    """What a run of these arguments starts from."""
    with torch.random.fork_rng([]):
        torch.manual_seed(args.seed)
        return swg.make_agent(args, S, A, CPU)


def saved_agent(folder: Path) -> tuple[swg.Args, swg.Agent, int]:
    content = checkpoint(folder)
    args, (S, A) = swg.Args(**content["args"]), SIZES[folder.parents[1].name]
    agent = fresh_agent(args, S, A)
    with torch.random.fork_rng([]):
        swg.restore(swg.agent_state(agent), content)
    return args, agent, A


def assert_same_run(a: Path, b: Path) -> None:
    """The same checkpoint bit for bit and the same evaluations; only clocks and folders may differ."""
    x, y = checkpoint(a), checkpoint(b)
    left = tensors(x)
    critic = [] if a.parents[1].name in swg.BETA_TOYS else ["q_opt/state/0/exp_avg", "value_opt/state/0/exp_avg"]
    assert {"/rng/cpu", "/state/step", *(f"/state/{k}" for k in ["opt/state/0/exp_avg", *critic])} <= left.keys()
    assert len(left) > 60 and same(x, y)
    free = {"run_dir", "resume", "overwrite"}
    assert [k for k in x["args"] if k not in free and x["args"][k] != y["args"][k]] == []
    clocks = {"seconds", "eval_seconds"}
    progress = [{k: v for k, v in content["progress"].items() if k not in clocks} for content in (x, y)]
    assert progress[0] == progress[1] and x["progress"]["seconds"].keys() == y["progress"]["seconds"].keys()
    assert (a / "eval.csv").read_text() == (b / "eval.csv").read_text()


def weights_line(out: str) -> str:
    (line,) = re.findall(r"^weights .*$", out, re.M)
    return line


@pytest.fixture(scope="module")
def argv_of(ant_data) -> dict[str, list]:
    """env -> command line of the runs below, without --run-dir."""
    argv = {env: [*TINY, "--env", env] for env in SIZES}
    argv[ANT] += ["--data-path", ant_data, "--eval-env", "ShortAnt-v0"]
    return argv | {"pendulum-demo": SHORT}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, argv_of) -> dict[str, tuple[Path, str]]:
    """env -> (folder, stdout) of finished runs. Not to be changed: `copy` them."""
    run_dir = tmp_path_factory.mktemp("runs")
    return {env: (folder_of(run_dir, env), trained(*argv_of[env], "--run-dir", run_dir)) for env in SIZES}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, Path]:
    """The pendulum's run, killed by a full disk: last.pt is of step 10 inside the critic's stage, of its end ..."""
    where = {"inside": 1, "between": 2, "main": 3}
    run_dir = tmp_path_factory.mktemp("killed")
    for name, saves in where.items():
        stop_after_saves(saves, *SHORT, "--run-dir", run_dir / name)
    return {name: folder_of(run_dir / name) for name in where}


# --- four runs, their folders and their output ------------------------------------------------------------
@EACH
def test_folder(runs, env):
    folder, _ = runs[env]
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    logs = {name for name in names if "events.out.tfevents" in name}
    toy, of_paper = env in common.TOYS, env in swg.BETA_TOYS
    assert sorted(str(Path(name).parent) for name in logs) == ([".", "critic"], ["."])[of_paper]
    expected = {"args.json", "eval.csv", "last.pt", "result.json", "curve.png"}
    assert names - logs == expected | ({"samples.png"} if toy else set())
    for name in names & {"curve.png", "samples.png"}:
        image = matplotlib.image.imread(folder / name)
        assert min(image.shape[:2]) > 200
        assert len(np.unique(image[::5, ::5].reshape(-1, image.shape[2]), axis=0)) > 20  # not an empty canvas


@EACH
def test_args_json_and_output_hold_the_resolved_arguments(runs, argv_of, env):
    folder, out = runs[env]
    about = json.loads((folder / "args.json").read_text())
    expected = asdict(swg.resolve(parsed(*argv_of[env], "--run-dir", folder.parents[2])))
    expected["layer_norm"] = SIZES[env][0] > 4  # [D8]
    assert about["args"] == json.loads(json.dumps(expected)) and about["method"] == "swg"
    assert about["versions"]["torch"] == torch.__version__ and {"device", "git_commit", "command"} <= about.keys()
    assert {k for k, v in expected.items() if v is None} <= {"data_path", "data_url", "eval_env", "pretrained"}
    shown = dict(re.findall(r"(\w+)=(\(.*?\)|\S+)", out.splitlines()[1]))
    assert shown.keys() == {k for k, v in expected.items() if v is not None}
    assert all(shown[k] == str(v) for k, v in expected.items() if k in shown)


@EACH
def test_output_begins_with_the_data_as_stored(runs, argv_of, env):
    """Whatever is done to the rewards: Pendulum's are scaled, antmaze's shifted."""
    data = common.load_dataset(env, parsed(*argv_of[env]).data_path)
    returns = data.returns().numpy()
    text = f"average return {returns.mean():.1f} (normalized score {common.normalized_score(env, returns).mean():.1f})"
    assert runs[env][1].startswith(f"{env}: {len(data)} transitions in {len(returns)} episodes, {text}; ")


@EACH
def test_evaluations_result_and_last_line(runs, env):
    folder, out = runs[env]
    assert (folder / "eval.csv").read_text().startswith("step,episode,return,length,normalized_score\n")
    rows = read_csv(folder / "eval.csv")
    expected = [(0, 0), (0, 1), (15, 0), (15, 1), (30, 0), (30, 1), (30, 2)]  # 2 episodes, 3 at the end
    assert [(int(r["step"]), int(r["episode"])) for r in rows] == expected
    returns = np.array([float(r["return"]) for r in rows])
    scores = np.array([float(r["normalized_score"]) for r in rows])
    np.testing.assert_allclose(scores, common.normalized_score(env, returns), atol=2e-2)
    assert {r["length"] for r in rows} == {"1" if env in common.TOYS else "5"}
    result = json.loads((folder / "result.json").read_text())
    keys = """method env seed step normalized_score normalized_score_std return return_std normalized_score_last5
              episodes steps_per_second train_seconds eval_seconds device"""
    assert result.keys() == set(keys.split())
    known = {"method": "swg", "env": env, "seed": 0, "step": 30, "episodes": 3}
    assert {k: result[k] for k in known} == known
    score, std = result["normalized_score"], result["normalized_score_std"]
    assert (score, std) == (pytest.approx(scores[4:].mean(), abs=2e-2), pytest.approx(scores[4:].std(), abs=2e-2))
    last = f"swg {env} seed 0: normalized score {score:.1f} +- {std:.1f} over 3 episodes at step 30 -> {folder}"
    assert out.splitlines()[-1] == last
    seconds = checkpoint(folder)["progress"]["seconds"]  # of both stages; the speed is of the main one
    assert list(seconds) == (["train"] if env in swg.BETA_TOYS else ["critic", "train"])
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
    main, of_paper = events(folder), env in swg.BETA_TOYS
    names = ["action", "weight", *(["gradient_norm"] if checkpoint(folder)["args"]["clip_norm"] else [])]
    logged = {f"losses/{k}" for k in names} | {"charts/lr", "charts/steps_per_second"}
    evals = {f"eval/{k}" for k in ("return", "normalized_score", "normalized_score_std", "normalized_score_last5")}
    assert main.keys() == logged | evals and ("losses/gradient_norm" in main) == of_paper
    assert all(list(main[tag]) == [5, 10, 15, 20, 25, 30] for tag in logged)
    assert all(list(main[tag]) == [0, 15, 30] for tag in evals)
    first = {} if of_paper else events(folder / "critic")
    names = "value critic v_mean q_mean advantage_std".split()
    charts = {"charts/lr", "charts/steps_per_second"}
    assert first.keys() == (set() if of_paper else {f"losses/{k}" for k in names} | charts)
    assert all(list(series) == [5, 10, 15, 20] for series in first.values())
    assert all(math.isfinite(v) for x in (main, first) for series in x.values() for v in series.values())
    args = checkpoint(folder)["args"]
    for step, value in main["charts/lr"].items():  # of update number step - 1
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / (args["lr_decay_steps"] or args["steps"])))
        assert value == pytest.approx(args["lr"] * cosine, rel=1e-5)


@EACH
def test_training_changes_every_parameter(runs, env):
    folder, _ = runs[env]
    content = checkpoint(folder)
    of_paper = env in swg.BETA_TOYS
    start = swg.agent_state(fresh_agent(swg.Args(**content["args"]), *SIZES[env]))
    nets = ("net", "net_ema", *(() if of_paper else CRITIC))
    optimisers = ("opt", *(() if of_paper else ("value_opt", "q_opt")))
    assert content["state"].keys() == start.keys() == {*nets, *optimisers, "step"}
    for name in nets:
        before, after = start[name].state_dict(), content["state"][name]
        kept = {k for k in before if torch.equal(before[k], after[k])}
        fixed = {"frequencies"} if of_paper else set()
        if env == "bandit-moons" and name == "value":  # the state is 0: V is its last bias
            fixed = before.keys() - {"2.bias"}
        if env == "bandit-moons" and name in ("q", "q_target"):  # only the row of the state
            assert (before["weights.0"][:, 0] == after["weights.0"][:, 0]).all()
        assert kept == fixed, name
    for name in optimisers:
        steps = {float(x["step"]) for x in content["state"][name]["state"].values()}
        assert steps == {30.0 if name == "opt" else 20.0}, name
    done = content["progress"]
    assert (done["stage"], done["step"], content["state"]["step"]) == ("train", 30, 30)
    assert done["done"] == (["train"] if of_paper else ["critic", "train"])


@EACH
def test_printed_weights(runs, argv_of, env):
    """Of every row, from the critic in the checkpoint: min target Q minus V, tau where it is positive."""
    folder, out = runs[env]
    if env in swg.BETA_TOYS:
        assert "weights (" not in out
        return
    args, agent, _ = saved_agent(folder)
    data = common.load_dataset(env, parsed(*argv_of[env]).data_path)
    with torch.no_grad():
        a = data.a.clamp(-1 + 1e-5, 1 - 1e-5)
        share = float((agent.judge(data.s, a) > agent.value(data.s)).double().mean())
    mean = args.tau * share + (1 - args.tau) * (1 - share)
    low, high = (1 - args.tau if share < 1 else args.tau), (args.tau if share > 0 else 1 - args.tau)
    text = f"mean {mean:.3f}, {low:.2g} to {high:.2g}, 0.0 % below w_min"
    assert weights_line(out) == f"weights (expectile): {text}; A > 0 in {100 * share:.1f} % of {len(data)} rows"
    assert args.tau == (0.9 if env == ANT else 0.7)


WEIGHTS = ("expectile", "smooth-expectile", "exponential", "linex", "dice", "hard")


@pytest.mark.parametrize("head", ["tap", "plain"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_weight_and_head_runs(tmp_path, kind, head):
    argv = [*SHORT, "--steps", 5, "--weight", kind, "--weight-max", 0.5, "--head", head, "--run-dir", tmp_path]
    out = trained(*argv)
    assert re.match(rf"weights \({kind}\): mean 0\.\d+, \S+ to 0\.5, ", weights_line(out))
    last = trained("--device", "cpu", "--eval-only", "--run-dir", tmp_path).splitlines()[-1]  # sizes from the file
    assert last == out.splitlines()[-1]


# --- the figures of the toys ------------------------------------------------------------------------------
def test_bandits_print_the_distance_to_exact_samples_and_its_floor(runs):
    """Again from the checkpoint, with other noise."""
    folder, out = runs["bandit-moons"]
    number = r"(\d+\.\d{4})"
    pattern = (
        rf"^energy distance to exact: {number} at rho 1, kappa 1, N 1; between two exact sample sets (-?{number})$"
    )
    ((distance, floor, _),) = re.findall(pattern, out, re.M)
    assert abs(float(floor)) < 0.01
    args, agent, A = saved_agent(folder)
    exact = swg.exact_samples(args, lambda r: r, 4000, 3)
    with torch.random.fork_rng([]):
        torch.manual_seed(6)
        x = swg.make_act(replace(args, rho=1.0, kappa=1.0, N=1), agent, A)(torch.zeros(4000, 1))
    assert float(distance) == pytest.approx(common.energy_distance(x, exact), rel=0.1)


def test_figure_of_a_bandit_shows_the_policy_as_it_acts(runs, tmp_path, monkeypatch):
    """Samples as the run is told to act, the distance at rho 1, kappa 1, N 1, the value field of the target Q."""
    settings, plots, real = [], [], swg.make_act

    def make_act(args, *rest):
        settings.append((args.rho, args.kappa, args.N))
        return real(args, *rest)

    monkeypatch.setattr(swg, "make_act", make_act)
    monkeypatch.setattr(swg, "plot_toy", lambda *what: plots.append(what))
    call_main(*TINY, "--steps", 2, "--env", "bandit-moons", "--rho", 5, "--N", 2, "--run-dir", tmp_path)
    folder = folder_of(tmp_path, "bandit-moons")
    assert settings == [(5.0, 1.0, 2), (1.0, 1.0, 1)]
    ((path, env, _, value, samples, _),) = plots
    assert (path, env, samples.shape) == (folder / "samples.png", "bandit-moons", (2000, 2))
    a, (_, agent, _) = torch.tensor([[0.3, -0.2], [1.0, 0.5]]), saved_agent(folder)
    torch.testing.assert_close(value(a), agent.q_target(torch.cat([torch.zeros(2, 1), a], 1)).amin(0).detach())


def test_figure_of_the_toys_of_the_paper(runs, tmp_path, monkeypatch):
    """Rows as printed by the run; exact mean energies of the sheet; beta = 0 is not guided."""
    folder, out = runs["toy-8gaussians"]
    args, agent, _ = saved_agent(folder)
    seen, real = [], swg.sample

    def sample(net, s, z, noise, sched, args):
        seen.append((float(s.unique()), args.rho))
        return real(net, s, z, noise, sched, args)

    monkeypatch.setattr(swg, "sample", sample)
    rows = swg.beta_figure(replace(args, rho=2.0), agent, tmp_path / "x.png", CPU)
    assert seen == [(3, 0), (1, 2), (5, 2), (10, 2), (15, 2)] and (tmp_path / "x.png").stat().st_size > 10_000
    for row, exact in zip(rows, (0.5, 0.6048, 0.8668, 0.9550, 0.9810)):
        assert row.keys() == {"env", "beta", "distance", "floor", "E", "E_exact"} and row["env"] == args.env
        assert all(math.isfinite(v) for k, v in row.items() if k != "env") and 0 <= row["E"] <= 1
        assert abs(row["floor"]) < 0.01 and row["distance"] > 0.05  # thirty steps teach nothing
        assert row["E_exact"] == pytest.approx(exact, abs=0.03)
    lines = re.findall(r"^env toy-8gaussians beta \d+ distance .* E_exact (\S+)$", out, re.M)
    assert lines == [f"{row['E_exact']:.4f}" for row in rows]


# --- interrupted in any stage -----------------------------------------------------------------------------
STOPS = [("pendulum-demo", stage, call) for stage in ("critic", "train") for call in (1, 13, 20)]


@pytest.mark.parametrize(("env", "stage", "call"), [*STOPS, ("toy-8gaussians", "train", 13), (ANT, "train", 30)])
def test_a_signal_inside_a_stage(runs, argv_of, tmp_path, monkeypatch, env, stage, call):
    """Saved at once; the run that goes on from there is the uninterrupted one, bit for bit."""
    argv, folder = [*argv_of[env], "--run-dir", tmp_path], folder_of(tmp_path, env)
    number, code = (signal.SIGTERM, 143) if call % 2 else (signal.SIGINT, 130)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupt(patch, "make_critic_update" if stage == "critic" else "make_update", call, number)
        call_main(*argv)
    assert stop.value.code == code
    progress = checkpoint(folder)["progress"]
    done = [] if stage == "critic" or env in swg.BETA_TOYS else ["critic"]
    assert (progress["stage"], progress["step"], progress["done"]) == (stage, call, done)
    steps = {int(r["step"]) for r in read_csv(folder / "eval.csv")}
    assert steps == (set(range(0, call, 15)) if stage == "train" else set())  # the critic's stage evaluates nothing
    out = call_main(*argv, "--resume")
    assert f"resuming {folder} at {stage} step {call}\n" in out
    assert_same_run(folder, runs[env][0])
    if env not in swg.BETA_TOYS:
        assert weights_line(out) == weights_line(runs[env][1])
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("where", ["inside", "between", "main"])
def test_killed_without_a_word(runs, killed, tmp_path, where):
    """The last checkpoint counts; the weights are made again from its critic."""
    folder = copy(killed[where], tmp_path)
    content = checkpoint(folder)
    progress = content["progress"]
    expected = {"inside": ("critic", 10, []), "between": ("critic", 20, ["critic"]), "main": ("train", 10, ["critic"])}
    assert (progress["stage"], progress["step"], progress["done"]) == expected[where]
    for path in folder.rglob("events*"):  # the second file must not sort before the first
        path.rename(path.with_name("events.out.tfevents.0000000001.host.0.0"))
    out = trained(*SHORT, "--run-dir", tmp_path, "--resume")
    assert_same_run(folder, runs["pendulum-demo"][0])
    assert weights_line(out) == weights_line(runs["pendulum-demo"][1])
    assert same(checkpoint(folder)["state"]["q"], content["state"]["q"]) == (where != "inside")
    assert list(events(folder / "critic")["losses/value"]) == [5, 10, 15, 20]  # every step once
    assert list(events(folder)["losses/action"]) == [5, 10, 15, 20, 25, 30]


def test_the_weights_that_the_model_learns_are_the_same_after_resuming(killed, tmp_path, monkeypatch):
    seen, real = [], swg.weigh
    monkeypatch.setattr(swg, "weigh", lambda *args: seen.append(real(*args)) or seen[-1])
    call_main(*SHORT, "--run-dir", tmp_path / "a")
    copy(killed["main"], tmp_path / "b")
    call_main(*SHORT, "--run-dir", tmp_path / "b", "--resume")
    assert torch.equal(*seen) and len(seen[0]) == len(common.load_dataset("pendulum-demo"))


def test_killed_for_real(tmp_path, monkeypatch):
    """SIGTERM in the critic's stage of a process that has only two files; then its advice is followed."""
    argv = [*TINY, "--critic-steps", 800, "--save-every", 50, "--log-every", 100]
    argv += ["--data-path", PENDULUM, "--eval-episodes", 1, "--final-episodes", 1, "--eval-every", 30]
    trained(*argv, "--run-dir", tmp_path / "whole")
    cwd = tmp_path / "a folder"
    cwd.mkdir()
    for name in ("swg.py", "common.py"):
        shutil.copy(ROOT / name, cwd)
    folder = folder_of(cwd / "my runs")
    nothing = {"PATH": str(cwd / "nothing here")}  # no git, no compiler
    child = process(*argv, "--run-dir", "my runs", "--overwrite", cwd=cwd, script="swg.py", env=nothing)
    wait_for(child, lambda: (folder / "last.pt").exists())
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (143, "")
    step, command = re.search(r"^stopped at critic step (\d+) of 800, saved; continue with: (.*)$", out, re.M).groups()
    progress = checkpoint(folder)["progress"]
    assert (progress["stage"], progress["step"]) == ("critic", int(step)) and int(step) < 800
    assert json.loads((folder / "args.json").read_text())["git_commit"] == ""
    python, script, *advice = shlex.split(command)
    assert (python, Path(script).name, advice[-1]) == ("python", "swg.py", "--resume") and "--overwrite" not in advice
    monkeypatch.chdir(cwd)
    trained(*advice)
    assert_same_run(folder, folder_of(tmp_path / "whole"))


def test_an_existing_run_is_kept_or_replaced(runs, tmp_path):
    folder = copy(runs["toy-8gaussians"][0], tmp_path)
    before = snapshot(folder)
    argv = [*TINY, "--env", "toy-8gaussians", "--run-dir", tmp_path]
    refused(*argv, says=[rf"{folder} holds a run", "--resume", "--overwrite"])
    refused(*argv, "--resume", "--overwrite", says=["give one of the two"])
    assert snapshot(folder) == before
    (folder / "leftover").touch()
    trained(*argv, "--overwrite")
    assert not (folder / "leftover").exists()
    assert_same_run(folder, runs["toy-8gaussians"][0])


@pytest.mark.parametrize(
    "text", ["critic-steps 25", "tau 0.8", "weight dice", "rho 4", "kappa 1", "hidden 8", "head plain", "N 1",
             "lr-decay-steps 31", "reward-shift 1", "weight-max 0.5", "pretrained nowhere"]
)  # fmt: skip
def test_resume_refuses_other_settings(killed, tmp_path, text):
    folder = copy(killed["main"], tmp_path)
    before = snapshot(folder)
    argv = f"--{text}".split()
    says = [argv[0][2:].replace("-", "_") + "=.*, not ", "same settings"]
    refused(*SHORT, *argv, "--run-dir", tmp_path, "--resume", says=says)
    assert snapshot(folder) == before


@pytest.mark.parametrize("mode", ["--resume", "--eval-only", "--pretrained"])
def test_a_checkpoint_of_another_method(runs, tmp_path, mode):
    folder = copy(runs["pendulum-demo"][0], tmp_path)
    torch.save(checkpoint(folder) | {"method": "dac"}, folder / "last.pt")
    before = snapshot(folder)
    says = [r"is of dac \(format 1\)", r"expected swg \(format 1\) on pendulum-demo"]
    refused(*SHORT, "--run-dir", tmp_path, mode, *([folder] if mode == "--pretrained" else []), says=says)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("option", "stage", "checkpoint_kept"), [("critic-lr", "critic", False), ("lr", "train", True)]
)  # fmt: skip
def test_a_loss_that_is_not_finite_stops_the_run(killed, tmp_path, option, stage, checkpoint_kept):
    last = folder_of(tmp_path) / "last.pt"
    good = f"last good checkpoint: {last}" if checkpoint_kept else "there is no checkpoint yet"
    says = [rf"losses/\w+ is (nan|inf) at {stage} step 5; {good}\. Try smaller learning rates"]
    refused(*SHORT, f"--{option}", "1e30", "--run-dir", tmp_path, says=says, code=1)
    assert last.exists() == checkpoint_kept
    if checkpoint_kept:
        ours, theirs = (checkpoint(x)["state"] for x in (last.parent, killed["between"]))
        assert all(same(ours[k], theirs[k]) for k in (*CRITIC, "net", "net_ema", "q_opt", "value_opt"))


# --- the critic of another run ----------------------------------------------------------------------------
@pytest.mark.parametrize("donor", ["finished", "between"])
def test_pretrained_takes_the_critic_and_leaves_it_alone(runs, killed, tmp_path, donor):
    source = runs["pendulum-demo"] if donor == "finished" else (killed["between"], runs["pendulum-demo"][1])
    theirs, before = checkpoint(source[0]), snapshot(source[0])
    free = ["--seed", 1, "--weight", "dice", "--critic-lr", 1e-5, "--critic-steps", 7, "--polyak", 0.5]
    out = trained(*SHORT, *free, "--pretrained", source[0], "--run-dir", tmp_path)
    folder = folder_of(tmp_path, seed=1)
    content = checkpoint(folder)
    assert all(same(content["state"][k], theirs["state"][k]) for k in CRITIC)
    assert content["state"]["q_opt"]["state"] == content["state"]["value_opt"]["state"] == {}  # never stepped
    assert content["progress"]["done"] == ["critic", "train"] and list(content["progress"]["seconds"]) == ["train"]
    assert not (folder / "critic").exists()
    share = r"A > 0 in \S+ % of \d+ rows"
    assert re.search(share, out)[0] == re.search(share, source[1])[0] and weights_line(out).startswith("weights (dice)")
    start = fresh_agent(swg.Args(**content["args"]), 3, 1).net.state_dict()  # the model is of this run's own seed
    moved = {k: float((content["state"]["net"][k] - v).abs().max()) for k, v in start.items()}
    assert 0 < min(moved.values()) and max(moved.values()) < 0.1  # 30 steps of 1e-3
    assert snapshot(source[0]) == before


def test_pretrained_is_needed_once(runs, tmp_path, monkeypatch):
    """A resumed run has the critic in its own checkpoint; the donor may be gone.  ~ is the home folder."""
    donor = copy(runs["pendulum-demo"][0], tmp_path / "donor")
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = [*SHORT, "--pretrained", f"~/{donor.relative_to(tmp_path)}"]
    call_main(*argv, "--run-dir", tmp_path / "a")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, "make_update", 14, signal.SIGTERM)
        call_main(*argv, "--run-dir", tmp_path / "b")
    shutil.rmtree(donor)
    call_main(*argv, "--run-dir", tmp_path / "b", "--resume")
    a, b = (checkpoint(folder_of(tmp_path / x)) for x in "ab")
    assert same(a["state"], b["state"]) and torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


def test_overwrite_a_run_with_its_own_critic(runs, tmp_path):
    """The main stage again, with other weights: the critic is read before the folder is deleted."""
    folder = copy(runs["pendulum-demo"][0], tmp_path)
    before = checkpoint(folder)["state"]
    trained(*SHORT, "--weight", "exponential", "--pretrained", folder, "--run-dir", tmp_path, "--overwrite")
    assert all(same(checkpoint(folder)["state"][k], before[k]) for k in CRITIC)
    assert checkpoint(folder)["args"]["weight"] == "exponential" and not (folder / "critic").exists()


WRONG = {  # further arguments -> what the message says
    "--tau 0.8": "trained with --tau 0.7, here 0.8",
    "--hidden 16 8": "trained with --hidden 16, here 16 8",
    "--discount 0.9": "trained with --discount 0.99, here 0.9",
    "--reward-scale none": "trained with --reward-scale range, here none",
    "--reward-shift -1": "trained with --reward-shift 0.0, here -1.0",
    "--layer-norm True": "trained with --layer-norm False, here True",
    "--tau 0.8 --discount 0.9": "trained with --tau 0.7, here 0.8, --discount 0.99, here 0.9; give the same",
    "--env bandit-moons": r"is of swg \(format \d\) on pendulum-demo; expected .* on bandit-moons",
    "--env toy-8gaussians --N 1": "--pretrained shares a critic, and toy-8gaussians has none",
    f"--eval-env Hopper-v5 --data-path {HOPPER} --layer-norm False": "other sizes; --pretrained takes a run of the",
    "unfinished": "has not done critic; give a run that has, or --resume that one",
    "nowhere": r"no checkpoint \S+nowhere/last\.pt",
}


@pytest.mark.parametrize("text", WRONG)
def test_pretrained_refuses_and_touches_nothing(runs, killed, tmp_path, text):
    donor = {"unfinished": killed["inside"], "nowhere": tmp_path / "nowhere"}.get(text, runs["pendulum-demo"][0])
    env = "bandit-moons" if "bandit" in text else "toy-8gaussians" if "toy" in text else "pendulum-demo"
    folder = copy(runs[env][0], tmp_path)
    before = snapshot(folder)
    argv = [*SHORT, *(text.split() if text.startswith("--") else []), "--pretrained", donor]
    for more in (["--overwrite", "--run-dir", tmp_path], ["--run-dir", tmp_path / "new"]):
        refused(*argv, *more, says=[WRONG[text]])
    assert snapshot(folder) == before and not (tmp_path / "new").exists()


# --- re-evaluation ----------------------------------------------------------------------------------------
SAMPLING = ("rho", "kappa", "N", "select", "beta", "factor", "log", "reverse", "w_min", "w_max")
OTHER = {  # a value that is not the run's
    "rho": 7.0, "kappa": 1.5, "N": 5, "select": "weight", "beta": 2.5, "factor": "exact", "log": "free",
    "reverse": "x0", "w_min": 0.01, "w_max": 0.4,
}  # fmt: skip


def returns_of(folder: Path, episodes: int, **settings) -> np.ndarray:
    """Of the policy in this checkpoint, under these settings of the sampler."""
    args, agent, A = saved_agent(folder)
    return swg.evaluate(swg.make_act(replace(args, **settings), agent, A), args, CPU, episodes)[0]


@pytest.mark.parametrize("env", ["pendulum-demo", "toy-8gaussians"])
def test_eval_only(runs, tmp_path, env):
    """Once without settings, then with each of SAMPLING alone, then with all: a row each, and nothing else changes."""
    assert swg.SAMPLING == SAMPLING and OTHER.keys() == set(SAMPLING)
    source = runs[env][0]
    folder, trained_with = copy(source, tmp_path), checkpoint(source)["args"]
    before = snapshot(folder)
    other = OTHER | ({} if env == "pendulum-demo" else {"reverse": "iterate", "select": "weight"})
    if env in swg.BETA_TOYS:  # N > 1 selects by Q, if nobody says otherwise
        refused("--env", env, "--run-dir", tmp_path, "--eval-only", "--N", 5, says=["no critic; give --select weight"])
        choices = [{}, *({k: v} for k, v in other.items() if k != "N"), other]
    else:
        choices = [{}, *({k: v} for k, v in other.items()), other]
    ignored = """--hidden 32 --weight dice --batch-size 3 --steps 7 --tau 0.2 --pretrained nowhere --overwrite --T 9
                 --critic-steps 1 --eval-every 1""".split()
    base = ["--env", env, "--run-dir", tmp_path, "--device", "cpu", "--eval-only", "--final-episodes", 12]
    for i, settings in enumerate(choices):
        given = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", v)]
        out = trained(*base, *given, *(ignored if i % 2 else []))
        row = read_csv(folder / "reeval.csv")[-1]
        expected = {k: trained_with[k] for k in SAMPLING} | settings
        assert {k: row[k] for k in SAMPLING} == {k: str(v) for k, v in expected.items()}
        assert (row["env"], row["seed"], row["step"], row["episodes"]) == (env, "0", "30", "12")
        assert row["eval_env"] == (trained_with["eval_env"] or "")
        returns = returns_of(folder, 12, **settings)
        assert float(row["return"]) == pytest.approx(returns.mean(), rel=1e-6)
        assert float(row["return_std"]) == pytest.approx(returns.std(), rel=1e-6, abs=1e-9)
        score, std = float(row["normalized_score"]), float(row["normalized_score_std"])
        text = f"swg {env} seed 0: normalized score {score:.1f} +- {std:.1f} over 12 episodes at step 30 -> {folder}"
        assert out.splitlines()[-1] == text
    rows = read_csv(folder / "reeval.csv")
    assert len(rows) == len(choices) and (folder / "reeval.csv").read_text().count("return_std") == 1
    changed = {k for s, row in zip(choices[1:], rows[1:]) for k in s if row["return"] != rows[0]["return"]}
    must = {"rho", "kappa", "reverse"} | ({"N", "select"} if env == "pendulum-demo" else {"beta"})
    assert must <= changed
    trained(*base)  # again: the same episodes, the same noise
    assert read_csv(folder / "reeval.csv")[-1] == rows[0]
    assert {k: v for k, v in snapshot(folder).items() if k != "reeval.csv"} == before


@EACH
def test_eval_only_without_settings_repeats_the_last_evaluation(runs, tmp_path, env):
    folder = copy(runs[env][0], tmp_path)
    out = trained("--env", env, "--run-dir", tmp_path, "--device", "cpu", "--eval-only")
    (row,) = read_csv(folder / "reeval.csv")
    result = json.loads((folder / "result.json").read_text())
    assert float(row["return"]) == pytest.approx(result["return"], rel=1e-4)
    assert "over 3 episodes at step 30" in out


def test_eval_only_of_a_run_without_a_policy(killed, tmp_path):
    for where in ("inside", "between"):
        folder = copy(killed[where], tmp_path / where)
        before = snapshot(folder)
        says = [f"{folder} has no policy yet", "main stage has not begun", "--resume"]
        refused("--run-dir", tmp_path / where, "--device", "cpu", "--eval-only", says=says)
        assert snapshot(folder) == before
    copy(killed["main"], tmp_path / "main")
    assert "at step 10 -> " in trained("--run-dir", tmp_path / "main", "--device", "cpu", "--eval-only")


@pytest.mark.parametrize("text", ["rho -1", "kappa nan", "N 0", "beta -1", "w-max 1e-4", "final-episodes 0"])
def test_numbers_that_make_no_sense_to_eval_only(runs, tmp_path, text):
    folder = copy(runs["pendulum-demo"][0], tmp_path)
    before = snapshot(folder)
    flag, value = f"--{text}".split()
    refused("--eval-only", "--device", "cpu", "--run-dir", tmp_path, flag, value, says=[f"{flag} is .*; expected "])
    assert snapshot(folder) == before


# --- rewards and actions ----------------------------------------------------------------------------------
def data_seen(monkeypatch, *argv):
    """The dataset as the critic gets it."""
    seen = []

    def make_critic_update(args, agent, data):
        seen.append(data)
        raise InterruptedError

    monkeypatch.setattr(swg, "make_critic_update", make_critic_update)
    with pytest.raises(InterruptedError):
        call_main(*TINY, *argv)
    return seen[0]


@pytest.mark.parametrize("shift", [0.0, -1.5])
@pytest.mark.parametrize("rule", ["range", "none"])
def test_rewards(uneven, tmp_path, monkeypatch, rule, shift):
    path, r = uneven
    kept, r64 = np.setdiff1d(np.arange(2999), [1200, 2800]), r.astype(float)  # no rows at time-outs, nor the last one
    sums = [r64[:701].sum(), r64[701:1200].sum(), r64[1201:2800].sum(), r64[2801:2999].sum()]
    factor = 1000 / (max(sums) - min(sums)) if rule == "range" else 1.0
    argv = ["--data-path", path, "--reward-scale", rule, "--reward-shift", shift, "--run-dir", tmp_path]
    got = data_seen(monkeypatch, *argv)
    np.testing.assert_allclose(got.r.numpy(), factor * (r64[kept] + shift), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("env", "shift"), [("hopper-medium-v2", 0), (ANT, -1), ("bandit-moons", 0)])
def test_rewards_and_actions_of_the_presets(ant_data, tmp_path, monkeypatch, env, shift):
    path = {"hopper-medium-v2": HOPPER, ANT: ant_data}.get(env)
    stored = common.load_dataset(env, path and str(path))
    returns = stored.returns()
    factor = 1000 / float(returns.max() - returns.min()) if env == "hopper-medium-v2" else 1
    got = data_seen(monkeypatch, "--env", env, "--run-dir", tmp_path, *(["--data-path", path] if path else []))
    torch.testing.assert_close(got.r, factor * (stored.r + shift))
    assert torch.equal(got.a, stored.a.clamp(-1 + 1e-5, 1 - 1e-5)) and got.a.abs().max() <= np.float32(1 - 1e-5)
    assert env != "hopper-medium-v2" or stored.a.abs().max() == 1  # there is something to clamp


def test_the_stored_toy_stays_as_it_is(tmp_path, monkeypatch):
    """common.py keeps a toy's tensors for all who ask."""
    before = [x.clone() for x in (common.toy_dataset("bandit-ring").r, common.toy_dataset("bandit-ring").a)]
    argv = ["--env", "bandit-ring", "--reward-shift", 3, "--reward-scale", "range", "--run-dir", tmp_path]
    got = data_seen(monkeypatch, *argv)
    after = [common.toy_dataset("bandit-ring").r, common.toy_dataset("bandit-ring").a]
    assert all(torch.equal(x, y) for x, y in zip(before, after)) and not torch.equal(got.r, before[0])


# --- bad input --------------------------------------------------------------------------------------------
NONSENSE = {  # what is expected -> what is given
    "> 0": """steps 0, steps -5, critic-steps 0, critic-batch-size 0, critic-lr 0, critic-lr nan, critic-lr inf,
              width 0, T 0, T -1, weight-factor 0, weight-factor nan, weight-factor inf, batch-size 0, batch-size -1,
              lr 0, lr -1e-3, lr nan, lr inf, N 0, N -1, w-min 0, w-min nan, log-every 0, eval-every 0,
              eval-episodes 0, final-episodes -2, save-every 0, input-scale 0, input-scale nan""",
    ">= 0": """rho -1, rho nan, rho inf, kappa -0.1, kappa nan, kappa inf, beta -1, beta nan, beta inf, weight-decay -1,
               weight-decay nan, clip-norm -1, clip-norm nan, clip-norm inf""",
    "in [0, 2^32)": "seed -1, seed 4294967296",
    "in [0, 1]": "discount 1.5, discount -0.1, discount nan",
    "in (0, 1)": "tau 0, tau 1, tau -0.5, tau nan",
    "in (0, 1]": """polyak 0, polyak 1.1, polyak nan, ema 0, ema 1.1, ema nan, weight-max 0, weight-max 1.1,
                    weight-max nan""",
    "in [0, 1)": "dropout -0.1, dropout 1, dropout nan",
    "above --w-min": "w-max 0, w-max 1e-4, w-max nan, w-max inf",
    ">= 2 with --head tap": "blocks 1, blocks 0, blocks -1",
    "0, or >= --steps": "lr-decay-steps 29, lr-decay-steps -1",
    "one or more positive widths": "hidden 0, hidden 16 -1",
    "a finite number": "reward-shift nan, reward-shift inf",
}
NONSENSE = {text: want for want, texts in NONSENSE.items() for text in re.split(r",\s+", texts)}


@pytest.mark.parametrize("text", NONSENSE)
def test_numbers_that_make_no_sense(tmp_path, text):
    flag, *values = f"--{text}".split()
    value = getattr(parsed(flag, *values), flag[2:].replace("-", "_"))
    says = ["^swg.py: " + re.escape(f"{flag} is {value}; expected {NONSENSE[text]}") + "$"]
    refused(*TINY, flag, *values, "--run-dir", tmp_path, says=says)
    assert list(tmp_path.iterdir()) == []


def test_every_number_is_among_them():
    """0 is nonsense or a limit of every numeric option: none may be forgotten."""
    numeric = {f.name for f in fields(swg.Args) if re.search(r"\b(int|float)\b", f.type)}
    assert numeric == {text.split()[0].replace("-", "_") for text in NONSENSE}


def test_limits_are_allowed():
    limits = dict(discount=1.0, polyak=1.0, ema=1.0, weight_max=1.0, kappa=0.0, rho=0.0, beta=0.0, dropout=0.0, N=1,
                  weight_decay=0.0, clip_norm=0.0, T=1, seed=2**32 - 1, blocks=1, head="plain", steps=8,
                  lr_decay_steps=8, w_max=2.0, hidden=(1,), reward_shift=-1e3)  # fmt: skip
    args = swg.resolve(swg.Args(**limits))
    assert {k: getattr(args, k) for k in limits} == limits
    assert swg.resolve(swg.Args(discount=0.0)).discount == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [("--size paper", "--size paper is for toy-spiral and toy-8gaussians"),
     ("--size paper --env hopper-medium-v2", "every D4RL name has the released sizes anyway"),
     ("--env bandit-moons --size paper", "--size paper is for"),
     ("--env toy-spiral --pretrained x", "--pretrained shares a critic, and toy-spiral has none; leave it out"),
     ("--env toy-spiral --N 4", "--N 4 selects by Q, and toy-spiral has no critic; give --select weight"),
     ("--env toy-8gaussians --N 2 --select q", "--N 2 selects by Q, and toy-8gaussians has no critic"),
     ("--head plain --blocks 0", "--blocks is 0; expected >= 1 with --head plain"),
     ("--w-min 1", "--w-max is 1.0; expected above --w-min"),
     ("--env hopper-medium-v2 --steps 4000000", "--lr-decay-steps is 3000000; expected 0, or >= --steps"),
     ("--env toy-spiral --beta 25", r"--beta is 25.0; expected in \[0, 24\]"),
     ("--resume --overwrite", "--resume continues a run, --overwrite deletes it"),
     ("--graph on --device cpu", "--graph on records CUDA graphs, and this run is on the CPU"),
     ("--env hopper-meduim-v2", "unknown --env 'hopper-meduim-v2'.*hopper-medium-v2"),
     (f"--data-path {HOPPER}", r"data has sizes .*\(11, 3\), the task \(3, 1\).*--env"),
     (f"--env bandit-two --data-path {PENDULUM}", r"data has sizes .*\(3, 1\), the task \(1, 2\)"),
     (f"--env toy-spiral --data-path {PENDULUM}", r"data has sizes .*\(3, 1\), the task \(1, 2\)")],
)  # fmt: skip
def test_what_does_not_fit_together(tmp_path, text, says):
    refused(*text.split(), "--run-dir", tmp_path, says=[says])
    assert list(tmp_path.iterdir()) == []


def test_toys_of_the_paper_select_by_weight(tmp_path):
    out = trained(*TINY, "--env", "toy-spiral", "--N", 3, "--select", "weight", "--steps", 2, "--run-dir", tmp_path)
    assert len(re.findall(r"^(?:env )?toy-spiral .*distance ", out, re.M)) == 5


# --- presets ----------------------------------------------------------------------------------------------
LOCOMOTION = [f"{task}-{kind}-v2" for task in ("halfcheetah", "hopper", "walker2d")
              for kind in ("medium", "medium-replay", "medium-expert")]  # fmt: skip
MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split()
PAPER = [*LOCOMOTION, *(f"antmaze-{maze}-v0" for maze in MAZES)]
PAPER += [f"kitchen-{kind}-v0" for kind in ("complete", "partial", "mixed")]
PAPER += [f"{task}-{kind}-v0" for task in ("pen", "hammer", "door", "relocate") for kind in ("human", "cloned")]


def test_the_presets_are_of_the_datasets_of_the_paper():
    assert len(PAPER) == 26 and swg.PRESETS.keys() == {*PAPER, *common.DEMOS, *common.TOYS}
    assert set(PAPER) == {name for name in common.FILES if re.fullmatch(common.PAPERS["SWG"], name)}
    assert set(swg.BETA_TOYS) == {name for name in common.TOYS if re.fullmatch(common.PAPERS["SWG"], name)}


@pytest.mark.parametrize("env", PAPER)
def test_presets_of_the_paper(env):
    """As released; rho is ours."""
    args = swg.resolve(swg.Args(env=env))
    ant = env.startswith("antmaze")
    expected = dict(
        steps=1_000_000, critic_steps=1_000_000, critic_batch_size=256, critic_lr=3e-4, hidden=(256, 256), polyak=0.005,
        discount=0.99, tau=0.9 if ant else 0.7, weight="expectile", weight_max=0.9 if ant else 0.7,
        width=256, blocks=3, head="tap", dropout=0.1, schedule="vp", T=15, weight_factor=1, batch_size=1024, lr=3e-4,
        lr_decay_steps=3_000_000, weight_decay=1e-4, clip_norm=0, ema=0.001, rho=10, kappa=0, N=1, select="q",
        factor="released", log="clip", reverse="iterate", w_min=1e-4, w_max=1, reward_shift=-1 if ant else 0,
        reward_scale="range" if env in LOCOMOTION else "none", eval_every=200_000, eval_episodes=20)  # fmt: skip
    assert {k: getattr(args, k) for k in expected} == expected


@pytest.mark.parametrize("env", swg.BETA_TOYS)
def test_sizes_of_the_toys_of_the_paper(env):
    args = swg.resolve(swg.Args(env=env, size="paper"))
    expected = dict(steps=200_000, width=512, blocks=6, lr=2e-5, batch_size=1024, schedule="cosine", T=100, rho=1,
                    kappa=1, weight_factor=2, weight_decay=0.01, reverse="x0", unit="one", log="free",
                    input_scale=1)  # fmt: skip
    assert {k: getattr(args, k) for k in expected} == expected
    assert args.lr_decay_steps > 1000 * args.steps  # the released rate is constant
    ours = swg.resolve(swg.Args(env=env))
    assert (
        ours.size == "cpu" and ours.width < 512 and ours.steps < 200_000 and (ours.T, ours.schedule) == (100, "cosine")
    )
    assert swg.resolve(swg.Args(env=env, size="paper", width=64)).width == 64


@pytest.mark.parametrize("env", swg.PRESETS)
def test_every_preset_names_known_fields_and_the_command_line_wins(env):
    names = {f.name: f for f in fields(swg.Args)}
    assert swg.PRESETS[env].keys() | swg.TOY_PAPER.keys() <= swg.PAPER.keys() <= names.keys()
    assert all(names[k].default is None for k in swg.PAPER)  # else a preset would never be read
    args = swg.resolve(swg.Args(env=env))
    for k, v in (swg.PAPER | swg.PRESETS[env]).items():
        assert getattr(args, k) == v and type(v).__name__ in names[k].type.replace("Literal", "str")
    assert args.weight_max == args.tau
    unset = {"data_path", "data_url", "eval_env", "pretrained", "layer_norm"}  # layer_norm: where S is known [D8]
    assert {k for k in names if getattr(args, k) is None} == unset
    given = dict(tau=0.6, steps=77, rho=0.5, kappa=0.25, reward_shift=0.5, hidden=(5,), reward_scale="range", T=2,
                 layer_norm=True, log="free", reverse="iterate", factor="exact")  # fmt: skip
    args = swg.resolve(swg.Args(env=env, **given))
    assert {k: getattr(args, k) for k in given} == given and args.weight_max == 0.6
    assert swg.resolve(swg.Args(env=env, weight_max=0.5)).weight_max == 0.5


# --- compiled ---------------------------------------------------------------------------------------------
NO_COMPILER = not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
def test_compiled_run_is_the_plain_one(runs, tmp_path, monkeypatch):
    """Both updates, traced as for --compile on; the C++ that inductor would make of them: test_swg.py."""
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn: compiled.append(fn) or real(fn, backend="aot_eager"))
    trained(*SHORT, "--compile", "on", "--run-dir", tmp_path)
    assert len(compiled) == 2
    ours, plain = (tensors(checkpoint(x)["state"]) for x in (folder_of(tmp_path), runs["pendulum-demo"][0]))
    for k, v in plain.items():
        torch.testing.assert_close(ours[k], v, rtol=1e-3, atol=1e-4)


def test_compile_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = [*SHORT, "--compile", "on", "--run-dir", tmp_path / "runs"]
    refused(*argv, says=["--compile on needs a C\\+\\+ compiler", "leave it out"])


# --- documentation ----------------------------------------------------------------------------------------
COMMANDS = [(page, words) for page, words in documented() if Path(words[1]).name == "swg.py"]
COMMANDS += [("docstring", shlex.split(text)) for text in re.findall(r"python swg\.py[^(\n]*", swg.__doc__)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page} {shlex.join(words)}" for page, words in COMMANDS])
def test_documented_commands_parse(page, words):
    check_command(words)


@pytest.mark.skipif(not (ROOT / "docs" / "swg.md").exists(), reason="docs/swg.md is not written yet")
def test_the_documentation_has_commands():
    assert "swg.md" in {page for page, _ in COMMANDS}


def test_help_explains_every_field():
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|\s", "", out)  # without colours, frames and line breaks
    body = (ROOT / "swg.py").read_text().split("class Args:")[1].split("\n\n\n")[0]
    texts = dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""$', body, re.M | re.S))
    assert list(texts) == [f.name for f in fields(swg.Args)]
    for name, text in texts.items():
        assert len(text) > 4 and f"--{name.replace('_', '-')}" in plain
        assert re.sub(r"\s", "", text) in plain, f"the help text of {name} is not shown"
