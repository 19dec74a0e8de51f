"""The tasks of d4rl_envs.py against D4RL's: its numbers are typed in here, from its code (commit 89141a6) and from
hand_dapg's recorded demonstrations; what gymnasium-robotics simulates alike is compared with it step by step.
"""

import re
import subprocess
import sys
import warnings
from collections import Counter, deque
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import common
import d4rl_envs
import dac
from common import FILES, SIZES, UserError, make_env, normalized_score

MAPS = {  # d4rl/locomotion/maze_env.py, *_TEST: R start of the ant, G its goal; d4rl/pointmaze has the same walls
    "umaze": "11111 1R001 11101 1G001 11111",
    "medium": "11111111 1R011001 10010001 11000111 10010001 10100101 100010G1 11111111",
    "large": "111111111111 1R0001000001 101101010101 100000010001 101111011101 100101000001 110101010111 "
    "100100010G01 111111111111",
}
GOALS = {"umaze": (0, 8), "medium": (20, 20), "large": (32, 24)}  # the ant's, before the noise: 4 (j - 1), 4 (i - 1)
TARGETS = {"umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}  # the ball's: i, j
NUMBERS = {  # in an observation, in an action; steps
    "antmaze-umaze": (29, 8, 700), "antmaze-medium": (29, 8, 1000), "antmaze-large": (29, 8, 1000),
    "maze2d-umaze": (4, 2, 300), "maze2d-medium": (4, 2, 600), "maze2d-large": (4, 2, 800), "kitchen": (60, 9, 280),
    "pen": (45, 24, 100), "hammer": (46, 26, 200), "door": (39, 28, 200), "relocate": (39, 30, 200),
}  # fmt: skip
TASKS = [  # one name for each task that differs
    *(f"antmaze-{kind}-{v}" for kind in ("umaze", "medium-play", "large-diverse") for v in ("v0", "v2")),
    *(f"maze2d-{kind}-v1" for size in MAPS for kind in (size, f"{size}-dense")),
    *(f"kitchen-{kind}-v0" for kind in ("complete", "partial", "mixed")),
    *"pen-cloned-v0 hammer-human-v1 door-expert-v0 relocate-human-v1".split(),
]
WAYS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def cells(size: str, kind: str) -> set:
    return {(i, j) for i, row in enumerate(MAPS[size].split()) for j, cell in enumerate(row) if cell in kind}


FREE = {size: cells(size, "0RG") for size in MAPS}


def boxes(model) -> tuple[set, set]:
    """Centres and half sizes of a model's walls."""
    box = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    return {tuple(p) for p in model.geom_pos[box].round(6)}, {tuple(s) for s in model.geom_size[box].round(6)}


def start(name: str):
    """The task after a reset, without TimeLimit and the other wrappers of gymnasium."""
    env = make_env(name)
    env.reset(seed=0)
    return env.unwrapped


def walk(env, seed: int, steps: int) -> tuple[list, list]:
    """Observations and (reward, terminated, truncated) until the end or for `steps` steps; every time the same
    random actions."""
    rng, states, rest = np.random.default_rng(0), [env.reset(seed=seed)[0]], []
    while len(rest) < steps and not (rest and any(rest[-1][1:])):
        s, *answer, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(env.action_space.dtype))
        states.append(s)
        rest.append(answer)
    return states, rest


# --- all tasks --------------------------------------------------------------------------------------------
def test_every_name_with_a_file_has_its_task():
    names = [name for name in FILES if name.split("-")[0] not in ("hopper", "halfcheetah", "walker2d", "ant")]
    assert sorted(d4rl_envs.IDS) == sorted(names) and len(names) == 12 + 6 + 3 + 24


