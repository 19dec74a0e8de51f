"""Many runs, on one machine or a Ray cluster: methods x envs x seeds, then a table with confidence intervals.

    pip install ray==2.60.0                       optional: only this script uses it
    python benchmark/sweep.py --methods dac swg --envs pendulum-demo hopper-demo --seeds 0 1 2 --run-dir runs/sweep
    python benchmark/sweep.py --methods dac --gpus 0.25 -- --steps 500     four runs share a GPU; every run gets --steps
    python benchmark/sweep.py --address auto --run-dir /shared/sweep       on the cluster that this machine belongs to
    python benchmark/sweep.py --run-dir runs/sweep --summary-only          the table of what is there, without Ray

A run is the ordinary command line with --resume, in its ordinary folder, with its output in sweep.log there. Finished
runs are not repeated. If its worker, its machine or the run itself is killed, it is started again and goes on from
last.pt (--save-every bounds the loss). A run that fails by itself is reported, not retried. Ctrl-C saves every run; the
same command continues. A cluster needs this repository, its Python and --run-dir under the same paths on every machine.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import DEMOS, FILES, MINARI_ID, TOYS, UserError, unknown_name  # noqa: E402

METHODS = ("dac", "diffusion_dice", "dydiff", "swg")
RAY = "ray==2.60.0"
OURS = ("--env", "--seed", "--run-dir", "--resume", "--overwrite", "--eval-only")  # not allowed after --
# Linux: the kernel kills the run (1 = PR_SET_PDEATHSIG) when its worker dies, however that dies, so that a retry never
# finds another process writing in the folder. Set between fork and exec, it holds for the program that exec starts.
GUARD = """import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.getppid() == int(sys.argv[1]) or sys.exit("the worker has died")
os.execv(sys.argv[2], sys.argv[2:])"""


@dataclass
class Args:
    methods: tuple[str, ...] = METHODS
    """scripts to run"""
    envs: tuple[str, ...] = ("pendulum-demo",)
    """datasets, as for the scripts' --env"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one run each"""
    run_dir: str = "runs/sweep"
    """every run's --run-dir, and the place of summary.csv; the table has all runs that are finished there"""
    cpus: int = 1
    """CPU cores and threads of one run"""
    gpus: float = 0.0
    """share of a GPU of one run, e.g. 0.25; 0: runs see no GPU. Ray counts shares, it does not limit memory"""
    address: str | None = None
    """a Ray cluster: auto, or host:port; without it Ray is started on this machine for this sweep"""
    retries: int = 3
    """times that a run is continued after its worker, its machine or the run itself was killed"""
    summary_only: bool = False
    """print the table and write summary.csv, run nothing"""


class Task(NamedTuple):
    name: str  # how the last line of its output begins
    method: str
    command: list[str]
    folder: Path


def check(args: Args, extra: list[str]) -> None:
    for method in args.methods:
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.5) or METHODS
            raise UserError(f"unknown --methods {method!r}; expected {', '.join(near)}")
    options = [word.split("=")[0].replace("_", "-") for word in extra if word.startswith("--")]
    for env in args.envs:  # with a file, any gymnasium id
        if env not in (*FILES, *DEMOS, *TOYS) and not MINARI_ID.fullmatch(env) and "--data-path" not in options:
            raise unknown_name(env)
    if wrong := [option for option in options if option in OURS]:
        raise UserError(f"{wrong[0]} after -- would be the same for every run; the sweep gives {', '.join(OURS[:4])}")
    if args.cpus < 1 or args.retries < 0:
        raise UserError(f"--cpus is {args.cpus}, --retries {args.retries}; expected at least 1 and at least 0")
    if not 0 <= args.gpus < math.inf or (args.gpus > 1 and args.gpus % 1):
        raise UserError(f"--gpus is {args.gpus}; expected a share from 0 to 1, or a whole number")


def make_tasks(args: Args, extra: list[str]) -> list[Task]:
    tasks, run_dir = {}, Path(args.run_dir).expanduser().resolve()
    for env, method, seed in product(args.envs, args.methods, args.seeds):
        command = [str(ROOT / f"{method}.py"), "--env", env, "--seed", str(seed), "--run-dir", str(run_dir), "--resume"]
        folder = run_dir / env.replace("/", "_") / method / f"seed{seed}"
        tasks[folder] = Task(f"{method} {env} seed {seed}", method, [*command, *extra], folder)
    return list(tasks.values())  # a name given twice is one run


