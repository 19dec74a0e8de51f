"""What a run of dydiff.py does: three models, rollouts, three base algorithms, borrowed models, the models' judgement.

The text that dac.py has too (Run, save, load, evaluate ...) is tested in test_runs.py; here stands what is new.
`cli` runs the script as `python dydiff.py` does, but in this process; `call_main` calls `main` of the module, where a
test has put something of its own. Most runs are evaluated in tasks of five steps (test_diffusion_dice_runs.py).
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
import sys
from dataclasses import fields
from itertools import product
from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import pytest
import test_diffusion_dice_runs as dice
import torch
import tyro
from test_diffusion_dice_runs import events, same
from test_runs import check_command, checkpoint, documented, full_after, read_csv, snapshot, tensors

import common
import dydiff
from common import UserError

ROOT = Path(__file__).resolve().parent.parent
PENDULUM, HOPPER = (ROOT / "data" / f"{name}-demo.hdf5" for name in ("pendulum", "hopper"))
CPU = torch.device("cpu")
TINY = """--device cpu --steps 24 --model-steps 20 --dynamics-steps 20 --reward-steps 20 --H 8 --channels 8 16 --b 8
          --M 1 --N 3 --rollout-every 8 --batch-size 16 --hidden 16 --policy-hidden 16 --dynamics-hidden 16
          --reward-hidden 16 --E 3 --elites 2 --capacity 200 --model-batch-size 4 --synther-width 16 --synther-rows 100
          --candidates 2 --log-every 4 --eval-every 12 --eval-episodes 2 --final-episodes 3 --save-every 10""".split()
SHORT = [*TINY, "--eval-env", "ShortPendulum-v0"]
BASES, AUGMENTS = ("td3bc", "cql", "diffql"), ("dydiff", "single-step", "synther", "none")
EACH = pytest.mark.parametrize(("base", "augment"), list(product(BASES, AUGMENTS)))
STAGES = {"dydiff": ["diffusion", "dynamics", "reward"], "single-step": ["dynamics", "reward"],
          "synther": ["synther"], "none": []}  # fmt: skip
PARTS = dict(unet=("dydiff", "synther"), unet_ema=("dydiff", "synther"), ensemble=("dydiff", "single-step"),
             ensemble_best=("dydiff", "single-step"), ensemble_fit=("dydiff", "single-step"),
             reward=("dydiff", "single-step"), reward_best=("dydiff", "single-step"),
             reward_fit=("dydiff", "single-step"), ring=("dydiff", "single-step", "synther"))  # fmt: skip
MODELS = (
    "unet",
    "unet_ema",
    "seen",
    "ensemble",
    "ensemble_best",
    "ensemble_fit",
    "reward",
    "reward_best",
    "reward_fit",
)
one_thread = dice.one_thread  # fixture


# --- helpers ----------------------------------------------------------------------------------------------
def cli(*argv) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python dydiff.py argv`."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["dydiff.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "dydiff.py"), run_name="__main__")
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
    assert len(err.splitlines()) == 1 and err.startswith("dydiff.py: "), err
    for pattern in says:
        assert re.search(pattern, err), f"{pattern!r} is not in {err!r}"
    assert got == code


def parsed(*argv) -> dydiff.Args:
    return tyro.cli(dydiff.Args, args=[str(x) for x in argv])


def call_main(*argv) -> str:
    """stdout of dydiff.main in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        dydiff.main(parsed(*argv))
    return out.getvalue()


def interrupt(monkeypatch, stage: str, call: int, number: int) -> None:
    """A signal arrives during call `call` (from 1) of the update of a stage."""
    real, calls = dydiff.Run.train, []

    def train(run, name, steps, update, act=None):
        def interrupted(i):
            calls.append(i)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return update(i)

        return real(run, name, steps, interrupted if name == stage else update, act)

    monkeypatch.setattr(dydiff.Run, "train", train)


def folder_of(run_dir: Path, env: str = "pendulum-demo", seed: int = 0) -> Path:
    return run_dir / env / "dydiff" / f"seed{seed}"


def copy(folder: Path, run_dir: Path) -> Path:
    """A run folder copied below another --run-dir."""
    return Path(shutil.copytree(folder, folder_of(run_dir, folder.parents[1].name)))


def fresh_agent(args: dydiff.Args, S: int = 3, A: int = 1) -> dydiff.Agent:
    """What a run of these arguments starts from."""
    with torch.random.fork_rng([]):
        torch.manual_seed(args.seed)
        return dydiff.make_agent(args, S, A, CPU)


def assert_same_run(a: Path, b: Path) -> None:
    """The same checkpoint bit for bit and the same evaluations; only clocks and folders may differ."""
    x, y = checkpoint(a), checkpoint(b)
    assert {"/rng/cpu", "/state/frames/mean", "/state/q_opt/state/0/exp_avg", "/state/filled"} <= tensors(x).keys()
    assert len(tensors(x)) > 60 and same(x, y)
    free = {"run_dir", "resume", "overwrite"}
    assert [k for k in x["args"] if k not in free and x["args"][k] != y["args"][k]] == []
    clocks = {"seconds", "eval_seconds"}
    progress = [{k: v for k, v in content["progress"].items() if k not in clocks} for content in (x, y)]
    assert progress[0] == progress[1] and x["progress"]["seconds"].keys() == y["progress"]["seconds"].keys()
    assert (a / "eval.csv").read_text() == (b / "eval.csv").read_text()


def judgement(out: str) -> list[str]:
    return [line for line in out.splitlines() if re.match("models on|  |warning", line)]


