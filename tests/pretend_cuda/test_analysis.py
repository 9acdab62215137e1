"""What else runs a model on a GPU: the representations that CKA compares, the held-out losses."""

import numpy as np
import pretend
import pytest
from shallow import shallow

import analyze
import midtrain
from corpus.tokenizer import toy_tokenizer
from data import Batch
from model import preset


@pytest.mark.parametrize("name", ["toy", "toy-h"])
def test_representations(name, monkeypatch):
    """One wait for a text's ids to go in, one for its features to come out."""
    def load(path, dtype, device):
        net = pretend.model(preset(name), dtype)
        net.tokenizer = toy_tokenizer()
        return net

    monkeypatch.setattr(analyze, "load", load)            # files would be read into tensors without data
    texts = [f"text {i}" for i in range(12)]
    with pretend.cuda() as meter:
        features = analyze.representations("", texts, "mean", 64, "bfloat16", pretend.DEVICE)
    assert {layer.shape[0] for layer in features} == {len(texts)}
    assert sum(count for place, count in meter.waits.items() if "analyze.py" in place) == 2 * len(texts)
    rng = np.random.default_rng(0)                        # they hold ones: CKA is given something
    assert analyze.layer_cka(*(rng.normal(size=features[0].shape) for _ in range(2)), 4, 10, 0)


@pytest.mark.parametrize("name", ["mistral-7b", "granite-4-h-micro"])
def test_heldout_losses(name):
    """One wait a pass, for its loss."""
    docs = np.repeat([[0, 1], [2, 2], [3, 4]], 600, axis=1)
    batch = Batch(np.zeros((3, 1200), np.int64), np.zeros((3, 1200), np.int64), docs, np.zeros(3))
    cfg = midtrain.Config(model=name, batch=8)
    with pretend.ranks(1, 8) as ranks, pretend.cuda() as meter:
        model = midtrain.build_model(shallow(name), cfg, ranks)
        meter.waits.clear()
        losses = midtrain.domain_losses(model, {"general": batch, "math": batch}, cfg, ranks)
    assert set(losses) == {"general", "math"}
    assert sum(meter.waits.values()) == len(losses), meter.waits
