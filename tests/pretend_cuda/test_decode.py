"""The embedded engine on the seven models: prompts are read, tokens decoded, at last by a graph."""

import pretend
import pytest
import torch
from shallow import SEVEN, shallow

from engines.contract import make_requests
from engines.embedded import Batch, TorchEngine


@pytest.mark.parametrize("name", SEVEN)
def test_generate(name):
    """A step waits for the ids and for their log-probs only. The replay of a graph is one launch."""
    with pretend.cuda() as meter, torch.no_grad():
        net = pretend.model(shallow(name))
        net.tokenizer = None
        engine = TorchEngine(net, context=8192, read_tokens=1 << 14, progress=False)

        def capture(function):
            function()
            return lambda: meter.launches.update(graph=1)

        engine.capture = lambda: capture
        requests, stops = make_requests(engine, [[1] * 100, [1] * 5000], n=16, max_new_tokens=5, stop=[],
                                        temperature=1.0, top_p=1.0, seed=0, keys=None, first=0)
        batch = Batch(engine, engine.allocate(requests), requests, stops, 1.0, 1.0, None)
        launches = []
        while batch.unfinished:
            meter.launches.clear()
            meter.waits.clear()
            batch.step()
            launches.append(meter.launches.total())
            assert meter.waits.total() == 2, meter.waits
        assert all(len(request.samples[-1].tokens) == 5 for request in requests)
        assert min(launches[1:4]) > 60 and launches[4] < 20
