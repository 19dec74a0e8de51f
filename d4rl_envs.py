"""D4RL's AntMaze, Maze2d, Kitchen and Adroit tasks in current gymnasium and MuJoCo: no d4rl package, no mujoco-py.

    import gymnasium, d4rl_envs
    env = gymnasium.make("antmaze-umaze-v2", render_mode="rgb_array")  # D4RL's ids; all of them: d4rl_envs.IDS

Observation, action, reward, start, goal, horizon and end follow D4RL (Fu et al., 2020; Apache-2.0, commit 89141a6).
gymnasium-robotics has tasks of similar names that are different ones: its ant has five times the torque and half the
time step, in a mirrored maze without an end; its point maze is rotated and has another goal rule; in its door, hammer
and relocate one reward term has the other sign, and its pen never ends. What still differs from D4RL here:

  all      MuJoCo 3 instead of 1.50 to 2.1 (its contacts differ), gymnasium's random generator instead of numpy's
           global one: the same distributions, other numbers
  antmaze  the robot is gymnasium's ant.xml after three replacements, which gives D4RL's model
  kitchen  gymnasium-robotics' port of the robot, with D4RL's noise in the observation. Whether an object is in place is
           read from the simulator, in D4RL from the noisy observation: at most 0.017 apart, the threshold is 0.3
  adroit   gymnasium-robotics' hand, with reward, horizon and end repaired
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from functools import partial
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import gymnasium.envs.mujoco
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

MAZES = {  # rows i, columns j; 1 = wall.  AntMaze starts in cell (1, 1), Maze2d in any free cell
    "umaze": "11111 10001 11101 10001 11111".split(),
    "medium": "11111111 10011001 10010001 11000111 10010001 10100101 10001001 11111111".split(),
    "large": """111111111111 100001000001 101101010101 100000010001 101111011101 100101000001 110101010111
                100100010001 111111111111""".split(),
}
GOALS = {"umaze": (3, 1), "medium": (6, 6), "large": (7, 9)}  # of AntMaze, cells (i, j)
TARGETS = {"umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}  # of Maze2d
KITCHEN = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}


def cells(size: str, kind: str) -> np.ndarray:
    """(n, 2) cells (i, j) of a maze that are of this kind: "1" wall, "0" free."""
    return np.argwhere(np.array([list(row) for row in MAZES[size]]) == kind)


class Maze(MujocoEnv):
    """A MuJoCo model given as text, with a mark at the goal: what AntMaze and Maze2d share."""

    metadata: ClassVar = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"]}

    def __init__(self, xml: str, frame_skip: int, camera: dict, **kwargs):
        # a disc of the radius that counts as reached; MuJoCo would let a site made at the origin not be moved
        mark = '<site name="goal" type="cylinder" size="0.5 0.02" pos="1 1 0.05" rgba="0.9 0.2 0.2 0.6"/>'
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "maze.xml"
            path.write_text(xml.replace("</worldbody>", mark + "</worldbody>"))
            super().__init__(str(path), frame_skip, None, default_camera_config=camera, **kwargs)
        self.metadata = self.metadata | {"render_fps": round(1 / self.dt)}
        size = self.model.nq + self.model.nv
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def place(self, goal: np.ndarray) -> None:
        self.goal = goal
        self.model.site("goal").pos[:2] = goal

    def distance(self) -> float:
        return float(np.linalg.norm(self.data.qpos[:2] - self.goal))


class AntMaze(Maze):
    """An ant walks through a maze with cells of 4 x 4; reward 1 and end within 0.5 of the goal, else 0.

    Observation (29,): qpos (15: x, y, height, quaternion, 8 joints), qvel (14).  The goal is not in it.  Action (8,)
    in [-1, 1]: torques of up to 30 for 0.1 s.  goal_per_episode: v2 draws the goal within its cell at every reset, v0
    once for the life of the environment.  info: goal, distance, success."""

    def __init__(self, size: str, goal_per_episode: bool = True, **kwargs):
        self.size, self.goal_per_episode, self.goal = size, goal_per_episode, None
        walls = [f'<geom type="box" size="2 2 1" pos="{4 * j - 4} {4 * i - 4} 1" contype="1" conaffinity="1" '
                 f'rgba="0.7 0.5 0.3 1"/>' for i, j in cells(size, "1")]  # fmt: skip
        xml = self.ant().replace("</worldbody>", "".join(walls) + "</worldbody>")
        rows, columns = len(MAZES[size]), len(MAZES[size][0])
        middle = np.array([2.0 * columns - 6, 2.0 * rows - 6, 0])
        camera = {"distance": 6.0 * columns, "lookat": middle, "elevation": -70.0}
        super().__init__(xml, 5, camera, **kwargs)

    @staticmethod
    def ant() -> str:
        """D4RL's ant.xml: gymnasium's with another time step, torque and contact softness."""
        xml = (Path(gymnasium.envs.mujoco.__file__).parent / "assets" / "ant.xml").read_text()
        for old, new, times in (
            ('timestep="0.01"', 'timestep="0.02"', 1),
            ('gear="150"', 'gear="30"', 8),
            ('<geom conaffinity="0"', '<geom solimp=".8 .8 .01" conaffinity="0"', 1),
        ):
            if xml.count(old) != times:
                raise ImportError(f"gymnasium's ant.xml has {xml.count(old)} x {old}, not {times}: use gymnasium 1.4.0")
            xml = xml.replace(old, new)
        return xml

    def reset_model(self) -> np.ndarray:
        i, j = GOALS[self.size]
        noise = self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)  # always drawn: a seed is a start
        if self.goal is None or self.goal_per_episode:
            self.place(np.maximum(np.array([4.0 * (j - 1), 4.0 * (i - 1)]) + noise, 0))
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        self.set_state(qpos, self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv))
        return self.state_vector()

    def step(self, action: np.ndarray):
        self.do_simulation(np.clip(action, -1, 1), self.frame_skip)
        success = self.distance() <= 0.5
        if self.render_mode == "human":
            self.render()
        info = {"goal": self.goal.copy(), "distance": self.distance(), "success": success}
        return self.state_vector(), float(success), success, False, info

    def _get_reset_info(self) -> dict:
        return {"goal": self.goal.copy()}


class Maze2d(Maze):
    """A ball is pushed through a maze with cells of 1 x 1 and never ends; reward 1 within 0.5 of a fixed target, else
    0 (dense: exp(-distance)).

    Observation (4,): x, y, their velocities.  Starts and targets are around x = i, y = j (row, column) of a cell, which
    lies between i - 0.7 and i + 0.3, j - 0.7 and j + 0.3, as in D4RL's model.  Action (2,) in [-1, 1]: forces of up to
    100 on 4.19 kg for 0.01 s; velocities are clipped to +-5 before every step.  info: goal, distance, success."""

    def __init__(self, size: str, dense: bool = False, **kwargs):
        self.size, self.dense = size, dense
        walls = [f'<geom type="box" size="0.5 0.5 0.2" pos="{i + 1} {j + 1} 0" conaffinity="1" rgba="0.7 0.5 0.3 1"/>'
                 for i, j in cells(size, "1")]  # fmt: skip
        # d4rl/pointmaze/maze_model.py: qpos is relative to (1.2, 1.2), walls are drawn at + 1
        xml = f"""<mujoco model="maze2d">
          <compiler inertiafromgeom="true" angle="radian" coordinate="local"/>
          <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
          <default>
            <joint damping="1" limited="false"/>
            <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/>
          </default>
          <worldbody>
            <light directional="true" pos="0 0 10" dir="0 0 -1"/>
            <geom name="ground" type="plane" size="40 40 0.25" pos="0 0 -0.1" contype="1" conaffinity="0"/>
            <body name="particle" pos="1.2 1.2 0">
              <geom name="particle" type="sphere" size="0.1" contype="1" rgba="0.2 0.3 0.9 1"/>
              <joint name="ball_x" type="slide" axis="1 0 0"/>
              <joint name="ball_y" type="slide" axis="0 1 0"/>
            </body>
            {"".join(walls)}
          </worldbody>
          <actuator>
            <motor joint="ball_x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
            <motor joint="ball_y" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
          </actuator>
        </mujoco>"""
        rows, columns = len(MAZES[size]), len(MAZES[size][0])
        camera = {"distance": 1.5 * columns, "lookat": np.array([rows + 1, columns + 1, 0]) / 2, "elevation": -80.0}
        super().__init__(xml, 1, camera, **kwargs)
        self.place(np.array(TARGETS[size], float))
        self.model.site("goal").pos[:2] += 1.2

    def reset_model(self) -> np.ndarray:
        free = cells(self.size, "0")
        qpos = free[self.np_random.integers(len(free))] + self.np_random.uniform(-0.1, 0.1, 2)
        self.set_state(qpos, 0.1 * self.np_random.standard_normal(2))
        return self.state_vector()

    def step(self, action: np.ndarray):
        self.set_state(self.data.qpos, np.clip(self.data.qvel, -5, 5))
        self.do_simulation(np.clip(action, -1, 1), self.frame_skip)
        distance = self.distance()
        reward = np.exp(-distance) if self.dense else distance <= 0.5
        if self.render_mode == "human":
            self.render()
        info = {"goal": self.goal.copy(), "distance": distance, "success": distance <= 0.5}
        return self.state_vector(), float(reward), False, False, info


def robotics(module: str):
    """A module of gymnasium-robotics. Its first import prints a notice about the reward signs that Adroit repairs."""
    from importlib import import_module

    with contextlib.redirect_stderr(io.StringIO()):
        return import_module(f"gymnasium_robotics.envs.{module}")


def share_model(robot: type) -> None:
    """All kitchens of a process use one compiled model, which they never change: each for itself takes 72 MB and 0.3 s
    to load, 7 GB for 100 episodes in lock step. It is gymnasium-robotics' class that learns to share."""
    if hasattr(robot, "load"):
        return
    robot.load, models = robot._initialize_simulation, {}

    def initialize(self):
        key = self.fullpath, self.width, self.height
        if key not in models:
            models[key], _ = self.load()
        return models[key], mujoco.MjData(models[key])

    robot._initialize_simulation = initialize


