"""The scripts' GPU path: whole runs, where what is recorded as a CUDA graph and replayed must leave the same policy as
the eager run. On a GPU if there is one; else on the device of pretend_cuda.py, and bit for bit."""

import contextlib
import csv
import importlib
import re

import pytest
import test_diffusion_dice_runs as dice_runs  # also registers ShortPendulum-v0
import test_dydiff_runs as dydiff_runs
import test_runs as dac_runs
import test_swg_runs as swg_runs
import torch
import tyro
from pretend_cuda import Cuda, pretend_cuda
from test_runs import tensors

import dydiff
from common import UserError

one_thread = dice_runs.one_thread  # fixture
REAL = torch.cuda.is_available()
PRETENDED = pytest.mark.skipif(REAL, reason="there is a GPU")
RUNS = {"dac": dac_runs, "diffusion_dice": dice_runs, "swg": swg_runs, "dydiff": dydiff_runs}
CASES = [  # script, options, how many graphs: one per stage, DAC's averaging, the sampler of ten candidates or episodes
    ("dac", "", 3),
    ("dac", "--guidance denoised --temperature 0.5 --target min", 3),
    ("dac", "--guidance none --N-a 1", 3),
    ("dac", "--env bandit-two --clip-x0 True", 2),
    ("diffusion_dice", "", 3),
    ("diffusion_dice", "--guidance cep --temperature 0.5", 3),
    ("diffusion_dice", "--guidance none --f pearson", 3),
    ("swg", "", 3),
    ("swg", "--weight dice --N 3 --kappa 0.5 --head plain --reverse x0", 3),
    ("swg", "--rho 0", 3),
    ("diffusion_dice", "--env bandit-ring", 2),
    ("swg", "--env bandit-moons", 2),
    ("swg", "--env toy-spiral", 1),
    ("dydiff", "--env bandit-three --base diffql --augment none", 1),
    ("dydiff", "", 6),
    ("dydiff", "--base cql --augment single-step --correction replace --filter hardmax", 4),
    ("dydiff", "--base diffql --augment synther --loss-mask", 3),
    ("dydiff", "--base cql --augment none", 2),
]


def cuda():
    """The device cuda:0; yields the graphs that were recorded, if it is pretended."""
    return contextlib.nullcontext([]) if REAL else pretend_cuda()


def assert_same(left: dict, right: dict) -> None:
    """Bit for bit; on a GPU within what rounding makes of a few dozen steps of Adam."""
    assert left.keys() == right.keys()
    if REAL:
        torch.testing.assert_close(right, left, rtol=1e-2, atol=5e-3)
    else:
        assert [k for k in left if not torch.equal(left[k], right[k])] == []


def run(folder, name: str, graph: str, *more: str, device: str = "cuda:0"):
    """Checkpoint, rows of eval.csv and recorded graphs of a short run."""
    module = importlib.import_module(name)
    words = [*RUNS[name].TINY, "--device", device, "--graph", graph, "--compile", "off", "--run-dir", str(folder)]
    env = [] if "--env" in more else ["--eval-env", "ShortPendulum-v0"]
    with cuda() as graphs:
        module.main(tyro.cli(module.Args, args=[*words, *env, *more]))
    (last,) = folder.glob("*/*/*/last.pt")
    with open(last.parent / "eval.csv", newline="") as file:
        return torch.load(last, weights_only=True), list(csv.reader(file)), list(graphs)


@pytest.mark.parametrize(("name", "options", "count"), CASES)
def test_recorded_and_replayed_is_eager(tmp_path, name, options, count):
    eager, eager_rows, none = run(tmp_path / "eager", name, "off", *options.split())
    graphed, rows, graphs = run(tmp_path / "graphed", name, "on", *options.split())
    assert_same(tensors(eager["state"]), tensors(graphed["state"]))
    assert torch.equal(eager["rng"]["cpu"], graphed["rng"]["cpu"]) and len(rows) == len(eager_rows)
    if not REAL:
        assert none == [] and rows == eager_rows
        assert len(graphs) == count and all(graph.replays > 0 for graph in graphs)


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda:0"), ("cuda:0", "cpu")])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_and_is_judged_on_another_device(tmp_path, monkeypatch, name, first, second):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        dac_runs.full_after(1, patch)
        run(tmp_path, name, "off", device=first)
    last, _, _ = run(tmp_path, name, "auto", "--resume", device=second)
    assert last["progress"]["step"] == last["args"]["steps"] and last["progress"]["done"][-1] == "train"
    assert all(x.device.type == "cpu" for x in tensors(last).values())
    for device in ("cpu", "cuda:0"):
        run(tmp_path, name, "auto", "--eval-only", device=device)
    with open(next(tmp_path.glob("*/*/*/reeval.csv")), newline="") as file:
        one, other = (float(row["return"]) for row in csv.DictReader(file))
    assert one == pytest.approx(other, abs=0.1 if REAL else 1e-3)  # kernels differ in their last bits


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_policy_acts_as_the_eager_one(tmp_path, name):
    """Two batch sizes in turn, past their recordings; answers given before stay as they were."""
    run(tmp_path, name, "off", *(["--N", "1"] if name == "swg" else []), device="cpu")
    (folder,) = tmp_path.glob("*/*/seed0")
    found = []
    for graph in ("off", "on"):
        with cuda() as graphs:
            act = importlib.import_module(name).load_policy(folder, device="cuda:0", graph=graph)[0]
            torch.manual_seed(0)
            answers = [act(torch.randn(n, 3, device="cuda:0")) for n in (4, 2) * 8]
            found.append({str(i): a.cpu() for i, a in enumerate(answers)})
        assert REAL or [graph.replays for graph in graphs] == ([3, 3] if graph == "on" else [])
    assert_same(*found)


