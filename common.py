"""Datasets, environments and diffusion schedules: what all scripts share, nothing that a paper contributes.

    load_dataset(name)      D4RL names, Minari ids, D4RL-format HDF5 files, demos, toys  ->  Dataset of tensors
    make_env(name)          the gymnasium task that a name is evaluated in: flat observations, actions in [-1, 1]
    normalized_score(name)  D4RL's 0 (random) to 100 (expert) scale
    vp_schedule, cosine_schedule, linear_schedule, VPSDE, edm_sigmas
    python common.py                          every name: rows, sizes, task, which paper uses it
    python common.py NAME|FILE [--env NAME]   a look at one dataset, before anything is trained on it

Shapes: N rows, S state, A action.  Bad input raises UserError, whose text is one line for the user.
"""
from __future__ import annotations

import difflib
import hashlib
import http.client
import math
import os
import re
import socket
import sys
import tempfile
import urllib.error
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro
from torch import Tensor


class UserError(Exception):
    """What was wrong, what was expected, what to do: one line. Scripts print it and exit with `code`."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


# --- D4RL: names, files, reference scores -----------------------------------------------------------------
ROOT = "http://rail.eecs.berkeley.edu/datasets/offline_rl"  # d4rl/infos.py
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"  # locomotion only
_MAZE = {
    "umaze": "u-maze_noisy_multistart_False_multigoal_False",
    "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
    "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
    "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
    "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
    "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
}
FILES = {  # name -> path below ROOT (d4rl/infos.py); the cache keeps the last part of the path, as D4RL does
    f"{task}-{quality}-v2": f"gym_mujoco_v2/{task}_{quality.replace('-', '_')}-v2.hdf5"
    for task in ("halfcheetah", "hopper", "walker2d", "ant")
    for quality in ("random", "medium", "medium-replay", "full-replay", "medium-expert", "expert")
}
FILES |= {f"antmaze-{k}-v0": f"ant_maze_new/Ant_maze_{v}_sparse.hdf5" for k, v in _MAZE.items()}
FILES |= {f"antmaze-{k}-v2": f"ant_maze_v2/Ant_maze_{v}_sparse_fixed.hdf5" for k, v in _MAZE.items()}
for _size in ("umaze", "medium", "large"):
    FILES[f"maze2d-{_size}-v1"] = f"maze2d/maze2d-{_size}-sparse-v1.hdf5"
    FILES[f"maze2d-{_size}-dense-v1"] = f"maze2d/maze2d-{_size}-dense-v1.hdf5"
FILES["kitchen-complete-v0"] = "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5"
FILES["kitchen-partial-v0"] = "kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5"
FILES["kitchen-mixed-v0"] = "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"
for _task in ("pen", "hammer", "door", "relocate"):
    FILES[f"{_task}-human-v0"] = f"hand_dapg/{_task}-v0_demos_clipped.hdf5"
    FILES[f"{_task}-cloned-v0"] = f"hand_dapg/{_task}-demos-v0-bc-combined.hdf5"
    FILES[f"{_task}-expert-v0"] = f"hand_dapg/{_task}-v0_expert_clipped.hdf5"
    for _kind in ("human", "cloned", "expert"):
        FILES[f"{_task}-{_kind}-v1"] = f"hand_dapg_v1/{_task}-{_kind}-v1.hdf5"

CHECKSUMS = """
hopper-random-v2           152525345 63103ef7059d   hopper-medium-v2           152756557 5bdf1bc4a713
hopper-medium-replay-v2     75854457 e121c5f7c985   hopper-full-replay-v2      187998921 56baf95963c5
hopper-medium-expert-v2    304537315 9d51ad87f8c9   hopper-expert-v2           152427435 01aa219a5f8e
walker2d-random-v2         216109364 4e863bb6090c   walker2d-medium-v2         232254996 cf00f43add04
walker2d-medium-replay-v2   86323963 e75de96a4f77   walker2d-full-replay-v2    285115514 f2720f9d27b2
walker2d-medium-expert-v2  462197079 6b8d7f868c45   walker2d-expert-v2         230567195 2985dc3d436a
halfcheetah-random-v2      237338037 25407aef85b5   halfcheetah-medium-v2      237727262 41324e8487a9
halfcheetah-medium-replay-v2  59448533 48d494a4770c   halfcheetah-full-replay-v2 291381762 27fdf7ea86e5
halfcheetah-medium-expert-v2 474567252 015db75dae5b   halfcheetah-expert-v2      237464597 d9fe53bb994e
antmaze-umaze-v0           232533093 188838316eab   antmaze-umaze-diverse-v0   230854793 4aff7f77b97a
antmaze-medium-play-v0     231110993 527385c14b87   antmaze-medium-diverse-v0  231095454 b77764cac90c
antmaze-large-play-v0      230880846 e37afef5b80b   antmaze-large-diverse-v0   231183929 dda7acbdde1a
antmaze-umaze-v2           232532949 5ef15257771c   antmaze-umaze-diverse-v2   230854272 c771dd63963c
antmaze-medium-diverse-v2  231095166 ad9dcbac05d1   antmaze-large-play-v2      230880653 6d353df24578
antmaze-large-diverse-v2   231183710 84f775eb7956   pen-human-v0                 2037685 64103c05d3b3
pen-cloned-v0              307070889 f881ab4b03c0   pen-expert-v0              262280734 0ad80bc6d5e6
pen-human-v1                 2040573 209e345b2150   pen-cloned-v1              155074191 6d1a982cee19
pen-expert-v1              262040663 3791b8ca6a80   hammer-human-v0              5585672 96bbad348459
hammer-cloned-v0           676007664 a645a67b7bc2   hammer-expert-v0           555652333 1e51edf95b00
hammer-human-v1              5606475 3e42f3f49b5c   hammer-cloned-v1           446616879 e48d75b159bd
hammer-expert-v1           557047483 1c069a0f6e48   door-human-v0                3118318 9df6345e28fc
door-cloned-v0             631681308 829cd0cd312a   door-expert-v0             535876867 a6e6c29985ca
door-human-v1                3121206 f9691288c3dd   door-cloned-v1             294356136 1f6a60ecc4d2
door-expert-v1             536056678 66df4cd4e0a1
""".split()  # name, bytes, start of the SHA-256 (tensorflow_datasets checksums.tsv); other files: none
CHECKSUMS = {CHECKSUMS[i]: (int(CHECKSUMS[i + 1]), CHECKSUMS[i + 2]) for i in range(0, len(CHECKSUMS), 3)}

REFERENCE = {  # (return at score 0, return at score 100), d4rl/infos.py: the same for every quality and version
    "hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0), "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7), "antmaze": (0.0, 1.0), "kitchen": (0.0, 4.0),
    "maze2d-umaze-v1": (23.85, 161.86), "maze2d-umaze-dense-v1": (68.537689, 193.66285642381482),
    "maze2d-medium-v1": (13.13, 277.39), "maze2d-medium-dense-v1": (44.264742, 297.4552547777125),
    "maze2d-large-v1": (6.7, 273.99), "maze2d-large-dense-v1": (30.569041, 303.4857382709002),
    "pen": (96.262799, 3076.8331017826877), "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737), "relocate": (-6.425911, 4233.877797728884),
    "pendulum-demo": (-1224.1, -152.9),  # ours: random actions, best controller (data/make_pendulum.py --score)
}
ENV_IDS = {  # -v4 keeps the rewards and models of D4RL's -v2, -v5 does not (docs/data.md); other names: d4rl_envs.py
    # [D5]
    "hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4",
    "hopper-demo": "Hopper-v5", "pendulum-demo": "Pendulum-v1",
}
SIZES = {  # of D4RL's tasks: (S, A, steps after which an episode is cut)
    "hopper": (11, 3, 1000), "halfcheetah": (17, 6, 1000), "walker2d": (17, 6, 1000), "ant": (111, 8, 1000),
    "antmaze": (29, 8, 1000), "antmaze-umaze": (29, 8, 700), "kitchen": (60, 9, 280),
    "maze2d-umaze": (4, 2, 300), "maze2d-medium": (4, 2, 600), "maze2d-large": (4, 2, 800),
    "pen": (45, 24, 100), "hammer": (46, 26, 200), "door": (39, 28, 200), "relocate": (39, 30, 200),
    "pendulum-demo": (3, 1, 200),
}
ROWS = {  # of the files, for the listing only: nothing checks them (docs/data.md); where nobody says: none
    "hopper-medium-replay": 402_000, "halfcheetah-medium-replay": 202_000, "walker2d-medium-replay": 302_000,
    "hopper-medium-expert": 1_999_906, "halfcheetah-medium-expert": 2_000_000, "walker2d-medium-expert": 1_999_995,
    **{f"{t}-{q}": 1_000_000 for t in ("hopper", "halfcheetah", "walker2d") for q in ("random", "medium", "expert")},
    "antmaze": 1_000_000, "maze2d-umaze": 1_000_000, "maze2d-medium": 2_000_000, "maze2d-large": 4_000_000,
    "kitchen-complete": 3_680, "kitchen": 136_950,
    "pen-human": 5_000, "hammer-human": 11_310, "door-human": 6_729, "relocate-human": 9_942,
    "pendulum-demo": 40_000, "hopper-demo": 99_618,
}
PAPERS = {  # regular expressions of the names in each paper's tables and figures
    "DAC": r"(hopper|halfcheetah|walker2d)-medium(-replay|-expert)?-v2|antmaze-.*-v0|bandit-(?!ring).*",
    "Diffusion-DICE": r"(hopper|halfcheetah|walker2d)-medium(-replay|-expert)?-v2|antmaze-.*-v2|bandit-ring",
    "DyDiff": r"(hopper|halfcheetah|walker2d)-medium(-replay|-expert)?-v2|maze2d-(umaze|medium|large)-v1",
    "SWG": r"(hopper|halfcheetah|walker2d)-medium(-replay|-expert)?-v2|antmaze-.*-v0|kitchen-.*|"
    r".*-(human|cloned)-v0|toy-.*",
}
DEMOS = ("pendulum-demo", "hopper-demo")
MINARI_ID = re.compile(r"([\w-]+/)+[\w-]+-v\d+")


def _by_task(table: dict, name: str):
    """The entry of a name, else of its longest beginning that has one: "antmaze-umaze-diverse" -> "antmaze-umaze"."""
    words = name.split("-")
    beginnings = ("-".join(words[:n]) for n in range(len(words), 0, -1))
    return next((table[b] for b in beginnings if b in table), None)


# --- datasets ---------------------------------------------------------------------------------------------
@dataclass
class Dataset:
    """Transitions in the order of the file. float32 but for `end`."""

    s: Tensor  # (N, S)
    a: Tensor  # (N, A), in [-1, 1]
    r: Tensor  # (N,)
    s_next: Tensor  # (N, S)
    terminal: Tensor  # (N,)  1 where the task ended; a time limit is not terminal
    end: Tensor  # (N,)  bool, last kept row of its episode, whatever ended it

    def __len__(self) -> int:
        return len(self.r)

    def to(self, device) -> Dataset:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def returns(self) -> Tensor:
        """(episodes,) float64, undiscounted; the last episode counts even where the file cuts it."""
        total = self.r.double().cumsum(0)[self.end]
        return total.diff(prepend=total.new_zeros(1))


def reward_scale(data: Dataset) -> float:
    """1000 / (max return - min return), IQL's rescaling (Kostrikov et al., 2022)."""
    returns = data.returns()
    span = float(returns.max() - returns.min())
    if not span > 0:
        why = f"every episode of this dataset returns {float(returns[0]):g}: 1000 / (max - min return) is undefined"
        raise UserError(f"{why}; give --reward-scale none")
    return 1000 / span