@pytest.mark.parametrize("name", d4rl_envs.IDS)
def test_sizes_and_horizon_are_d4rl_s_and_nothing_warns(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("error", ".*out of date.*")
        env = make_env(name)
        (s, s_next), [(r, *_)] = walk(env, 0, 1)
    sizes = *env.observation_space.shape, *env.action_space.shape, env.spec.max_episode_steps
    assert sizes == common._by_task(NUMBERS, name) == common._by_task(SIZES, name) and env.spec.id == name
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all() and type(r) is float
    assert s in env.observation_space and s_next in env.observation_space and s.dtype == np.float64


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_fixes_start_and_trajectory(name):
    (s, rest), (t, again) = (walk(make_env(name), 7, 20) for _ in range(2))
    assert np.array_equal(s, t) and rest == again and len(s) == 21
    assert not np.allclose(s[0], make_env(name).reset(seed=8)[0])


@pytest.mark.parametrize("name", TASKS)
def test_an_episode_ends_at_the_horizon_and_before_it_only_if_the_pen_is_dropped(name):
    states, rest = walk(make_env(name), 0, 2000)
    assert rest[-1][1:] == ([True, False] if name.startswith("pen") else [False, True]) and np.isfinite(states).all()
    steps = common._by_task(NUMBERS, name)[2]
    assert len(rest) < steps if name.startswith("pen") else len(rest) == steps


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "maze2d-umaze-v1", "kitchen-mixed-v0", "door-human-v1"])
def test_gymnasium_s_checker_finds_nothing(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*(different from the unwrapped|Box observation space).*")
        check_env(make_env(name), skip_render_check=True)


def test_adroit_is_made_without_the_notice_of_gymnasium_robotics():
    code, folder = "import common; common.make_env('door-human-v1').reset(seed=0)", Path(common.__file__).parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    assert "reward" not in out.stderr + out.stdout


# --- AntMaze ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", MAPS)
def test_antmaze_has_d4rl_s_walls_and_goals(size):
    kind = size if size == "umaze" else size + "-play"
    u = start(f"antmaze-{kind}-v2")
    assert boxes(u.model) == ({(4 * j - 4, 4 * i - 4, 1) for i, j in cells(size, "1")}, {(2, 2, 1)})
    goals = []
    for _ in range(400):
        u.reset_model()
        goals.append(u.goal)
    noise = np.array(goals) - GOALS[size]  # U(0, 1) + U(0, 0.5) on each axis: mean 0.75, variance 1/12 + 0.25/12
    assert (noise >= 0).all() and (noise <= 1.5).all() and (np.ptp(noise, axis=0) > 1.25).all()
    np.testing.assert_allclose(noise.mean(0), 0.75, atol=4 * 0.323 / 20)
    np.testing.assert_allclose(noise.std(0), 0.323, atol=0.04)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.2 and np.array_equal(u.model.site("goal").pos[:2], goals[-1])
    for version, different in ("v2", 5), ("v0", 1):  # v0 draws once per environment
        env = make_env(f"antmaze-{kind}-{version}")
        goals = [tuple(env.reset(seed=seed)[1]["goal"]) for seed in range(5)]
        assert len(set(goals)) == different and tuple(env.step(np.zeros(8, np.float32))[4]["goal"]) == goals[-1]
        assert np.array_equal(env.reset(seed=3)[0], make_env(f"antmaze-{kind}-{version}").reset(seed=3)[0])  # start
    assert len({tuple(make_env(f"antmaze-{kind}-v0").reset(seed=k)[1]["goal"]) for k in range(5)}) == 5


def test_the_ant_starts_around_the_origin_and_observes_qpos_and_qvel():
    u = start("antmaze-umaze-v2")
    starts = np.array([u.reset_model() for _ in range(400)])
    assert np.array_equal(starts[-1], np.append(u.data.qpos, u.data.qvel))
    noise = starts[:, :15] - [0, 0, 0.75, 1, *np.zeros(11)]  # U(-0.1, 0.1)
    assert (np.abs(noise) <= 0.1).all() and (np.ptp(noise, axis=0) > 0.19).all()
    np.testing.assert_allclose(starts[:, 15:].std(0), 0.1, atol=0.02)  # 0.1 N(0, 1)
    s = u.step(np.ones(8))[0]
    assert np.array_equal(s, np.append(u.data.qpos, u.data.qvel))


def test_the_ant_is_d4rl_s_robot():
    u = start("antmaze-medium-play-v0")
    m, rk4, hip = u.model, mujoco.mjtIntegrator.mjINT_RK4, [-30, 30]
    assert (m.opt.timestep, u.frame_skip, u.dt, m.opt.integrator) == (0.02, 5, 0.1, rk4)
    assert m.body_mass.sum() == pytest.approx(0.91088, abs=1e-5)
    assert (m.dof_armature[6:] == 1).all() and (m.dof_damping[6:] == 1).all() and (m.geom_margin == 0.01).all()
    assert (m.geom_friction == [1, 0.5, 0.5]).all() and (m.geom_solimp[:, :3] == [0.8, 0.8, 0.01]).all()
    ranges = [hip, [30, 70], hip, [-70, -30], hip, [-70, -30], hip, [30, 70]]
    np.testing.assert_allclose(np.rad2deg(m.jnt_range[1:]), ranges)
    t, a = u.data.time, np.array([1, -0.5, 0.25, 2, -3, 0.1, 0, -1])  # hip_4, ankle_4, hip_1, ..., ankle_3
    u.step(a)  # 30 a, clipped to [-1, 1], on the joints hip_1, ankle_1, ..., ankle_4
    np.testing.assert_allclose(u.data.qfrc_actuator, [*[0] * 6, 7.5, 30, -30, 3, 0, -30, 30, -15], atol=1e-5)
    assert u.data.time - t == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["antmaze-umaze-v0", "antmaze-umaze-diverse-v2"])
