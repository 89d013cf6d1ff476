# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Times and bytes of callables."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import warnings
from typing import Callable, Dict, Iterator, NamedTuple, Optional

import torch
from torch import Tensor, nn


class Spread(NamedTuple):
    """Times of one variant over interleaved runs, in milliseconds."""

    median: float
    fastest: float
    slowest: float


def interleaved(
    runs: Dict[str, Callable[[], None]],
    repeats: int,
    clock: Optional[Callable[[], float]] = None,
) -> Dict[str, Spread]:
    """Time callables in turns, after one run each to warm up.

    Args:
        runs: Names -> what to run.
        repeats: How often each runs.
        clock: Returns seconds; by default the GPU's events where there is
            one, else the time that passes.
    """
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(_seconds(run, clock))
    return {
        name: Spread(
            1e3 * statistics.median(values),
            1e3 * min(values),
            1e3 * max(values),
        )
        for name, values in seconds.items()
    }


def captured(
    function: Callable[..., None], *inputs: Tensor
) -> Callable[..., None]:
    """Capture a function as a CUDA graph.

    Args:
        function: What to run. It is run three times first, as torch asks for.
        inputs: Its arguments.

    Returns:
        Callable: Copies its arguments to where those of the captured call
        were, and replays the call.
    """
    inputs = [value.clone() for value in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*inputs)

    def replay(*values: Tensor) -> None:
        for place, value in zip(inputs, values):
            place.copy_(value)
        graph.replay()

    return replay


def kept_megabytes(
    forward: Callable[[], object], net: Optional[nn.Module] = None
) -> float:
    """What autograd keeps of a forward pass; each storage counts once.

    Args:
        forward: What to run.
        net: A network whose parameters do not count: they are there anyway.
    """
    storages = {}
    own = [] if net is None else net.parameters()
    own = {p.untyped_storage().data_ptr() for p in own}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # Holding the tensor keeps its address from being used again.
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(size for size, _ in storages.values()) / 1e6


def peak_megabytes(run: Callable[[], None], device: torch.device) -> float:
    """Largest sum of live allocations while a callable runs."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with (
        _without_noise(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU],
            profile_memory=True,
        ) as profiler,
    ):
        run()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == '[memory]'
    ]
    live = peak = 0
    for _, size in sorted(events):
        live += size
        peak = max(peak, live)
    return peak / 1e6


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Within the context nothing reaches stderr.

    torch's profiler writes to the descriptor itself.
    """
    with open(os.devnull, 'w') as nowhere, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        before = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def _seconds(
    run: Callable[[], None], clock: Optional[Callable[[], float]]
) -> float:
    if clock is not None or not torch.cuda.is_available():
        clock = clock or time.perf_counter
        start = clock()
        run()
        return clock() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