class Kitchen(gym.ObservationWrapper):
    """A robot arm moves four objects of a kitchen into place: +1 for each, once; ends when all are.

    Observation (60,): robot qpos (9), object qpos (21), both with noise, and their goal (30), 0 where nothing is asked.
    Action (9,) in [-1, 1]: joint velocities.  info of gymnasium-robotics: tasks_to_complete and others."""

    def __init__(self, kind: str, **kwargs):
        module = robotics("franka_kitchen.kitchen_env")
        share_model(module.FrankaRobot)
        super().__init__(module.KitchenEnv(list(KITCHEN[kind]), robot_noise_ratio=0.1, object_noise_ratio=0, **kwargs))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (60,), np.float64)
        self.goal = np.zeros(30)
        for task in KITCHEN[kind]:
            self.goal[module.OBS_ELEMENT_INDICES[task]] = module.OBS_ELEMENT_GOALS[task]
        # amplitudes of joints 9 to 29; gymnasium-robotics uses 8 to 28 for them, and does not read the last one
        self.noise = np.append(self.unwrapped.robot_env.robot_pos_noise_amp[9:], 0.005)

    def observation(self, obs: dict) -> np.ndarray:
        robot, objects = obs["observation"][:9], obs["observation"][18:39]  # its 59: qpos 9, qvel 9, qpos 21, qvel 20
        noise = 0.1 * self.noise * self.unwrapped.np_random.uniform(-1, 1, 21)
        return np.concatenate([robot, objects + noise, self.goal])