def is_finished(task: Task) -> bool:
    """By this command. If it was another, the script decides: it refuses other settings, and repeats no training."""
    try:
        command = json.loads((task.folder / "args.json").read_text())["command"]
        return (task.folder / "result.json").exists() and command[1:] == task.command[1:]
    except (OSError, ValueError, KeyError):
        return False


# --- one run, in a Ray worker -----------------------------------------------------------------------------
def execute(task: Task, cpus: int, gpus: float, cwd: str) -> tuple[int, str]:
    """Exit code and telling line of one run. Raises ChildProcessError if the run was killed: Ray then retries."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # how ray.cancel arrives; `... &` in a script ignores it
    task.folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": str(cpus), "PYTHONUNBUFFERED": "1"}
    env |= {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}  # else Ray has set it
    guard = [sys.executable, "-c", GUARD, str(os.getpid())] if sys.platform == "linux" else []
    with open(task.folder / "sweep.log", "a+", encoding="utf-8", errors="replace") as log:
        start, command = log.seek(0, os.SEEK_END), [*guard, sys.executable, *task.command]
        run = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while run.poll() is None:  # polled, so that ray.cancel gets through
                time.sleep(0.2)
        finally:
            run.terminate()  # cancelled: it saves. Nothing, if it has ended
            run.wait()
        log.seek(start)
        lines = [line.strip(" │\n") for line in log if line.strip()]
    if run.returncode < 0 or run.returncode > 128:
        raise ChildProcessError(f"killed, exit code {run.returncode}")
    own = [line for line in lines if line.startswith((f"{task.name}: ", f"{task.method}.py: "))]
    boxed = [after for line, after in pairwise(lines) if line.startswith("╭")]  # tyro's, of a wrong option
    return run.returncode, (own[-1:] or boxed[-1:] or lines[-1:] or ["no output"])[0]


# --- all runs ---------------------------------------------------------------------------------------------
def start_ray(args: Args):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15
    why = f"no Ray at --address {args.address}" if args.address else "Ray did not start"
    try:
        import ray

        if ":" in (args.address or ""):  # Ray itself tries for minutes
            host, port = args.address.removeprefix("ray://").rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=10).close()
        options = dict(address=args.address) if args.address else dict(address="local", include_dashboard=False)
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except ImportError:
        raise UserError(f"Ray is not installed: pip install {RAY}   (--summary-only needs none)") from None
    except Exception as error:  # of many kinds, plain ones among them
        what = " ".join(str(error).split())[:200] or type(error).__name__
        fix = "; ray start --head makes this machine a cluster, no --address starts Ray here" if args.address else ""
        raise UserError(f"{why} ({what}){fix}") from error
    have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(x.get("CPU", 0) >= args.cpus and x.get("GPU", 0) >= args.gpus for x in have):
        most = ", ".join(f"{x.get('CPU', 0):g} CPUs and {x.get('GPU', 0):g} GPUs" for x in have[:4])
        why = f"no machine has --cpus {args.cpus} and --gpus {args.gpus:g} for a run; there is: {most}"
        if not args.address:
            raise UserError(why)
        print(f"note: {why}. Waiting for one")  # a cluster may grow
    if not args.gpus and any(x.get("GPU") for x in have):
        print("note: there are GPUs, but without --gpus no run sees one")
    return ray


def run_all(args: Args, tasks: list[Task]) -> list[Path]:
    """Runs what is not finished; returns the folders of those that failed."""
    todo, failed = [task for task in tasks if not is_finished(task)], []
    for task in tasks:
        if task not in todo:
            print(f"{task.name}: finished before -> {task.folder}")
    if not todo:
        return []
    ray = start_ray(args)
    options = dict(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=args.retries)
    remote = ray.remote(execute).options(**options, retry_exceptions=[ChildProcessError])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pending = {remote.remote(task, args.cpus, args.gpus, os.getcwd()): task for task in todo}
    print(f"{len(todo)} runs, each with {args.cpus} CPU and {args.gpus:g} GPU", flush=True)
    try:
        while pending:
            (ref,), _ = ray.wait(list(pending), num_returns=1)
            try:
                code, line = ray.get(ref)
            except (ray.exceptions.RayError, OSError) as error:  # lost more often than --retries, or never started
                code, line = 1, str(error).strip().splitlines()[-1]
            task = pending.pop(ref)
            if code == 0 and not (task.folder / "result.json").exists():
                code, line = 1, f"ended without a result.json: {line}"
            failed += [task.folder] if code else []
            text = f"FAILED {task.name}: {line}   ({task.folder / 'sweep.log'})" if code else line
            print(f"[{len(todo) - len(pending)}/{len(todo)}] {text}", flush=True)
    except KeyboardInterrupt:
        print("\nstopping: every run saves (Ctrl-C again: at once, without)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            for ref in pending:
                ray.cancel(ref)
            ray.wait(list(pending), num_returns=len(pending))
        print("stopped; the same command continues")
        raise SystemExit(130) from None
    finally:
        ray.shutdown()
    return failed


# --- summary ----------------------------------------------------------------------------------------------
# The conventions of rliable (Agarwal et al., 2021), not the package: it brings arch, pandas, statsmodels and seaborn
# (500 MB), and what pip installs today fails at the import (arch 7.2 with pandas 3).
def iqm(x: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: without the lowest and the highest quarter, rounded down to whole runs."""
    n = x.shape[-1]
    return np.sort(x, axis=-1)[..., n // 4 : n - n // 4].mean(-1)


def interval(strata: list[np.ndarray], repeats: int = 50_000) -> tuple[float, float]:
    """95 % percentile bootstrap of the IQM of all runs. strata: the runs of each env, drawn from separately."""
    if min(map(len, strata)) < 2:
        return math.nan, math.nan  # one run says nothing about its spread
    rng = np.random.default_rng(0)
    draws = [x[rng.integers(len(x), size=(repeats, len(x)))] for x in strata]  # (repeats, runs) each
    low, high = np.quantile(iqm(np.concatenate(draws, axis=1)), (0.025, 0.975))
    return float(low), float(high)


def summarize(run_dir: Path, without: list[Path] | None = None) -> list[dict]:
    """One row per method and env, and one per method over all its envs that have normalized scores."""
    values = defaultdict(lambda: defaultdict(list))  # (method, metric) -> env -> one value per seed
    for path in sorted(run_dir.resolve().glob("*/*/seed*/result.json")):
        if path.parent in (without or ()):  # what it has is of other settings
            continue
        try:
            result = json.loads(path.read_text())
            metric = "return" if result["normalized_score"] is None else "normalized_score"
            values[result["method"], metric][result["env"]].append(float(result[metric]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a result of these scripts; expected normalized_score or return") from error
    rows = []
    for (method, metric), by_env in sorted(values.items()):
        groups = {env: [np.array(x)] for env, x in sorted(by_env.items())}
        if metric == "normalized_score" and len(groups) > 1:  # returns of different tasks have no common scale
            groups[f"all {len(groups)}"] = [x for (x,) in groups.values()]
        for env, strata in groups.items():
            x, (low, high) = np.concatenate(strata), interval(strata)
            row = {"method": method, "env": env, "metric": metric, "n": len(x)}
            row["mean"] = float(np.mean([s.mean() for s in strata]))  # every env counts the same
            row["std"] = float(x.std()) if len(strata) == 1 and len(x) > 1 else math.nan  # over seeds
            rows.append(row | {"iqm": float(iqm(x)), "low": low, "high": high})
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| method | env | metric | n | mean | std | IQM | 95 % interval of the IQM |", "|---" * 8 + "|"]
    for row in rows:
        cells = [row["method"], row["env"], row["metric"].replace("_", " "), str(row["n"])]
        cells += ["-" if math.isnan(row[k]) else f"{row[k]:.1f}" for k in ("mean", "std", "iqm")]
        cells += ["-" if math.isnan(row["low"]) else f"{row['low']:.1f} to {row['high']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: Args, extra: list[str]) -> int:
    run_dir, failed = Path(args.run_dir).expanduser(), []
    if not args.summary_only:
        check(args, extra)
        run_dir.mkdir(parents=True, exist_ok=True)
        failed = run_all(args, make_tasks(args, extra))
    rows = summarize(run_dir, failed)
    if rows:
        print(f"\n{table(rows)}")
        with open(run_dir / "summary.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in rows)  # nan: an empty cell
    elif args.summary_only:
        raise UserError(f"no finished run in {run_dir}; expected <env>/<method>/seed<k>/result.json there")
    return int(bool(failed))


if __name__ == "__main__":
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    try:
        arguments = tyro.cli(Args, args=sys.argv[1:cut], description=__doc__.split("\n\n")[0])
        sys.exit(main(arguments, sys.argv[cut + 1 :]))
    except UserError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        sys.exit(error.code)
    except OSError as error:
        print(f"sweep.py: cannot write {error.filename or 'to --run-dir'} ({error.strerror})", file=sys.stderr)
        sys.exit(2)
