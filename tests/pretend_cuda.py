"""A CUDA device for machines that have none: enough of one to run the scripts' own GPU path, graphs included.

Tensors "on cuda:0" are `Cuda` objects: they say so, follow CUDA's rules, and compute on CPU tensors they hold. What is
checked: an operation must not mix devices; and while a graph is recorded nothing may be read by the host, nothing may
move between devices, nothing may enter as a CPU number (it would be frozen). As on a GPU, what is recorded is not
executed; a replay runs the recorded operations again on the same memory, so that a value which Python holds, or a
tensor that an update exchanges instead of overwriting, shows as a difference to the eager run.
Not covered: kernels and their rounding, streams, and the allocator (memory freed between recording and replay).
"""

from __future__ import annotations

import contextlib
from typing import ClassVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
SYNCS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}  # the host waits for them


class Cuda(torch.Tensor):
    """A tensor on cuda:0, held as the CPU tensor x."""

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Cuda:
        # to torch's C++ side it is a meta tensor: a CPU build of torch knows no third device
        about = dict(storage_offset=x.storage_offset(), dtype=x.dtype, device="meta")
        new = torch.Tensor._make_wrapper_subclass(cls, x.shape, x.stride(), **about)
        new.x = x
        return new

    device = property(lambda self: torch.device("cuda:0"))
    is_cuda, is_meta = property(lambda self: True), property(lambda self: False)

    def __repr__(self) -> str:
        return f"Cuda({self.x})"

    def __format__(self, spec: str) -> str:
        return format(self.x, spec)

    def __reduce_ex__(self, protocol: int):  # torch.save
        return self.x.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.cpu, torch.Tensor.to):
            given = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (str, torch.device))]
            name = "cpu" if func is torch.Tensor.cpu else str(given[0]) if given else "cuda:0"
            dtype = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)]
            if name == "cpu" or (dtype and dtype[0] != args[0].dtype):
                return aten._to_copy(args[0], device=name, dtype=dtype[0] if dtype else None)
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class CUDAGraph:
    """What torch.cuda.CUDAGraph is to Graphed: recorded operations, and the memory they read and write."""

    recording: CUDAGraph | None = None
    made: ClassVar[list[CUDAGraph]] = []

    def __init__(self):
        self.operations, self.replays = [], 0
        self.numbers = []  # Python numbers that torch made 0-d CPU tensors of
        CUDAGraph.made.append(self)

    @contextlib.contextmanager
    def record(self):
        self.before, random = [], torch.get_rng_state()
        CUDAGraph.recording = self
        try:
            yield
        finally:
            CUDAGraph.recording = None
            for x, old in reversed(self.before):  # recorded, not executed
                x.copy_(old)
            torch.set_rng_state(random)

    def add(self, func, args, kwargs):
        arguments = zip(func._schema.arguments, args)
        for argument, value in (*arguments, *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(x, x.clone()) for x in tensors(value)]
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def work(self) -> list[tuple]:
        """The operations that compute something, views left out; with each, which of its results are new memory."""
        found = []
        for func, args, kwargs, out in self.operations:
            memory = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            fresh = [x.untyped_storage().data_ptr() not in memory for x in tensors(out)]
            if not fresh or any(fresh) or func._schema.is_mutable:
                found.append((func, args, kwargs, out, fresh))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out, fresh in self.work():
            for x, new, own in zip(tensors(out), tensors(func(*args, **kwargs)), fresh):
                if own:
                    x.copy_(new)


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def dispatch(func, args, kwargs):
    graph, given = CUDAGraph.recording, tensors((args, kwargs))
    there = [x for x in given if not isinstance(x, Cuda)]
    here, device = len(given) > len(there), kwargs.get("device")
    to_cuda = here if device is None else torch.device(device).type != "cpu"
    if func is aten.copy_.default:
        to_cuda = isinstance(args[0], Cuda)
    frozen = [x for x in there if graph and all(x is not number for number in graph.numbers)]
    if here and func not in MOVES and (frozen or any(x.dim() for x in there)):
        raise RuntimeError(f"{func}: tensors on cuda:0 and on the CPU")
    if graph and (here or to_cuda):
        moves = func in MOVES and (not to_cuda or bool(there))
        by_mask = func is aten.index.Tensor and any(x.dtype == torch.bool for x in tensors(args[1]))
        if moves or by_mask or func in SYNCS:
            raise RuntimeError(f"{func}: not permitted while a graph is recorded")
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    held, held_kwargs = tree_map_only(Cuda, lambda x: x.x, (args, kwargs))
    out = graph.add(func, held, held_kwargs) if graph and to_cuda else func(*held, **held_kwargs)
    if graph and not to_cuda:
        graph.numbers += tensors(out)
    if not to_cuda or func is aten._local_scalar_dense.default:
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, Cuda, out))


def grouped(lists, with_indices=False, group=torch._C._group_tensors_by_device_and_dtype):
    """As torch._C has it, for optimisers and gradient norms: that one asks the C++ side where tensors are."""
    found = {}
    for (_, dtype), value in group(lists, with_indices).items():
        found[tensors(value)[0].device, dtype] = value
    return found


class Mode(TorchDispatchMode):
    """Sees what no Cuda tensor is part of yet: torch.zeros(..., device="cuda:0")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


@contextlib.contextmanager
def pretend_cuda():
    """torch.cuda.is_available() inside; use the name cuda:0.  Yields the list of graphs that were recorded."""
    CUDAGraph.made = []
    nothing = contextlib.nullcontext
    fakes = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "set_device": lambda device: None, "get_device_name": lambda device=None: "pretended GPU",
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed_all": lambda seed: None, "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device=None: None, "max_memory_allocated": lambda device=None: 0,
        "Stream": mock.MagicMock, "current_stream": mock.MagicMock, "stream": lambda s: nothing(),
        "CUDAGraph": CUDAGraph, "graph": lambda graph: graph.record(),
    }  # fmt: skip
    lifts, replaces = torch._C._only_lift_cpu_tensors(), torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, replaces)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device=...): made on the CPU, then moved
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to: new parameters, not new .data
        stack.enter_context(Mode())
        yield CUDAGraph.made
