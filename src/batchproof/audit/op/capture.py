"""A batch eager and in a CUDA graph."""

from __future__ import annotations

import torch

from .workload import Result, Workload

__all__ = ["eager_and_captured"]


def eager_and_captured(workload: Workload, size: int) -> tuple[Result, Result]:
    """One batch eager, and the same replayed from a CUDA graph whose outputs were spoilt in between."""
    index = torch.arange(size, device=workload.device)
    eager = workload.run_batch("normal", index)
    made = workload.prepare("normal", index)
    fresh = {k: v.clone() for k, v in made.items() if isinstance(v, torch.Tensor) and k in workload.batched}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        workload.call(made)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = workload.call(made)
    for value in returned:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.zero_()
    for name, value in fresh.items():
        made[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    captured = [(name, t.clone()) for name, t in workload.observe(made, returned, size)]
    seen = torch.ones(size, dtype=torch.bool, device=workload.device)
    return Result(tuple(eager), seen), Result(tuple(captured), seen)