def test_the_ant_is_paid_within_half_a_unit_of_the_goal_where_the_episode_ends(name):
    u = start(name)
    u.place(np.array([4.0, 8.0]))  # far from walls
    for distance, reached in (0.0, True), (0.47, True), (0.499, True), (0.501, False), (0.6, False), (2.0, False):
        for angle in 0, 0.3, 3:
            xy = u.goal + distance * np.array([np.cos(angle), np.sin(angle)])
            u.set_state(np.append(xy, u.init_qpos[2:]), np.zeros(14))
            s, r, terminated, truncated, info = u.step(np.zeros(8))
            np.testing.assert_allclose(s[:2], xy, atol=1e-6)  # it stays where it was put
            assert (r, terminated, truncated, info["success"]) == (float(reached), reached, False, reached)
            assert info["distance"] == pytest.approx(distance, abs=1e-6)


@pytest.mark.parametrize("way, face", [((1, 0), 10), ((-1, 0), 2), ((0, 1), 2), ((0, -1), 2)])
def test_walls_hold_the_ant(way, face):
    u, far = start("antmaze-umaze-v2"), []  # its first corridor: x from -2 to 10, y from -2 to 2
    u.set_state(u.init_qpos, np.zeros(14))
    for _ in range(50):
        u.set_state(u.data.qpos, np.append(3 * np.array(way), u.data.qvel[2:]))
        far.append(u.step(np.zeros(8))[0][:2] @ way)
    assert face - 0.5 < max(far) < face


def test_another_ant_of_gymnasium_is_refused(tmp_path, monkeypatch):
    text = (Path(gym.envs.mujoco.__file__).parent / "assets" / "ant.xml").read_text()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "ant.xml").write_text(text.replace('gear="150"', 'gear="160"', 1))
    monkeypatch.setattr(gym.envs.mujoco, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=re.escape('7 x gear="150", not 8')):
        make_env("antmaze-umaze-v2")


# --- Maze2d -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", MAPS)
def test_maze2d_has_d4rl_s_walls_target_and_starts(size):
    u = start(f"maze2d-{size}-v1")
    assert boxes(u.model) == ({(i + 1, j + 1, 0) for i, j in cells(size, "1")}, {(0.5, 0.5, 0.2)})
    assert np.allclose(u.model.body("particle").pos, [1.2, 1.2, 0])
    assert tuple(u.goal) == TARGETS[size] and np.allclose(u.model.site("goal").pos[:2] - 1.2, u.goal)
    starts = np.array([u.reset_model() for _ in range(40 * len(FREE[size]))])
    cell = starts[:, :2].round()
    count, noise = Counter(map(tuple, cell)), starts[:, :2] - cell  # U(-0.1, 0.1) around a free cell, any
    assert set(count) == FREE[size] and min(count.values()) > 10 and max(count.values()) < 80
    assert (np.abs(noise) <= 0.1).all() and (np.ptp(noise, axis=0) > 0.19).all()
    np.testing.assert_allclose(starts[:, 2:].std(0), 0.1, rtol=0.2)  # 0.1 N(0, 1)


