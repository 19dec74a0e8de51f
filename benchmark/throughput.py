"""Updates per second: script x stage x {paper size, demo size} x {eager, compiled, graphed}, on the device at hand.

    python benchmark/throughput.py [--scripts dac diffusion_dice dydiff swg] [--threads 1] [--sizes paper demo]
    python benchmark/throughput.py --profile      where the time of an update goes

Timed: whole updates (batch, targets, losses, optimisers, averages), data on the device, no logging, no evaluation;
the median of several rounds, after warm-up; the first updates with compilation in a column of their own. FLOPs: the
formulas of torch.utils.flop_counter, matrix products only. share: seconds that plain torch.mm needs for the same
products (same shapes, one after the other; a convolution is the product that it unfolds to), over seconds of the
update. act: one call for 10 episodes at once, as in
evaluation; act K=32: one state with 32 candidates; act 1: one state. Peak memory: CUDA allocator; on a CPU the largest
resident size of the process so far.
"""

import itertools
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dac  # noqa: E402
import diffusion_dice  # noqa: E402
import dydiff  # noqa: E402
import swg  # noqa: E402
from common import Dataset  # noqa: E402

Mode = Literal["eager", "compiled", "graphed", "compiled+graphed"]
SIZES = {"paper": ("halfcheetah-medium-v2", 17, 6), "demo": ("hopper-demo", 11, 3), "pendulum": ("pendulum-demo", 3, 1)}


@dataclass
class Args:
    scripts: tuple[Literal["dac", "diffusion_dice", "dydiff", "swg"], ...] = ("dac", "diffusion_dice", "dydiff", "swg")
    """methods to time"""
    sizes: tuple[Literal["paper", "demo", "pendulum"], ...] = ("paper", "demo")
    """which presets: paper = halfcheetah-medium-v2 (S 17, A 6), demo = hopper-demo, pendulum = pendulum-demo"""
    modes: tuple[Mode, ...] = ("eager", "compiled", "graphed", "compiled+graphed")
    """graphed modes need CUDA and are left out on a CPU"""
    device: str = "auto"
    """auto, cpu, cuda"""
    threads: int | None = None
    """CPU threads (default: torch's)"""
    guidance: Literal["soft", "hard", "denoised", "none"] = "soft"
    """dac: soft against denoised at --T 5 10 20 50 100 is the paper's table of update times"""
    T: tuple[int, ...] = (5,)
    """dac: diffusion steps"""
    seconds: float = 10.0
    """time per measurement"""
    profile: bool = False
    """instead of the table: where the time of each eager update goes, operation by operation (torch.profiler)"""


