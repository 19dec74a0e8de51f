"""The data layer: what common.py makes of D4RL's names and files, of Minari's store, of tasks and of toys.

Nothing leaves this machine: files are written to a temporary folder, downloads come from 127.0.0.1.
"""

import errno
import hashlib
import math
import os
import re
import runpy
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import common
from common import DEMOS, FILES, TOYS, Raw, UserError, load_dataset, make_env, normalized_score, transitions

REPOSITORY = Path(common.__file__).parent
PATHS = """
gym_mujoco_v2/
    halfcheetah-random-v2 halfcheetah_random-v2                 halfcheetah-medium-v2 halfcheetah_medium-v2
    halfcheetah-medium-replay-v2 halfcheetah_medium_replay-v2   halfcheetah-full-replay-v2 halfcheetah_full_replay-v2
    halfcheetah-medium-expert-v2 halfcheetah_medium_expert-v2   halfcheetah-expert-v2 halfcheetah_expert-v2
    hopper-random-v2 hopper_random-v2                           hopper-medium-v2 hopper_medium-v2
    hopper-medium-replay-v2 hopper_medium_replay-v2             hopper-full-replay-v2 hopper_full_replay-v2
    hopper-medium-expert-v2 hopper_medium_expert-v2             hopper-expert-v2 hopper_expert-v2
    walker2d-random-v2 walker2d_random-v2                       walker2d-medium-v2 walker2d_medium-v2
    walker2d-medium-replay-v2 walker2d_medium_replay-v2         walker2d-full-replay-v2 walker2d_full_replay-v2
    walker2d-medium-expert-v2 walker2d_medium_expert-v2         walker2d-expert-v2 walker2d_expert-v2
    ant-random-v2 ant_random-v2                                 ant-medium-v2 ant_medium-v2
    ant-medium-replay-v2 ant_medium_replay-v2                   ant-full-replay-v2 ant_full_replay-v2
    ant-medium-expert-v2 ant_medium_expert-v2                   ant-expert-v2 ant_expert-v2
ant_maze_new/
    antmaze-umaze-v0 Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse
    antmaze-umaze-diverse-v0 Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse
    antmaze-medium-play-v0 Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse
    antmaze-medium-diverse-v0 Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse
    antmaze-large-play-v0 Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse
    antmaze-large-diverse-v0 Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse
ant_maze_v2/
    antmaze-umaze-v2 Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed
    antmaze-umaze-diverse-v2 Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed
    antmaze-medium-play-v2 Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed
    antmaze-medium-diverse-v2 Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed
    antmaze-large-play-v2 Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed
    antmaze-large-diverse-v2 Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed
maze2d/
    maze2d-umaze-v1 maze2d-umaze-sparse-v1     maze2d-umaze-dense-v1 maze2d-umaze-dense-v1
    maze2d-medium-v1 maze2d-medium-sparse-v1   maze2d-medium-dense-v1 maze2d-medium-dense-v1
    maze2d-large-v1 maze2d-large-sparse-v1     maze2d-large-dense-v1 maze2d-large-dense-v1
kitchen/
    kitchen-complete-v0 mini_kitchen_microwave_kettle_light_slider-v0
    kitchen-partial-v0 kitchen_microwave_kettle_light_slider-v0
    kitchen-mixed-v0 kitchen_microwave_kettle_bottomburner_light-v0
hand_dapg/
    pen-human-v0 pen-v0_demos_clipped                  pen-cloned-v0 pen-demos-v0-bc-combined
    pen-expert-v0 pen-v0_expert_clipped                hammer-human-v0 hammer-v0_demos_clipped
    hammer-cloned-v0 hammer-demos-v0-bc-combined       hammer-expert-v0 hammer-v0_expert_clipped
    door-human-v0 door-v0_demos_clipped                door-cloned-v0 door-demos-v0-bc-combined
    door-expert-v0 door-v0_expert_clipped              relocate-human-v0 relocate-v0_demos_clipped
    relocate-cloned-v0 relocate-demos-v0-bc-combined   relocate-expert-v0 relocate-v0_expert_clipped
hand_dapg_v1/
    pen-human-v1 pen-human-v1               pen-cloned-v1 pen-cloned-v1
    pen-expert-v1 pen-expert-v1             hammer-human-v1 hammer-human-v1
    hammer-cloned-v1 hammer-cloned-v1       hammer-expert-v1 hammer-expert-v1
    door-human-v1 door-human-v1             door-cloned-v1 door-cloned-v1
    door-expert-v1 door-expert-v1           relocate-human-v1 relocate-human-v1
    relocate-cloned-v1 relocate-cloned-v1   relocate-expert-v1 relocate-expert-v1
""".split()  # folder/, then name and file without .hdf5 (d4rl/infos.py)
_folders = np.cumsum([word.endswith("/") for word in PATHS]) - 1
_files = [(w, [f for f in PATHS if f.endswith("/")][k]) for w, k in zip(PATHS, _folders) if not w.endswith("/")]
PATHS = {name: f"{folder}{file}.hdf5" for (name, folder), (file, _) in zip(_files[::2], _files[1::2])}
FAMILIES = {  # names: numbers in an observation, in an action, steps of an episode, returns at score 0 and 100
    "halfcheetah-.*": (17, 6, 1000, -280.178953, 12135.0),
    "hopper-.*": (11, 3, 1000, -20.272305, 3234.3),
    "walker2d-.*": (17, 6, 1000, 1.629008, 4592.3),
    "ant-.*": (111, 8, 1000, -325.6, 3879.7),
    "antmaze-umaze(-diverse)?-v[02]": (29, 8, 700, 0.0, 1.0),
    "antmaze-(medium|large)-(play|diverse)-v[02]": (29, 8, 1000, 0.0, 1.0),
    "maze2d-umaze-v1": (4, 2, 300, 23.85, 161.86),
    "maze2d-medium-v1": (4, 2, 600, 13.13, 277.39),
    "maze2d-large-v1": (4, 2, 800, 6.7, 273.99),
    "maze2d-umaze-dense-v1": (4, 2, 300, 68.537689, 193.66285642381482),
    "maze2d-medium-dense-v1": (4, 2, 600, 44.264742, 297.4552547777125),
    "maze2d-large-dense-v1": (4, 2, 800, 30.569041, 303.4857382709002),
    "kitchen-(complete|partial|mixed)-v0": (60, 9, 280, 0.0, 4.0),
    "pen-.*": (45, 24, 100, 96.262799, 3076.8331017826877),
    "hammer-.*": (46, 26, 200, -274.856578, 12794.134825156867),
    "door-.*": (39, 28, 200, -56.512833, 2880.5693087298737),
    "relocate-.*": (39, 30, 200, -6.425911, 4233.877797728884),
    "pendulum-demo": (3, 1, 200, -1224.1, -152.9),
}


def facts(name: str) -> tuple[int, int, int, float, float]:
    """The one row of FAMILIES that a name belongs to."""
    (row,) = (row for names, row in FAMILIES.items() if re.fullmatch(names, name))
    return row


def arrays(n: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a small valid file: states of 3, actions of 2 numbers, one terminal and one time-out."""
    g = np.random.default_rng(seed)
    s, r = g.standard_normal((n, 3), np.float32), g.standard_normal(n, np.float32)
    a, i = g.uniform(-1, 1, (n, 2)).astype(np.float32), np.arange(n)
    return {"observations": s, "actions": a, "rewards": r, "terminals": i == 4, "timeouts": i == 9}


def write(path: Path, data: dict, **options) -> Path:
    with h5py.File(path, "w") as file:
        for key, x in data.items():
            file.create_dataset(key, data=x, **options)
    return path


def refused(call, *words: str) -> str:
    """`call` raises UserError with one line that has all the words."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text and caught.value.code == 2
    for word in words:
        assert str(word) in text
    return text


# --- rows: d4rl.qlearning_dataset -------------------------------------------------------------------------
def d4rl_loop(data: dict, max_episode_steps: int) -> dict[str, np.ndarray]:
    """d4rl/__init__.py::qlearning_dataset with its defaults, row by row. The counter's two habits are the
    original's: a row at a time-out leaves it at 0, a terminal row runs on to the last line: 1."""
    rows = {k: [] for k in ("s", "a", "r", "s_next", "terminal")}
    episode_step = 0
    for i in range(len(data["rewards"]) - 1):
        done = bool(data["terminals"][i])
        final = bool(data["timeouts"][i]) if "timeouts" in data else episode_step == max_episode_steps - 1
        if final:
            episode_step = 0
            continue
        if done:
            episode_step = 0
        rows["s"].append(data["observations"][i])
        rows["a"].append(data["actions"][i])
        rows["r"].append(np.squeeze(data["rewards"][i]))
        rows["s_next"].append(data["observations"][i + 1])
        rows["terminal"].append(done)
        episode_step += 1
    return {k: np.array(v).astype(np.float32) for k, v in rows.items()}


def iql_ends(s: np.ndarray, s_next: np.ndarray, terminal: np.ndarray) -> np.ndarray:
    """IQL's train_offline.py: ends are terminals, jumps to the next row, and the last row."""
    end = np.ones(len(s), bool)
    for i in range(len(s) - 1):
        end[i] = np.linalg.norm(s[i + 1] - s_next[i]) > 1e-6 or terminal[i] == 1
    return end


def random_file(seed: int, n: int = 300) -> dict[str, np.ndarray]:
    """Terminals and time-outs are thrown independently: also together, side by side, on the last rows."""
    g = np.random.default_rng(seed)
    data = arrays(n, seed) | {"terminals": g.random(n) < 0.1, "timeouts": g.random(n) < 0.1}
    data["terminals"][-1], data["timeouts"][-2:] = seed % 2, seed % 3 == 0
    return data


FLAGS = ["timeouts", "horizon 7", "horizon 2", "horizon 1000"]
LAYOUTS = [(layout, flags) for layout in ("float32", "float64", "columns") for flags in FLAGS]


@pytest.mark.parametrize("layout, flags", [*LAYOUTS, ("next_observations", "timeouts")])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_those_of_d4rl_qlearning_dataset(tmp_path, layout, flags, seed):
    data, horizon = random_file(seed), 1000
    if flags != "timeouts":  # as in D4RL's kitchen files: the time limit must be counted
        del data["timeouts"]
        horizon = int(flags.split()[1])
    if layout == "float64":  # as in the replay sets of D4RL; numbers that float32 has to round
        data |= {k: np.sin(data[k].astype(np.float64)) for k in ("observations", "actions", "rewards")}
    if layout == "columns":
        data |= {k: x[:, None] for k, x in data.items() if x.ndim == 1}
        data["terminals"] = data["terminals"].astype(np.float32)  # as in kitchen
    if layout == "next_observations":  # beside time-outs: D4RL reads s[i + 1] all the same
        data["next_observations"] = np.full((300, 3), 7.0, np.float32)
    want = d4rl_loop(data, horizon)
    got = transitions(common.read_hdf5(write(tmp_path / "x.hdf5", data), horizon))
    assert 0 < len(want["r"]) < 300 and len(got) == len(want["r"])
    for key, x in want.items():
        assert getattr(got, key).dtype == torch.float32
        np.testing.assert_array_equal(getattr(got, key).numpy(), x, err_msg=key)


def test_after_a_terminal_row_the_count_to_the_horizon_starts_at_one():
    """Horizon 4, terminal in row 1. The rows are counted 0 1 | 1 2 3 | 0 1 2 3: time-outs in rows 4 and 8."""
    terminal = np.arange(10) == 1
    assert np.flatnonzero(common.timeouts_by_horizon(terminal, 4)).tolist() == [4, 8]
    none = np.zeros(10, bool)
    assert np.flatnonzero(common.timeouts_by_horizon(none, 4)).tolist() == [3, 7]


HORIZONS = {"kitchen-partial-v0": 280, "antmaze-umaze-diverse-v2": 700, "maze2d-large-dense-v1": 800,
            "pen-human-v0": 100, "hopper-medium-v2": 1000, "Pendulum-v1": 200, "a/b-v0": 1000}  # fmt: skip


@pytest.mark.parametrize("name, steps", HORIZONS.items())
def test_files_without_timeouts_are_cut_at_the_horizon_of_their_task(tmp_path, name, steps):
    data = arrays(2 * steps + 3) | {"terminals": np.zeros(2 * steps + 3, bool)}
    data["observations"] /= 10  # no two rows so far apart that antmaze would be cut there
    del data["timeouts"]
    got = load_dataset(name, str(write(tmp_path / "x.hdf5", data)))
    want = d4rl_loop(data, steps)
    assert len(got) == 2 * steps  # of N - 1 rows two stand at the limit
    np.testing.assert_array_equal(got.s, want["s"])
    assert np.flatnonzero(got.end).tolist() == [steps - 2, 2 * steps - 3, 2 * steps - 1]


def successors(**changes) -> dict[str, np.ndarray]:
    """12 rows without time-outs, with successors, all at (0, 0), where float32 is fine enough, but for four: row 3 is
    terminal, the successor of 6 is 1.1e-6 off (0.8e-6 on either axis), of 8 by 0.9e-6, of 9 by far."""
    i, s, s_next = np.arange(12), np.zeros((12, 2), np.float32), np.zeros((12, 2), np.float32)
    s_next[3], s_next[6], s_next[8], s_next[9] = 5, 0.8e-6, (0.9e-6, 0), (0, -70)
    data = {"observations": s, "actions": i[:, None] / 20, "rewards": i + 1.0, "terminals": i == 3}
    return data | {"next_observations": s_next} | changes


@pytest.mark.parametrize("name", ["hopper-medium-v2", "pen-human-v0"])
@pytest.mark.parametrize("last", [False, True])
def test_without_time_outs_successors_tell_the_ends_of_episodes(tmp_path, name, last):
    """IQL's rule: more than 1e-6 apart in Euclid's norm. Terminal rows are no time-outs, the last row ends anyway."""
    i = np.arange(12)
    path = write(tmp_path / "x.hdf5", successors(terminals=(i == 3) | (last & (i == 11))))
    raw, data = common.load_raw(name, str(path)), load_dataset(name, str(path))
    assert np.flatnonzero(raw.timeout).tolist() == [6, 9] + [11] * (not last) and raw.s_next is None
    assert data.r.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 11]  # without rows 6, 9 and 11
    assert data.returns().tolist() == [1 + 2 + 3 + 4, 5 + 6, 8 + 9, 11] and data.terminal.sum() == 1
    assert not data.s_next.any()  # the next row's state, not the stored one