def test_maze2d_moves_by_implicit_euler_with_velocities_clipped_to_5():
    u, m, dt = start("maze2d-umaze-v1"), 4 / 3 * np.pi * 0.1**3 * 1000, 0.01  # 4.18879 kg; joints with damping 1
    assert u.model.body("particle").mass[0] == pytest.approx(m) == pytest.approx(4.18879, abs=1e-5) and u.dt == dt
    for v, a in ((0, 0), (1, -1)), ((2, -3), (0.3, -0.8)), ((9, -5.5), (0, 0.5)), ((5, 0.1), (7, -1.5)):
        u.set_state(np.array([1.0, 2.0]), np.array(v, float))
        v_0 = np.clip(v, -5, 5)
        v_1 = v_0 + dt * (100 * np.clip(a, -1, 1) - v_0) / (m + dt)
        np.testing.assert_allclose(u.step(np.array(a, float))[0], [*([1, 2] + dt * v_1), *v_1], atol=1e-9)


@pytest.mark.parametrize("kind", ["umaze", "medium", "large", "umaze-dense", "medium-dense", "large-dense"])
def test_maze2d_pays_near_its_target_and_never_ends(kind):
    u, size = start(f"maze2d-{kind}-v1"), kind.split("-")[0]
    way = np.array((-1, 0) if size == "medium" else (0, 1))  # to a free neighbour of the target's cell
    for distance in 0.0, 0.47, 0.499, 0.501, 0.55, 0.9:
        u.set_state(TARGETS[size] + distance * way, np.zeros(2))
        for _ in range(3):  # without force it stays
            s, r, terminated, truncated, info = u.step(np.zeros(2))
            assert r == (pytest.approx(np.exp(-distance)) if "dense" in kind else float(distance < 0.5))
            assert not terminated and not truncated and info["success"] == (distance < 0.5)
        np.testing.assert_allclose(s, [*(TARGETS[size] + distance * way), 0, 0], atol=1e-12)


@pytest.mark.parametrize("size", MAPS)
def test_walls_hold_the_ball_where_the_map_has_them(size):
    u = start(f"maze2d-{size}-v1")
    for cell in FREE[size]:
        for way in WAYS:
            last = cell
            while (last[0] + way[0], last[1] + way[1]) in FREE[size]:
                last = last[0] + way[0], last[1] + way[1]
            u.set_state(np.array(cell) - 0.2, np.zeros(2))  # the middle of cell i is at i - 0.2
            for _ in range(150):
                s = u.step(np.array(way, float))[0]
            # radius 0.1: it rests 0.4 behind the middle of the last free cell; 0.003 is MuJoCo's soft contact
            np.testing.assert_allclose(s[:2], np.array(last) - 0.2 + 0.4 * np.array(way), atol=0.005)


@pytest.mark.parametrize("size", MAPS)
def test_a_controller_along_shortest_paths_scores_in_maze2d(size):
    steps, queue = {TARGETS[size]: 0}, deque([TARGETS[size]])  # from a cell to the target, breadth first
    while queue:
        i, j = queue.popleft()
        for cell in {(i + k, j + n) for k, n in WAYS} & FREE[size] - set(steps):
            steps[cell] = steps[i, j] + 1
            queue.append(cell)

    def towards(s: np.ndarray) -> np.ndarray:
        i, j = np.floor(s[:2] + 0.7).astype(int)
        cell = min([(i, j), *((i + k, j + n) for k, n in WAYS)], key=lambda cell: steps.get(cell, np.inf))
        return np.clip(3 * (np.array(cell) - 0.2 * (cell != TARGETS[size]) - s[:2]) - 0.5 * s[2:], -1, 1)

    args = SimpleNamespace(env=f"maze2d-{size}-v1", eval_env=None, seed=0)
    act = lambda s: torch.tensor(np.array([towards(x) for x in s.double().numpy()]))  # noqa: E731
    returns, lengths = dac.evaluate(act, args, torch.device("cpu"), 5)
    assert (normalized_score(args.env, returns) > 50).all() and (lengths == NUMBERS[f"maze2d-{size}"][2]).all()