def part_of_pendulum(path: Path, rows: int, ends: bool = True) -> Path:
    with h5py.File(PENDULUM) as file, h5py.File(path, "w") as small:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            small[key] = file[key][:rows] if ends or key[0] != "t" else np.zeros(rows, bool)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The first twenty episodes of pendulum-demo: an epoch of the ensemble has eleven steps."""
    return part_of_pendulum(tmp_path_factory.mktemp("small") / "small.hdf5", 4000)


@pytest.fixture(scope="module")
def argv(small) -> list:
    return [*SHORT, "--data-path", small]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, argv):
    """(base, augment) -> (folder, stdout) of a finished run. Not to be changed: `copy` it."""

    @functools.cache
    def run(base: str, augment: str) -> tuple[Path, str]:
        run_dir = tmp_path_factory.mktemp(f"{base}-{augment}")
        out = trained(*argv, "--base", base, "--augment", augment, "--run-dir", run_dir)
        return folder_of(run_dir), out

    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory, argv):
    """(augment, saves) -> folder of a run that a full disk ends after so many checkpoints."""

    @functools.cache
    def run(augment: str, saves: int) -> Path:
        run_dir = tmp_path_factory.mktemp("killed")
        with pytest.MonkeyPatch.context() as monkeypatch:
            full_after(saves, monkeypatch)
            assert cli(*argv, *OF[augment], "--run-dir", run_dir)[0] == 1
        return folder_of(run_dir)

    return run


OF = {"dydiff": ["--base", "td3bc", "--augment", "dydiff"], "synther": ["--base", "diffql", "--augment", "synther"]}


# --- every base algorithm with every kind of data ---------------------------------------------------------
@EACH
def test_folder_and_stages(runs, base, augment):
    folder, out = runs(base, augment)
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    logs = {name for name in names if "events.out.tfevents" in name}
    assert sorted(str(Path(name).parent) for name in logs) == sorted([".", *STAGES[augment]])
    assert names - logs == {"args.json", "eval.csv", "last.pt", "result.json", "curve.png"}
    progress = checkpoint(folder)["progress"]
    assert progress["done"] == list(progress["seconds"]) == [*STAGES[augment], "train"]
    assert (progress["stage"], progress["step"]) == ("train", 24)
    steps = [(int(row["step"]), int(row["episode"])) for row in read_csv(folder / "eval.csv")]
    assert steps == [(0, 0), (0, 1), (12, 0), (12, 1), (24, 0), (24, 1), (24, 2)]
    assert json.loads((folder / "result.json").read_text())["method"] == "dydiff"
    assert out.splitlines()[-1].endswith(f" over 3 episodes at step 24 -> {folder}")
    (following,) = re.findall(r"^next: (python .*?)  ", out, re.M)
    check_command(shlex.split(following))
    assert out.startswith("pendulum-demo: 3980 transitions in 20 episodes, average return ")
    assert len(judgement(out)) >= {"dydiff": 5, "single-step": 2}.get(augment, 0)
    assert bool(judgement(out)) == (augment in ("dydiff", "single-step"))


@EACH
def test_parameters_of_what_must_learn_change(runs, base, augment):
    content = checkpoint(runs(base, augment)[0])
    state = content["state"]
    start = fresh_agent(dydiff.Args(**content["args"]))
    assert state.keys() == dydiff.agent_state(start).keys()
    assert all((k in state) == (augment in augments) for k, augments in PARTS.items())
    assert ("log_alpha" in state) == ("alpha_opt" in state) == (base == "cql")
    nets = {k: v for k, v in dydiff.agent_state(start).items() if isinstance(v, torch.nn.Module)}
    waits = {"cql": "policy_target", "diffql": "policy_target"}  # unused; averaged from step 1000 on
    for name, net in nets.items():
        kept = {k for k, v in net.state_dict().items() if torch.equal(v, state[name][k])} - {"elites", "alpha_bar"}
        assert kept == (set(net.state_dict()) - {"alpha_bar"} if name == waits.get(base) else set()), name
    optimisers = {"unet_opt": 20, "ensemble_opt": 20, "reward_opt": 20, "q_opt": 24, "alpha_opt": 24}
    optimisers["policy_opt"] = 12 if base == "td3bc" else 24
    for name in optimisers.keys() & state.keys():
        assert {float(x["step"]) for x in state[name]["state"].values()} == {optimisers[name]}, name
    if augment in ("dydiff", "single-step"):  # the best weights are restored, the best networks chosen
        assert same(state["ensemble"]["heads.weights.0"], state["ensemble_best"]["heads.weights.0"])
        assert same(state["reward"], state["reward_best"])
        assert state["ensemble"]["elites"].tolist() == state["ensemble_fit"][:3].argsort()[:2].tolist()
        assert state["ensemble_fit"].isfinite().all() and state["reward_fit"].isfinite().all()
    assert float(state["seen"]) == {"dydiff": 80, "synther": 320}.get(augment, 0)


LOSSES = {"td3bc": {"critic", "q_mean", "actor"}, "cql": {"critic", "gap", "actor", "alpha", "q_mean"},
          "diffql": {"critic", "actor", "cloning", "q_mean"}}  # fmt: skip
ROLLOUT = "seconds share_of_time network_calls gflop rows reward_sum reward_sum_kept terminal filled".split()


@EACH
def test_tensorboard_of_every_stage(runs, base, augment):
    folder, _ = runs(base, augment)
    main, rolls = events(folder), augment in ("dydiff", "single-step")
    logged = {f"losses/{k}" for k in LOSSES[base]} | {"charts/steps_per_second", "charts/lr"}
    evals = {f"eval/{k}" for k in ("return", "normalized_score", "normalized_score_std", "normalized_score_last5")}
    assert main.keys() == logged | evals | ({f"rollout/{k}" for k in ROLLOUT} if rolls else set())
    assert all(list(main[k]) == ([0, 12, 24] if k in evals else [4, 8, 12, 16, 20, 24]) for k in main)
    series = [main]
    for stage in STAGES[augment]:
        series.append(events(folder / stage))
        name = "diffusion" if stage == "synther" else stage
        more = set() if name == "diffusion" else {f"losses/{stage}_holdout"}
        assert series[-1].keys() == {f"losses/{name}", "charts/steps_per_second", "charts/lr"} | more
        assert list(series[-1][f"losses/{name}"]) == [4, 8, 12, 16, 20]
        if more:  # checks at steps 11 and 20
            assert list(series[-1][f"losses/{stage}_holdout"]) == [12, 16, 20]
    assert all(math.isfinite(v) for found in series for values in found.values() for v in values.values())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("augment", ["dydiff", "single-step"])
def test_cost_and_outcome_of_rollouts(runs, base, augment):
    """At most int(0.6 * 8) = 4 trajectories of L = 7 transitions at updates 0, 8 and 16; 2 N - 1 = 5 calls, M times."""
    folder, _ = runs(base, augment)
    found = {k: list(events(folder)[f"rollout/{k}"].values()) for k in ROLLOUT}
    assert set(found["network_calls"]) == {5.0 if augment == "dydiff" else 0.0}
    assert all((x > 0) == (augment == "dydiff") for x in found["gflop"]) and len(set(found["gflop"])) == 1
    assert all(0 < x <= 28 for x in found["rows"]) and set(found["terminal"]) == {0}  # Pendulum never ends
    assert all(0 < x < 1 for x in found["share_of_time"]) and all(x > 0 for x in found["seconds"])
    for k in found:  # logged at steps 4, 8 | 12, 16 | 20, 24
        assert found[k][::2] == found[k][1::2]
    assert found["filled"][::2] == np.cumsum(found["rows"][::2]).tolist()
    ring, filled = checkpoint(folder)["state"]["ring"], int(found["filled"][-1])
    assert (ring[:filled, :3] != 0).any(1).all() and not ring[filled:].any() and not ring[:, -1].any()


def test_the_network_is_called_as_often_as_the_log_says(argv, tmp_path, monkeypatch):
    """--M 2 --N 4: 2 * 7 calls per rollout, for all trajectories at once; of the averaged network alone."""
    calls, real = [], dydiff.denoise
    monkeypatch.setattr(dydiff, "denoise", lambda net, x, *rest: calls.append((net, len(x))) or real(net, x, *rest))
    agents, make = [], dydiff.make_agent
    monkeypatch.setattr(dydiff, "make_agent", lambda *args: agents.append(make(*args)) or agents[-1])
    monkeypatch.setattr(dydiff, "report_models", lambda *args: calls.clear())
    call_main(*argv, "--M", 2, "--N", 4, "--b", 6, "--steps", 9, "--log-every", 2, "--run-dir", tmp_path)
    assert len(calls) == 2 * 2 * 7 and all(net is agents[0].unet_ema and n == 6 for net, n in calls)
    assert set(events(folder_of(tmp_path))["rollout/network_calls"].values()) == {14.0}


def test_synther_fills_the_ring_once(runs):
    """min(--synther-rows, --capacity) rows of whole transitions with terminal flags of 0 or 1."""
    state = checkpoint(runs("cql", "synther")[0])["state"]
    assert float(state["filled"]) == float(state["place"]) == 100 and state["ring"].shape == (200, 9)
    assert state["ring"][:100].isfinite().all() and set(state["ring"][:, -1].tolist()) <= {0.0, 1.0}
    assert len(state["ring"][:100].unique(dim=0)) == 100 and not state["ring"][100:].any()


# --- bandits ----------------------------------------------------------------------------------------------
def test_bandit_with_its_preset(tmp_path):
    out = trained(*TINY, "--env", "bandit-moons", "--run-dir", tmp_path)
    folder = folder_of(tmp_path, "bandit-moons")
    content = checkpoint(folder)
    assert (content["args"]["base"], content["args"]["augment"]) == ("diffql", "none") and "next:" not in out
    assert content["progress"]["done"] == ["train"] and {p.name for p in folder.iterdir() if p.is_dir()} == set()
    for name in ("curve.png", "samples.png"):
        image = matplotlib.image.imread(folder / name)
        assert min(image.shape[:2]) > 200 and len(np.unique(image[::5, ::5].reshape(-1, image.shape[2]), axis=0)) > 20


@pytest.mark.parametrize("augment", ["dydiff", "single-step", "synther"])
def test_bandits_have_nothing_to_roll_out(tmp_path, augment):
    says = ["bandit-two has episodes of one step", "--augment none"]
    refused(*TINY, "--env", "bandit-two", "--augment", augment, "--run-dir", tmp_path, says=says)
    assert list(tmp_path.iterdir()) == []


# --- interrupted in any stage -----------------------------------------------------------------------------
STOPS = {
    "dydiff": dict(diffusion=(13, 20), dynamics=(10, 11), reward=(12,), train=(8, 9, 13, 24)),
    "synther": dict(synther=(7,), train=(1, 13)),
}
STOPS = [(augment, stage, i) for augment, x in STOPS.items() for stage, calls in x.items() for i in calls]


@pytest.mark.parametrize(("augment", "stage", "call"), STOPS)
def test_a_signal_inside_a_stage(runs, argv, tmp_path, monkeypatch, augment, stage, call):
    """Saved at once: before and after a check of the hold-out, before, after and between rollouts.  The run that goes
    on from there is the uninterrupted one, bit for bit."""
    argv, folder = [*argv, *OF[augment], "--run-dir", tmp_path], folder_of(tmp_path)
    whole, out = runs(OF[augment][1], augment)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupt(patch, stage, call, signal.SIGTERM if call % 2 else signal.SIGINT)
        call_main(*argv)
    assert stop.value.code == (143 if call % 2 else 130)
    progress, order = checkpoint(folder)["progress"], [*STAGES[augment], "train"]
    assert (progress["stage"], progress["step"], progress["done"]) == (stage, call, order[: order.index(stage)])
    again = call_main(*argv, "--resume")
    assert f"resuming {folder} at {stage} step {call}\n" in again and judgement(again) == judgement(out)
    assert_same_run(folder, whole)
    assert list(tmp_path.rglob("*.part")) == []


SAVES = [("dydiff", 2, "diffusion", 20), ("dydiff", 4, "dynamics", 20), ("dydiff", 6, "reward", 20),
         ("dydiff", 7, "train", 10), ("synther", 2, "synther", 20), ("synther", 3, "train", 10)]  # fmt: skip


@pytest.mark.parametrize(("augment", "saves", "stage", "step"), SAVES)
def test_killed_without_a_word(runs, killed, argv, tmp_path, augment, saves, stage, step):
    """The last checkpoint counts: of the end of a stage, before best weights are restored or rows are generated."""
    folder = copy(killed(augment, saves), tmp_path)
    progress = checkpoint(folder)["progress"]
    assert (progress["stage"], progress["step"], stage in progress["done"]) == (stage, step, stage != "train")
    trained(*argv, *OF[augment], "--run-dir", tmp_path, "--resume")
    assert_same_run(folder, runs(OF[augment][1], augment)[0])


@pytest.mark.parametrize("stage", ["dynamics", "reward"])
def test_a_stopped_regression_stays_stopped(tmp_path, monkeypatch, stage):
    """Weights that cannot move: the first check improves, the eight after it do not; what is left does nothing."""
    argv = [*SHORT, "--data-path", part_of_pendulum(tmp_path / "x.hdf5", 600), "--augment", "single-step"]
    argv += ["--dynamics-lr", 1e-30, "--reward-lr", 1e-30]
    call_main(*argv, "--run-dir", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, stage, 13, signal.SIGTERM)
        call_main(*argv, "--run-dir", tmp_path / "cut")
    net = "ensemble" if stage == "dynamics" else "reward"
    state = checkpoint(folder_of(tmp_path / "cut"))["state"]
    assert state[f"{net}_fit"][-2:].tolist() == [8, 1] and state[f"{net}_fit"].isfinite().all()
    call_main(*argv, "--run-dir", tmp_path / "cut", "--resume")
    assert_same_run(folder_of(tmp_path / "cut"), folder_of(tmp_path / "whole"))
    state = checkpoint(folder_of(tmp_path / "cut"))["state"]
    for name in ("ensemble_opt", "reward_opt"):
        assert {float(x["step"]) for x in state[name]["state"].values()} == {9}
    found = events(folder_of(tmp_path / "cut") / stage)  # nothing was computed that could be logged
    assert list(found["charts/steps_per_second"]) == [4, 8, 12, 16, 20] and list(found[f"losses/{stage}"]) == [4, 8, 12]


@pytest.mark.parametrize("text", ["holdout 0.5", "base cql", "augment single-step", "H 16", "eta 0.5", "elites 1",
                                  "correction replace", "terminate clipped", "pretrained nowhere"])  # fmt: skip
def test_resume_refuses_other_settings(killed, argv, tmp_path, text):
    folder = copy(killed("dydiff", 7), tmp_path)
    before = snapshot(folder)
    says = [text.split()[0] + "=.*, not ", "same settings"]
    refused(*argv, *f"--{text}".split(), "--run-dir", tmp_path, "--resume", says=says)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("option", "stage"), [("model-lr", "diffusion"), ("dynamics-lr", "dynamics"), ("reward-lr", "reward"),
                          ("lr", "train")]
)  # fmt: skip
def test_a_loss_that_is_not_finite_stops_the_run(argv, tmp_path, option, stage):
    last = folder_of(tmp_path) / "last.pt"
    good = "there is no checkpoint yet" if stage == "diffusion" else f"last good checkpoint: {last}"
    says = [rf"losses/\w+ is (nan|-?inf) at {stage} step 4; {good}\. Try smaller learning rates"]
    refused(*argv, f"--{option}", "1e30", "--run-dir", tmp_path, says=says, code=1)
    assert last.exists() == (stage != "diffusion")


# --- the models of another run ----------------------------------------------------------------------------
TAKES = [("cql", "dydiff", "td3bc", "dydiff"), ("diffql", "single-step", "td3bc", "dydiff"),
         ("td3bc", "single-step", "cql", "single-step"), ("td3bc", "synther", "diffql", "synther")]  # fmt: skip


@pytest.mark.parametrize(("base", "augment", "their_base", "theirs"), TAKES)
def test_pretrained_takes_the_models_and_leaves_them_alone(runs, argv, tmp_path, base, augment, their_base, theirs):
    """Between seeds and base algorithms; what is set anew concerns the rest."""
    donor, before = runs(their_base, theirs)[0], snapshot(runs(their_base, theirs)[0])
    free = ["--seed", 1, "--model-steps", 7, "--dynamics-lr", 1e-5, "--reward-steps", 3, "--N", 2, "--b", 5, "--M", 2]
    unused = {"single-step": ["--H", 4, "--channels", 8], "synther": ["--H", 4, "--E", 2, "--holdout", 0]}
    free += unused.get(augment, [])  # settings of models that are not taken
    call = [*argv, "--base", base, "--augment", augment, *free, "--pretrained", donor, "--run-dir", tmp_path]
    out = trained(*call)
    folder = folder_of(tmp_path, seed=1)
    ours, state = checkpoint(folder), checkpoint(donor)["state"]
    taken = [k for k in MODELS if k in ours["state"] and not (k == "seen" and augment == "single-step")]
    assert len(taken) == {"dydiff": 9, "single-step": 6, "synther": 3}[augment]
    assert all(same({"": ours["state"][k]}, {"": state[k]}) for k in taken)
    assert all(ours["state"][f"{k}_opt"]["state"] == {} for k in ("unet", "ensemble", "reward") if k in ours["state"])
    assert ours["progress"]["done"] == [*STAGES[augment], "train"] and list(ours["progress"]["seconds"]) == ["train"]
    assert not any(p.is_dir() for p in folder.iterdir()) and snapshot(donor) == before
    assert (augment != "synther") == bool(judgement(out))
    start = fresh_agent(dydiff.Args(**ours["args"]))  # the policy is of this run's own seed
    moved = max(float((v - start.q.state_dict()[k]).abs().max()) for k, v in ours["state"]["q"].items())
    assert 0 < moved < 0.1  # 24 steps of 1e-3


def test_models_of_a_run_stopped_right_after_them(runs, killed, argv, tmp_path):
    """Its checkpoint holds the last weights of the reward network, and which networks are best is not yet told."""
    for name, donor in (("a", killed("dydiff", 6)), ("b", runs("td3bc", "dydiff")[0])):
        trained(*argv, *OF["dydiff"], "--pretrained", donor, "--run-dir", tmp_path / name)
    a, b = (checkpoint(folder_of(tmp_path / x)) for x in "ab")
    assert same(a["state"], b["state"])


def test_pretrained_is_needed_once(runs, argv, tmp_path, monkeypatch):
    """A resumed run has the models in its own checkpoint; the donor may be gone.  ~ is the home folder."""
    donor = copy(runs("td3bc", "dydiff")[0], tmp_path / "donor")
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = [*argv, "--seed", 1, "--pretrained", f"~/{donor.relative_to(tmp_path)}"]
    call_main(*argv, "--run-dir", tmp_path / "a")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, "train", 14, signal.SIGTERM)
        call_main(*argv, "--run-dir", tmp_path / "b")
    shutil.rmtree(donor)
    call_main(*argv, "--run-dir", tmp_path / "b", "--resume")
    a, b = (checkpoint(folder_of(tmp_path / x, seed=1)) for x in "ab")
    assert same(a["state"], b["state"]) and torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


WRONG = {  # further arguments -> what the message says
    "--H 16": "--H 8, here 16; give the same",
    "--channels 8 8": "--channels 8 16, here 8 8",
    "--scale-conditions True": "--scale-conditions False, here True",
    "--dynamics-hidden 8": "--dynamics-hidden ",
    "--E 4": "--E 3, here 4",
    "--elites 1": "--elites 2, here 1",
    "--reward-hidden 8 8": "--reward-hidden ",
    "--holdout 0": r"--holdout 0.05, here 0.0",
    "--H 4 --E 2": "--E 3, here 2, --H 8, here 4; give the same",
    "--env hopper-demo": r"is of dydiff \(format \d\) on pendulum-demo; expected .* on hopper-demo",
    f"--eval-env Hopper-v5 --data-path {HOPPER}": "other sizes; --pretrained takes a run of the same task",
    f"--data-path {PENDULUM}": "other data",
    "--augment synther": "has not done synther; give a run that has",
    "--augment none": "--augment none has no models to take",
    "synther": "has not done diffusion, dynamics, reward; give a run that has",
    "single-step": "has not done diffusion; give",
    "unfinished": "has not done reward; give a run that has, or --resume that one",
    "nowhere": r"no checkpoint \S+nowhere/last\.pt",
}


@pytest.mark.parametrize("text", WRONG)
def test_pretrained_refuses_and_touches_nothing(runs, killed, argv, tmp_path, text):
    donor = tmp_path / "nowhere"
    if text == "unfinished":
        donor = killed("dydiff", 4)
    elif text != "nowhere":
        donor = runs("diffql", text)[0] if text in AUGMENTS else runs("td3bc", "dydiff")[0]
    folder = copy(runs("td3bc", "dydiff")[0], tmp_path)
    if "hopper-demo" in text:
        argv = TINY
    before = snapshot(tmp_path)
    argv = [*argv, *(text.split() if text.startswith("--") else []), "--pretrained", donor]
    refused(*argv, "--overwrite", "--run-dir", tmp_path, says=[WRONG[text]])
    assert snapshot(tmp_path) == before and folder.exists()


# --- re-evaluation ----------------------------------------------------------------------------------------
def returns_of(folder: Path, episodes: int, **settings) -> np.ndarray:
    """Of the policy in this checkpoint, under these settings."""
    content = checkpoint(folder)
    args = dydiff.Args(**(content["args"] | settings))
    agent = fresh_agent(args)
    with torch.random.fork_rng([]):
        dydiff.restore(dydiff.agent_state(agent), content)
    return dydiff.evaluate(dydiff.make_act(args, agent, 1), args, CPU, episodes)[0]


@pytest.mark.parametrize(("base", "augment"), [("diffql", "dydiff"), ("cql", "single-step"), ("td3bc", "none")])
def test_eval_only(runs, tmp_path, monkeypatch, base, augment):
    """A row each, nothing else changes, and no data is read.  Only Diffusion-QL has something to set."""
    assert dydiff.SAMPLING == ("candidates",)
    folder = copy(runs(base, augment)[0], tmp_path)
    before, argv = snapshot(folder), ["--run-dir", tmp_path, "--device", "cpu", "--eval-only"]
    monkeypatch.setattr(common, "load_raw", lambda *args: pytest.fail("the data was read"))
    ignored = "--hidden 32 --base cql --augment synther --steps 7 --M 3 --pretrained nowhere --overwrite".split()
    given = {}, {"candidates": 1}, {"candidates": 7}
    for settings in given:
        more = [word for k, v in settings.items() for word in (f"--{k}", v)]
        out = trained(*argv, "--final-episodes", 6, *more, *(ignored if settings else []))
        row, returns = read_csv(folder / "reeval.csv")[-1], returns_of(folder, 6, **settings)
        expected = {"env": "pendulum-demo", "seed": "0", "step": "24", "episodes": "6", "eval_env": "ShortPendulum-v0"}
        expected["candidates"] = str(settings.get("candidates", 2))
        assert {k: row[k] for k in expected} == expected and row["length"] == "5.0"
        assert float(row["return"]) == pytest.approx(returns.mean(), rel=1e-6)
        score, std = float(row["normalized_score"]), float(row["normalized_score_std"])
        text = f"normalized score {score:.1f} +- {std:.1f} over 6 episodes at step 24 -> {folder}"
        assert out.splitlines()[-1] == f"dydiff pendulum-demo seed 0: {text}"
    rows = read_csv(folder / "reeval.csv")
    assert len({row["return"] for row in rows}) == (3 if base == "diffql" else 1) and len(rows) == 3
    assert {k: v for k, v in snapshot(folder).items() if k != "reeval.csv"} == before
    trained(*argv)  # as the run itself at its end
    result = json.loads((folder / "result.json").read_text())
    assert float(read_csv(folder / "reeval.csv")[-1]["return"]) == pytest.approx(result["return"], rel=1e-4)
    refused(*argv, "--candidates", 0, says=["--candidates is 0; expected > 0"])


@pytest.mark.parametrize("saves", [1, 4, 6])
def test_eval_only_of_a_run_without_a_policy(killed, tmp_path, saves):
    folder = copy(killed("dydiff", saves), tmp_path)
    before = snapshot(folder)
    says = [f"{folder} has no policy yet", "main stage has not begun", "--resume"]
    refused("--run-dir", tmp_path, "--device", "cpu", "--eval-only", says=says)
    assert snapshot(folder) == before


# --- how good the models are ------------------------------------------------------------------------------
def judged(capsys, useful: bool, monkeypatch, *more) -> list[str]:
    """States that stay where they are for a model that knows it, states that jump for one that was never trained."""
    args = dydiff.resolve(parsed(*TINY, *more))
    agent, g = fresh_agent(args), torch.Generator().manual_seed(0)
    rows = 2 * torch.rand(64, 1 if useful else 8, 4, generator=g) - 1
    windows = torch.cat([rows.expand(-1, 8, -1)[..., :3], 2 * torch.rand(64, 8, 1, generator=g) - 1], -1)
    with torch.no_grad():
        agent.frames.fit(*(windows.flatten(0, 1)[:, i] for i in (slice(3), slice(3), slice(3, 4))))
        s, a = agent.frames.to_model(windows[..., :3]), agent.frames.action_to_model(windows[..., 3:])
        windows = torch.cat([s, a], -1)
        if useful:
            for p in (agent.ensemble.heads.weights[-1], agent.ensemble.heads.biases[-1]):
                p.zero_()
            stay = lambda net, x, *_: torch.cat([x[:, :1, :3].expand(-1, 8, -1), x[..., 3:]], -1)  # noqa: E731
            monkeypatch.setattr(dydiff, "denoise", stay)
    before = torch.get_rng_state()
    dydiff.report_models(args, agent, windows, useful)
    assert torch.equal(torch.get_rng_state(), before)
    return capsys.readouterr().out.splitlines()


def test_a_perfect_model_is_not_warned_of(capsys, monkeypatch):
    lines = judged(capsys, True, monkeypatch)
    assert lines[0] == "models on 64 held-out windows, squared error of states (data: 1):"
    assert [line[2:15].strip() for line in lines[1:]] == ["ensemble", "diffusion", "mean of both", "denoising"]
    for line in lines[1:4]:
        assert all(float(x) < 1e-6 for x in re.findall(r"step \d (\S+?)(?:,|$)", line))
    errors = {float(k): float(v) for k, v in re.findall(r"sigma (\S+) ([\d.e-]+)", lines[4])}
    assert errors.keys() == {80, 10, 1} and max(errors.values()) < 1e-6 and re.search(r"variance 0\.3", lines[4])


def test_a_useless_model_is_warned_of(capsys, monkeypatch):
    lines = judged(capsys, False, monkeypatch)
    assert lines[0] == "models on 64 training windows, squared error of states (data: 1):"
    assert lines[5].startswith("warning: the diffusion model ignores its conditions: train longer")
    for line, name in zip(lines[6:], ["ensemble", "diffusion", "mean of both"], strict=True):
        assert line == f"warning: after 7 steps the {name} is no better than the data's mean; its rollouts do harm"
    lines = judged(capsys, False, monkeypatch, "--augment", "single-step")
    assert len(lines) == 3 and lines[1].startswith("  ensemble ") and lines[2].startswith("warning: after 7 steps")


def test_no_trajectory_is_long_enough_to_judge(argv, tmp_path):
    argv = [*argv, "--augment", "single-step", "--H", 256, "--steps", 2, "--dynamics-steps", 2, "--reward-steps", 2]
    out = trained(*argv, "--run-dir", tmp_path)
    assert "note: no trajectory has 256 rows: models not judged\n" in out and judgement(out) == []


@pytest.mark.parametrize("mode", ["new", "--overwrite"])
@pytest.mark.parametrize("why", ["no end", "holdout"])
def test_data_without_a_trajectory_to_train_on(runs, argv, tmp_path, why, mode):
    """One line, before the run's folder is touched."""
    if mode == "--overwrite":
        copy(runs("td3bc", "dydiff")[0], tmp_path / "runs")
    more, says = ["--holdout", 0.99], ["--holdout 0.99 leaves no trajectory of 20 to train on; give less"]
    if why == "no end":
        more = ["--data-path", part_of_pendulum(tmp_path / "x.hdf5", 300, ends=False)]
        says = ["no trajectory of the data ends", "terminal or time-out"]
    before = snapshot(tmp_path)
    refused(*argv, *more, *([mode] if mode != "new" else []), "--run-dir", tmp_path / "runs", says=says)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_held_out_trajectories_are_in_no_training_data(small, share):
    """Neither in windows nor in the regressions' transitions; the same ones for every seed."""
    raw = common.load_raw("pendulum-demo", str(small))
    raw.s[:, 0] = np.arange(len(raw.s))  # every row is known by its first state
    data, found = common.transitions(raw), []
    for seed in (0, 1):
        args = dydiff.resolve(parsed(*TINY, "--holdout", share, "--seed", seed))
        agent = fresh_agent(args)
        np.random.seed(seed)
        with torch.no_grad():
            agent.frames.fit(data.s, torch.from_numpy(raw.s), torch.from_numpy(raw.a))
        found.append(dydiff.prepare(args, agent.frames, raw, torch.cat([data.s, data.a], 1)))
    train, held, rows = found[0]
    index = lambda x: agent.frames.from_model(x[..., :3]).round()[..., 0].long()  # noqa: E731
    out = set((index(held[:, 0]) // 200).tolist())
    assert len(out) == round(20 * share) and len(held) == min(256, 193 * len(out)) and held.shape[1:] == (8, 4)
    assert (index(held).diff(dim=1) == 1).all() and torch.equal(held, found[1][1])
    assert set((train.start // 200).tolist()) == set((rows[:, 0].long() // 200).tolist()) == set(range(20)) - out
    assert len(train) == 193 * (20 - len(out)) and len(rows) == 199 * (20 - len(out))


# --- bad input --------------------------------------------------------------------------------------------
NONSENSE = {  # what is expected -> what is given
    "> 0": """steps 0, model-steps 0, dynamics-steps -1, reward-steps 0, batch-size 0, lr 0, lr nan, lr inf,
              policy-lr 0, policy-lr nan, alpha-bc 0, alpha-bc nan, candidates 0, rollout-every 0, b 0, L 0, L -1,
              capacity 0, H 0, model-batch-size 0, model-lr 0, model-lr nan, model-warmup 0, ema-half-life 0,
              dynamics-lr 0, reward-lr -1, E 0, elites 0, synther-width 0, synther-rows 0,
              filter-temperature 0, filter-temperature inf, log-every 0, eval-every 0, eval-episodes 0,
              final-episodes -2, save-every 0""",
    ">= 0": """M -1, S-churn -1, S-churn nan, S-churn inf, cql-weight -1, cql-weight nan, eta-q -1, eta-q inf,
               clip-norm -1, clip-norm nan""",
    "in [0, 2^32)": "seed -1, seed 4294967296",
    "in [0, 1]": "discount 1.5, discount -0.1, discount nan, real-ratio -0.1, real-ratio 1.1, real-ratio nan",
    "in (0, 1]": "polyak 0, polyak 1.1, polyak nan, eta 0, eta 1.1, eta nan",
    "in [0, 1)": "holdout 1, holdout -0.1, holdout nan",
    "less than H": "L 8, L 99",
    "at most --E": "elites 4, E 1",
    "a multiple of 2": "H 7, H 9",
    "one or more positive multiples of 8 (group norm)": "channels 12, channels 0 8, channels -8, channels",
    "at least 2": "N 1, N 0",
    "enough that --eta keeps one": "b 1",
    "one or more positive widths": """hidden 0, hidden, policy-hidden -1, policy-hidden, dynamics-hidden 0,
                                      dynamics-hidden, reward-hidden 16 -1, reward-hidden""",
}
NONSENSE = {text: want for want, texts in NONSENSE.items() for text in re.split(r",\s+", texts)}


@pytest.mark.parametrize("text", NONSENSE)
def test_numbers_that_make_no_sense(text):
    flag, *values = f"--{text}".split()
    if text == "E 1":
        flag, shown = "--elites", 2
    else:
        shown = getattr(parsed(flag, *values), flag[2:].replace("-", "_"))
    says = "^" + re.escape(f"{flag} is {shown}; expected {NONSENSE[text]}")
    with pytest.raises(UserError, match=says) as stop:
        dydiff.resolve(parsed(*TINY, *f"--{text}".split()))
    assert stop.value.code == 2 and "\n" not in str(stop.value)


def test_every_number_is_among_them():
    """0 is nonsense or a limit of every numeric option: none may be forgotten."""
    numeric = {f.name for f in fields(dydiff.Args) if re.search(r"\b(int|float)\b", f.type)}
    assert numeric == {text.split()[0].replace("-", "_") for text in NONSENSE}


@pytest.mark.parametrize(
    ("text", "says"),
    [("--L 8", "--L is 8; expected less than H"),
     ("--eta 0.1", "--(b|eta) is .*expected "),  # int(0.1 * 8) trajectories stay
     ("--channels 8 16 32 --H 6", "--H is 6; expected a multiple of 4"),
     ("--resume --overwrite", "--resume continues a run, --overwrite deletes it"),
     ("--graph on", "--graph on records CUDA graphs, and this run is on the CPU"),
     ("--base sac", "sac"), ("--augment mopo", "mopo"),
     ("--env hopper-meduim-v2 --eval-env Hopper-v5", "unknown --env 'hopper-meduim-v2'.*hopper-medium-v2"),
     (f"--data-path {HOPPER}", r"data has sizes .*\(11, 3\), the task \(3, 1\).*--env"),
     ("--data-path nowhere.hdf5", "no such file: nowhere.hdf5")],
)  # fmt: skip
def test_what_is_refused_on_the_command_line(tmp_path, text, says):
    if text.split()[-1] in ("sac", "mopo"):  # tyro's own words
        code, _, err = cli(*SHORT, *text.split(), "--run-dir", tmp_path)
        assert code == 2 and says in err
    else:
        refused(*SHORT, *text.split(), "--run-dir", tmp_path, says=[says])
    assert list(tmp_path.iterdir()) == []


def test_limits_are_allowed():
    limits = dict(discount=1.0, polyak=1.0, real_ratio=0.0, eta=1.0, holdout=0.0, M=0, S_churn=0.0, cql_weight=0.0,
                  eta_q=0.0, clip_norm=0.0, seed=2**32 - 1, H=2, L=1, E=1, elites=1, channels=(8,), N=2,
                  hidden=(1,), policy_hidden=(1,), dynamics_hidden=(1,), reward_hidden=(1,))  # fmt: skip
    args = dydiff.resolve(dydiff.Args(**limits))
    assert {k: getattr(args, k) for k in limits} == limits


# --- presets ----------------------------------------------------------------------------------------------
LOCOMOTION = [f"{task}-{kind}-v2" for task in ("halfcheetah", "hopper", "walker2d")
              for kind in ("medium", "medium-replay", "medium-expert")]  # fmt: skip
PAPER = [*LOCOMOTION, *(f"maze2d-{size}-v1" for size in ("umaze", "medium", "large"))]


def test_the_presets_are_of_the_datasets_of_the_paper():
    assert len(PAPER) == 12 and dydiff.PRESETS.keys() == {*PAPER, *common.DEMOS, *common.TOYS}
    assert set(PAPER) == {name for name in common.FILES if re.fullmatch(common.PAPERS["DyDiff"], name)}


@pytest.mark.parametrize("env", PAPER)
def test_presets_of_the_paper(env):
    """2000 epochs of 500 steps; 3,000k windows by 8; warm-up 10,000k windows."""
    args = dydiff.resolve(dydiff.Args(env=env))
    expected = dict(
        steps=2000 * 500, rollout_every=500, batch_size=256, real_ratio=0.6, b=2048, H=100, L=99, M=2, eta=0.6,
        filter="softmax", filter_temperature=0.05, correction="average", capacity=2_000_000, base="td3bc",
        augment="dydiff", alpha_bc=2.5, cql_weight=10.0, eta_q=1.0, clip_norm=5.0, candidates=50, discount=0.99,
        polyak=0.005, hidden=(256, 256), lr=3e-4, model_steps=3_000_000 // 8, model_batch_size=8, model_lr=1e-3,
        model_warmup=10_000_000, model_cosine=False, ema_half_life=500_000, channels=(128, 512, 1024), loss_mask=False,
        scale_conditions=True, rewrite=False, N=34, S_churn=60, dtype="float32",
        E=7, elites=5, dynamics_hidden=(200,) * 4, dynamics_lr=1e-4,
        reward_hidden=(256, 256), reward_lr=1e-4, holdout=0.0, stop_at_padding=False, terminate="unclipped",
    )  # fmt: skip
    assert {k: getattr(args, k) for k in expected} == expected
    for base, hidden, lr in (("td3bc", 2, 3e-4), ("cql", 2, 3e-5), ("diffql", 3, 3e-4)):
        args = dydiff.resolve(dydiff.Args(env=env, base=base))
        assert (args.policy_hidden, args.policy_lr) == ((256,) * hidden, lr)
    args = dydiff.resolve(dydiff.Args(env=env, base="diffql", hidden=(32, 16), lr=1e-3))
    assert (args.policy_hidden, args.policy_lr) == ((32, 16, 16), 1e-3)
    args = dydiff.resolve(dydiff.Args(env=env, base="cql", policy_hidden=(9,), policy_lr=7.0, H=40, augment="synther"))
    assert (args.policy_hidden, args.policy_lr, args.L, args.M) == ((9,), 7.0, 39, 2)
    assert dydiff.resolve(dydiff.Args(env=env, augment="single-step")).M == 0


@pytest.mark.parametrize("env", dydiff.PRESETS)
def test_every_preset_names_known_fields_and_the_command_line_wins(env):
    names = {f.name: f for f in fields(dydiff.Args)}
    free = {"policy_hidden", "policy_lr", "L"}  # follow others
    assert dydiff.PRESETS[env].keys() - free <= dydiff.PAPER.keys() <= names.keys()
    assert all(names[k].default is None for k in (*dydiff.PAPER, *free))  # else a preset would never be read
    args = dydiff.resolve(dydiff.Args(env=env))
    for k, v in (dydiff.PAPER | dydiff.PRESETS[env]).items():
        assert getattr(args, k) == v and type(v).__name__ in names[k].type.replace("Literal", "str"), k
    assert {k for k in names if getattr(args, k) is None} == {"data_path", "data_url", "eval_env", "pretrained"}
    given = dict(steps=77, b=5, M=4, eta=0.5, H=16, L=3, channels=(8, 16), N=5, holdout=0.2, scale_conditions=False,
                 rewrite=True, stop_at_padding=True, policy_lr=0.5, base="cql", augment="none", S_churn=0)  # fmt: skip
    args = dydiff.resolve(dydiff.Args(env=env, **given))
    assert {k: getattr(args, k) for k in given} == given
    given = {k: not v if isinstance(v, bool) else v for k, v in given.items()}
    assert dydiff.resolve(dydiff.Args(env=env, **given)).rewrite is False


# --- compiled ---------------------------------------------------------------------------------------------
NO_COMPILER = not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("base", "augment", "pieces"), [("td3bc", "dydiff", 6), ("cql", "none", 1), ("diffql", "none", 1)]
)
def test_compiled_run_is_the_plain_one(argv, tmp_path, monkeypatch, base, augment, pieces):
    """Traced as for --compile on: three models, the network in rollouts, td3bc with and without its policy."""
    argv = [*argv, "--base", base, "--augment", augment]
    argv += "--steps 4 --model-steps 2 --dynamics-steps 2 --reward-steps 2 --channels 8 --eval-every 4".split()
    call_main(*argv, "--run-dir", tmp_path / "plain")
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn: compiled.append(fn) or real(fn, backend="aot_eager"))
    call_main(*argv, "--compile", "on", "--run-dir", tmp_path / "compiled")
    assert len(compiled) == pieces
    ours, plain = (tensors(checkpoint(folder_of(tmp_path / x))["state"]) for x in ("compiled", "plain"))
    for k, v in plain.items():
        torch.testing.assert_close(ours[k], v, rtol=1e-3, atol=1e-4)


# --- documentation ----------------------------------------------------------------------------------------
COMMANDS = [(page, words) for page, words in documented() if Path(words[1]).name == "dydiff.py"]
COMMANDS += [("docstring", shlex.split(text)) for text in re.findall(r"python dydiff\.py[^(\n]*", dydiff.__doc__)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page} {shlex.join(words)}" for page, words in COMMANDS])
def test_documented_commands_parse(page, words):
    check_command(words)


@pytest.mark.skipif(not (ROOT / "docs" / "dydiff.md").exists(), reason="docs/dydiff.md is not written yet")
def test_the_documentation_has_commands():
    assert {"docstring", "dydiff.md"} <= {page for page, _ in COMMANDS}


def test_help_explains_every_field():
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|\s", "", out)  # without colours, frames and line breaks
    body = (ROOT / "dydiff.py").read_text().split("class Args:")[1].split("\n\n\n")[0]
    texts = dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""$', body, re.M | re.S))
    assert list(texts) == [f.name for f in fields(dydiff.Args)]
    for name, text in texts.items():
        assert len(text) > 4 and f"--{name.replace('_', '-')}" in plain
        assert re.sub(r"\s", "", text) in plain, f"the help text of {name} is not shown"
