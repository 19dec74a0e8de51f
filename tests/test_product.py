"""What README promises beyond the methods: a file copied out runs, its example and its diff work, its numbers are those
of the committed evaluations, a trained policy loads, a video is written or refused in one line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import dac
import diffusion_dice
import dydiff
import swg

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"dac": dac, "diffusion_dice": diffusion_dice, "swg": swg, "dydiff": dydiff}
README = (ROOT / "README.md").read_text()
FEW = "--eval-every 20 --eval-episodes 2 --final-episodes 2 --log-every 20".split()
STAGES = {"dac": [], "diffusion_dice": ["--behavior-steps", "20"], "swg": ["--critic-steps", "20"],
          "dydiff": ["--augment", "none"]}  # fmt: skip


def start(folder: Path, *words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)  # nothing of the repository but what lies in the folder
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def train(folder: Path, script: str, env: str, *words: str) -> subprocess.CompletedProcess:
    stages = STAGES.get(script.removesuffix(".py"), [])
    return start(folder, script, "--env", env, "--steps", "20", "--run-dir", "runs", *FEW, *stages, *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder in which each script has trained a few steps of pendulum-demo."""
    folder = tmp_path_factory.mktemp("trained")
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copy(ROOT / "common.py", folder)
    shutil.copytree(ROOT / "data", folder / "data")
    for name in SCRIPTS:
        done = train(folder, f"{name}.py", "pendulum-demo")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_and_common_are_all_that_a_run_needs(tmp_path, name):
    for file in (f"{name}.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    done = train(tmp_path, f"{name}.py", "bandit-two")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "bandit-two" / name / "seed0" / "samples.png").exists()


def test_common_is_the_only_module_of_ours_that_a_script_imports():
    for name in SCRIPTS:
        found = set(re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.M))
        ours = {path.stem for path in ROOT.glob("*.py")} | {"tests", "benchmark"}
        assert found & ours == {"common"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_load_policy_is_the_policy_that_was_evaluated(trained, name, monkeypatch):
    module, folder = SCRIPTS[name], trained / "runs" / "pendulum-demo" / name / "seed0"
    monkeypatch.chdir(trained)
    act, args, step = module.load_policy(folder, device="cpu")
    returns, _ = module.evaluate(act, args, torch.device("cpu"), 2)
    rows = (folder / "eval.csv").read_text().split()[1:]
    assert step == 20 and args.env == "pendulum-demo"
    assert returns == pytest.approx([float(r.split(",")[2]) for r in rows if r.startswith("20,")], abs=1e-3)
    assert act(torch.zeros(5, 3)).shape == (5, 1)


def test_load_policy_takes_sampling_settings_and_refuses_nonsense(trained):
    folder = trained / "runs" / "pendulum-demo" / "dac" / "seed0"
    assert dac.load_policy(folder, device="cpu", N_a=3)[1].N_a == 3
    with pytest.raises(common.UserError, match="--N-a is 0"):
        dac.load_policy(folder, device="cpu", N_a=0)
    with pytest.raises(common.UserError, match="is of dac"):
        swg.load_policy(folder, device="cpu")
    with pytest.raises(common.UserError, match="no checkpoint"):
        dac.load_policy(folder / "elsewhere")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", SCRIPTS)
def test_graphed_acting_equals_eager_past_the_recording(trained, name):
    """Nine batches: five run eagerly, the sixth records, three replay; and another number of rows in between."""
    folder, found = trained / "runs" / "pendulum-demo" / name / "seed0", []
    for graph in ("off", "on"):
        act = SCRIPTS[name].load_policy(folder, device="cuda", graph=graph)[0]
        torch.manual_seed(0)
        found.append([act(torch.randn(n, 3, device="cuda")).clone() for n in (4, 4, 4, 4, 4, 4, 2, 4, 4, 4)])
    for eager, graphed in zip(*found):
        torch.testing.assert_close(graphed, eager, atol=1e-4, rtol=1e-4)


def test_the_example_of_the_readme_runs(trained):
    section = README.partition("## Using a trained policy")[2]
    (trained / "example.py").write_text(re.search(r"```python\n(.*?)```", section, re.S)[1])
    done = start(trained, "example.py")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"return -\d+\.\d of the policy after 20 steps\n", done.stdout)


def test_the_diff_of_the_readme_applies_and_changes_what_is_learned(trained, tmp_path):
    """A block of - lines stands once in dac.py; with the + lines in its place the method runs, and learns otherwise."""
    patch = re.search(r"```diff\n--- dac.py\n\+\+\+ my_method.py\n(.*?)```", README, re.S)[1]
    source = (ROOT / "dac.py").read_text()
    blocks = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", patch, re.M)
    assert len(blocks) == 2
    for old, new in ([re.sub(r"^[-+]", "", x, flags=re.M) for x in block] for block in blocks):
        assert source.count(old) == 1, f"not once in dac.py: {old}"
        source = source.replace(old, new)
    (tmp_path / "my_method.py").write_text(source)
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    done = train(tmp_path, "my_method.py", "pendulum-demo")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        torch.load(folder / "runs/pendulum-demo" / name / "seed0/last.pt", weights_only=True)["state"]["actor"]
        for folder, name in ((tmp_path, "my_method"), (trained, "dac"))
    )
    assert ours.keys() == theirs.keys() and any((ours[k] != theirs[k]).any() for k in ours)