def test_the_count_to_the_horizon_is_off_where_successors_are_stored(tmp_path):
    """250 rows in one go: at a horizon of 100 two would be dropped."""
    g = np.random.default_rng(0).standard_normal((251, 3)).astype(np.float32)
    data = arrays(250) | {"observations": g[:-1], "next_observations": g[1:], "terminals": np.zeros(250, bool)}
    del data["timeouts"]
    assert len(load_dataset("pen-human-v0", str(write(tmp_path / "x.hdf5", data)))) == 249


BAD_SUCCESSORS = {"(11, 2)": np.zeros((11, 2)), "(12, 3)": np.zeros((12, 3)), "(12,)": np.zeros(12), "()": 0.0,
                  "NaN": np.full((12, 2), np.nan), "not numbers": np.full((12, 2), b"left")}  # fmt: skip


@pytest.mark.parametrize("word", BAD_SUCCESSORS)
def test_successors_that_do_not_fit(tmp_path, word):
    path = write(tmp_path / "x.hdf5", successors(next_observations=BAD_SUCCESSORS[word]))
    key = [] if word == "not numbers" else ["next_observations"]
    refused(lambda: load_dataset("hopper-medium-v2", str(path)), path, word, "expected", *key)


# --- episodes ---------------------------------------------------------------------------------------------
def nine_rows(**changes) -> Raw:
    """Rewards 1..9; row 2 is terminal, row 5 a time-out, the file ends in the middle of an episode."""
    i = np.arange(9)
    raw = dict(s=i[:, None].astype(np.float32), a=np.zeros((9, 1), np.float32), r=(i + 1).astype(np.float32))
    return Raw(**(raw | {"terminal": i == 2, "timeout": i == 5} | changes))


def test_ends_and_returns_by_hand():
    data = transitions(nine_rows())
    assert data.s[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 7]  # row 5 is at the time-out, row 8 is the last
    assert data.s_next[:, 0].tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert data.terminal.tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert data.end.tolist() == [False, False, True, False, True, False, True]
    assert data.returns().tolist() == [1 + 2 + 3, 4 + 5, 7 + 8]  # the last episode, cut by the file, counts
    assert data.returns().dtype == torch.float64
    assert common.reward_scale(data) == pytest.approx(1000 / (15 - 6))


def test_a_terminal_row_at_a_time_out_is_dropped_as_in_d4rl():
    data = transitions(nine_rows(timeout=np.arange(9) == 2))
    assert data.s[:, 0].tolist() == [0, 1, 3, 4, 5, 6, 7] and data.terminal.sum() == 0
    assert data.returns().tolist() == [1 + 2, 4 + 5 + 6 + 7 + 8]


def test_true_successors_keep_every_row():
    data = transitions(nine_rows(s_next=np.arange(10, 19, dtype=np.float32)[:, None]))
    assert len(data) == 9 and data.s_next[:, 0].tolist() == list(range(10, 19))
    assert data.end.tolist() == [i in (2, 5, 8) for i in range(9)]
    assert data.returns().tolist() == [6, 4 + 5 + 6, 7 + 8 + 9]


XYZ = [(0, 0, 0), (0, 5, 0), (0, 10.25, 0), (3.75, 14.25, 0), (3.75, 14.25, 99), (9, 20, 0), (0, 0, 0), (4, 2.9, 0)]


@pytest.mark.parametrize("name", ["antmaze-umaze-v0", "antmaze-large-play-v2", "ant-medium-v2", "maze2d-large-v1"])
def test_antmaze_rows_whose_successor_is_elsewhere_become_time_outs(capsys, name):
    """Steps in x, y: 5, 5.25, (3.75, 4) = 5.48, 0 (only z moves), then 7.8 from a terminal row, 21.9 from a row at a
    time-out, 4.94; the last row has no successor."""
    i = np.arange(8)
    s, one = np.array(XYZ, np.float32), np.zeros((8, 1), np.float32)
    raw = common.cut_jumps(name, Raw(s, one, one[:, 0], i == 4, i == 5))
    ant = name.startswith("antmaze")
    assert np.flatnonzero(raw.timeout).tolist() == ([1, 2, 5] if ant else [5])
    assert np.flatnonzero(raw.terminal).tolist() == [4]
    out = capsys.readouterr().out
    assert out.count("\n") == ant and (not ant or f"2 rows of {name} have a successor elsewhere" in out)
    common.cut_jumps(name, raw)  # nothing is left to cut, nothing to say
    assert np.flatnonzero(raw.timeout).tolist() == ([1, 2, 5] if ant else [5]) and capsys.readouterr().out == ""