class Adroit(gym.Wrapper):
    """A hand with 24 joints turns a pen, hammers a nail, opens a door or carries a ball.

    Observation (45 pen, 46 hammer, 39 door and relocate), action (24, 26, 28, 30) in [-1, 1], as in gymnasium-robotics.
    Repaired: where it adds 0.1 x the distance from palm to object, D4RL subtracts it; D4RL's pen ends when dropped,
    below a height of 0.075.  info: success."""

    def __init__(self, task: str, **kwargs):
        module = robotics(f"adroit_hand.adroit_{task}")
        super().__init__(getattr(module, f"AdroitHand{task.capitalize()}Env")(**kwargs))
        self.task = task

    def step(self, action: np.ndarray):
        obs, reward, _, truncated, info = self.env.step(action)
        to_object = {  # palm to handle, hammer or ball
            "pen": lambda: np.zeros(3),
            "hammer": lambda: obs[33:36] - obs[36:39],
            "door": lambda: obs[35:38],
            "relocate": lambda: obs[30:33],
        }[self.task]()
        dropped = self.task == "pen" and obs[26] < 0.075
        return obs, float(reward - 0.2 * np.linalg.norm(to_object)), bool(dropped), truncated, info


IDS = []


def register(name: str, entry_point, horizon: int, **kwargs) -> None:
    # partial: up to gymnasium 1.3 make() reads the metadata of a class, and those of a wrapper class are a property
    gym.register(name, partial(entry_point), max_episode_steps=horizon, kwargs=kwargs)
    IDS.append(name)


for _kind in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
    _size = _kind.split("-")[0]  # play and diverse name the data; the task is the same
    for _version in (0, 2):
        register(f"antmaze-{_kind}-v{_version}", AntMaze, 700 if _size == "umaze" else 1000,
                 size=_size, goal_per_episode=_version == 2)  # fmt: skip
for _size, _horizon in {"umaze": 300, "medium": 600, "large": 800}.items():
    register(f"maze2d-{_size}-v1", Maze2d, _horizon, size=_size)
    register(f"maze2d-{_size}-dense-v1", Maze2d, _horizon, size=_size, dense=True)
for _kind in KITCHEN:
    register(f"kitchen-{_kind}-v0", Kitchen, 280, kind=_kind)
for _task in ("pen", "hammer", "door", "relocate"):
    for _kind in ("human", "cloned", "expert"):
        for _version in (0, 1):
            register(f"{_task}-{_kind}-v{_version}", Adroit, 100 if _task == "pen" else 200, task=_task)