class Products(TorchDispatchMode):
    """Counts the FLOPs of all matrix products that run under it, and their shapes (b, n, k, m): b times (n, k) (k, m).
    (FlopCounterMode itself cannot follow a gradient taken inside of an update.)"""

    def __init__(self):
        super().__init__()
        self.shapes: Counter = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            x, y = args[-2:]
            self.shapes[(*(x.shape[:-2] or (1,)), x.shape[-2], x.shape[-1], y.shape[-1])] += 1
        if name.startswith("convolution"):
            backward = name == "convolution_backward"
            x, weight = args[1:3] if backward else args[:2]
            grad, transposed = (args[0], args[7]) if backward else (None, args[6])
            i, o, k = weight.shape[0 if transposed else 1], weight.shape[1 if transposed else 0], weight.shape[2]
            if transposed:  # unfolded: (B H, i) (i, o k)
                n, m, r = len(x) * x.shape[2], i, o * k
            else:  # (B H_out, i k) (i k, o)
                out_length = grad.shape[2] if backward else (x.shape[2] + 2 * args[4][0] - k) // args[3][0] + 1
                n, m, r = len(x) * out_length, i * k, o
            for shape in ((n, r, m), (m, n, r)) if backward else ((n, m, r),):
                self.shapes[(1, *shape)] += 1
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def rounds(fn, device: torch.device, seconds: float) -> float:
    """Median seconds per call."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    fn()
    wait()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        clock = time.perf_counter()
        for _ in range(calls := 20 if device.type == "cuda" else 1):
            fn()
        wait()
        times.append((time.perf_counter() - clock) / calls)
    return statistics.median(times)


def mm_seconds(shapes: Counter, device: torch.device) -> float:
    total = 0.0
    for (b, n, k, m), count in shapes.items():
        x, y = torch.randn(n, k, device=device), torch.randn(k, m, device=device)
        total += count * b * rounds(lambda x=x, y=y: torch.mm(x, y), device, 0.2)
    return total


def parts(args: Args, script: str, size: str, T: int, device: torch.device, mode: str = "eager") -> dict:
    """Stage -> (update, {name: act}), both compiled and recorded as the script itself does under --compile, --graph."""
    env, S, A = SIZES[size]
    how = {"compile": "on" if "compiled" in mode else "off", "graph": "on" if "graphed" in mode else "off"}
    torch.manual_seed(0)
    n = 100_000
    zeros = torch.zeros(n)
    data = Dataset(torch.randn(n, S), torch.rand(n, A) * 2 - 1, torch.randn(n), torch.randn(n, S), zeros, zeros.bool())
    data, ten = data.to(device), torch.zeros(10, S, device=device)
    if script == "dac":
        run = dac.resolve(dac.Args(env=env, guidance=args.guidance, T=T, steps=2_000_000, **how))
        agent = dac.make_agent(run, S, A, device)
        update, _ = dac.make_update(run, agent, data)
        act = dac.make_act(run, agent, A)
        return {f"{args.guidance}, T={T}": (dac.accelerate(update, run, device), {"act": lambda: act(ten)})}
    if script == "dydiff":
        return dydiff_parts(env, data, ten, device, how)
    if script == "swg":
        run = swg.resolve(swg.Args(env=env, steps=1_000_000, lr_decay_steps=3_000_000, layer_norm=True, **how))
        agent = swg.make_agent(run, S, A, device)
        act = swg.make_act(run, agent, A)
        plain = swg.make_act(replace(run, rho=0.0), agent, A)
        acts = {"act": lambda: act(ten), "act 1": lambda: act(ten[:1]), "act 1, rho 0": lambda: plain(ten[:1])}
        w = torch.rand(n, device=device)
        return {
            "critic": (swg.accelerate(swg.make_critic_update(run, agent, data), run, device), {}),
            "train": (swg.accelerate(swg.make_update(run, agent, data, w), run, device), acts),
        }
    run = diffusion_dice.resolve(diffusion_dice.Args(env=env, steps=1_000_000, **how))
    agent = diffusion_dice.make_agent(run, S, A, device)
    act = diffusion_dice.make_act(run, agent, A)
    act_32 = diffusion_dice.make_act(replace(run, K=32), agent, A)
    acts = {"act": lambda: act(ten), "act K=32": lambda: act_32(ten[:1])}
    updates = {
        "behavior": diffusion_dice.make_behavior_update(run, agent, data),
        "main without guidance": diffusion_dice.make_update(replace(run, guidance="none"), agent, data),
        "main": diffusion_dice.make_update(run, agent, data),
    }
    return {k: (diffusion_dice.accelerate(v, run, device), acts if k == "main" else {}) for k, v in updates.items()}


class Captured:
    """Stands in for a Run: keeps a stage's update instead of calling it."""

    def train(self, name: str, steps: int, update) -> None:
        setattr(self, name, update)


def dydiff_parts(env: str, data: Dataset, ten: torch.Tensor, device: torch.device, how: dict) -> dict:
    S, A = data.s.shape[1], data.a.shape[1]
    rows = torch.cat([data.s, data.a, data.r[:, None], data.s_next, data.terminal[:, None]], -1)
    pieces = [(k, 1000) for k in range(0, len(rows), 1000)]
    windows = dydiff.make_windows(rows[:, : S + A], pieces, 100).to(device)
    out = dydiff_models(env, rows, windows, S, A, device, how)
    for base in ("td3bc", "cql", "diffql"):
        run = dydiff.resolve(dydiff.Args(env=env, base=base, augment="dydiff", **how))
        agent = dydiff.make_agent(run, S, A, device)
        agent.filled.fill_(len(agent.ring))
        update, act = dydiff.make_update(run, agent, rows, S, A), dydiff.make_act(run, agent, A)
        count = itertools.count()
        step = lambda update=update, count=count: update(next(count))  # td3bc: every second one has the actor  # noqa: E731
        out[base] = step, {"act": lambda act=act: act(ten)}
    return out


