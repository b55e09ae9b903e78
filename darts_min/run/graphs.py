"""Record what a step computes as CUDA graphs, so that a GPU does not wait for Python."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class Recorded:
    """Call a function as usual the first time, record the second call, and replay it ever after.

    Arguments that are tuples are batches of tensors. A replay copies the tensors of the new batches
    over those of the recorded call, so that the shapes must be the same. All else must stay as it
    was in the recorded call: numbers are constants of a graph, and a graph finds other tensors,
    such as weights or the momentum of an optimizer, at their addresses. What is returned is the
    same tensors in each replay; another graph of the same `pool` of memory may overwrite them. The
    function must not draw random numbers, nor wait for the GPU. Its first call chooses kernels; the
    step after this call creates the state of the optimizer.
    """

    def __init__(self, function: Callable, pool: Any):
        self.function, self.pool, self.calls = function, pool, 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == 1:
            return self.call_aside(partial(self.function, *args, **options))
        if self.calls == 2:
            self.args = [tuple(t.clone() for t in a) if type(a) is tuple else a for a in args]
            self.again = partial(self.function, *self.args, **options)
            self.outputs = self.record()
        for ours, given in zip(self.args, args, strict=True):
            if type(given) is tuple:
                for tensor, new in zip(ours, given, strict=True):
                    tensor.copy_(new)
        self.replay()
        return self.outputs

    def call_aside(self, call: Callable[[], Any]) -> Any:
        """Call the function on the stream that will record it, as PyTorch demands."""
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = call()
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self) -> Any:
        """Record a call, which computes nothing yet; return the tensors that replays will fill."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.pool, stream=self.stream):
            return self.again()

    def replay(self) -> None:
        self.graph.replay()
