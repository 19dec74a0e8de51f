"""Makes pendulum-demo.hdf5 (Pendulum-v1, 200 episodes of 200 steps, actions torque / 2) and measures its scores.

    python data/make_pendulum.py            writes pendulum-demo.hdf5 beside this file
    python data/make_pendulum.py --score    prints the returns of uniform random actions (score 0) and of noise-free
                                            controllers (the best is score 100), 200 episodes each

The controller pumps energy, torque = gain (E_top - E) sign(velocity), and holds upright with -(8 angle + 1.5 velocity).
The data is meant to be instructive: mixed quality (gain uniform in [0.3, 1.5] per episode; torque noise of standard
deviation 0.1, 0.5 or 1.0 held for 6 steps; every fourth episode plays uniform actions held for 8 steps), so that
cloning it fails and offline RL works.
"""
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np


def controller(obs: np.ndarray, gain: float) -> float:
    """Torque / 2, in [-1, 1] after clipping. obs: cos(angle), sin(angle), velocity; upright is angle 0."""
    angle, velocity = np.arctan2(obs[1], obs[0]), obs[2]
    if abs(angle) < 0.4:
        return -(8 * angle + 1.5 * velocity) / 2
    energy = velocity**2 / 6 + 5 * obs[0]  # m = l = 1, I = 1/3, g = 10: kinetic + potential; 5 at rest upright
    return gain * (5 - energy) * (1 if velocity >= 0 else -1) / 2


def episode(env: gym.Env, seed: int, act) -> tuple[list, float]:
    obs, _ = env.reset(seed=seed)
    rows, total, truncated = [], 0.0, False
    while not truncated:
        a = np.clip(act(obs, len(rows)), -1, 1).astype(np.float32).reshape(1)
        obs_next, r, _, truncated, _ = env.step(2 * a)
        rows.append((obs, a, r, truncated))
        obs, total = obs_next, total + r
    return rows, total


def make(path: Path, episodes: int = 200) -> None:
    rng, env, rows, returns = np.random.default_rng(0), gym.make("Pendulum-v1"), [], []
    for k in range(episodes):
        gain, std, noise = rng.uniform(0.3, 1.5), (0.1, 0.5, 1.0)[k % 3], 0.0

        def act(obs, step, gain=gain, std=std, uniform=k % 4 == 3):
            nonlocal noise
            if uniform:
                noise = rng.uniform(-1, 1) if step % 8 == 0 else noise
                return noise
            noise = std * rng.standard_normal() if step % 6 == 0 else noise
            return controller(obs, gain) + noise / 2

        new, total = episode(env, k, act)
        rows, returns = rows + new, [*returns, total]
    s, a, r, timeout = (np.array(x) for x in zip(*rows, strict=True))
    with h5py.File(path, "w") as file:
        for key, x in (("observations", s.astype(np.float32)), ("actions", a), ("rewards", r.astype(np.float32)),
                       ("terminals", np.zeros(len(r), bool)), ("timeouts", timeout)):
            file.create_dataset(key, data=x, compression="gzip", compression_opts=9)
    print(f"{path.name}: {len(r)} rows, {episodes} episodes, return {np.mean(returns):.0f} +- {np.std(returns):.0f} "
          f"({min(returns):.0f} to {max(returns):.0f}), {path.stat().st_size / 1e6:.2f} MB")


def score(episodes: int = 200) -> None:
    env, rng = gym.make("Pendulum-v1"), np.random.default_rng(1)
    low = [episode(env, i, lambda obs, step: rng.uniform(-1, 1))[1] for i in range(episodes)]
    print(f"uniform random actions: {np.mean(low):.1f} +- {np.std(low):.1f}")
    for gain in (0.3, 1.0, 1.5, 3.0, 6.0, 12.0):
        high = [episode(env, i, lambda obs, step, gain=gain: controller(obs, gain))[1] for i in range(episodes)]
        print(f"controller, gain {gain}: {np.mean(high):.1f} +- {np.std(high):.1f}")


if __name__ == "__main__":
    score() if "--score" in sys.argv else make(Path(__file__).with_name("pendulum-demo.hdf5"))