@pytest.mark.parametrize("name", RUNS)
def test_throughput_runs_every_stage_graphed(monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(dac_runs.ROOT / "benchmark")
    throughput = importlib.import_module("throughput")
    monkeypatch.setattr(throughput, "rounds", lambda fn, device, seconds: (fn(), 1.0)[1])  # once
    tiny = dict(b=8, N=2, H=16, channels=(8, 16), synther_rows=10)
    monkeypatch.setitem(dydiff.PRESETS, "pendulum-demo", dydiff.PRESETS["pendulum-demo"] | tiny)
    words = dict(scripts=(name,), sizes=("pendulum",), modes=("eager", "graphed"), device="cuda:0")
    with cuda() as graphs:
        throughput.main(throughput.Args(**words))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {name}")]
    stages = {"dac": 1, "diffusion_dice": 3, "swg": 2, "dydiff": 8}[name]
    assert len(rows) == 2 * stages
    assert REAL or len(graphs) == stages  # dydiff: td3bc two, a rollout none


@PRETENDED
@pytest.mark.parametrize("name", RUNS)
def test_operations_of_an_update_are_those_of_the_docs(monkeypatch, name):
    """The table of docs/speed.md. Small batches: an update has as many operations as one of large ones."""
    monkeypatch.syspath_prepend(dac_runs.ROOT / "benchmark")
    throughput, module = importlib.import_module("throughput"), importlib.import_module(name)
    small = {"dydiff": dict(b=8, N=2, synther_rows=10, model_batch_size=1, channels=(8, 32, 64))}.get(
        name, dict(batch_size=8)
    )
    preset = "halfcheetah-medium-v2"
    monkeypatch.setitem(module.PRESETS, preset, module.PRESETS.get(preset, {}) | small)
    found = []
    with pretend_cuda() as graphs:
        parts = throughput.parts(throughput.Args(), name, "paper", 5, torch.device("cuda:0"), "graphed")
        for stage, (update, _) in parts.items():
            if stage not in ("rollout", "U-net, 64 windows"):
                before = len(graphs)
                for _ in range(12):
                    update()
                found += [len(graph.work()) for graph in graphs[before:]]
    rows = re.findall(r"^\| (.+?) \| ([\d,; ]+) \|$", (dac_runs.ROOT / "docs" / "speed.md").read_text(), re.M)
    title = {"dac": "DAC", "diffusion_dice": "Diffusion-DICE", "swg": "SWG", "dydiff": "DyDiff"}[name]
    stated = [int(x) for stages, numbers in rows if stages.startswith(title) for x in re.findall(r"\d+", numbers)]
    assert sorted(found) == sorted(stated)


# --- the pretended device catches what a real one would ---------------------------------------------------
def graphed_and_eager(make, calls: int = 9):
    """State after `calls` calls of make()'s update, eager and recorded."""
    from dac import Graphed

    found = []
    for wrap in (lambda fn: fn, Graphed):
        with pretend_cuda():
            torch.manual_seed(0)
            state, update = make()
            update = wrap(update)
            for _ in range(calls):
                update()
            found.append({k: v.x.clone() for k, v in state.items()})
    return found


def counter():
    state = {"x": torch.zeros(3, device="cuda:0")}
    return state, lambda: state["x"].add_(torch.randn(3, device="cuda:0"))


@PRETENDED
def test_a_sound_update_is_the_same_recorded():
    eager, graphed = graphed_and_eager(counter)
    assert torch.equal(eager["x"], graphed["x"]) and graphed["x"].abs().sum() > 0


@PRETENDED
def test_an_exchanged_tensor_and_a_number_held_by_python_show():
    def exchanged():
        state = {"x": torch.zeros(3, device="cuda:0")}

        def update():
            state["x"] = state["x"] + 1

        return state, update

    def held():
        state, steps = {"x": torch.zeros(3, device="cuda:0")}, [0]

        def update():
            steps[0] += 1
            state["x"].add_(steps[0])

        return state, update

    for make, expected in ((exchanged, 9), (held, 45)):
        eager, graphed = graphed_and_eager(make)
        assert eager["x"].tolist() == [expected] * 3
        assert not torch.equal(eager["x"], graphed["x"])


@PRETENDED
@pytest.mark.parametrize(
    ("step", "says"),
    [
        (lambda x: x.add_(float(x.sum())), "not permitted while a graph is recorded"),
        (lambda x: x[x > 0], "not permitted while a graph is recorded"),
        (lambda x: x.cpu(), "not permitted while a graph is recorded"),
        (lambda x: x.add_(torch.ones(3).to("cuda:0")), "not permitted while a graph is recorded"),
        (lambda x: x.add_(torch.ones(3)), "tensors on cuda:0 and on the CPU"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(step, says):
    def make():
        state = {"x": torch.ones(3, device="cuda:0")}
        return state, lambda: step(state["x"])

    with pytest.raises(RuntimeError, match=says):
        graphed_and_eager(make)


@PRETENDED
def test_a_number_made_on_the_cpu_before_is_refused_only_in_a_graph():
    rate = torch.tensor(0.5)

    def make():
        state = {"x": torch.ones(3, device="cuda:0")}
        return state, lambda: state["x"].mul_(rate)

    assert [x.tolist() for x in graphed_and_eager(make, calls=5)[1].values()] == [[0.5**5] * 3]
    with pytest.raises(RuntimeError, match="tensors on cuda:0 and on the CPU"):
        graphed_and_eager(make)


@PRETENDED
def test_the_pretended_device_ends_with_its_block():
    with pretend_cuda():
        assert torch.cuda.is_available() and isinstance(torch.zeros(2, device="cuda:0"), Cuda)
    assert not torch.cuda.is_available() and type(torch.zeros(2)) is torch.Tensor
