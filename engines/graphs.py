"""CUDA graphs: the launches of a decode step recorded once and replayed as one, since Python would need
longer to launch them than a GPU to run them.

A graph repeats the same kernels on the same memory. So what is recorded must read its inputs from tensors
that stay where they are, write its outputs into such tensors, have sizes that repeat (`bucket`), and ask the
device for nothing.
"""

from collections import Counter

import torch

from cli import InputError

EAGER_RUNS = 2                           # of a size, before it is worth a capture (ours)


def bucket(n, most):
    """The power of two that holds n, or `most` if that is less."""
    return min(1 << (n - 1).bit_length(), most)


class CudaCapture:
    """capture(function): runs function once, records it and returns what replays it. All graphs share one
    pool of memory: they never run at the same time, and keep nothing in it from one replay to the next."""

    def __init__(self):
        if not torch.cuda.is_available():
            raise InputError("graphs=True: there is no GPU; give graphs=None, which uses them where one is")
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, function):
        # The first run is the one whose results count. It is on the stream of the capture, so that libraries
        # set up what they need for that stream before it.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile (checkpoints are copied by one).
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


class Graphs:
    """A graph for each size that is met often."""

    def __init__(self, capture):
        """capture: function -> its replay, as CudaCapture."""
        self.capture = capture
        self.runs = Counter()
        self.replays = {}

    def run(self, sizes, function):
        """Runs function, or replays what was recorded when it ran with these sizes before."""
        if sizes in self.replays:
            self.replays[sizes]()
        elif self.runs[sizes] < EAGER_RUNS:
            self.runs[sizes] += 1
            function()
        else:
            self.replays[sizes] = self.capture(function)