@pytest.mark.parametrize("size, title", [("umaze", "UMaze"), ("medium", "Medium"), ("large", "Large")])
def test_maze2d_moves_as_the_point_maze_of_gymnasium_robotics_does_in_its_own_axes(size, title):
    d4rl_envs.robotics("maze.point_maze")
    u, w = start(f"maze2d-{size}-v1"), gym.make(f"PointMaze_{title}-v3").unwrapped
    w.reset(seed=0)
    xc, yc, (p, q), (v, z) = w.maze.x_map_center, w.maze.y_map_center, u.data.qpos, u.data.qvel
    w.point_env.set_state(np.array([q + 0.7 - xc, yc - 0.7 - p]), np.array([z, -v]))
    way = []
    for a in np.random.default_rng(0).uniform(-1, 1, (30, 2)).repeat(10, 0):
        way.append(u.step(a)[0])
        x, y, vx, vy = w.step(np.array([a[1], -a[0]]))[0]["observation"]
        np.testing.assert_allclose(way[-1], [yc - y - 0.7, x + xc - 0.7, -vy, vx], atol=1e-6)
    assert np.ptp(way, axis=0).max() > 1  # it did move


# --- Kitchen ----------------------------------------------------------------------------------------------
OBJECTS = {  # d4rl/kitchen/kitchen_envs.py: entries of the observation and where they shall be
    "bottom burner": ([11, 12], [-0.88, -0.01]), "light switch": ([17, 18], [-0.69, -0.05]),
    "slide cabinet": ([19], [0.37]), "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06]),
}  # fmt: skip
_SLIDE = ("microwave", "kettle", "light switch", "slide cabinet")
ASKED = {"complete": _SLIDE, "partial": _SLIDE, "mixed": ("microwave", "kettle", "bottom burner", "light switch")}


@pytest.mark.parametrize("kind", ASKED)
def test_kitchen_observes_robot_objects_and_goal(kind):
    env, goal, noise = make_env(f"kitchen-{kind}-v0"), np.zeros(30), []
    for name in ASKED[kind]:
        goal[OBJECTS[name][0]] = OBJECTS[name][1]
    qpos = env.unwrapped.data.qpos
    for seed in range(60):
        s, _ = env.reset(seed=seed)
        noise.append(s[:30] - qpos)
        np.testing.assert_allclose(s[30:], goal, atol=1e-12)
    robot = [0.148388, -1.768486, 1.843903, -2.476858, 0.260252, 0.712533, 1.595154, 0.047927, 0.037135]
    np.testing.assert_allclose([*qpos[:9], *qpos[23:26]], [*robot, -0.269397, 0.350383, 1.619447], atol=1e-6)  # kettle
    width = np.abs(noise).max(0)  # 0.1 x the amplitude in franka_config.xml: at most 0.1, for the robot always
    assert (width <= 0.01).all() and (width[[*range(9), 20, 21, 22, 26, 27, 28]] > 0.0085).all()
    assert (width[[9, 10, 17, 18, 23, 24, 25, 29]] <= 5e-4).all() and (width[11:17] <= 5.1e-5).all()  # joints 9 to 29
    s = env.step(env.action_space.sample())[0]
    assert (np.abs(s[:30] - qpos) <= 0.01).all() and (s[:30] != qpos).all() and np.array_equal(s[30:], goal)


@pytest.mark.parametrize("kind", ASKED)
def test_kitchen_pays_each_object_once_and_ends_with_the_fourth(kind):
    env = make_env(f"kitchen-{kind}-v0")
    for seed in 0, 1:  # the second episode starts with nothing done
        env.reset(seed=seed)
        done = 0
        for name in sorted(OBJECTS, key=lambda name: name in ASKED[kind]):  # first the one that is not asked for
            assert env.step(np.zeros(9))[1] == 0
            env.unwrapped.data.qpos[OBJECTS[name][0]] = OBJECTS[name][1]
            s, r, terminated, truncated, info = env.step(np.zeros(9))
            done += name in ASKED[kind]
            assert r == (name in ASKED[kind]) and terminated == (done == 4) and not truncated
            assert len(info["tasks_to_complete"]) == 4 - done
            np.testing.assert_allclose(s[OBJECTS[name][0]], OBJECTS[name][1], atol=0.03)