@dataclass
class Raw:
    """A file's arrays, row by row as stored. `s_next` only where the source has true successors (Minari)."""

    s: np.ndarray  # (N, S) float32, as the others
    a: np.ndarray  # (N, A)
    r: np.ndarray  # (N,)
    terminal: np.ndarray  # (N,) bool
    timeout: np.ndarray  # (N,) bool
    s_next: np.ndarray | None = None  # (N, S)


def load_dataset(name: str, data_path: str | None = None, data_url: str | None = None) -> Dataset:
    """The transitions of `name`, on the CPU.  data_path: a D4RL-format HDF5 file to use instead.  data_url: a
    mirror (file or folder) instead of Berkeley.  Raises UserError for anything that the user can mend."""
    if name in TOYS and not data_path:
        return toy_dataset(name)
    return transitions(load_raw(name, data_path, data_url))


def load_raw(name: str, data_path: str | None = None, data_url: str | None = None) -> Raw:
    """The stored rows of `name`, time-outs included: what trajectory models train on."""
    if data_path:
        if name not in (*FILES, *DEMOS, *TOYS, *gym.registry) and not MINARI_ID.fullmatch(name):
            raise unknown_name(name)
        return cut_jumps(name, read_hdf5(Path(data_path).expanduser(), horizon(name)))
    if name in DEMOS:
        path = Path(__file__).parent / "data" / f"{name}.hdf5"
        if not path.exists():
            raise UserError(f"{path} is missing: copy the repository's data/ beside common.py, or give --data-path")
        return read_hdf5(path)
    if name in FILES:
        return cut_jumps(name, read_hdf5(fetch(name, data_url), horizon(name)))
    if MINARI_ID.fullmatch(name):
        return read_minari(name)
    raise unknown_name(name)