def test_ten_thousand_long_episodes_do_not_lose_digits():
    """Float32 running sums would: returns are differences of them."""
    n = 1_000_000
    one = torch.full((n,), 0.1)
    data = common.Dataset(one[:, None], one[:, None], one, one[:, None], one, torch.arange(n) % 100 == 99)
    np.testing.assert_allclose(data.returns(), np.full(n // 100, 100 * float(one[0])), rtol=1e-8)


def test_equal_returns_have_no_scale():
    data = transitions(nine_rows(r=np.zeros(9, np.float32)))
    refused(lambda: common.reward_scale(data), "returns 0", "--reward-scale none")


def test_nothing_left_after_dropping_rows():
    refused(lambda: transitions(nine_rows(timeout=np.ones(9, bool))), "time-outs")


@pytest.mark.parametrize("seed", range(4))
def test_ends_are_those_of_iql_on_random_data(seed):
    data = random_file(seed)
    raw = Raw(data["observations"], data["actions"], data["rewards"], data["terminals"], data["timeouts"])
    got = transitions(raw)
    np.testing.assert_array_equal(got.end, iql_ends(got.s.numpy(), got.s_next.numpy(), got.terminal.numpy()))
    assert 20 < got.end.sum() < 100


def test_ends_are_those_of_iql_on_hopper_demo():
    with h5py.File(REPOSITORY / "data" / "hopper-demo.hdf5") as file:
        stored = {k: file[k][()] for k in ("observations", "actions", "rewards", "terminals", "timeouts")}
    data, want = load_dataset("hopper-demo"), d4rl_loop(stored, 1000)
    for key, x in want.items():
        np.testing.assert_array_equal(getattr(data, key).numpy(), x, err_msg=key)
    np.testing.assert_array_equal(data.end, iql_ends(want["s"], want["s_next"], want["terminal"]))
    assert abs(data.returns().mean() - 1365) < 5  # data/README.md, where the dropped rows count too
    assert data.s.shape[1:] == (11,) and data.a.shape[1:] == (3,) and data.a.abs().max() <= 1


def test_pendulum_demo_is_what_its_readme_says():
    """200 episodes of 200 rows, the last of each at its time-out: 199 are kept. Pendulum never terminates."""
    data = load_dataset("pendulum-demo")
    assert len(data) == 200 * 199 and data.end.sum() == 200 and data.terminal.sum() == 0
    assert data.s.shape[1:] == (3,) and data.a.shape[1:] == (1,)
    np.testing.assert_allclose(data.s[:, :2].norm(dim=1), 1, atol=1e-5)  # cosine and sine of the angle
    assert abs(normalized_score("pendulum-demo", data.returns().numpy()).mean() - 62) < 1


# --- reference scores -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*FILES, *DEMOS])
def test_sizes_horizons_and_reference_scores(name):
    S, A, steps, low, high = facts(name)
    assert common._by_task(common.SIZES, name) == (S, A, steps) and common.horizon(name) == steps
    assert common.reference(name) == (low, high)
    assert normalized_score(name, np.array([low, high, (low + high) / 2])) == pytest.approx([0, 100, 50])


def test_normalized_score_by_hand():
    """hopper: 100 (1606.9 + 20.272305) / (3234.3 + 20.272305) = 162717.2305 / 3254.572305 = 49.99650."""
    assert normalized_score("hopper-medium-v2", [1606.9])[0] == pytest.approx(49.99650, abs=1e-4)
    assert normalized_score("antmaze-large-play-v0", [1.0, 0.0]).tolist() == [100, 0]
    assert normalized_score("kitchen-mixed-v0", 3.0) == 75  # three of four tasks


def test_other_tasks_have_no_reference_scores():
    assert normalized_score("Hopper-v4", [1.0]) is None and normalized_score("maze2d-umaze-v0", [1.0]) is None


# --- names, files, checksums ------------------------------------------------------------------------------
@pytest.mark.parametrize("name, path", PATHS.items())
def test_urls_and_cache_names(monkeypatch, tmp_path, name, path):
    """The URL of the file, and the name under which D4RL itself would cache it: the last part of the URL."""
    asked = []

    def download(url, dst, *_):
        asked.append(url)
        write(Path(dst), arrays())

    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(common, "CHECKSUMS", {})
    assert common.fetch(name) == tmp_path / path.split("/")[1]
    assert asked == [f"http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}"]
    assert [p.name for p in tmp_path.iterdir()] == [path.split("/")[1]]


def test_every_name_has_its_own_cache_file():
    assert len(PATHS) == 4 * 6 + 2 * 6 + 2 * 3 + 3 + 4 * 3 * 2 and set(PATHS) == set(FILES)
    assert len({path.rsplit("/", 1)[1] for path in FILES.values()}) == len(FILES)


def test_the_cache_is_the_folder_of_d4rl(monkeypatch, tmp_path):
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".d4rl" / "datasets"
    folder.mkdir(parents=True)
    write(folder / "hopper_medium-v2.hdf5", arrays())
    assert common.fetch("hopper-medium-v2") == folder / "hopper_medium-v2.hdf5"
    assert len(load_dataset("hopper-medium-v2")) == 18


def test_checksums():
    table = common.CHECKSUMS
    assert table["hopper-medium-v2"] == (152756557, "5bdf1bc4a713")
    assert table["halfcheetah-full-replay-v2"] == (291381762, "27fdf7ea86e5")
    assert table["antmaze-large-diverse-v0"] == (231183929, "dda7acbdde1a")
    assert table["antmaze-umaze-v2"] == (232532949, "5ef15257771c")
    assert table["pen-human-v0"] == (2037685, "64103c05d3b3")
    assert table["door-expert-v1"] == (536056678, "66df4cd4e0a1")
    assert len(table) == 18 + 6 + 5 + 18 and set(table) <= set(FILES)
    assert all(size > 2e6 and len(sha) == 12 and int(sha, 16) > 0 for size, sha in table.values())
    assert len({sha for _, sha in table.values()}) == len(table)
    unknown = {name for name in FILES if name not in table}  # no public record of their size
    assert unknown == {n for n in FILES if n.startswith(("ant-", "maze2d", "kitchen", "relocate"))} | {
        "antmaze-medium-play-v2"}  # fmt: skip


@pytest.mark.parametrize("name, near", [
    ("hoper-medium-v2", "hopper-medium-v2"), ("hopper-medium-v0", "hopper-medium-v2"),
    ("antmaze-large-v2", "antmaze-large-play-v2"), ("pendulum", "pendulum-demo"),
    ("bandit-moon", "bandit-moons"), ("8gaussians", "toy-8gaussians"), ("zzzzzzzz", "pendulum-demo"),
])  # fmt: skip
def test_unknown_names_are_answered_with_near_ones(tmp_path, name, near):
    refused(lambda: load_dataset(name), repr(name), near, "Minari")
    path = write(tmp_path / "x.hdf5", arrays())
    refused(lambda: load_dataset(name, str(path)), repr(name), near)  # a file does not make the task known


@pytest.mark.parametrize("name", """hopper-medium-v2 kitchen-mixed-v0 pendulum-demo bandit-two Pendulum-v1
                                    mujoco/hopper/medium-v0""".split())
def test_data_path_works_for_every_known_name(tmp_path, name):
    """Also for any gymnasium id; the name is then the task, and nothing is looked up or downloaded."""
    path = write(tmp_path / "x.hdf5", arrays())
    assert load_dataset(name, str(path)).s.shape == (18, 3)


def test_a_gymnasium_id_alone_is_no_dataset():
    refused(lambda: load_dataset("Pendulum-v1"), "'Pendulum-v1'", "pendulum-demo", "--data-path")


def test_stored_rows_keep_their_time_outs(tmp_path):
    """What trajectory models train on: nothing dropped, the successor left to them."""
    raw, data = common.load_raw("hopper-medium-v2", str(write(tmp_path / "x.hdf5", arrays()))), arrays()
    assert raw.s_next is None
    np.testing.assert_array_equal(raw.s, data["observations"])
    np.testing.assert_array_equal(raw.a, data["actions"])
    np.testing.assert_array_equal(raw.r, data["rewards"])
    assert np.flatnonzero(raw.terminal).tolist() == [4]
    assert np.flatnonzero(raw.timeout).tolist() == [9]


def test_a_dataset_moves_as_a_whole():
    data = load_dataset("pendulum-demo").to("meta")
    fields = (data.s, data.a, data.r, data.s_next, data.terminal, data.end)
    assert {x.device.type for x in fields} == {"meta"} and len(data) == 200 * 199


# --- bad files --------------------------------------------------------------------------------------------
def changed(**changes) -> dict:
    """A valid file with some arrays replaced, or, at None, removed."""
    return {k: x for k, x in (arrays() | changes).items() if x is not None}


def spoiled(key: str, value: float) -> dict:
    data = arrays()
    data[key] = data[key].astype(np.float32)
    data[key][3:5] = value
    return data


@pytest.mark.parametrize("data, words", [
    (changed(rewards=None), ["has no rewards", "actions, observations, terminals, timeouts"]),
    (changed(observations=None, terminals=None), ["observations, terminals"]),
    ({}, ["nothing"]),
    (changed(actions=arrays(19)["actions"]), ["(20, 3)", "(19, 2)"]),
    (changed(rewards=np.zeros(21)), ["(21,)"]),
    (changed(rewards=np.zeros((20, 2))), ["(20, 2)"]),
    (changed(rewards=np.zeros((1, 20))), ["(1, 20)"]),
    (changed(rewards=np.float32(1)), ["rewards ()"]),
    (changed(terminals=np.zeros((20, 1, 1))), ["(20, 1, 1)"]),
    (changed(observations=np.zeros(20)), ["(20,)"]),
    (changed(actions=np.zeros(20)), ["(20,)"]),
    (changed(observations=np.zeros((20, 3, 4, 4))), ["(20, 3, 4, 4)"]),  # images
    (changed(observations=np.zeros((20, 0))), ["(20, 0)"]),
    (spoiled("observations", np.nan), ["observations", "NaN", "2 of 20"]),
    (spoiled("actions", np.nan), ["actions", "NaN", "2 of 20"]),
    (spoiled("rewards", np.inf), ["rewards", "infinity", "2 of 20"]),
    (spoiled("terminals", -np.inf), ["terminals", "infinity", "2 of 20"]),
    (changed(observations=np.full((20, 3), 1e300)), ["observations", "20 of 20"]),  # infinite in float32
    (arrays(0), ["(0, 3)", "at least two rows"]),
    (arrays(1), ["(1, 3)", "at least two rows"]),
    (changed(actions=np.full((20, 2), b"left")), ["not numbers"]),
    (changed(timeouts=np.zeros(19, bool)), ["timeouts has 19 rows", "20"]),
    (changed(timeouts=np.zeros((20, 2), bool)), ["timeouts"]),
])  # fmt: skip
def test_bad_arrays_are_named(tmp_path, data, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the one line is all that is said
        warnings.filterwarnings("ignore", "overflow", RuntimeWarning)
        path = write(tmp_path / "bad.hdf5", data)
        refused(lambda: load_dataset("hopper-medium-v2", str(path)), path, "expected", *words)


def test_a_group_in_place_of_an_array(tmp_path):
    path = write(tmp_path / "bad.hdf5", changed(rewards=None))
    with h5py.File(path, "a") as file:
        file.create_group("rewards")
    refused(lambda: load_dataset("hopper-medium-v2", str(path)), path, "expected")


def test_no_such_file(tmp_path):
    path = tmp_path / "nowhere.hdf5"
    refused(lambda: load_dataset("hopper-medium-v2", str(path)), "no such file", path, "expected a D4RL file")
    refused(lambda: load_dataset("hopper-medium-v2", str(tmp_path)), "no such file", tmp_path)  # a folder


def test_a_broken_file_in_the_cache_is_named(tmp_path, monkeypatch):
    """D4RL downloads straight into this folder: an interrupted download of its own stays there."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "hopper_medium-v2.hdf5").write_bytes(b"\x89HDF")
    refused(lambda: load_dataset("hopper-medium-v2"), "cannot read", tmp_path / "hopper_medium-v2.hdf5")


@pytest.mark.parametrize("damage", ["text", "empty", "first half", "one byte less", "broken chunk"])
def test_files_that_hdf5_cannot_read(tmp_path, damage):
    path = write(tmp_path / "bad.hdf5", arrays(500), compression="gzip", chunks=True)
    whole = path.read_bytes()
    if damage == "broken chunk":  # opens, but the compressed rewards cannot be unpacked
        with h5py.File(path) as file:
            chunk = file["rewards"].id.get_chunk_info(0)
        start = chunk.byte_offset
        path.write_bytes(whole[:start] + b"\xff" * chunk.size + whole[start + chunk.size :])
    else:
        new = {"text": b"<html>\nnot found\n</html>\n", "empty": b"", "first half": whole[: len(whole) // 2]}
        path.write_bytes(new.get(damage, whole[:-1]))
    refused(lambda: load_dataset("hopper-medium-v2", str(path)), "cannot read", path, "truncated", "expected")


def test_actions_outside_the_box_are_clipped_and_announced_once(tmp_path, capsys):
    data = arrays()
    data["actions"][[2, 7, 11], 1] = [1.5, -2.0, 1.1]
    got = load_dataset("hopper-medium-v2", str(write(tmp_path / "wide.hdf5", data)))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "15 %" in out and "wide.hdf5" in out and "clipped" in out  # 3 of 20 rows
    want = np.delete(np.clip(data["actions"], -1, 1), [9, 19], 0)  # without the time-out and the last row
    np.testing.assert_array_equal(got.a, want)


def test_rounding_just_outside_the_box_is_clipped_silently(tmp_path, capsys):
    data = arrays()
    data["actions"][0] = [1 + 5e-6, -1 - 5e-6]
    got = load_dataset("hopper-medium-v2", str(write(tmp_path / "x.hdf5", data)))
    assert got.a[0].tolist() == [1, -1] and capsys.readouterr().out == ""


# --- downloads --------------------------------------------------------------------------------------------
class Handler(BaseHTTPRequestHandler):
    """Answers every request with `server.answer(self)` and remembers the paths."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.answer(self)

    def log_message(self, *_):
        pass

    def send(self, body: bytes, status: int = 200, length: int | None = None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server in a thread, an empty cache, and no proxy between them."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.asked, web.gone = [], threading.Event()
    web.url = f"http://127.0.0.1:{web.server_address[1]}"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield web
    web.gone.set()
    web.shutdown()
    web.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def content(tmp_path, monkeypatch):
    """The bytes of a good file, known by size and SHA-256 as hopper-medium-v2."""
    body = write(tmp_path / "good.hdf5", arrays()).read_bytes()
    sha = hashlib.sha256(body).hexdigest()
    monkeypatch.setitem(common.CHECKSUMS, "hopper-medium-v2", (len(body), sha[:12]))
    return body


def left(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*")) if cache.exists() else []


KNOWN, UNKNOWN = "hopper-medium-v2", "maze2d-umaze-v1"  # with and without a checksum


@pytest.mark.parametrize("name", [KNOWN, UNKNOWN])
def test_a_download_lands_in_the_cache_and_happens_once(server, cache, content, monkeypatch, capfd, name):
    server.answer = lambda request: request.send(content)
    monkeypatch.setattr(common, "ROOT", server.url + "/offline_rl")
    first, again = load_dataset(name), load_dataset(name)
    assert server.asked == ["/offline_rl/" + FILES[name]]
    assert left(cache) == [cache / Path(FILES[name]).name] and left(cache)[0].read_bytes() == content
    np.testing.assert_array_equal(first.s, np.delete(arrays()["observations"], [9, 19], 0))
    assert torch.equal(first.s, again.s)
    out, err = capfd.readouterr()
    assert out.count("downloading") == 1 and server.url in out and str(cache) in out
    assert "100%" in err  # the progress bar


@pytest.mark.parametrize("end", ["/mirror", "/mirror/", "/mirror/other-name.hdf5"])
def test_data_url_is_a_folder_or_a_file(server, cache, content, end):
    server.answer = lambda request: request.send(content)
    assert len(load_dataset(KNOWN, data_url=server.url + end)) == 18
    file = "other-name" if end.endswith(".hdf5") else "hopper_medium-v2"
    assert server.asked == [f"/mirror/{file}.hdf5"]
    assert [p.name for p in left(cache)] == ["hopper_medium-v2.hdf5"]  # the cache always has D4RL's name


def test_data_url_may_be_a_folder_of_this_machine(tmp_path, cache, content, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(cache))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "hopper_medium-v2.hdf5").write_bytes(content)
    assert len(load_dataset(KNOWN, data_url=f"file://{tmp_path}/disk")) == 18
    assert [p.name for p in left(cache)] == ["hopper_medium-v2.hdf5"]


def test_redirects_are_followed(server, cache, content):
    """Mirrors answer with the address of a storage server."""

    def answer(request):
        if request.path.startswith("/store"):
            return request.send(content)
        return request.send(b"", 302, Location=f"{server.url}/store{request.path}")

    server.answer = answer
    assert len(load_dataset(KNOWN, data_url=server.url)) == 18
    assert server.asked == ["/hopper_medium-v2.hdf5", "/store/hopper_medium-v2.hdf5"]


def test_data_path_comes_before_the_cache_and_the_cache_before_a_download(server, cache, tmp_path):
    """Rows: 10 given, 12 cached, 14 served. The last row is dropped, and the time-out in row 9."""
    given, served = write(tmp_path / "given.hdf5", arrays(10)), write(tmp_path / "served.hdf5", arrays(14))
    body = served.read_bytes()
    server.answer = lambda request: request.send(body)
    cache.mkdir()
    write(cache / "maze2d-umaze-sparse-v1.hdf5", arrays(12))
    assert len(load_dataset(UNKNOWN, str(given), server.url)) == 9
    assert len(load_dataset(UNKNOWN, None, server.url)) == 10
    assert server.asked == []
    os.remove(cache / "maze2d-umaze-sparse-v1.hdf5")
    assert len(load_dataset(UNKNOWN, None, server.url)) == 12
    assert server.asked == ["/maze2d-umaze-sparse-v1.hdf5"]


def test_the_right_file_ends_a_series_of_failures(server, cache, content):
    """A failed attempt must not stand in the way of the next."""
    server.answer = lambda request: request.send(b"", 404)
    refused(lambda: load_dataset(KNOWN, data_url=server.url))
    server.answer = lambda request: request.send(content)
    assert len(load_dataset(KNOWN, data_url=server.url)) == 18


def hang_in_the_middle(request, body):
    request.send(body[:100], length=len(body))
    request.wfile.flush()
    request.server.gone.wait(5)


def hang_up(request, body):
    """Closes the connection without an answer."""
    request.close_connection = True


FAULTS = {  # what the server does wrong -> (answer, datasets, words that the line must have)
    "404": (lambda q, body: q.send(b"no", 404), (KNOWN, UNKNOWN), ["HTTP 404"]),
    "403": (lambda q, body: q.send(b"no", 403), (KNOWN, UNKNOWN), ["HTTP 403"]),
    "500": (lambda q, body: q.send(b"no", 500), (KNOWN,), ["HTTP 500"]),
    "short body": (lambda q, body: q.send(body[:-500], length=len(body)), (KNOWN, UNKNOWN), []),
    "short file": (lambda q, body: q.send(body[:-500]), (KNOWN, UNKNOWN), []),
    "empty file": (lambda q, body: q.send(b""), (KNOWN, UNKNOWN), []),
    "long file": (lambda q, body: q.send(body + b"more"), (KNOWN,), ["bytes came, expected"]),
    "another file of that size": (lambda q, body: q.send(body[:-1] + b"?"), (KNOWN,), ["SHA-256"]),
    "a web page": (lambda q, body: q.send(b"<html>\nplease log in\n</html>"), (KNOWN, UNKNOWN), []),
    "no answer": (lambda q, body: q.server.gone.wait(5), (KNOWN, UNKNOWN), ["timed out"]),
    "hangs in the middle": (hang_in_the_middle, (KNOWN, UNKNOWN), ["timed out"]),
    "hangs up": (hang_up, (KNOWN,), []),
    "not HTTP": (lambda q, body: q.wfile.write(b"220 mail ready\r\n"), (KNOWN,), []),
}


@pytest.mark.parametrize("fault, name", [(fault, name) for fault in FAULTS for name in FAULTS[fault][1]])
def test_failed_downloads_leave_nothing(server, cache, content, monkeypatch, fault, name):
    monkeypatch.setenv("D4RL_TIMEOUT", "0.5")
    answer, _, words = FAULTS[fault]
    server.answer = lambda request: answer(request, content)
    words = [*words, name, server.url, "Nothing was kept", "--data-path", common.MIRROR]
    refused(lambda: load_dataset(name, data_url=server.url), *words)
    assert left(cache) == [] and len(server.asked) == 1


def test_the_size_of_a_short_file_is_told(server, cache, content):
    server.answer = lambda request: request.send(content[:-500])
    sizes = f"{len(content) - 500} bytes came, expected {len(content)}"
    refused(lambda: load_dataset(KNOWN, data_url=server.url), sizes)


def test_a_download_does_not_change_the_default_timeout(server, content):
    """Sockets of the rest of the program (TensorBoard, a user's own) keep theirs."""
    import socket

    server.answer = lambda request: request.send(b"", 404)
    refused(lambda: load_dataset(KNOWN, data_url=server.url))
    assert socket.getdefaulttimeout() is None


def test_connection_refused(server, cache, content):
    dead = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = dead.server_address[1]
    dead.server_close()  # nobody listens there any more
    url = f"http://127.0.0.1:{port}/x"
    refused(lambda: load_dataset(KNOWN, data_url=url), "refused", url, "--data-path")
    assert left(cache) == []


NO_URLS = ["mirror", "http://127.0.0.1:port/x", "http://127.0.0.1/two words", "http:///x", "file:///no"]


@pytest.mark.parametrize("url", NO_URLS)
def test_urls_that_are_none(server, cache, url):
    refused(lambda: load_dataset(KNOWN, data_url=url), url, "--data-path")
    assert left(cache) == []


def test_a_cache_that_cannot_be_made(server, content, tmp_path, monkeypatch):
    """A file stands where the folder should be: this fails for root too, whom no permission stops."""
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/datasets"):
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / folder))
        refused(lambda: load_dataset(KNOWN, data_url=server.url), str(tmp_path / "file"))
    assert server.asked == [] and (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_write_permission(server, cache, content):
    cache.mkdir(mode=0o500)
    refused(lambda: load_dataset(KNOWN, data_url=server.url), "Permission denied", cache)
    assert server.asked == [] and left(cache) == []


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_disk_that_fills_up(server, cache, content, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server.answer = lambda request: request.send(content)
    monkeypatch.setattr(*((torch.hub, "download_url_to_file") if where == "write" else (os, "replace")), full)
    refused(lambda: load_dataset(KNOWN, data_url=server.url), "No space left on device")
    assert left(cache) == []


def test_an_interrupted_download_leaves_nothing(server, cache, content, monkeypatch):
    def interrupted(url, dst, *_):
        Path(dst).write_bytes(content[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(KNOWN, data_url=server.url)
    assert left(cache) == []


# --- every name, from the server to the rows --------------------------------------------------------------
TRUE_ENDS, V0_FLAGS = (149, 299, 449, 549), (151, 299, 452, 548)  # antmaze: where the ant starts anew, v0's time-outs


def layout(name: str) -> dict[str, np.ndarray]:
    """Keys, shapes and types of D4RL's file of this name with 700 random rows, the last of them inside an episode."""
    (S, A, *_), i, task = facts(name), np.arange(700), name.split("-")[0]
    g, wide = np.random.default_rng(len(name)), "-replay-" in name or name == "pen-cloned-v0"
    real = np.float64 if wide else np.float32
    s, a, r = (x.astype(real) for x in (g.standard_normal((700, S)), g.uniform(-1, 1, (700, A)), g.random(700)))
    ends = {"observations": s, "actions": a, "rewards": r, "terminals": i == 99, "timeouts": np.isin(i, (249, 449))}
    q = S // 2 + S % 2
    body = {"infos/qpos": s[:, :q], "infos/qvel": s[:, q:]}
    if "gym_mujoco" in PATHS[name]:
        s_next = np.roll(s, -1, 0)
        s_next[[99, 249, 449, 699]] = 7  # the true successors where episodes end
        about = {} if re.search("random|medium-expert", name) else {"algorithm": "SAC", "iteration": 3}
        if re.search("-(medium|expert)-v2", name.replace("medium-expert", "")):
            about |= {f"policy/fc0/{k}": np.ones((4, 4)) for k in ("weight", "bias")}
        about = {f"metadata/{k}": x for k, x in about.items()}
        return ends | body | about | {"next_observations": s_next, "infos/action_log_probs": r}
    if task == "antmaze":
        starts = np.repeat([0, *np.add(TRUE_ENDS, 1)], np.diff([0, *np.add(TRUE_ENDS, 1), 700]))
        s[:, :2] = np.outer(i - starts, (0.06, 0.03))  # from (0, 0) to at least (5.9, 3), and back at once
        goal = np.isin(i, [*range(290, 299), *range(440, 450)])  # the ant stays: runs of terminal rows
        flags = np.isin(i, V0_FLAGS if name.endswith("v0") else TRUE_ENDS)
        labels = {"rewards": goal.astype(real), "terminals": goal, "timeouts": flags, "infos/goal": s[:, 3:5]}
        return ends | body | labels | {"infos/qpos": s[:, :15], "infos/qvel": s[:, 15:]}
    if task == "maze2d":  # the time-outs are targets reached
        targets = np.isin(i, (37, 61, 310, 311))
        return ends | body | {"terminals": np.zeros(700, bool), "timeouts": targets, "infos/goal": s[:, :2]}
    if task == "kitchen":  # demonstrations of 200 and 450 rows; the second is longer than the task
        last, demo = np.isin(i, (199, 649)), 1 + (i > 199) + (i > 649)
        s[:, 30:] = 0.5  # the goal
        kitchen = ends | {"rewards": (i % 5).astype(real), "terminals": last.astype(np.float32), "infos": demo}
        return {k: x for k, x in kitchen.items() if k != "timeouts"}
    extra = {"infos/target_pos": s[:, :3], "metadata/algorithm": "DAPG", "metadata/nested/policy": np.ones((2, 2))}
    if "human" in name:  # ends by time-outs only; in columns
        extra |= {"rewards": r[:, None], "terminals": np.zeros((700, 1), bool)}
    return ends | body | extra


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_name_become_the_rows_of_d4rl(server, tmp_path, monkeypatch, capsys, name):
    data, path = layout(name), PATHS[name]
    body = write(tmp_path / "served.hdf5", data).read_bytes()
    server.answer = lambda q: q.send(body) if q.path == f"/d4rl/{path}" else q.send(b"", 404)
    monkeypatch.setattr(common, "CHECKSUMS", {})
    got = load_dataset(name, data_url=f"{server.url}/d4rl/{path.split('/')[0]}")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    if name.startswith("antmaze") and name.endswith("v0"):  # rows 149 and 549; 449 is terminal, 299 is flagged
        data["timeouts"] = data["timeouts"] | np.isin(np.arange(700), (149, 549))
        assert len(notes) == 1 and "note: 2 rows" in notes[0] and name in notes[0]
    else:
        assert notes == []
    want = d4rl_loop(data, facts(name)[2])
    assert 650 < len(want["r"]) < 699 and (got.s.shape[1], got.a.shape[1]) == facts(name)[:2]
    for key, x in want.items():
        np.testing.assert_array_equal(getattr(got, key).numpy(), x, err_msg=key)
    np.testing.assert_array_equal(got.end, iql_ends(want["s"], want["s_next"], want["terminal"]))


# --- Minari -----------------------------------------------------------------------------------------------
@pytest.fixture
def store(monkeypatch, tmp_path):
    """An empty Minari store; a download is an error at once, in place of minutes of retries."""
    pytest.importorskip("minari")
    from minari.storage import hosting

    def offline(*_, **__):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(hosting, "download_dataset", offline)
    common.minari_dataset.cache_clear()
    yield tmp_path / "minari"
    common.minari_dataset.cache_clear()


def put(name: str, episodes: list[dict], **options) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

    about = dict(algorithm_name="none", author="x", author_email="x@y.z", code_permalink="https://x.y")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what a published dataset should have
        minari.create_dataset_from_buffers(name, [EpisodeBuffer(**e) for e in episodes], **about, **options)


def episode(steps: int, end: str, start: float = 0.0, observe=None, high: float = 2.0) -> dict:
    """Actions rise from -high to high. `end`: terminations, truncations, or none."""
    t = np.arange(steps + 1)
    flags = {k: (t[:-1] == steps - 1) & (k == end) for k in ("terminations", "truncations")}
    o = observe(t + start) if observe else np.stack([np.cos(t), np.sin(t), t + start], 1).astype(np.float32)
    a = np.linspace(-high, high, steps, dtype=np.float32)[:, None]
    return dict(observations=o, actions=a, rewards=(t[1:] + start).astype(np.float64), **flags)


THREE = [episode(5, "truncations"), episode(3, "none", 10), episode(4, "terminations", 20)]


def test_minari_rows(store):
    """Nothing is dropped: the successor of the last row of an episode is stored, unlike in D4RL's files."""
    put("test/pendulum-v0", THREE, env="Pendulum-v1", ref_min_score=-1200.0, ref_max_score=-150.0)
    data = load_dataset("test/pendulum-v0")
    step = data.s[:, 2]
    assert step.tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 20, 21, 22, 23]
    assert torch.equal(data.s_next[:, 2], step + 1)  # 5, 13 and 24 at the ends, not the next episode's start
    assert data.terminal.tolist() == [float(x == 23) for x in step]  # a truncation is not terminal
    assert data.end.tolist() == [x in (4, 12, 23) for x in step]  # flagged or not
    assert data.returns().tolist() == [15, 11 + 12 + 13, 21 + 22 + 23 + 24]
    assert data.a[:5, 0].tolist() == [-1, -0.5, 0, 0.5, 1]  # torque in [-2, 2] -> [-1, 1]
    assert all(getattr(data, k).dtype == torch.float32 for k in ("s", "a", "r", "s_next", "terminal"))
    raw = common.load_raw("test/pendulum-v0")
    assert np.flatnonzero(raw.timeout).tolist() == [4, 7] and np.flatnonzero(raw.terminal).tolist() == [11]


@pytest.mark.parametrize("key, row, value", [
    ("observations", 1, np.nan), ("observations", 5, np.nan), ("actions", 2, np.nan), ("actions", 2, -np.inf),
    ("rewards", 4, np.inf),
])  # fmt: skip
def test_minari_rows_must_be_finite(store, key, row, value):
    """Observation 5 is the last: a successor only."""
    bad = episode(5, "truncations")
    bad[key][row] = value
    put("test/bad-v0", [bad, *THREE], observation_space=free(3, dtype=np.float32),
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32))  # fmt: skip
    refused(lambda: load_dataset("test/bad-v0"), "test/bad-v0", key, "NaN or infinity", "of 17 rows")


def test_minari_scores_come_from_the_dataset(store):
    put("test/scored-v0", THREE, env="Pendulum-v1", ref_min_score=-1200.0, ref_max_score=-150.0)
    put("test/unscored-v0", THREE, env="Pendulum-v1")
    assert normalized_score("test/scored-v0", [-1200, -150, -675]).tolist() == [0, 100, 50]
    assert normalized_score("test/unscored-v0", [-1200]) is None


def test_minari_environments_are_recovered(store):
    put("test/pendulum-v0", THREE, env="Pendulum-v1")
    put("test/other-v0", THREE, env="Pendulum-v1", eval_env="MountainCarContinuous-v0")
    env = make_env("test/pendulum-v0")
    assert env.spec.id == "Pendulum-v1" and env.action_space.low == -1 and env.action_space.high == 1
    assert make_env("test/other-v0").spec.id == "MountainCarContinuous-v0"  # the one meant for evaluation
    assert make_env("test/other-v0", "Pendulum-v1").spec.id == "Pendulum-v1"


def test_minari_actions_are_scaled_per_coordinate(store):
    """From [-1, 3] x [0, 10]."""
    box, see = gym.spaces.Box, gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    e = episode(3, "truncations") | {"actions": np.array([(-1, 0), (1, 5), (3, 7.5)], np.float32)}
    space = box(np.array([-1, 0], np.float32), np.array([3, 10], np.float32))
    put("test/box-v0", [e], observation_space=see, action_space=space)
    assert load_dataset("test/box-v0").a.tolist() == [[-1, -1], [0, 0], [1, 0.5]]


def goal(t: np.ndarray) -> dict:
    """Observation of a maze task; the keys stand in another order than the one promised."""
    parts = {"observation": [0.0, 0.1, 0.2, 0.3], "desired_goal": [0.5, 0.5], "achieved_goal": [0.7, 0.8]}
    return {k: t[:, None] + x for k, x in parts.items()}


def free(*shape: int, dtype=np.float64) -> gym.spaces.Box:
    return gym.spaces.Box(-np.inf, np.inf, shape, dtype)


def test_minari_goal_tasks_are_flattened_in_a_fixed_order(store):
    space = gym.spaces.Dict(observation=free(4), desired_goal=free(2), achieved_goal=free(2))
    put("test/maze-v0", [episode(3, "truncations", observe=goal)], observation_space=space,
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32))  # fmt: skip
    data = load_dataset("test/maze-v0")
    row = [0.7, 0.8, 0.0, 0.1, 0.2, 0.3, 0.5, 0.5]  # achieved_goal, observation, desired_goal
    np.testing.assert_allclose(data.s[0], row, rtol=1e-6)
    np.testing.assert_allclose(data.s_next[2], np.array(row) + 3, rtol=1e-6)


def kitchen(t: np.ndarray) -> dict:
    """Franka kitchen's goals are dicts themselves, one entry per task, not always in the same order."""
    t = t[:, None] + 0.0
    return {"observation": np.concatenate([t, t], 1), "achieved_goal": {"kettle": t + 0.1, "door": t + 0.2},
            "desired_goal": {"kettle": t + 0.3, "door": t + 0.4}}  # fmt: skip


KITCHEN = gym.spaces.Dict(observation=free(2), achieved_goal=gym.spaces.Dict(kettle=free(1), door=free(1)),
                          desired_goal=gym.spaces.Dict(kettle=free(1), door=free(1)))  # fmt: skip


def test_minari_goals_within_goals_are_flattened(store):
    put("test/kitchen-v0", [episode(3, "truncations", observe=kitchen)], observation_space=KITCHEN,
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32))  # fmt: skip
    assert load_dataset("test/kitchen-v0").s[0].tolist() == pytest.approx([0.2, 0.1, 0, 0, 0.4, 0.3])


@pytest.mark.parametrize("space", [gym.spaces.Discrete(3), gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)])
def test_minari_actions_must_be_continuous_and_bounded(store, space):
    e = episode(3, "truncations")
    e["actions"] = e["actions"] if isinstance(space, gym.spaces.Box) else np.arange(3)
    put("test/actions-v0", [e], observation_space=free(3, dtype=np.float32), action_space=space)
    refused(lambda: load_dataset("test/actions-v0"), "test/actions-v0", type(space).__name__, "bounded")


def test_minari_dataset_without_an_environment(store):
    put("test/nowhere-v0", [episode(3, "truncations")], observation_space=free(3, dtype=np.float32),
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32))  # fmt: skip
    assert len(load_dataset("test/nowhere-v0")) == 3
    refused(lambda: make_env("test/nowhere-v0"), "test/nowhere-v0", "--eval-env")
    assert make_env("test/nowhere-v0", "Pendulum-v1").spec.id == "Pendulum-v1"