def test_kitchens_share_a_model_that_they_leave_alone_and_nothing_else():
    envs = [make_env("kitchen-complete-v0")]
    model = envs[0].unwrapped.model
    buffers = np.empty((2, mujoco.mj_sizeModel(model)), np.uint8)
    mujoco.mj_saveModel(model, None, buffers[0])
    envs.append(make_env("kitchen-mixed-v0"))
    assert model is envs[1].unwrapped.model and envs[0].unwrapped.data is not envs[1].unwrapped.data
    alone, rng = [walk(env, seed, 30)[0] for seed, env in enumerate(envs)], [np.random.default_rng(0) for _ in envs]
    together = [[env.reset(seed=seed)[0]] for seed, env in enumerate(envs)]
    for _ in range(30):
        for env, states, g in zip(envs, together, rng):
            states.append(env.step(g.uniform(-1, 1, 9))[0])
    assert np.array_equal(alone, together) and not np.allclose(alone[0], alone[1])
    mujoco.mj_saveModel(model, None, buffers[1])
    assert np.array_equal(*buffers)


# --- Adroit -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["door", "hammer", "relocate"])
def test_adroit_subtracts_the_distance_that_gymnasium_robotics_adds(task):
    raw = getattr(d4rl_envs.robotics(f"adroit_hand.adroit_{task}"), f"AdroitHand{task.capitalize()}Env")()
    env, distances, norm = make_env(f"{task}-human-v1"), [], np.linalg.norm
    data, site = env.unwrapped.data, lambda name: env.unwrapped.data.site(name).xpos
    assert np.array_equal(env.reset(seed=3)[0], raw.reset(seed=3)[0])
    for a in np.random.default_rng(0).uniform(-1, 1, (100, *env.action_space.shape)).astype(np.float32):
        (s, r, terminated, *_), (t, q, *_) = env.step(a), raw.step(a)
        d = norm(site("S_grasp") - (site("S_handle") if task == "door" else data.body("Object").xpos))
        other = {  # d4rl/hand_manipulation_suite without the bonuses, which random actions do not reach
            "door": lambda: 0.1 * (data.joint("door_hinge").qpos[0] - 1.57) ** 2 + 1e-5 * np.sum(data.qvel**2),
            "hammer": lambda: norm(site("tool") - site("S_target")) + 0.01 * norm(data.qvel)
            + 10 * norm(site("S_target") - site("nail_goal")),
            "relocate": lambda: 0,
        }[task]()  # fmt: skip
        assert r == pytest.approx(-0.1 * d - other, abs=1e-9) == pytest.approx(q - 0.2 * d, abs=1e-9)
        assert np.array_equal(s, t) and not terminated
        distances.append(d)
    assert min(distances) > 0.01 and np.ptp(distances) > 0.01


def test_door_pays_in_recorded_poses_what_was_recorded():
    # 6 rows of hand_dapg's human demonstrations: reward, ARTz, ARRx, ARRy, ARRz, WRJ1, WRJ0, hinge, latch, door x, y, z
    # fingers straight: they do not enter; velocities unknown: up to 0.006; the other sign is 0.05 to 0.13 off
    env = make_env("door-human-v1")
    env.reset(seed=0)
    for reward, *pose in (
        (-0.2978, -0.0539, -0.0195, 0.0293, 0.3066, 0.1482, -0.2491, 0.0106, 0, -0.1324, 0.3829, 0.2658),
        (-0.2788, -0.0086, -0.0682, -0.1307, 0.2932, 0.1423, -0.0623, 0.012, 0, -0.1496, 0.2436, 0.3813),
        (-0.268, 0.0488, -0.2155, -0.1848, -0.0177, 0.1635, -0.0352, 0.012, 0, -0.1559, 0.238, 0.2697),
        (1.9192, -0.102, 0.0067, -0.0484, 0.2847, 0.1528, -0.2826, 0.8221, 1.8023, -0.1559, 0.238, 0.2697),
        (9.9369, -0.1448, -0.0686, -0.0636, 0.4769, 0.1655, -0.059, 1.2176, 1.8008, -0.1324, 0.3829, 0.2658),
        (19.937, -0.1561, -0.164, -0.143, 0.3438, 0.1821, -0.569, 1.5317, 1.3793, -0.1133, 0.2559, 0.2805),
    ):
        qpos, door = np.array([*pose[:6], *[0] * 22, *pose[6:8]]), np.array(pose[8:])
        env.unwrapped.set_env_state({"qpos": qpos, "qvel": np.zeros(30), "door_body_pos": door})
        _, r, terminated, *_ = env.step(np.zeros(28, np.float32))
        assert r == pytest.approx(reward, abs=0.008) and not terminated