def unknown_name(name: str) -> UserError:
    known = (*FILES, *DEMOS, *TOYS)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [*DEMOS, "hopper-medium-v2", "bandit-moons"]
    also = "Minari ids (mujoco/hopper/medium-v0), and gymnasium ids together with --data-path"
    return UserError(f"unknown --env {name!r}; nearest names: {', '.join(near)}. Also: {also}")


def horizon(name: str) -> int:
    """Steps after which an episode is cut, for files that store no time-outs."""
    if name in FILES or name in DEMOS:
        return _by_task(SIZES, name)[2]
    spec = gym.registry.get(name)
    return spec.max_episode_steps if spec and spec.max_episode_steps else 1000


def read_hdf5(path: Path, horizon: int = 1000) -> Raw:
    """A D4RL-format file: observations (N, S), actions (N, A), rewards, terminals, perhaps timeouts: (N,) or (N, 1)."""
    want = "expected a D4RL file with observations (N, S), actions (N, A), rewards (N,), terminals (N,)"
    if not path.is_file():
        raise UserError(f"no such file: {path}; {want}")
    try:
        with h5py.File(path, "r") as file:
            missing = [k for k in ("observations", "actions", "rewards", "terminals") if k not in file]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)} (it has {', '.join(file) or 'nothing'}); {want}")
            s, a = (file[k][()].astype(np.float32) for k in ("observations", "actions"))
            r, terminal = (file[k][()].astype(np.float32) for k in ("rewards", "terminals"))
            r, terminal = (x[:, 0] if x.ndim == 2 and x.shape[1] == 1 else x for x in (r, terminal))
            timeout = file["timeouts"][()].astype(bool).reshape(-1) if "timeouts" in file else None
            s_next = None  # D4RL ignores it; here it tells the ends of episodes where no time-outs are stored
            if timeout is None and "next_observations" in file:
                s_next = file["next_observations"][()].astype(np.float32)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = f"cannot read {path} ({str(error).splitlines()[0]})"
        raise UserError(f"{why}: truncated, not HDF5 or not numbers (a download? delete it); {want}") from error
    shapes = f"observations {s.shape}, actions {a.shape}, rewards {r.shape}, terminals {terminal.shape}"
    if (s.ndim, a.ndim, r.ndim, terminal.ndim) != (2, 2, 1, 1) or len({len(s), len(a), len(r), len(terminal)}) > 1:
        raise UserError(f"{path}: shapes do not fit together: {shapes}; {want}")
    if timeout is not None and len(timeout) != len(s):
        raise UserError(f"{path}: timeouts has {len(timeout)} rows, the other arrays {len(s)}; {want}")
    if len(s) < 2 or not s.shape[1] or not a.shape[1]:
        raise UserError(f"{path}: nothing to train on: {shapes}; expected at least two rows and one column")
    if s_next is not None and s_next.shape != s.shape:
        raise UserError(f"{path}: next_observations is {s_next.shape}, observations {s.shape}; expected the same shape")
    check_finite(path, observations=s, actions=a, rewards=r, terminals=terminal)
    if s_next is not None:
        check_finite(path, next_observations=s_next)
        timeout = timeouts_by_distance(s, s_next, terminal > 0)
    elif timeout is None:
        timeout = timeouts_by_horizon(terminal > 0, horizon)
    outside = (np.abs(a) > 1 + 1e-5).any(1).mean()
    if outside > 0:
        print(f"note: {100 * outside:.3g} % of the actions in {path.name} leave [-1, 1]; they are clipped")
    return Raw(s, np.clip(a, -1, 1), r, terminal > 0, timeout)