# --- video ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_video_is_written_or_one_line_says_what_is_missing(trained, name):
    words = f"{name}.py --eval-only --video --run-dir runs --final-episodes 2".split()
    done = start(trained, *words)
    lines, folder = done.stdout.splitlines(), trained / "runs" / "pendulum-demo" / name / "seed0"
    assert done.returncode == 0, done.stderr
    assert lines[-1].startswith(f"{name} pendulum-demo seed 0: normalized score")
    if lines[-2].startswith("video: "):
        assert [p.stat().st_size > 1000 for p in (folder / "video").glob("*.mp4")] == [True]
    else:
        assert re.match(r"no video: .*(install|display|render)", lines[-2])


def test_a_video_shows_one_whole_episode_from_the_first_start(trained, tmp_path, monkeypatch):
    """RecordVideo sees every state of the policy's episode; nothing else is recorded."""
    seen = []

    class Recorder(common.gym.Wrapper):
        def __init__(self, env, folder, **options):
            super().__init__(env)
            seen.append((folder, options["name_prefix"]))

        def reset(self, **options):
            seen.append(options)
            return self.env.reset(**options)

        def step(self, a):
            seen.append(a)
            return self.env.step(a)

    monkeypatch.setattr(dac.gym.wrappers, "RecordVideo", Recorder)
    monkeypatch.setattr(dac, "make_env", lambda name, eval_env, render_mode=None: common.make_env(name, eval_env))
    monkeypatch.chdir(trained)
    act, args, _ = dac.load_policy("runs/pendulum-demo/dac/seed0", device="cpu", run_dir="runs")
    dac.record(act, args, torch.device("cpu"))
    (folder, _), start, *actions = seen
    assert folder == str(Path("runs/pendulum-demo/dac/seed0/video")) and start == {"seed": 0} and len(actions) == 200
    assert all(a.shape == (1,) and np.abs(a).max() <= 1 for a in actions)


def test_a_toy_has_no_video(tmp_path, capsys):
    dac.record(None, dac.Args(env="bandit-two", run_dir=str(tmp_path)), torch.device("cpu"))
    assert re.fullmatch(r"no video: 'bandit-two' has no gymnasium task.*\n", capsys.readouterr().out)


# --- numbers ----------------------------------------------------------------------------------------------
def test_the_tables_of_the_readme_are_those_of_the_committed_evaluations():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import table

    assert README.count("<!-- end of results -->") == len(table.ROWS) + 2 == 6
    assert README == table.with_tables(README), "run: python benchmark/table.py --write"


def test_a_table_is_mean_and_spread_over_seeds_of_the_last_evaluation(tmp_path, monkeypatch):
    """Two seeds, last evaluation at step 20: means over episodes 2 and 6, so 4.0 +- 2.0; step 0 has no say.  Runs on
    a stand-in set have its name in their label."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    import table

    head = "step,episode,return,length,normalized_score\n"
    for seed, scores in enumerate(((1, 3), (5, 7))):
        rows = "".join(f"20,{i},0,1,{x}\n" for i, x in enumerate(scores))
        (tmp_path / f"pendulum-demo__dac__dac__seed{seed}.csv").write_text(f"{head}0,0,0,1,99\n{rows}")
    other = tmp_path / "hopper-demo__dac__hopper-expert-sac@dac__seed0.csv"
    other.write_text(f"{head}0,0,0,1,99\n30,0,0,1,50\n")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    head, _, average, *_, ours = table.readme_table("dac").splitlines()
    assert head == "| | pendulum-demo | hopper-expert-sac |" and average == "| average of the data | 62.2 | 90.7 |"
    assert ours == "| **DAC** (stand-ins: `--eta 1 --eta-lr 0`) | 4.0 ± 2.0 (2) | 50.0 (1) |"


def test_the_table_beside_the_papers_has_their_scores_and_ours_in_brackets(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "benchmark"))
    import table

    row = "| hopper-medium-v2 | 101.2 ± 3.1 | not measured | 100.2 ± 3.2 | not measured | 52.5 ± 5.6 | not measured |"
    assert row in table.beside_published()
    (tmp_path / "published.csv").write_text("dataset,run,score,spread\nhopper-medium-v2,dac,101.2,3.1\n")
    head = "step,episode,return,length,normalized_score\n"
    (tmp_path / "hopper-medium-v2__dac__dac__seed0.csv").write_text(f"{head}0,0,0,1,99\n5,0,0,1,80\n")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert "| hopper-medium-v2 | 101.2 ± 3.1 | 80.0 ± 0.0 (1) |  | not measured |" in table.beside_published()