def test_the_pen_ends_when_dropped_and_its_reward_is_left_alone():
    env, raw = make_env("pen-expert-v1"), d4rl_envs.robotics("adroit_hand.adroit_pen").AdroitHandPenEnv()
    for seed in range(5):
        (s, rest), height = walk(env, seed, 100), env.unwrapped.data.body("Object").xpos[2]
        states, rewards = walk(raw, seed, len(rest))
        assert np.array_equal(s, states) and [r for r, *_ in rest] == [r for r, *_ in rewards]
        assert s[-1][26] == height < 0.075 and min(x[26] for x in s[:-1]) >= 0.075 and rest[-1][1:] == [True, False]
    u = env.unwrapped
    for height, dropped in (0.0765, False), (0.0745, True):
        env.reset(seed=0)
        qpos = u.data.qpos.copy()
        qpos[24] = 0.25 - height  # OBJTx points down, from 0.25; in 0.01 s the pen falls another 0.0005
        u.set_state(qpos, np.zeros(30))
        s, _, terminated, *_ = env.step(np.zeros(24, np.float32))
        assert s[26] == pytest.approx(height - 0.0005, abs=0.0003) and terminated == dropped
    env.reset(seed=0)
    ends = [env.step(np.zeros(24, np.float32))[2:4] for _ in range(100)]  # held still it stays in the hand
    assert ends == [(False, False)] * 99 + [(False, True)]


# --- evaluation and pictures ------------------------------------------------------------------------------
@pytest.mark.parametrize("name, episodes, different", [
    ("antmaze-umaze-v0", 3, 1), ("maze2d-umaze-dense-v1", 3, 1), ("pen-human-v0", 3, 3), ("kitchen-partial-v0", 2, 1),
])  # fmt: skip
def test_lock_step_evaluation_is_that_of_single_environments(name, episodes, different):
    A, batches = common._by_task(SIZES, name)[1], []

    def act(s: torch.Tensor) -> torch.Tensor:  # leaves [-1, 1]: evaluate clips; in pen it drops some
        batches.append(s)
        return -10 * s[:, -A:] if name.startswith("pen") else 3 * s[:, :A]

    args = SimpleNamespace(env=name, eval_env=None, seed=11)
    returns, lengths = dac.evaluate(act, args, torch.device("cpu"), episodes)
    assert len(batches) == max(lengths) and len(set(lengths)) == different
    for i in range(episodes):
        env, total = make_env(name), 0.0
        s, _ = env.reset(seed=11 + i)
        for t in range(lengths[i]):
            s = torch.as_tensor(s[None], dtype=torch.float32)
            assert torch.equal(s[0], batches[t][i])
            s, r, terminated, truncated, _ = env.step(act(s).clamp(-1, 1)[0].numpy())
            total += r
        assert (terminated or truncated) and total == returns[i]


@cache
def draws() -> bool:
    """Whether gymnasium's own tasks can be drawn here; without OpenGL some attempts abort the process."""
    code = "import gymnasium as g; e = g.make('InvertedPendulum-v5', render_mode='rgb_array'); e.reset(); e.render()"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "maze2d-large-v1", "kitchen-mixed-v0", "hammer-human-v1"])
def test_pictures(name):
    if not draws():
        pytest.skip("no OpenGL here")
    env = make_env(name, render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    env.close()
    assert picture.shape == (480, 480, 3) and picture.dtype == np.uint8 and picture.std((0, 1)).min() > 10
    if "maze" in name:  # the goal's mark
        r, g, b = picture.astype(int).transpose(2, 0, 1)
        assert ((r > 100) & (r > 2 * g) & (r > 2 * b)).sum() > 50