def check_finite(source, **arrays: np.ndarray) -> None:
    for key, x in arrays.items():
        if not np.isfinite(x).all():
            rows = int((~np.isfinite(x)).reshape(len(x), -1).any(1).sum())
            why = f"{source}: {key} has NaN or infinity in {rows} of {len(x)} rows"
            raise UserError(f"{why}; expected finite numbers: remove these rows")


def cut_jumps(name: str, raw: Raw) -> Raw:
    """[D6] antmaze: a row whose successor is more than 5 away in x, y is made a time-out, the threshold of d4rl's
    check_antmaze_datasets.py: in the v0 files some flags are misplaced, and such a successor starts another episode."""
    if name.startswith("antmaze"):
        jump = np.append(np.linalg.norm(np.diff(raw.s[:, :2], axis=0), axis=1) > 5, False)
        jump &= ~raw.terminal & ~raw.timeout
        if jump.any():
            print(f"note: {jump.sum()} rows of {name} have a successor elsewhere in the maze; taken as time-outs")
        raw.timeout |= jump
    return raw


def timeouts_by_distance(s: np.ndarray, s_next: np.ndarray, terminal: np.ndarray) -> np.ndarray:
    """(N,) bool: rows whose stored successor is not the next row, the rule of IQL (Kostrikov et al., 2022)."""
    apart = np.linalg.norm(s[1:] - s_next[:-1], axis=1) > 1e-6
    return np.append(apart, True) & ~terminal


def timeouts_by_horizon(terminal: np.ndarray, horizon: int) -> np.ndarray:
    """(N,) bool: d4rl.qlearning_dataset's rule for files without time-outs; as there, the count starts at 1 after a
    terminal row and at 0 after a time-out."""
    timeout, step = np.zeros(len(terminal), bool), 0
    for i in range(len(terminal)):
        timeout[i] = step == horizon - 1
        step = 0 if timeout[i] else 1 if terminal[i] else step + 1
    return timeout


def transitions(raw: Raw) -> Dataset:
    """d4rl.qlearning_dataset to the row (terminate_on_end=False): the last row of the file and every row at a
    time-out are dropped, s_next is the next stored observation.  With true successors (Minari) every row is kept."""
    n = len(raw.s)
    keep = np.ones(n, bool) if raw.s_next is not None else np.append(~raw.timeout[:-1], False)
    row = np.flatnonzero(keep)
    if not len(row):
        raise UserError("no transition is left without the rows at time-outs and the last row; expected longer ones")
    s_next = raw.s_next if raw.s_next is not None else np.roll(raw.s, -1, 0)  # row i -> s[i + 1]
    end = raw.terminal[row] | raw.timeout[row] | (np.diff(row, append=n + 1) != 1)
    arrays = (raw.s[row], raw.a[row], raw.r[row], s_next[row], raw.terminal[row].astype(np.float32))
    return Dataset(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays), end=torch.from_numpy(end))


