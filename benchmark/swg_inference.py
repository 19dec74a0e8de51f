"""Figures 4 and 5 of the SWG paper: seconds per action against depth and width of the diffusion model.

    python benchmark/swg_inference.py [--device auto] [--threads 1] [--calls 200]

Timed: one guided action for one state (N 1, rho 1, T 15; S 17, A 6), the device synchronised before and after every
call, after 20 warm-up calls. Mean and two standard deviations over the calls. Prints a table, draws
docs/figures/swg_inference.png. The authors' grid is not known: blocks 2 to 12 at width 256, widths 128 to 1024 at 3
blocks are ours; they time 10,000 calls.
"""

import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import swg  # noqa: E402


@dataclass
class Args:
    device: str = "auto"
    """auto, cpu, cuda"""
    threads: int | None = None
    """CPU threads (default: torch's)"""
    calls: int = 200
    """timed calls per setting"""
    blocks: tuple[int, ...] = (2, 3, 4, 6, 8, 12)
    """depths, at width 256"""
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    """widths, at 3 blocks"""
    graph: Literal["auto", "off"] = "auto"
    """on CUDA the sampler is recorded as a graph, unless off"""


def times(args: Args, device: torch.device, blocks: int, width: int) -> np.ndarray:
    """(calls,) milliseconds"""
    run = swg.resolve(swg.Args(env="halfcheetah-medium-v2", blocks=blocks, width=width, rho=1.0, graph=args.graph))
    agent = swg.make_agent(run, 17, 6, device)
    act, s, ms = swg.make_act(run, agent, 6), torch.randn(1, 17, device=device), []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(20 + args.calls):
        wait()
        clock = time.perf_counter()
        act(s)
        wait()
        ms.append(1000 * (time.perf_counter() - clock))
    return np.array(ms[20:])


def main(args: Args) -> None:
    device = swg.pick_device(swg.Args(device=args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    where = f"{swg.device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{where}, float32, {args.calls} calls\n\n| blocks | width | parameters | ms per action | 2 sd |")
    print("|---" * 5 + "|")
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    depths, widths = [(b, 256) for b in args.blocks], [(3, w) for w in args.widths]
    for ax, label, grid in zip(axes, ("blocks (width 256)", "width (3 blocks)"), (depths, widths)):
        x, mean, two_sd = [], [], []
        for blocks, width in grid:
            ms = times(args, device, blocks, width)
            net = swg.JointNet(17, 6, width, blocks, "tap", 0.0)
            size = sum(p.numel() for p in net.parameters())
            print(f"| {blocks} | {width} | {size:,} | {ms.mean():.2f} | {2 * ms.std():.2f} |", flush=True)
            x.append(blocks if "blocks (" in label else width)
            mean.append(ms.mean())
            two_sd.append(2 * ms.std())
        ax.errorbar(x, mean, two_sd, marker="o", ms=4, capsize=3)
        ax.set(xlabel=label, ylabel="ms per action", ylim=(0, None), xticks=x)
    fig.suptitle(f"SWG, one state, T = 15: mean and two standard deviations\n{where}", fontsize=9)
    fig.savefig(ROOT / "docs" / "figures" / "swg_inference.png", dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