def test_unknown_minari_ids_offline(store):
    for call in (load_dataset, make_env, common.reference):
        words = "'mujoco/hopper/nonsense-v0'", "Minari", "no route to host"
        refused(lambda call=call: call("mujoco/hopper/nonsense-v0"), *words)


def test_errors_without_a_text(store, monkeypatch):
    """Time-outs of the layers below minari are often silent."""
    from minari.storage import hosting

    def silent(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(hosting, "download_dataset", silent)
    refused(lambda: load_dataset("mujoco/hopper/medium-v0"), "TimeoutError")


def test_a_broken_minari_store(store):
    put("test/pendulum-v0", THREE, env="Pendulum-v1")
    (store / "test/pendulum-v0/data/metadata.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # minari's own remark on it
        refused(lambda: load_dataset("test/pendulum-v0"), "test/pendulum-v0")


def test_minari_data_never_stand_in_for_d4rl(store, monkeypatch, tmp_path):
    """A file of one is not answered with the data of the other, whatever is at hand."""
    put("mujoco/hopper/medium-v0", THREE, env="Pendulum-v1")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    refused(lambda: load_dataset("hopper-medium-v2", data_url=f"file://{tmp_path}"), "hopper-medium-v2")
    with pytest.raises(UserError):
        load_dataset("mujoco/hopper/medium-v1")


# --- environments -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["halfcheetah", "hopper", "walker2d", "ant"])
@pytest.mark.parametrize("quality", ["medium", "full-replay"])
def test_locomotion_environments_have_the_sizes_of_the_data(task, quality):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        env = make_env(f"{task}-{quality}-v2")
    assert not [w for w in said if "out of date" in str(w.message)]  # -v4 is meant: no advice against it
    kind = {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "walker2d": "Walker2d", "ant": "Ant"}[task]
    assert env.spec.id == f"{kind}-v4" and env.spec.max_episode_steps == 1000
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    obs, _ = env.reset(seed=0)
    assert (*obs.shape, *env.action_space.shape) == facts(f"{task}-{quality}-v2")[:2]
    assert env.observation_space.shape == obs.shape


def test_demos_are_evaluated_where_they_were_made():
    for name, task in (("hopper-demo", "Hopper-v5"), ("pendulum-demo", "Pendulum-v1")):
        env, data = make_env(name), load_dataset(name)
        assert env.spec.id == task
        assert env.observation_space.shape == data.s.shape[1:] and env.action_space.shape == data.a.shape[1:]


def test_pendulum_actions_are_rescaled():
    """Action 1 is torque 2, the file stores torque / 2, and the file's actions repeat its states."""
    env, data = make_env("pendulum-demo"), load_dataset("pendulum-demo")
    assert env.action_space == gym.spaces.Box(-1, 1, (1,), np.float32)
    env.reset(seed=0)
    for action in (1.0, -0.25):
        env.step(np.array([action], np.float32))
        assert env.unwrapped.last_u == pytest.approx(2 * action)
    obs, _ = env.reset(seed=0)  # the seed of the file's first episode
    np.testing.assert_allclose(obs, data.s[0], atol=1e-6)
    for i in range(20):
        obs, r, *_ = env.step(data.a[i].numpy())
        np.testing.assert_allclose(obs, data.s_next[i], atol=1e-4)
        assert r == pytest.approx(float(data.r[i]), abs=1e-4)


def test_eval_env_overrides_the_task():
    assert make_env("hopper-medium-v2", "Hopper-v5").spec.id == "Hopper-v5"
    assert make_env("Pendulum-v1").spec.id == "Pendulum-v1"


NO_ENVS = {"hoper-medium-v2": "hopper-medium-v2", "Hopper-v99": "hopper-demo", "nonsense": "pendulum-demo",
           "nowhere:A-v0": "nearest names", "antmaze-umaze-v1": "antmaze-umaze-v2", "pen-human-v2": "pen-human-v1",
           "maze2d-open-v0": "maze2d-", "kitchen-complete-v1": "kitchen-complete-v0"}  # fmt: skip


@pytest.mark.parametrize("name, near", NO_ENVS.items())
def test_unknown_environments(name, near):
    refused(lambda: make_env(name), f"unknown --env {name!r}", near, "Minari")
    refused(lambda: make_env("hopper-medium-v2", name), "'hopper-medium-v2'", "--eval-env")


def test_discrete_actions_are_refused():
    refused(lambda: make_env("CartPole-v1"), "CartPole-v1", "Discrete", "continuous")


@pytest.fixture
def without_d4rl_envs(monkeypatch):
    """common.py alone, as someone may have copied it: no folder of sys.path has d4rl_envs.py."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "d4rl_envs.py").exists()])
    monkeypatch.delitem(sys.modules, "d4rl_envs", raising=False)


@pytest.mark.parametrize("name", "antmaze-umaze-v0 maze2d-umaze-v1 kitchen-mixed-v0 pen-human-v1".split())
def test_tasks_of_d4rl_envs_say_that_they_need_it_and_their_data_do_not(without_d4rl_envs, tmp_path, name):
    refused(lambda: make_env(name), name, "d4rl_envs.py must stand beside common.py")
    path = write(tmp_path / "x.hdf5", layout(name))
    assert len(load_dataset(name, str(path))) > 650 and "d4rl_envs" not in sys.modules
    assert "d4rl_envs.py must stand beside common.py" in common.inspect(str(path), name)
    assert make_env("hopper-medium-v2").spec.id == "Hopper-v4"


class Goal(gym.Env):
    """A task with dict observations and an action box other than [-1, 1]."""

    action_space = gym.spaces.Box(0, 10, (2,), np.float32)

    def __init__(self, observe, space):
        self.observe, self.observation_space = observe, space

    def seen(self):
        return {k: {j: y[0] for j, y in x.items()} if isinstance(x, dict) else x[0]
                for k, x in self.observe(np.zeros(1)).items()}  # fmt: skip

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.seen(), {}

    def step(self, action):
        return self.seen(), float(action.sum()), False, False, {}


@pytest.mark.parametrize("observe, space, row", [
    (goal, gym.spaces.Dict(observation=free(4), desired_goal=free(2), achieved_goal=free(2)),
     [0.7, 0.8, 0.0, 0.1, 0.2, 0.3, 0.5, 0.5]),
    (kitchen, KITCHEN, [0.2, 0.1, 0, 0, 0.4, 0.3]),  # within a goal by the alphabet: door, kettle
], ids=["maze", "kitchen"])  # fmt: skip
def test_goal_tasks_are_flattened_like_their_data(observe, space, row):
    gym.register("Goal-v0", lambda: Goal(observe, space), disable_env_checker=True)
    try:
        env = make_env("Goal-v0")
    finally:
        del gym.registry["Goal-v0"]
    obs, _ = env.reset()
    assert env.observation_space.shape == obs.shape == (len(row),) and obs.dtype == np.float32
    np.testing.assert_allclose(obs, row, rtol=1e-6)
    assert env.step(np.array([0.0, 1.0], np.float32))[1] == 5 + 10  # [-1, 1] -> [0, 10]


# --- toys -------------------------------------------------------------------------------------------------
ROWS = {"bandit-two": 800, "bandit-three": 1200, "bandit-moons": 400, "bandit-circles": 400,
        "bandit-ring": 1500, "toy-spiral": 1_000_000, "toy-8gaussians": 1_000_000}  # fmt: skip


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_one_step_tasks_with_a_constant_state(name):
    data, noisy = load_dataset(name), name.startswith("bandit") and name != "bandit-ring"
    n = ROWS[name] * (250 if noisy else 1)
    assert data.s.shape == (n, 1) and data.a.shape == (n, 2) and len(data) == n
    assert not data.s.any() and not data.s_next.any() and data.terminal.all() and data.end.all()
    assert data.a.abs().max() <= 1 and len(data.returns()) == n
    few = min(ROWS[name], 20_000)
    assert len(data.a[:few].unique(dim=0)) >= 0.99 * few  # clipping may make a few equal
    if noisy:  # r = -distance + 0.5 z: the mean over the 250 draws of one action, and their spread
        noise = data.r.view(250, -1) - TOYS[name].reward(data.a).view(250, -1)
        assert noise.mean().abs() < 0.01 and abs(noise.std() - 0.5) < 0.01
        assert noise.mean(0).std() < 0.05 and torch.equal(data.a[: ROWS[name]], data.a[-ROWS[name] :])
    elif name == "bandit-ring":
        assert torch.allclose(data.r, TOYS[name].reward(data.a), atol=1e-5)  # no noise
    else:  # the label is the reward at the nearest arm or mode, but for few points near another one
        error = (TOYS[name].reward(data.a[:5000]) - data.r[:5000]).abs()
        assert (error < 0.1).float().mean() > (0.9 if name == "toy-spiral" else 0.99)
        assert 0 <= data.r.min() and data.r.max() <= 1


@pytest.mark.parametrize("name", ["bandit-two", "bandit-moons", "bandit-ring"])
def test_toys_do_not_depend_on_the_seed_of_a_run_nor_move_its_generator(name):
    first = load_dataset(name)
    common.toy_dataset.cache_clear()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = load_dataset(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.a, again.a) and torch.equal(first.r, again.r)


def reward_at(name: str, *points) -> list[float]:
    return TOYS[name].reward(torch.tensor(points, dtype=torch.float32)).tolist()


def test_bandit_reward_is_minus_the_distance_to_a_point_off_the_data():
    """(0.4, -0.4): 0; the modes (0.4, 0.2): 0.6 away, (-0.4, -0.4): 0.8, (-0.6, 0.6): sqrt(2)."""
    want = [0, -0.6, -0.8, -math.sqrt(2)]
    for name in ("bandit-two", "bandit-three", "bandit-moons", "bandit-circles"):
        got = reward_at(name, (0.4, -0.4), (0.4, 0.2), (-0.4, -0.4), (-0.6, 0.6))
        assert got == pytest.approx(want, abs=1e-6)


def test_ring_reward_has_its_peaks_at_radius_a_quarter_and_one():
    """Radii 0, 0.25, 0.5, 1, 1.25, 1.5, 2; an action is a point / 1.5, whatever its direction."""
    want = [-1, 0.8, -1, 1, 0, -1, -1]  # 0.8 - 7.2 |r - 0.25| and 1 - 4 |r - 1|; -1 beyond
    for u in (0.0, 0.7, 2.0, 4.0):
        radii = (0, 0.25, 0.4999999, 1, 1.25, 1.4999999, 2)
        points = [(r / 1.5 * math.cos(u), r / 1.5 * math.sin(u)) for r in radii]
        assert reward_at("bandit-ring", *points) == pytest.approx(want, abs=1e-4)


def test_spiral_reward_falls_along_the_arms():
    """1 - theta / 10 on the arms, +-((-theta cos theta + 0.25) / 3, (theta sin theta + 0.25) / 3) / 4.5."""
    for theta in (1.0, 3.0, 6.0, 9.0):
        x = np.array([-math.cos(theta) * theta + 0.25, math.sin(theta) * theta + 0.25]) / 3 / 4.5
        assert reward_at("toy-spiral", tuple(x), tuple(-x)) == pytest.approx([1 - theta / 10] * 2, abs=2e-3)
    assert reward_at("toy-spiral", (0.0, 0.0))[0] > 0.95


def test_eight_gaussians_reward_counts_the_modes():
    """From (0, 1) counter-clockwise; (1, 0) is the seventh, k = 6; radius 4 / 1.414 / 4.5."""
    d, e = 4 / 1.414 / 4.5, 4 / 1.414 / 4.5 / math.sqrt(2)
    points = [(0, d), (-e, e), (-d, 0), (-e, -e), (0, -d), (e, -e), (d, 0), (e, e)]
    assert reward_at("toy-8gaussians", *points) == pytest.approx([k / 7 for k in range(8)])


def test_reference_of_a_toy_is_the_mean_and_the_best_of_its_data():
    data = load_dataset("bandit-two")
    low, high = common.reference("bandit-two")
    assert low == pytest.approx(float(data.r.mean()), abs=0.01)  # the noise averages out
    assert high == pytest.approx(float(TOYS["bandit-two"].reward(data.a).max()))
    assert common.reference("bandit-ring")[1] == pytest.approx(1, abs=0.02)
    assert normalized_score("toy-8gaussians", [1.0, 0.5]) == pytest.approx([100, 0], abs=0.2)


def test_moons_and_circles_stand_where_scikit_learn_puts_them():
    """make_moons(40), make_circles(40), each axis scaled to [0, 1], times 1.1, plus (-0.8, -0.2)."""
    u = np.linspace(0, np.pi, 20)
    moons = np.stack([np.r_[np.cos(u), 1 - np.cos(u)], np.r_[np.sin(u), 0.5 - np.sin(u)]], 1)
    v = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    circles = np.stack([np.r_[np.cos(v), 0.8 * np.cos(v)], np.r_[np.sin(v), 0.8 * np.sin(v)]], 1)
    for name, x in (("bandit-moons", moons), ("bandit-circles", circles)):
        x = 1.1 * (x - x.min(0)) / (x.max(0) - x.min(0)) + [-0.8, -0.2]
        np.testing.assert_allclose(TOYS[name].centres, x, atol=1e-6)
        np.testing.assert_allclose([x.min(0), x.max(0)], [(-0.8, -0.2), (0.3, 0.9)])
    radius = (TOYS["bandit-circles"].centres - torch.tensor([-0.25, 0.35])).norm(dim=1)
    np.testing.assert_allclose(radius, [0.55] * 20 + [0.44] * 20, atol=1e-6)
    first = [1.1 * 2 / 3 - 0.8, 1.1 * 0.49658 / 1.49317 - 0.2]  # (1, 0) in [-1, 2] x [-0.49658, 0.99658]
    np.testing.assert_allclose(TOYS["bandit-moons"].centres[0], first, atol=1e-4)


@pytest.mark.parametrize("name, centres, spread", [
    ("bandit-two", [(-0.6, 0.6), (0.4, 0.2)], 0.1),
    ("bandit-three", [(-0.6, 0.6), (0.4, 0.4), (-0.4, -0.4)], 0.1),
])  # fmt: skip
def test_bandits_are_gaussians_around_their_centres(name, centres, spread):
    toy, a = TOYS[name], load_dataset(name).a[: ROWS[name]]
    np.testing.assert_allclose(toy.centres, centres)
    assert toy.spread == spread
    nearest = torch.cdist(a, torch.tensor(centres)).argmin(1)
    for k, centre in enumerate(centres):
        own = a[nearest == k]
        assert abs(len(own) - 400) < 60  # 400 each, up to the luck of the draw
        assert (own.mean(0) - torch.tensor(centre)).abs().max() < 0.02
        assert (own.std(0) - spread).abs().max() < 0.02


@pytest.mark.parametrize("name", ["bandit-moons", "bandit-circles"])
def test_moons_and_circles_are_noisy_by_a_twentieth(name):
    toy, a = TOYS[name], load_dataset(name).a[: ROWS[name]]
    d = torch.cdist(a, toy.centres).min(1).values
    assert toy.spread == 0.05
    assert 0.02 < d.mean() < 0.05 * math.sqrt(math.pi / 2)  # less than of one Gaussian: neighbours lie near
    assert (d > 3 * 0.05).float().mean() < 0.02
    assert len(torch.cdist(a, toy.centres).argmin(1).unique()) == 40


def test_ring_is_a_normal_distribution_between_two_radii():
    """P(r < 1) = (e^(-1/32) - e^(-1/2)) / (e^(-1/32) - e^(-9/8)) = 0.36270 / 0.64458 = 0.5627."""
    radius = 1.5 * load_dataset("bandit-ring").a.norm(dim=1)
    assert 0.25 - 1e-6 <= radius.min() < 0.27 and 1.48 < radius.max() <= 1.5 + 1e-6
    x, _ = TOYS["bandit-ring"].draw(100_000, torch.Generator().manual_seed(1))
    assert abs((x.norm(dim=1) < 1).float().mean() - 0.5627) < 0.005
    assert x.mean(0).abs().max() < 0.01


def test_spiral_by_its_moments():
    """Without a tilt: mean reward 0.3716, mean radius 2.122, 4.5 % of the points above 0.8."""
    data = load_dataset("toy-spiral")
    assert abs(data.r.mean() - 0.3716) < 1e-3
    assert abs((4.5 * data.a).norm(dim=1).mean() - 2.122) < 5e-3
    assert abs((data.r > 0.8).float().mean() - 0.045) < 1e-3
    assert abs(data.r.min() - 0.0575) < 1e-3 and data.r.max() > 0.99
    assert data.a.mean(0).abs().max() < 2e-3  # two arms, the second the first turned by half a circle


def test_eight_gaussians_by_their_moments():
    data = load_dataset("toy-8gaussians")
    k = (7 * data.r).round().long()
    for mode in range(8):
        own = 4.5 * 1.414 * data.a[k == mode]
        centre = [-4 * math.sin(mode * math.pi / 4), 4 * math.cos(mode * math.pi / 4)]
        assert abs(len(own) / 1e6 - 0.125) < 2e-3
        np.testing.assert_allclose(own.mean(0), centre, atol=0.01)
        np.testing.assert_allclose(own.std(0), 0.5, atol=0.01)


EIGHT = {  # beta -> P(mode k) and mean reward of p(a) exp(beta E)
    0: ([0.125] * 8, 0.5),
    1: ([0.0719, 0.0829, 0.0957, 0.1104, 0.1273, 0.1469, 0.1694, 0.1955], 0.6048),
    5: ([0.0035, 0.0070, 0.0144, 0.0294, 0.0601, 0.1227, 0.2507, 0.5121], 0.8668),
    10: ([0.0000, 0.0001, 0.0006, 0.0025, 0.0105, 0.0437, 0.1822, 0.7604], 0.9550),
}
SPIRAL = {  # beta -> mean reward, mean radius, P(reward > 0.8)
    0: (0.3716, 2.122, 0.045),
    1: (0.4238, 1.945, 0.072),
    5: (0.6420, 1.234, 0.278),
    10: (0.8007, 0.736, 0.594),
}


@pytest.mark.parametrize("beta", EIGHT)
def test_tilted_eight_gaussians(beta):
    """4 x 4,000 samples: the standard error of a probability is at most 0.004."""
    a = torch.cat([common.tilted_samples("toy-8gaussians", 4000, beta, seed) for seed in range(4)])
    share, mean = EIGHT[beta]
    reward = TOYS["toy-8gaussians"].reward(a)
    assert np.abs(np.bincount((7 * reward).round().long(), minlength=8) / len(a) - share).max() < 0.015
    assert abs(reward.mean() - mean) < 0.01


@pytest.mark.parametrize("beta", SPIRAL)
def test_tilted_spiral(beta):
    """The reward of a sample is read at the nearest point of the arms; the noise around them blurs it."""
    a = torch.cat([common.tilted_samples("toy-spiral", 4000, beta, seed) for seed in range(4)])
    mean, radius, top = SPIRAL[beta]
    reward = TOYS["toy-spiral"].reward(a)
    assert abs(reward.mean() - mean) < 0.015
    assert abs((4.5 * a).norm(dim=1).mean() - radius) < 0.03
    assert abs((reward > 0.8).float().mean() - top) < 0.03


def test_tilted_samples_take_seed_and_number():
    def draw(beta, seed):
        return common.tilted_samples("bandit-moons", 500, beta, seed, pool=20_000)

    a, plain = draw(3.0, 1), draw(0.0, 1)
    assert a.shape == (500, 2) and torch.equal(a, draw(3.0, 1)) and not torch.equal(a, draw(3.0, 2))
    reward = TOYS["bandit-moons"].reward
    assert reward(a).mean() > reward(plain).mean() + 0.2


# --- python common.py -------------------------------------------------------------------------------------
MUJOCO = {f"{t}-medium{q}-v2" for t in ("halfcheetah", "hopper", "walker2d") for q in ("", "-replay", "-expert")}
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
USED = {  # what the papers' tables and figures have
    "DAC": MUJOCO | {f"antmaze-{m}-v0" for m in MAZES} | {f"bandit-{t}" for t in ("two", "three", "moons", "circles")},
    "Diffusion-DICE": MUJOCO | {f"antmaze-{m}-v2" for m in MAZES} | {"bandit-ring"},
    "DyDiff": MUJOCO | {"maze2d-umaze-v1", "maze2d-medium-v1", "maze2d-large-v1"},
    "SWG": MUJOCO | {f"antmaze-{m}-v0" for m in MAZES} | {f"kitchen-{k}-v0" for k in ("complete", "partial", "mixed")}
    | {f"{t}-{k}-v0" for t in ("pen", "hammer", "door", "relocate") for k in ("human", "cloned")}
    | {"toy-spiral", "toy-8gaussians"},
}  # fmt: skip
LISTED = """pendulum-demo 40,000 Pendulum-v1   hopper-demo 99,618 Hopper-v5   hopper-medium-v2 1,000,000 153 Hopper-v4
    hopper-medium-replay-v2 402,000 76 Hopper-v4   walker2d-medium-replay-v2 302,000 86 Walker2d-v4
    halfcheetah-medium-replay-v2 202,000 59 HalfCheetah-v4   hopper-medium-expert-v2 1,999,906 305 Hopper-v4
    walker2d-medium-expert-v2 1,999,995 462 Walker2d-v4   halfcheetah-expert-v2 1,000,000 237 HalfCheetah-v4
    halfcheetah-medium-expert-v2 2,000,000 475 HalfCheetah-v4   hopper-full-replay-v2 ? 188 Hopper-v4
    ant-medium-v2 ? - Ant-v4   antmaze-umaze-diverse-v0 1,000,000 231 d4rl_envs.py
    antmaze-medium-play-v2 1,000,000 - d4rl_envs.py   maze2d-umaze-v1 1,000,000 - d4rl_envs.py
    maze2d-medium-dense-v1 2,000,000 - d4rl_envs.py   maze2d-large-v1 4,000,000 - d4rl_envs.py
    kitchen-complete-v0 3,680 - d4rl_envs.py   kitchen-mixed-v0 136,950 - d4rl_envs.py
    pen-human-v0 5,000 2 d4rl_envs.py   pen-cloned-v0 ? 307 d4rl_envs.py   hammer-human-v1 11,310 6 d4rl_envs.py
    door-human-v0 6,729 3 d4rl_envs.py   relocate-human-v0 9,942 - d4rl_envs.py   relocate-expert-v1 ? - d4rl_envs.py
    bandit-two 200,000 its reward   bandit-ring 1,500 its reward   toy-spiral 1,000,000 its reward"""


def test_the_listing_has_one_true_row_per_name():
    head, *lines = common.listing().splitlines()
    assert head.split() == "name rows MB S A steps task used by".split() and max(map(len, lines)) <= 120
    row = re.compile(r"(\S+) +([\d,]+|\?) +(\d+|-)? *\b(\d+) +(\d+) +(\d+)  (its reward|\S+)(?: +(\S.*))?")
    rows = {m[1]: m.groups() for m in map(row.fullmatch, lines)}
    assert list(rows) == [*DEMOS, *FILES, *TOYS] and len(lines) == 2 + 69 + 7
    for name, (_, _, _, S, A, steps, _, users) in rows.items():
        want = (1, 2, 1) if name in TOYS else facts(name)[:3]
        assert (int(S), int(A), int(steps)) == want, name
        assert (users or "") == ", ".join(paper for paper in USED if name in USED[paper]), name
    for entry in re.split(r"\s{2,}", LISTED):
        name, *want = entry.replace("its reward", "its_reward").split()
        assert [x for x in rows[name][1:3] + rows[name][6:7] if x] == [w.replace("_r", " r") for w in want], name
    for name in DEMOS:
        assert rows[name][1] == f"{len(common.load_raw(name).r):,}"
    for name in TOYS:
        assert rows[name][1] == f"{len(load_dataset(name)):,}"


def test_the_documentation_shows_what_is_printed():
    text = (REPOSITORY / "docs" / "data.md").read_text()
    blocks = re.findall(r"<!-- printed by: python common\.py(.*?) -->\n+```\w*\n(.*?)\n```", text, re.S)
    assert [args for args, _ in blocks].count("") == 1
    for args, block in blocks:
        assert block == (common.inspect(*args.split()) if args else common.listing()), args


def look(source, env: str | None = None) -> dict[str, str]:
    """Label -> text of inspect(); several notes are one text."""
    head, *lines = common.inspect(str(source), env).splitlines()
    assert head == str(source) and len(lines) <= 24 and max(map(len, lines)) <= 130
    assert all(re.match(r"  [a-z]+ +\S", line) for line in lines)
    found = {}
    for label, text in (line.split(maxsplit=1) for line in lines):
        found[label] = f"{found[label]} | {text}" if label in found else text
    return found


def eleven(**changes) -> dict[str, np.ndarray]:
    """Five episodes: rows 0-2 terminal, 3-5 to a time-out, 6-7 terminal, 8 terminal at once, 9-10 unfinished.
    Rows 4 and 8 repeat 1; row 5 has the state of row 3, with another action. Column 1 is constant."""
    i = np.arange(11)
    s = np.stack([i / 2, np.full(11, -3), np.sin(i)], 1).astype(np.float32)
    a = np.array([1, 0.5, -1, 0.3, 0.5, 0.2, 1 - 5e-6, 0.9999, 0.5, 0, 0], np.float32)[:, None]
    s[[4, 8]], s[5] = s[1], s[3]
    r = np.array([0, 2, 4, 4, 5, 6, 7, 8, 9, 10, 11], np.float32)
    data = {"observations": s, "actions": a, "rewards": r, "terminals": np.isin(i, (2, 7, 8)), "timeouts": i == 5}
    return data | changes


def test_a_look_at_a_file_by_hand(tmp_path):
    """Lengths 3 3 2 1 2, returns 6 15 15 9 21: mean 13.2, variance 27.36; 10 % of them lie below 6 + 0.4 (9 - 6),
    90 % below 15 + 0.6 (21 - 15). Scores: (R + 1224.1) / 10.712."""
    path = write(tmp_path / "eleven.hdf5", eleven())
    want = {
        "rows": "11 with observations (3) and actions (1); every number is finite",
        "transitions": "9 to train on, 3 of them terminal",
        "episodes": "5: 3 end terminal, 1 at a time-out, the last one (2 rows) is cut off",
        "length": "2.2 +- 0.748;  min, 10 %, median, 90 %, max: 1  1.4  2  3  3",
        "return": "13.2 +- 5.23;  min, 10 %, median, 90 %, max: 6  7.2  15  18.6  21",
        "score": "no reference scores",
        "reward": "6 +- 3.25;  min, 10 %, median, 90 %, max: 0  2  6  10  11; 0 in 9.09 % of the rows",
        "observation": "-3 to 5; constant columns: [1]",
        "action": "-1 to 1; 27.3 % of the numbers at a bound",
        "duplicates": "2 rows repeat the observation and action of an earlier one",
        "task": "not known from a file; sizes as in: pendulum-demo. --env NAME names it",
        "note": "1 terminal rows follow a terminal row; each counts as an episode of one row",
    }
    assert look(path) == want
    score = "115.5 +- 0.488;  min, 10 %, median, 90 %, max: 114.8  114.9  115.7  116  116.2"
    assert look(path, "pendulum-demo") == want | {"score": score, "task": "Pendulum-v1, 200 steps: sizes fit"}
    other = look(path, "hopper-medium-v2")
    assert other["task"] == "Hopper-v4, 1000 steps: does NOT fit: its sizes are (11, 3), the data's (3, 1)"
    wide = write(tmp_path / "wide.hdf5", eleven(actions=np.zeros((11, 2))))
    assert look(wide, "pendulum-demo")["task"].endswith("its sizes are (3, 1), the data's (3, 2)")
    assert look(path, "Pendulum-v1") == want | {"task": "Pendulum-v1, 200 steps: sizes fit"}  # no scores


def test_a_look_at_a_file_with_the_name_of_a_toy_is_one_at_the_file(tmp_path):
    assert look(write(tmp_path / "x.hdf5", eleven()), "bandit-ring")["rows"].startswith("11 with observations (3)")


@pytest.mark.parametrize("last, words", [
    ("terminals", "5: 4 end terminal, 1 at a time-out"), ("timeouts", "5: 3 end terminal, 2 at a time-out")
])  # fmt: skip
def test_a_file_that_ends_with_its_last_episode(tmp_path, last, words):
    data = eleven()
    data[last][10] = True
    assert look(write(tmp_path / "x.hdf5", data))["episodes"] == words


def test_a_row_at_a_time_out_and_terminal_ends_terminal(tmp_path):
    data = eleven(timeouts=np.isin(np.arange(11), (2, 5)))
    found = look(write(tmp_path / "x.hdf5", data))
    assert found["episodes"].startswith("5: 3 end terminal, 1 at a time-out")
    assert found["transitions"] == "8 to train on, 2 of them terminal"  # D4RL drops it


@pytest.mark.parametrize("S, A, words", [
    (17, 6, "halfcheetah, walker2d"), (29, 8, "antmaze, antmaze-umaze"), (39, 30, "relocate"), (5, 5, "none of D4RL's"),
])  # fmt: skip
def test_tasks_that_a_file_without_a_name_may_belong_to(tmp_path, S, A, words):
    path = write(tmp_path / "x.h5", arrays() | {"observations": np.eye(20, S), "actions": np.eye(20, A)})
    assert look(path)["task"] == f"not known from a file; sizes as in: {words}. --env NAME names it"


def test_notes_on_what_cannot_be_learned_from(tmp_path):
    """Episodes of 200, 201 and 49 rows where the task has 200 steps; no reward; no run of terminal rows."""
    i = np.arange(450)
    s = np.random.default_rng(0).standard_normal((450, 3))
    data = {"observations": s, "actions": s[:, :1] / 9, "rewards": 0.0 * i, "terminals": i == 400, "timeouts": i == 199}
    found = look(write(tmp_path / "x.hdf5", data), "pendulum-demo")
    notes = ["1 episodes are longer than the task's 200 steps", "all rewards are 0: there is nothing to learn from"]
    assert found["note"] == " | ".join(notes) and found["reward"].endswith("; 0 in 100 % of the rows")
    data["rewards"][7] = 1
    assert look(write(tmp_path / "x.hdf5", data), "pendulum-demo")["note"] == notes[0]
    assert "note" not in look(write(tmp_path / "x.hdf5", data))


D4RL_LOOKS = {  # end terminal, at a time-out, rows cut off; terminal rows after another; longer than the task
    "antmaze-umaze-diverse-v0": ("26: 19 end terminal, 6 at a time-out, the last one (150 rows)", 8 + 9, 0),
    "antmaze-medium-play-v2": ("23: 19 end terminal, 3 at a time-out, the last one (150 rows)", 8 + 9, 0),
    "maze2d-umaze-v1": ("5: 0 end terminal, 4 at a time-out, the last one (388 rows)", 0, 1),
    "kitchen-complete-v0": ("4: 2 end terminal, 1 at a time-out, the last one (50 rows)", 0, 0),
    "door-human-v0": ("3: 0 end terminal, 2 at a time-out, the last one (250 rows)", 0, 2),
}


@pytest.mark.parametrize("name", D4RL_LOOKS)
def test_a_look_at_the_files_of_d4rl_finds_their_oddities(tmp_path, monkeypatch, name):
    """From the cache, under the name of the dataset, and as a file with --env: the same but for the first line."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = write(tmp_path / Path(PATHS[name]).name, layout(name))
    episodes, runs, longer = D4RL_LOOKS[name]
    found = look(name)
    assert found == look(path, name) and found["episodes"].startswith(episodes)
    assert found["task"] == f"{name}, {facts(name)[2]} steps: sizes fit" and found["score"][0] in "-0123456789"
    notes = [f"{longer} episodes are longer than the task's {facts(name)[2]} steps"] * (longer > 0)
    notes += [f"{runs} terminal rows follow a terminal row; each counts as an episode of one row"] * (runs > 0)
    assert found.get("note", "") == " | ".join(notes)


def test_a_look_at_demos_and_toys():
    found = look("pendulum-demo")  # data/README.md
    assert found["rows"].startswith("40,000 with observations (3) and actions (1)")
    assert found["episodes"] == "200: 0 end terminal, 200 at a time-out" and found["score"].startswith("62.01 +- ")
    assert found["length"] == "200 +- 0;  min, 10 %, median, 90 %, max: 200  200  200  200  200"
    assert found["transitions"] == "39,800 to train on, 0 of them terminal" and "note" not in found
    ring, two = look("bandit-ring"), look("bandit-two")
    assert ring["transitions"] == "1,500 to train on, 1,500 of them terminal"
    assert ring["episodes"] == "1,500: 1,500 end terminal, 0 at a time-out"
    assert ring["observation"] == "0 to 0; constant columns: [0]" and not {"task", "note"} & set(ring)
    assert ring["score"].endswith("  100") and ring["reward"].startswith(ring["return"] + "; 0 in ")
    assert ring["duplicates"].startswith("0 rows") and two["duplicates"].startswith("199,200 rows")


def test_a_look_at_a_minari_dataset(store):
    """Returns 15, 36, 90: (R + 1200) / 10.5."""
    put("test/pendulum-v0", THREE, env="Pendulum-v1", ref_min_score=-1200.0, ref_max_score=-150.0)
    found = look("test/pendulum-v0")
    assert found["transitions"] == "12 to train on, 1 of them terminal"
    assert found["episodes"] == "3: 1 end terminal, 2 at a time-out" and found["length"].startswith("4 +- 0.816;")
    assert found["return"].endswith("max: 15  19.2  36  79.2  90") and found["score"].endswith("  122.9")
    assert found["task"] == "Pendulum-v1, 200 steps: sizes fit"


def command(monkeypatch, capfd, *args) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python common.py ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["common.py", *map(str, args)])
    code = 0
    try:
        runpy.run_path(str(REPOSITORY / "common.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return code, *capfd.readouterr()


BROKEN = {  # arguments -> words of the line; {} is a temporary folder
    "{}/nan.hdf5": ["observations has NaN", "2 of 20"],
    "{}/nan.hdf5 --env hopper-medium-v2": ["observations has NaN"],
    "{}/half.hdf5": ["cannot read", "truncated"],
    "{}/half": ["cannot read", "truncated"],  # a file is one whatever its name
    "{}/keys.hdf5": ["has no rewards"],
    "{}/time.hdf5": ["no transition is left"],
    "{}/nowhere.hdf5": ["no such file"],
    "{}": ["unknown", "nearest names"],
    "{}/folder.hdf5": ["no such file"],
    "{}/good.hdf5 --env hoper-medium-v2": ["'hoper-medium-v2'", "hopper-medium-v2"],
    "": ["unknown", "nearest names"],
    "antmaze-umaze": ["'antmaze-umaze'", "antmaze-umaze-v2"],
    "Pendulum-v1": ["'Pendulum-v1'", "pendulum-demo"],
}


@pytest.mark.parametrize("args", BROKEN)
def test_what_cannot_be_looked_at_is_told_in_one_line(tmp_path, monkeypatch, capfd, args):
    good = write(tmp_path / "good.hdf5", arrays()).read_bytes()
    for name in ("half.hdf5", "half"):
        (tmp_path / name).write_bytes(good[: len(good) // 2])
    write(tmp_path / "nan.hdf5", spoiled("observations", np.nan))
    write(tmp_path / "keys.hdf5", changed(rewards=None))
    write(tmp_path / "time.hdf5", changed(timeouts=np.ones(20, bool)))
    (tmp_path / "folder.hdf5").mkdir()
    code, out, err = command(monkeypatch, capfd, *args.format(tmp_path).split(" "))
    assert code == 2 and out == "" and err.startswith("common.py: ") and err.count("\n") == 1 and err.endswith("\n")
    assert all(word in err for word in BROKEN[args])


def test_the_command_lists_looks_and_helps(monkeypatch, capfd, tmp_path):
    assert command(monkeypatch, capfd) == (0, common.listing() + "\n", "")
    path = str(write(tmp_path / "x.hdf5", eleven()))
    assert command(monkeypatch, capfd, path) == (0, common.inspect(path) + "\n", "")
    want = common.inspect(path, "pendulum-demo") + "\n"
    assert command(monkeypatch, capfd, path, "--env", "pendulum-demo") == (0, want, "")
    code, out, err = command(monkeypatch, capfd, "--help")
    words = " ".join(out.replace("│", " ").split())
    assert code == 0 and err == "" and "Without arguments: every dataset name" in words
    assert "With a name or a D4RL-format HDF5 file: a look" in words and "--env" in words


def test_a_process_of_its_own_says_the_same(tmp_path):
    """From another folder, with everything that the interpreter may print."""
    write(tmp_path / "nan.hdf5", spoiled("rewards", np.nan))

    def run(*args):
        command = [sys.executable, str(REPOSITORY / "common.py"), *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)

    good, bad = run("hopper-demo"), run("nan.hdf5")
    assert (good.returncode, good.stdout, good.stderr) == (0, common.inspect("hopper-demo") + "\n", "")
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("common.py: nan.hdf5: rewards has NaN or infinity in 2 of 20 rows")