def dydiff_models(env: str, rows, windows: dydiff.Windows, S: int, A: int, device: torch.device, how: dict) -> dict:
    run, captured = dydiff.resolve(dydiff.Args(env=env, base="td3bc", augment="dydiff", **how)), Captured()
    windows = replace(windows, H=run.H, length=windows.length.clamp(max=run.H))
    agent = dydiff.make_agent(run, S, A, device)
    draw = lambda: windows[torch.randint(len(windows), (run.model_batch_size,), device=device)]  # noqa: E731
    x, sigma = torch.randn(64, run.H, S + A, device=device), torch.ones(64, device=device)
    dydiff.train_regressions(run, agent, captured, rows, S, A, known_successors=True)
    out = {
        "diffusion": (dydiff.accelerate(dydiff.make_model_update(run, agent, draw, None, S), run, device), {}),
        "U-net, 64 windows": (torch.no_grad()(dydiff.accelerate(lambda: agent.unet_ema(x, sigma), run, device)), {}),
        "dynamics": (lambda: captured.dynamics(0), {}),
        "reward": (lambda: captured.reward(0), {}),
    }
    if run.b * run.M * run.N < 10_000 or device.type == "cuda":  # at paper size an hour on a CPU
        out["rollout"] = dydiff.Roller(run, agent, rows[:, :S]), {}
    return out


def counted(update, device: torch.device) -> tuple[int, float]:
    """FLOPs of an eager update, and the seconds that torch.mm needs for its products."""
    with Products() as products:
        update()
    return products.flops, mm_seconds(products.shapes, device)


def measure(args: Args, update, acts: dict, flops: int, plain: float, device: torch.device) -> str:
    clock = time.perf_counter()
    for _ in range(16 if device.type == "cuda" else 8):  # compiles; records, of td3bc's two kinds of update each
        update()
    warm = time.perf_counter() - clock
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = rounds(update, device, args.seconds)
    peak = (torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # fmt: skip
    latency = ", ".join(f"{name} {1000 * rounds(call, device, 1.0):.1f}" for name, call in acts.items())
    time_ = f"{1 / seconds:.1f} | {1000 * seconds:.2f} | {warm:.0f} | {peak:.0f}"
    work = f"{flops / 1e9:.3f} | {flops / seconds / 1e9:.0f} | {100 * plain / seconds:.0f} %"
    return f"{time_} | {work} | {latency} |"


def profiled(update, device: torch.device, rows: int = 12) -> str:
    """Shares of the time that operations take themselves, without what they call. A number that the host reads makes it
    wait for a GPU."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    for _ in range(3):
        update()
    calls = 5
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(calls):
            update()
    time_of = (lambda x: x.self_device_time_total) if cuda else (lambda x: x.self_cpu_time_total)
    times = {x.key: (time_of(x), x.count) for x in trace.key_averages()}
    total = sum(us for us, _ in times.values())
    lines = [f"  {total / calls / 1000:.2f} ms, {sum(count for _, count in times.values()) / calls:.0f} operations"]
    for key, (us, count) in sorted(times.items(), key=lambda x: -x[1][0])[:rows]:
        lines.append(f"  {100 * us / total:5.1f} %  {count / calls:6.1f} x {us / count:9.1f} us  {key}")
    reads = [event for event in trace.events() if event.name == "aten::item"]
    reads = [event for event in reads if "fused" not in event.cpu_parent.name]  # a CPU's Adam reads its learning rate
    return "\n".join([*lines, f"  numbers read on the host: {len(reads) / calls:.1f} per update"])


def main(args: Args) -> None:
    device = dac.pick_device(dac.Args(device=args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {dac.device_name(device)}\n")
    if not args.profile:
        print("| script | size | stage | mode | updates/s | ms | warm-up s | peak MiB | GFLOP | GFLOP/s | share | ms |")
        print("|---" * 12 + "|")
    settings = [
        (*x, T) for x in itertools.product(args.scripts, args.sizes) for T in args.T if x[0] == "dac" or T == args.T[0]
    ]
    modes = [mode for mode in args.modes if "graphed" not in mode or device.type == "cuda"]
    for script, size, T in settings:
        eager = {stage: update for stage, (update, _) in parts(args, script, size, T, device).items()}
        if args.profile:
            for stage, update in eager.items():
                print(f"{script}, {size}, {stage}", profiled(update, device), "", sep="\n", flush=True)
            continue
        work = {stage: counted(update, device) for stage, update in eager.items()}
        for mode in modes:
            torch.compiler.reset()  # else code compiled for an earlier size counts towards dynamo's limit
            for stage, (update, acts) in parts(args, script, size, T, device, mode).items():
                row = measure(args, update, acts, *work[stage], device)
                print(f"| {script} | {size} | {stage} | {mode} | {row}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
