"""The embedded engine on the seven models: prompts are read, tokens decoded, at last by a graph."""

import pretend
import pytest
import torch
from shallow import SEVEN, shallow


@pytest.mark.parametrize("name", SEVEN)
def test_generate(name):
    """A step waits for the ids and for their log-probs only. The replay of a graph is one launch."""
    with pretend.cuda() as meter, torch.no_grad():
        model = pretend.model(shallow(name))
        steps = list(pretend.decode_steps(model, [[1] * 100, [1] * 5000], 16, 5, meter, context=8192,
                                          read_tokens=1 << 14))
    launches, waits = zip(*steps, strict=True)
    assert set(waits) == {2}
    assert min(launches[1:4]) > 60 and launches[4] < 20
