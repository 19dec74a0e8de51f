"""benchmark/sweep.py: the table's arithmetic, errors, and (where Ray is installed) a worker killed in the middle."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import sweep  # noqa: E402

from common import UserError  # noqa: E402

TINY = """--device cpu --batch-size 16 --hidden 16 16 --T 2 --N 1 --H 2 --ema-after 5 --log-every 500
          --eval-every 100000 --eval-episodes 1 --final-episodes 2 --save-every 50""".split()


def put_result(run_dir: Path, method: str, env: str, seed: int, score: float | None, back: float = 0.0) -> Path:
    folder = run_dir / env / method / f"seed{seed}"
    folder.mkdir(parents=True)
    result = {"method": method, "env": env, "seed": seed, "normalized_score": score, "return": back}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


# --- arithmetic -------------------------------------------------------------------------------------------
def test_iqm_is_the_mean_of_the_middle_half():
    # 8 values: without the lowest 2 (-50, 1) and the highest 2 (9, 100), (2 + 3 + 5 + 6) / 4 = 4
    assert sweep.iqm(np.array([9.0, 2, -50, 3, 100, 5, 1, 6])) == 4
    # 5 values: 5 // 4 = 1 from each end, (2 + 3 + 7) / 3 = 4;  3 values: nothing to cut, the mean
    assert sweep.iqm(np.array([0.0, 2, 3, 7, 1000])) == 4
    assert sweep.iqm(np.array([1.0, 2, 9])) == 4


def test_iqm_and_interval_are_those_of_rliable():
    """rliable 1.2.0 on these 5 runs x 3 tasks, 50,000 repeats: 63.8027, interval 57.50 to 68.65."""
    x = np.random.default_rng(1).normal(60, 20, (5, 3))
    assert sweep.iqm(x.ravel()) == pytest.approx(63.80268155713111)
    assert sweep.interval(list(x.T)) == pytest.approx((57.50, 68.65), abs=0.15)


def test_interval_resamples_within_each_env():
    """Runs of one env all alike, two envs far apart: nothing varies within a stratum, so the interval is a point."""
    assert sweep.interval([np.full(4, 10.0), np.full(4, 90.0)]) == (50, 50)
    low, high = sweep.interval([np.array([10.0] * 4 + [90.0] * 4)])  # as one stratum it is wide
    assert low < 20 and high > 80


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    pairs = [sweep.interval([rng.normal(0, 1, 20), rng.normal(0, 1, 20)], repeats=500) for _ in range(200)]
    assert 0.88 < np.mean([low < 0 < high for low, high in pairs]) < 0.99
    assert sweep.interval([rng.normal(0, 1, 20)]) != sweep.interval([rng.normal(0, 1, 20)])
    x = rng.normal(0, 1, 9)
    assert sweep.interval([x]) == sweep.interval([x])  # the same table every time


def test_interval_of_a_single_run_is_not_given():
    assert all(map(math.isnan, sweep.interval([np.array([3.0])])))
    assert all(map(math.isnan, sweep.interval([np.arange(5.0), np.array([3.0])])))


def test_table_has_a_row_per_method_and_env_and_one_over_all_envs(tmp_path):
    for seed, (a, b) in enumerate([(10, 50), (20, 60), (60, 100)]):
        put_result(tmp_path, "dac", "hopper-demo", seed, a)
        put_result(tmp_path, "dac", "pendulum-demo", seed, b)
        put_result(tmp_path, "dac", "bandit-moons", seed, None, back=0.5 + seed)
    put_result(tmp_path, "swg", "pendulum-demo", 0, 97)
    rows = {(row["method"], row["env"]): row for row in sweep.summarize(tmp_path)}
    hopper, everything = rows["dac", "hopper-demo"], rows["dac", "all 2"]
    assert (hopper["n"], hopper["mean"]) == (3, 30)
    assert hopper["std"] == pytest.approx(math.sqrt((400 + 100 + 900) / 3))  # over seeds
    # both envs: 10 20 50 60 60 100, 6 // 4 = 1 from each end, (20 + 50 + 60 + 60) / 4 = 47.5
    assert (everything["n"], everything["mean"], everything["iqm"]) == (6, 50, 47.5)
    assert math.isnan(everything["std"])
    toy = rows["dac", "bandit-moons"]  # no reference scores: returns, and not mixed with scores
    assert (toy["metric"], toy["mean"]) == ("return", 1.5)
    assert rows["swg", "pendulum-demo"]["n"] == 1 and ("swg", "all 1") not in rows


def test_summary_only_needs_no_ray_and_writes_the_csv(tmp_path):
    for seed in range(4):
        put_result(tmp_path, "dac", "pendulum-demo", seed, 90 + seed)
    hide = "import sys, runpy; sys.modules['ray'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
    command = [sys.executable, "-c", hide, str(ROOT / "benchmark" / "sweep.py"), "--run-dir", str(tmp_path)]
    done = subprocess.run([*command, "--summary-only"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "| dac | pendulum-demo | normalized score | 4 | 91.5 | 1.1 | 91.5 | 90." in done.stdout
    with open(tmp_path / "summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["iqm"] == "91.5" and 90 <= float(row["low"]) < 91.5 < float(row["high"]) <= 93


def test_a_missing_ray_is_said_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install ray==") as error:
        sweep.main(sweep.Args(run_dir=str(tmp_path)), [])
    assert error.value.code == 2


# --- errors -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "args, extra, words",
    [
        ({"methods": ("dca",)}, [], "unknown --methods 'dca'; expected dac"),
        ({"envs": ("hoper-demo",)}, [], "nearest names: hopper-demo"),
        ({"cpus": 0}, [], "--cpus is 0"),
        ({"retries": -1}, [], "--retries -1"),
        ({"gpus": 1.5}, [], "--gpus is 1.5"),
        ({"gpus": math.nan}, [], "--gpus is nan"),
        ({}, ["--steps", "5", "--seed=3"], "--seed after --"),
        ({}, ["--run_dir", "x"], "--run-dir after --"),
        ({}, ["--overwrite"], "--overwrite after --"),
    ],
)
def test_bad_input_is_one_line(args, extra, words):
    with pytest.raises(UserError) as error:
        sweep.check(sweep.Args(**args), extra)
    assert words in str(error.value) and "\n" not in str(error.value) and error.value.code == 2


def test_other_env_names_pass():
    sweep.check(sweep.Args(envs=("hopper-medium-v2", "mujoco/hopper/medium-v0", "bandit-moons")), [])
    sweep.check(sweep.Args(envs=("Hopper-v5",), gpus=2, seeds=(1, 1)), ["--data-path", "rows.hdf5"])


def test_an_empty_or_foreign_folder_is_said(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        sweep.main(sweep.Args(run_dir=str(tmp_path), summary_only=True), [])
    (put_result(tmp_path, "dac", "x", 0, 1.0) / "result.json").write_text("{}")
    with pytest.raises(UserError, match="is not a result"):
        sweep.summarize(tmp_path)


# --- which runs -------------------------------------------------------------------------------------------
def test_runs_are_the_ordinary_command_lines_each_once(tmp_path):
    args = sweep.Args(methods=("dac", "swg"), envs=("mujoco/hopper/medium-v0",), seeds=(0, 3, 3), run_dir=str(tmp_path))
    tasks = sweep.make_tasks(args, ["--steps", "5"])
    assert [task.name[-6:] for task in tasks] == ["seed 0", "seed 3"] * 2
    task = tasks[1]
    assert task.folder == tmp_path / "mujoco_hopper_medium-v0" / "dac" / "seed3"
    assert task.command[0] == str(ROOT / "dac.py") and task.command[-3:] == ["--resume", "--steps", "5"]


def test_finished_runs_are_not_repeated(tmp_path, capsys, monkeypatch):
    def no_ray(args):
        raise AssertionError("started Ray for nothing")

    monkeypatch.setattr(sweep, "start_ray", no_ray)
    args = sweep.Args(methods=("dac",), seeds=(0, 1), run_dir=str(tmp_path))
    for seed, task in enumerate(sweep.make_tasks(args, ["--steps", "5"])):
        folder = put_result(tmp_path, "dac", "pendulum-demo", seed, 50)
        assert not sweep.is_finished(task)  # no args.json
        (folder / "args.json").write_text(json.dumps({"command": task.command}))
    assert sweep.main(args, ["--steps", "5"]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    other = sweep.make_tasks(args, ["--steps", "6"])[0]  # other settings: the script must decide
    assert not sweep.is_finished(other)
    (tmp_path / "pendulum-demo" / "dac" / "seed0" / "result.json").unlink()
    assert not sweep.is_finished(sweep.make_tasks(args, ["--steps", "5"])[0])


# --- one run, without Ray ---------------------------------------------------------------------------------
def fake(tmp_path: Path, program: str) -> sweep.Task:
    (tmp_path / "run.py").write_text(program)
    return sweep.Task("dac x seed 0", "dac", [str(tmp_path / "run.py")], tmp_path / "folder")


def test_exit_code_and_telling_line_are_reported(tmp_path):
    ok = "from os import environ as e; print('dac x seed 0:', e['OMP_NUM_THREADS'], e['CUDA_VISIBLE_DEVICES'] == '')"
    assert sweep.execute(fake(tmp_path, ok), 3, 0.0, ".") == (0, "dac x seed 0: 3 True")
    wrong = "import sys; print('start'); print('dac.py: --steps is -3', file=sys.stderr); print('bye'); sys.exit(2)"
    assert sweep.execute(fake(tmp_path, wrong), 1, 0.0, ".") == (2, "dac.py: --steps is -3")
    assert sweep.execute(fake(tmp_path, "1 / 0"), 1, 0.0, ".") == (1, "ZeroDivisionError: division by zero")
    assert "dac.py: --steps is -3" in (tmp_path / "folder" / "sweep.log").read_text()  # every attempt is kept


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit(143)"])
def test_a_killed_run_raises_what_ray_retries(tmp_path, end):
    with pytest.raises(ChildProcessError, match="killed"):
        sweep.execute(fake(tmp_path, f"import os, sys; {end}"), 1, 0.0, ".")


def start_worker(tmp_path: Path, program: str) -> tuple[subprocess.Popen, int]:
    """A process that executes a run as a Ray worker does, and the run's pid. SIGINT is ignored, as in `sweep.py ... &`
    in a shell script."""
    task = fake(tmp_path, f"import os, signal, sys, time\n{program}\nprint('pid', os.getpid())\ntime.sleep(300)")
    work = f"import signal, sys; from pathlib import Path; sys.path.insert(0, {str(ROOT / 'benchmark')!r}); "
    work += "import sweep; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    work += f"sweep.execute(sweep.Task('', 'dac', {task.command!r}, Path({str(task.folder)!r})), 1, 0.0, '.')"
    worker, log = subprocess.Popen([sys.executable, "-c", work], stderr=subprocess.DEVNULL), task.folder / "sweep.log"
    wait_for(lambda: log.exists() and log.read_text().startswith("pid ") and log.read_text().endswith("\n"), worker)
    return worker, int(log.read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_run_dies_with_its_worker(tmp_path):
    worker, pid = start_worker(tmp_path, "")
    worker.kill()  # SIGKILL: no chance to clean up
    worker.wait()
    wait_for(lambda: gone(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_cancelled_run_saves_before_its_worker_goes_on(tmp_path):
    save = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print('saved'), sys.exit(143)))"
    worker, pid = start_worker(tmp_path, save)
    worker.send_signal(signal.SIGINT)
    worker.wait(300)
    assert gone(pid) and "saved" in (tmp_path / "folder" / "sweep.log").read_text()


def wait_for(condition, process=None, seconds=300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """No such process, or only its exit code is left."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- with Ray ---------------------------------------------------------------------------------------------
def find_run(run_dir: Path, seed: int) -> tuple[int, int] | None:
    """(pid, pid of its parent, the Ray worker) of the run of this seed."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_text().split("\0")
            if words[5:8] == [str(seed), "--run-dir", str(run_dir)]:
                return int(path.name), int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            pass
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_sweep_survives_a_killed_worker_and_reports_a_failing_run(tmp_path):
    """Seed 0's worker is killed after its first checkpoint: the run goes on from there. Seed 2's folder is damaged:
    that run is refused by its script and left out of the table, the others go on, and the exit code is 1."""
    pytest.importorskip("ray")
    put_result(tmp_path, "dac", "pendulum-demo", 2, 50.0)
    (tmp_path / "pendulum-demo" / "dac" / "seed2" / "last.pt").write_text("damaged")
    sweep_args = ["--methods", "dac", "--seeds", "0", "1", "2", "--run-dir", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmark" / "sweep.py"), *sweep_args, "--", "--steps", "400", *TINY]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        folder = tmp_path / "pendulum-demo" / "dac" / "seed0"
        wait_for(lambda: (folder / "last.pt").exists(), driver, 600)
        run, worker = find_run(tmp_path, 0)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: gone(run), seconds=30)  # no orphan
        out, err = driver.communicate(timeout=900)
    finally:
        if driver.poll() is None:
            driver.send_signal(signal.SIGINT)
            driver.wait(120)
    assert driver.returncode == 1, out + err
    log = (folder / "sweep.log").read_text()
    assert "nothing saved yet" in log and "resuming" in log
    assert all(json.loads((folder.parent / f"seed{k}" / "result.json").read_text())["step"] == 400 for k in (0, 1))
    assert "dac pendulum-demo seed 0: normalized score" in out
    assert "| dac | pendulum-demo | normalized score | 2 |" in out
    assert "FAILED dac pendulum-demo seed 2: dac.py: " in out and "damaged" in out