def fetch(name: str, data_url: str | None = None) -> Path:
    """The D4RL file of `name` in the cache ($D4RL_DATASET_DIR, else ~/.d4rl/datasets), downloaded if it is not
    there: into a folder beside it, checked (size and SHA-256 where known, and that HDF5 opens it), then renamed."""
    cache = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets").expanduser()
    path = cache / FILES[name].rsplit("/", 1)[1]
    if path.is_file():
        return path
    url = data_url or f"{ROOT}/{FILES[name]}"
    if not url.endswith((".hdf5", ".h5")):
        url = f"{url.rstrip('/')}/{path.name}"
    way_out = f"try --data-url {MIRROR} (locomotion), or get the file yourself and give --data-path FILE"
    size, sha = CHECKSUMS.get(name, (None, None))
    print(f"downloading {url}" + (f" ({size / 1e6:.0f} MB)" if size else "") + f" to {path}")
    timeout = socket.getdefaulttimeout()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as folder:  # same disk, so a rename will do
            part = Path(folder) / path.name
            socket.setdefaulttimeout(float(os.environ.get("D4RL_TIMEOUT", 60)))  # seconds without a byte
            torch.hub.download_url_to_file(url, str(part))
            if size and part.stat().st_size != size:
                raise ValueError(f"{part.stat().st_size} bytes came, expected {size}")
            if sha and _sha256(part)[:12] != sha:
                raise ValueError(f"the SHA-256 starts with {_sha256(part)[:12]}, expected {sha}")
            h5py.File(part, "r").close()
            os.replace(part, path)
    except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:  # URLError is an OSError
        status = isinstance(error, urllib.error.HTTPError)
        why = f"HTTP {error.code} {error.reason}" if status else (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"could not download {name} from {url}: {why}. Nothing was kept; {way_out}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@cache
def minari_dataset(name: str):
    """The Minari dataset `name` from the local store ($MINARI_DATASETS_PATH), else downloaded by minari."""
    import minari

    try:
        return minari.load_dataset(name, download=name not in minari.list_local_datasets())
    except Exception as error:  # minari lets the errors of all layers below through: HTTP, Hugging Face, JSON, h5py
        why = f"Minari dataset {name!r} is not in the local store and could not be downloaded"
        hint = "`minari list remote` prints the ids; check the network"
        raise UserError(f"{why} ({(str(error) or type(error).__name__).splitlines()[0]}); {hint}") from error


def _flat(observations) -> np.ndarray:
    """Goal tasks store dicts: achieved_goal, observation, desired_goal side by side, in this order. Kitchen goals are
    dicts again, one entry per task: by the alphabet."""
    if not isinstance(observations, dict):
        return np.asarray(observations, np.float32)
    keys = [k for k in ("achieved_goal", "observation", "desired_goal") if k in observations]
    return np.concatenate([_flat(observations[k]) for k in keys or sorted(observations)], -1)


def read_minari(name: str) -> Raw:
    """Every row of a Minari dataset with its true successor; actions scaled from the space's bounds to [-1, 1]."""
    data = minari_dataset(name)
    episodes = list(data.iterate_episodes())
    s = [_flat(e.observations) for e in episodes]  # (T + 1, S) each
    space = data.action_space
    if not isinstance(space, gym.spaces.Box) or not np.isfinite([space.low, space.high]).all():
        raise UserError(f"Minari dataset {name!r} has actions in {space}; expected bounded continuous ones")
    a = np.concatenate([e.actions for e in episodes])
    check_finite(f"Minari dataset {name!r}", actions=a)
    a = np.clip(2 * (a - space.low) / (space.high - space.low) - 1, -1, 1)
    r = np.concatenate([e.rewards for e in episodes])
    terminal = np.concatenate([e.terminations for e in episodes]).astype(bool)
    timeout = np.zeros(len(r), bool)
    timeout[np.cumsum([len(e.rewards) for e in episodes]) - 1] = True  # the last row of every episode, flagged or not
    s, s_next = np.concatenate([x[:-1] for x in s]), np.concatenate([x[1:] for x in s])
    check_finite(f"Minari dataset {name!r}", observations=np.stack([s, s_next], 1), rewards=r)
    return Raw(s, a.astype(np.float32), r.astype(np.float32), terminal, timeout & ~terminal, s_next)


# --- evaluation -------------------------------------------------------------------------------------------
def make_env(name: str, eval_env: str | None = None, render_mode: str | None = None) -> gym.Env:
    """The task that `name` is evaluated in: flat observations, actions in [-1, 1].  eval_env: another gymnasium id.
    render_mode: of gymnasium, e.g. rgb_array."""
    task = eval_env or _by_task(ENV_IDS, name)
    if task is None and name in FILES:
        task = f"d4rl_envs:{name}"  # antmaze, maze2d, kitchen, adroit: importing the module registers them
    if task is None and name in TOYS:
        raise UserError(f"{name!r} has no gymnasium task: TOYS[{name!r}].reward judges an action")
    if task is None and name not in gym.registry and not MINARI_ID.fullmatch(name):
        raise unknown_name(name)
    options = {"render_mode": render_mode} if render_mode else {}
    if task == "Ant-v4" and name in FILES:
        options["use_contact_forces"] = True  # D4RL's ant observes its contact forces too: 111 numbers, not 27
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*out of date.*")  # -v4 and -v0 are deliberate
        try:
            if task is None and MINARI_ID.fullmatch(name):
                if name.startswith("D4RL/"):
                    import gymnasium_robotics  # noqa: F401  registers the tasks of these datasets
                env = minari_dataset(name).recover_environment(eval_env=True, **options)
            else:
                env = gym.make(task or name, **options)
        except (gym.error.Error, ImportError, ValueError) as error:  # ValueError: Minari data without a task
            hint = "check --env and --eval-env, and that requirements.txt is installed"
            if "No module named 'd4rl_envs'" in str(error):
                hint = "d4rl_envs.py must stand beside common.py"
            why = f"cannot make the evaluation task of {name!r} ({str(error).splitlines()[0]})"
            raise UserError(f"{why}; {hint}") from error
    if isinstance(env.observation_space, gym.spaces.Dict):
        shape = _flat(env.observation_space.sample()).shape
        env = gym.wrappers.TransformObservation(env, _flat, gym.spaces.Box(-np.inf, np.inf, shape, np.float32))
    if not isinstance(env.action_space, gym.spaces.Box):
        raise UserError(f"the task of {name!r} has actions in {env.action_space}; expected continuous ones (a Box)")
    if (env.action_space.low != -1).any() or (env.action_space.high != 1).any():
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


def reference(name: str) -> tuple[float, float] | None:
    """(return at score 0, return at score 100), or None where nobody has published one."""
    if name in TOYS:
        rewards = toy_dataset(name).r if TOYS[name].noise == 0 else TOYS[name].reward(toy_dataset(name).a)
        return float(rewards.mean()), float(rewards.max())
    if MINARI_ID.fullmatch(name) and name not in FILES:
        meta = minari_dataset(name).storage.metadata
        low, high = meta.get("ref_min_score"), meta.get("ref_max_score")
        return (low, high) if low is not None and high is not None else None
    return _by_task(REFERENCE, name)


def normalized_score(name: str, returns: np.ndarray) -> np.ndarray | None:
    """100 (R - R_0) / (R_100 - R_0) for each return, the scale of all D4RL tables; None without references."""
    pair = reference(name)
    return None if pair is None else 100 * (np.asarray(returns) - pair[0]) / (pair[1] - pair[0])


# --- toys: one-step tasks, constant state, two-dimensional actions, known reward ---------------
@dataclass
class Toy:
    """draw(n, generator) -> (n, 2) points and (n,) rewards, in the units of the paper; a = point / scale."""

    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    reward: Callable[[Tensor], Tensor]  # (n, 2) actions a -> (n,) mean reward, anywhere in the plane
    rows: int
    scale: float = 1.0
    noise: float = 0.0  # standard deviation of the reward around its mean
    centres: Tensor | None = None  # (k, 2) modes of the data and `spread`, their standard deviation: bandits only
    spread: float = 0.0


def _bandit(centres: Tensor, rows: int, spread: float) -> Toy:
    """DAC Fig. 2: Gaussians around `centres`; r = -||a - (0.4, -0.4)|| + 0.5 z."""

    def draw(n, g):
        a = centres[torch.arange(n) % len(centres)] + spread * torch.randn(n, 2, generator=g)  # equally many per mode
        return a.clamp(-1, 1), reward(a.clamp(-1, 1))

    def reward(a):
        return -(a - torch.tensor([0.4, -0.4], device=a.device)).norm(dim=-1)

    return Toy(draw, reward, rows, noise=0.5, centres=centres, spread=spread)


def _circle(n: int, radius: float = 1.0, turn: float = 2 * math.pi, endpoint: bool = False) -> Tensor:
    u = torch.linspace(0, turn, n if endpoint else n + 1)[:n]
    return radius * torch.stack([u.cos(), u.sin()], 1)


def _shifted(x: Tensor) -> Tensor:
    """Per axis to [0, 1], x 1.1, + (-0.8, -0.2) (DAC Fig. 2)."""
    low, high = x.min(0).values, x.max(0).values
    return 1.1 * (x - low) / (high - low) + torch.tensor([-0.8, -0.2])


def _ring_reward(a: Tensor) -> Tensor:
    """Diffusion-DICE Fig. 2, as read from the figure: peaks 0.8 at radius 0.25 and 1 at radius 1, -1 beyond 1.5."""
    r = 1.5 * a.norm(dim=-1)
    inner, outer = 0.8 - 7.2 * (r - 0.25).abs(), 1 - 4 * (r - 1).abs()
    return torch.where(r < 0.5, inner, torch.where(r <= 1.5, outer, -torch.ones_like(r)))


def _ring(n: int, g: torch.Generator):
    """N(0, I) restricted to radii 0.25..1.5: the radius by its inverse distribution function."""
    lo, hi = math.exp(-(0.25**2) / 2), math.exp(-(1.5**2) / 2)
    r = (-2 * (lo - (lo - hi) * torch.rand(n, generator=g)).log()).sqrt()
    u = 2 * math.pi * torch.rand(n, generator=g)
    x = torch.stack([r * u.cos(), r * u.sin()], 1)
    return x, _ring_reward(x / 1.5)


def _arm(theta: Tensor) -> Tensor:
    return torch.stack([-theta.cos() * theta, theta.sin() * theta], -1)


def _spiral(n: int, g: torch.Generator):
    """SWG Fig. 2 ("2spirals"): reward E = clip(1 - theta/10, 0, 1), 1 at the centre and 0.0575 at the rim."""
    theta = torch.rand(n, generator=g).sqrt() * 3 * math.pi
    x = (_arm(theta) + 0.5 * torch.rand(n, 2, generator=g)) / 3
    x = torch.where(torch.arange(n)[:, None] < n // 2, x, -x) + 0.1 * torch.randn(n, 2, generator=g)
    return x, (1 - theta / 10).clamp(0, 1)


def _spiral_reward(a: Tensor) -> Tensor:
    """E at the nearest point of the two arms."""
    theta = torch.linspace(0, 3 * math.pi, 400, device=a.device)
    arm = (_arm(theta) + 0.25) / 3
    d = torch.minimum(torch.cdist(4.5 * a, arm), torch.cdist(4.5 * a, -arm))  # (n, 400)
    return (1 - theta[d.argmin(-1)] / 10).clamp(0, 1)


_MODES = 4 / 1.414 * torch.tensor([(-math.sin(k * math.pi / 4), math.cos(k * math.pi / 4)) for k in range(8)])


def _eight(n: int, g: torch.Generator):
    """SWG Fig. 3: modes k = 0..7 on a circle of radius 4, from (0, 1) counter-clockwise; all / 1.414; E = k / 7."""
    k = torch.randint(8, (n,), generator=g)
    return _MODES[k] + 0.5 / 1.414 * torch.randn(n, 2, generator=g), k / 7


def _eight_reward(a: Tensor) -> Tensor:
    """E of the nearest mode."""
    return torch.cdist(4.5 * a, _MODES.to(a.device)).argmin(-1) / 7


_MOONS = torch.cat([_circle(20, turn=math.pi, endpoint=True), _circle(20, turn=math.pi, endpoint=True)])
_MOONS[20:] = torch.tensor([1.0, 0.5]) - _MOONS[20:]  # scikit-learn's make_moons(40)
_CIRCLES = torch.cat([_circle(20), _circle(20, radius=0.8)])  # make_circles(40)
TOYS = {
    "bandit-two": _bandit(torch.tensor([(-0.6, 0.6), (0.4, 0.2)]), 800, 0.1),
    "bandit-three": _bandit(torch.tensor([(-0.6, 0.6), (0.4, 0.4), (-0.4, -0.4)]), 1200, 0.1),
    "bandit-moons": _bandit(_shifted(_MOONS), 400, 0.05),
    "bandit-circles": _bandit(_shifted(_CIRCLES), 400, 0.05),
    "bandit-ring": Toy(_ring, _ring_reward, 1500, scale=1.5),
    "toy-spiral": Toy(_spiral, _spiral_reward, 1_000_000, scale=4.5),
    "toy-8gaussians": Toy(_eight, _eight_reward, 1_000_000, scale=4.5),
}


@cache
def toy_dataset(name: str) -> Dataset:
    """One-step episodes from state 0.  [D3] Where the reward is noisy each of the toy's rows stands 250 times,
    every time with a new draw of the noise: what a minibatch sees is a fresh reward for an old action."""
    toy, g = TOYS[name], torch.Generator().manual_seed(0)
    x, r = toy.draw(toy.rows, g)
    a = (x / toy.scale).clamp(-1, 1)
    if toy.noise:
        a, r = a.repeat(250, 1), r.repeat(250)
        r = r + toy.noise * torch.randn(len(r), generator=g)
    s, one = torch.zeros(len(r), 1), torch.ones(len(r))
    return Dataset(s, a, r.float(), s, one, one.bool())


def reweighted_samples(name: str, n: int, weight, seed: int = 0, pool: int = 1_000_000) -> Tensor:
    """(n, 2) exact samples of p(a) ~ p_data(a) weight(r(a)), r the mean reward: fresh draws, resampled."""
    g = torch.Generator().manual_seed(seed)
    x, r = TOYS[name].draw(pool, g)
    return x[torch.multinomial(weight(r), n, replacement=True, generator=g)] / TOYS[name].scale


def tilted_samples(name: str, n: int, beta: float, seed: int = 0, pool: int = 1_000_000) -> Tensor:
    """(n, 2) exact samples of p(a) ~ p_data(a) exp(beta r(a))."""
    return reweighted_samples(name, n, lambda r: (beta * r).softmax(0), seed, pool)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sample sets, (n, 2) and (m, 2) (Szekely & Rizzo, 2013): 0 if alike."""

    def within(z):
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


# --- diffusion schedules ----------------------------------------------------------------------------------
@dataclass
class Schedule:
    """Discrete schedule of T steps.  Index 0 is "no noise": alpha_bar[0] = 1, so t runs over 1..T as in the papers.
    a_t = sqrt(alpha_bar_t) a_0 + sqrt(1 - alpha_bar_t) eps."""

    T: int
    beta: Tensor  # (T + 1,), as the two below
    alpha: Tensor
    alpha_bar: Tensor
    floats: tuple[list[float], ...]  # the three as numbers: constants of a sampler that is compiled or recorded

    def to(self, device) -> Schedule:
        return Schedule(self.T, *(x.to(device) for x in (self.beta, self.alpha, self.alpha_bar)), self.floats)


def _schedule(beta: Tensor) -> Schedule:
    beta = torch.cat([beta.new_zeros(1), beta.double()])
    rows = beta.float(), (1 - beta).float(), (1 - beta).cumprod(0).float()
    return Schedule(len(beta) - 1, *rows, tuple(x.tolist() for x in rows))


def vp_schedule(T: int, beta_min: float = 0.1, beta_max: float = 10.0) -> Schedule:
    """alpha_t = exp(-beta_min/T - (beta_max - beta_min)(2t - 1) / (2 T^2)); alpha_bar_T is the same for all T."""
    t = torch.arange(1, T + 1, dtype=torch.float64)
    return _schedule(1 - torch.exp(-beta_min / T - 0.5 * (beta_max - beta_min) * (2 * t - 1) / T**2))


def cosine_schedule(T: int, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """Nichol & Dhariwal (2021) Eq. (17): alpha_bar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    return _schedule((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def linear_schedule(T: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule:
    """Ho et al. (2020): beta_1..beta_T evenly spaced."""
    return _schedule(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))


@dataclass
class VPSDE:
    """Continuous-time VP-SDE (Song et al., 2021), t in (0, 1]:  a_t = alpha(t) a_0 + sigma(t) eps.  Here alpha is
    the signal scale itself (the root of a discrete alpha_bar); lambda = log(alpha / sigma), the half log-SNR."""

    b0: float = 0.1
    b1: float = 20.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.b1 - self.b0) - 0.5 * t * self.b0

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def lam(self, t: Tensor) -> Tensor:
        return self.log_alpha(t) - self.sigma(t).log()

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """Inverse of lam, in a form that does not cancel at small t."""
        u = 2 * (self.b1 - self.b0) * torch.logaddexp(-2 * lam, torch.zeros_like(lam))
        return u / (((self.b0**2 + u).sqrt() + self.b0) * (self.b1 - self.b0))


def edm_sigmas(N: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """(N + 1,) float64 noise levels of EDM (Karras et al., 2022) Eq. (5): sigma_max down to sigma_min, then 0."""
    i = torch.arange(N, dtype=torch.float64) / (N - 1)
    sigma = (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigma, sigma.new_zeros(1)])


# --- python common.py -------------------------------------------------------------------------------------
def listing() -> str:
    """Every name with rows, megabytes of the download, sizes, horizon, task, and the papers that use it."""
    lines = [f"{'name':<29}{'rows':>9}{'MB':>6}{'S':>5}{'A':>4}{'steps':>7}  {'task':<15} used by"]
    for name in (*DEMOS, *FILES, *TOYS):
        toy = TOYS.get(name)
        rows = toy.rows * (250 if toy.noise else 1) if toy else _by_task(ROWS, name)
        S, A, steps = (1, 2, 1) if toy else _by_task(SIZES, name)
        task = "its reward" if toy else _by_task(ENV_IDS, name) or "d4rl_envs.py"
        size = f"{CHECKSUMS[name][0] / 1e6:.0f}" if name in CHECKSUMS else "-" if name in FILES else ""
        users = ", ".join(paper for paper, names in PAPERS.items() if re.fullmatch(names, name))
        rows = f"{rows:,}" if rows else "?"
        lines.append(f"{name:<29}{rows:>9}{size:>6}{S:>5}{A:>4}{steps:>7}  {task:<15} {users}".rstrip())
    return "\n".join(lines)


def inspect(source: str, env: str | None = None) -> str:
    """What to know of a dataset before training on it.  source: a name or a file; env: the task of a file."""
    is_file = source.endswith((".hdf5", ".h5")) or Path(source).expanduser().is_file()
    if env and not is_file:
        raise UserError(f"--env {env} names the task of a file, and {source!r} is not one; leave it out")
    name = env or None if is_file else source
    is_toy = name in TOYS and not is_file
    if is_toy:
        toy = toy_dataset(name)
        raw = Raw(toy.s.numpy(), toy.a.numpy(), toy.r.numpy(), toy.end.numpy(), np.zeros(len(toy), bool))
    elif is_file:
        raw = load_raw(name, source) if name else read_hdf5(Path(source).expanduser())
    else:
        raw = load_raw(name)
    n, S, A = len(raw.r), raw.s.shape[1], raw.a.shape[1]
    data = toy if is_toy else transitions(raw)

    ends = np.append(np.flatnonzero((raw.terminal | raw.timeout)[:-1]), n - 1)  # last row of every episode
    lengths, returns = np.diff(ends, prepend=-1), np.diff(raw.r.cumsum(dtype=float)[ends], prepend=0)
    terminal, timeout = raw.terminal[ends], raw.timeout[ends] & ~raw.terminal[ends]
    unfinished = "" if terminal[-1] or timeout[-1] else f", the last one ({lengths[-1]} rows) is cut off"
    runs = int((raw.terminal[1:] & raw.terminal[:-1]).sum()) if not is_toy else 0
    scores = normalized_score(name, returns) if name else None
    rows = np.ascontiguousarray(np.hstack([raw.s, raw.a]))
    doubles = n - len(np.unique(rows.view(f"V{rows.shape[1] * rows.itemsize}")))
    constant = np.flatnonzero(np.ptp(raw.s, axis=0) == 0).tolist()
    constant = f"{len(constant)}, from {constant[0]} to {constant[-1]}" if len(constant) > 10 else constant or "none"
    bound = (np.abs(raw.a) > 1 - 1e-5).mean()

    def spread(x: np.ndarray) -> str:
        q = "  ".join(f"{v:.4g}" for v in np.quantile(x, [0, 0.1, 0.5, 0.9, 1]))
        return f"{x.mean():.4g} +- {x.std():.3g};  min, 10 %, median, 90 %, max: {q}"

    lines = [
        ("rows", f"{n:,} with observations ({S}) and actions ({A}); every number is finite"),
        ("transitions", f"{len(data):,} to train on, {data.terminal.sum():,.0f} of them terminal"),
        ("episodes", f"{len(ends):,}: {terminal.sum():,} end terminal, {timeout.sum():,} at a time-out{unfinished}"),
        ("length", spread(lengths)),
        ("return", spread(returns)),
        ("score", "no reference scores" if scores is None else spread(scores)),
        ("reward", f"{spread(raw.r)}; 0 in {100 * (raw.r == 0).mean():.3g} % of the rows"),
        ("observation", f"{raw.s.min():.4g} to {raw.s.max():.4g}; constant columns: {constant}"),
        ("action", f"{raw.a.min():.4g} to {raw.a.max():.4g}; {100 * bound:.3g} % of the numbers at a bound"),
        ("duplicates", f"{doubles:,} rows repeat the observation and action of an earlier one"),
    ]
    if name is None:
        fit = ", ".join(task for task, sizes in SIZES.items() if sizes[:2] == (S, A)) or "none of D4RL's"
        lines.append(("task", f"not known from a file; sizes as in: {fit}. --env NAME names it"))
    elif name not in TOYS:
        try:
            task = make_env(name)
            sizes = *task.observation_space.shape, *task.action_space.shape
            fits = "sizes fit" if sizes == (S, A) else f"does NOT fit: its sizes are {sizes}, the data's {S, A}"
            steps = task.spec.max_episode_steps if task.spec else None
            lines.append(("task", f"{task.spec.id if task.spec else name}, {steps or 'any number of'} steps: {fits}"))
            task.close()
            if steps and lengths.max() > steps:
                lines.append(("note", f"{(lengths > steps).sum():,} episodes are longer than the task's {steps} steps"))
        except UserError as error:
            lines.append(("task", str(error)))
    if runs:
        lines.append(("note", f"{runs:,} terminal rows follow a terminal row; each counts as an episode of one row"))
    if not raw.r.any():
        lines.append(("note", "all rewards are 0: there is nothing to learn from"))
    return "\n".join([source, *(f"  {label:<12} {text}" for label, text in lines)])


def main(
    dataset: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME|FILE]")] = None,
    env: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
) -> None:
    """Without arguments: every dataset name. With a name or a D4RL-format HDF5 file: a look at that dataset.

    Args:
        dataset: a name of the listing, a Minari id, or a file
        env: the task that a file belongs to
    """
    if dataset is None and env:
        raise UserError(f"--env {env} names the task of a file: python common.py FILE --env {env}")
    print(inspect(dataset, env) if dataset is not None else listing())


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        print(f"common.py: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (OSError, RuntimeError) as error:  # a path that no system can have
        print(f"common.py: {str(error)[:200]}; expected a name or a file", file=sys.stderr)
        sys.exit(2)
