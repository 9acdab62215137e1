"""The embedded engine against the plain forward pass, position by position; exact probabilities; push() and
its self-check. fp32, 1e-5 nats: the same sums in another order."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, ROOMY, make, write_tokenizer
from processes import Process

from cli import InputError
from engines import contract, embedded
from engines.contract import EngineError, draw, log_distribution, sample_seed
from engines.embedded import Cache, TorchEngine
from engines.push import StaleWeights, full_tensors, push, score, tensor_kind
from generate import engine
from model import load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KNOWN = 512                                               # of ROOMY's 515 rows
EOS = 508


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> folder of a tiny checkpoint with the toy tokenizer, made once."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = str(tmp_path_factory.mktemp(name))
            make(name, folders[name], **ROOMY)
            write_tokenizer(folders[name])
        return folders[name]
    return get


@pytest.fixture(scope="module")
def toy():
    return load("random:toy")


def some_prompts(*lengths, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, KNOWN, (n,), generator=rng).tolist() for n in lengths]


def worst(model, prompts, samples, temperature=1.0, top_p=1.0):
    """The largest difference of any token's log-prob from the plain forward pass. Where the mass reaches
    top_p to within rounding, the set may have one id more or less: the nearest of these sets counts."""
    repeated = []                                         # score() takes one sample a prompt
    alone = []
    for ids, group in zip(prompts, samples, strict=True):
        repeated += [ids] * len(group)
        alone += [[sample] for sample in group]
    engines = torch.cat([torch.tensor(sample.logprobs) for sample, in alone])
    gaps = []
    for mass in (top_p,) if top_p == 1 else (top_p - 1e-6, top_p, top_p + 1e-6):
        expected = torch.cat(score(model, repeated, alone, temperature, mass))
        gaps.append((expected - engines).abs())
    return torch.stack(gaps).amin(0).max().item()


def flat(samples):
    return [sample for group in samples for sample in group]


def tokens(samples):
    return [[sample.tokens for sample in group] for group in samples]


# -- equal to the plain forward pass -------------------------------------------------------------------------

@pytest.mark.parametrize("name", FAMILIES)
def test_every_position_equals_the_forward_pass(name, folder):
    """Prompts and samples longer than Mistral's window of 9; more samples than rows, so that rows are
    freed, moved and used again; the padded ids are never sampled."""
    model = load(folder(name))
    prompts = some_prompts(1, 7, 33, 12, 2, 20, 9)
    few = TorchEngine(model, max_batch=5, read_tokens=40)
    stop = list(range(100, 110))                          # lengths differ
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.9)):
        settings = dict(max_new_tokens=40, temperature=temperature, top_p=top_p, stop=stop, seed=3)
        samples = few.generate(prompts, 3, **settings)
        assert worst(model, prompts, samples, temperature, top_p) <= 1e-5
        assert max(max(sample.tokens) for sample in flat(samples)) < KNOWN
        assert len({len(sample.tokens) for sample in flat(samples)}) > 5
        for sample in flat(samples):
            assert (sample.finish_reason == "stop") == (sample.tokens[-1] in stop)
        # other companions in the batch: the same tokens
        wide = TorchEngine(model, max_batch=64).generate(prompts[::-1], 3, **settings)[::-1]
        assert tokens(wide) == tokens(samples)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_the_argmax_of_the_forward_pass(name, folder):
    model = load(folder(name))
    prompts = some_prompts(4, 15)
    samples = TorchEngine(model).generate(prompts, max_new_tokens=20, temperature=0.0, stop=[])
    for ids, (sample,) in zip(prompts, samples, strict=True):
        for token in sample.tokens:
            with torch.no_grad():
                assert model(torch.tensor([ids]))[0, -1, :KNOWN].argmax() == token
            ids = ids + [token]
    assert worst(model, prompts, samples) <= 1e-5


@pytest.mark.parametrize("name", ["mistral-7b", "granite-4-h-micro"])
def test_attention_may_return_the_layout_of_a_gpu(name, folder, monkeypatch):
    """CUDA's op returns queries before heads, and log-sum-exps padded to a multiple of 32. Its layout rounds
    otherwise."""
    model = load(folder(name))
    prompts = some_prompts(5, 12)

    def generate():
        return TorchEngine(model).generate(prompts, 3, max_new_tokens=12, stop=[])

    before = generate()
    compute = embedded.attention
    calls = []

    def as_on_a_gpu(q, *rest):
        out, lse = compute(q, *rest)
        queries = q.shape[2]
        padded = torch.full((*lse.shape[:2], embedded.round_up(queries, 32)), math.nan)
        padded[..., :queries] = lse
        calls.append(queries)
        return out.transpose(1, 2).contiguous().transpose(1, 2), padded[..., :queries]

    monkeypatch.setattr(embedded, "attention", as_on_a_gpu)
    after = generate()
    assert len(set(calls)) == 2                           # over the samples' tokens and over the prompts'
    assert tokens(after) == tokens(before) and worst(model, prompts, after) <= 1e-5


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-7b", "granite-4-h-micro", "nemotron-h-8b"])
def test_bf16(name, folder):
    """The cache is bf16 too; the plain pass in bf16 differs by its own rounding, 0.005 to 0.01 nats."""
    model = load(folder(name), dtype=torch.bfloat16)
    prompts = some_prompts(5, 12)
    samples = TorchEngine(model).generate(prompts, max_new_tokens=30, stop=[])
    oracle = score(model, prompts, samples)
    engines = torch.cat([torch.tensor(sample.logprobs) for sample, in samples])
    gap = (torch.cat(oracle) - engines).abs()
    assert gap.mean() < 0.02 and gap.max() < 0.2


def test_a_prompt_is_read_once_and_memory_keeps_to_its_budget(toy):
    prompts = some_prompts(50, 40, 30)
    seen, whole = [], TorchEngine(toy, progress=False)
    hook = toy.trunk.embed.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    expected = whole.generate(prompts, 8, max_new_tokens=6, stop=[])
    hook.remove()
    assert seen == [(3, 50)] + [(24, 1)] * 5              # the last token is drawn, not read

    # stragglers do not keep rows empty: with lengths of all kinds, most of them are at work
    busy = []
    hook = toy.trunk.embed.register_forward_hook(lambda module, args, out: busy.append(args[0].shape))
    TorchEngine(toy, max_batch=16).generate(some_prompts(*[10] * 24), 4, max_new_tokens=100,
                                            stop=list(range(0, KNOWN, 20)))
    hook.remove()
    assert np.mean([rows for rows, width in busy if width == 1][:-30]) > 12
    budget = 4 * Cache.row_bytes(toy, 6) + 2 * Cache.row_bytes(toy, 50)
    small = TorchEngine(toy, cache_gb=budget / 1e9)
    requests, _ = contract.make_requests(small, prompts, n=8, max_new_tokens=6, temperature=1.0, top_p=1.0,
                                         stop=[], seed=0, keys=None, first=0)
    cache = small.allocate(requests)
    held = sum(t.nbytes for pair in cache.layers.values() for tensors in pair for t in tensors)
    assert cache.sample_rows == 4 and held <= budget
    assert tokens(small.generate(prompts, 8, max_new_tokens=6, stop=[])) == tokens(expected)
    with pytest.raises(InputError, match="--cache_gb=0.0001 does not hold one sample: a prompt of 50 tok"):
        TorchEngine(toy, cache_gb=1e-4).generate(prompts, 8, max_new_tokens=6)


# -- sampling ------------------------------------------------------------------------------------------------

def chi_square(counts, probabilities):
    """(statistic - degrees of freedom) in standard deviations; cells under 5 expected are joined."""
    expected = probabilities * counts.sum()
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_frequencies_are_the_exact_probabilities(temperature, top_p, folder):
    """Of the first token, and of the second whatever the first was."""
    model = load(folder("granite-4-h-micro"))
    ids, = some_prompts(6)
    n = 6000
    samples, = TorchEngine(model, max_batch=2000).generate([ids], n, max_new_tokens=2, stop=[],
                                                           temperature=temperature, top_p=top_p)
    with torch.no_grad():
        first = log_distribution(model(torch.tensor([ids]))[0, -1, :KNOWN], temperature, top_p).exp()
        pairs = torch.tensor([ids + [token] for token in range(KNOWN)])
        second = first @ log_distribution(model(pairs)[:, -1, :KNOWN], temperature, top_p).exp()
    for position, exact in enumerate((first, second)):
        counts = np.bincount([s.tokens[position] for s in samples], minlength=KNOWN)
        assert counts[exact.numpy() == 0].sum() == 0
        assert abs(chi_square(counts, exact.double().numpy())) < 4


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.499, 1), (0.501, 2), (0.799, 2), (0.81, 3), (0.951, 4), (1e-9, 1)):
        p = log_distribution(logits, 1.0, top_p).exp()[0]
        assert (p > 0).sum() == kept
        assert torch.allclose(p[:kept], logits.exp()[0, :kept] / logits.exp()[0, :kept].sum())


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.0, 0.5, 0.25, 0.25]]).log()
    for u, expected in ((0.0, 1), (0.499999, 1), (0.500001, 2), (0.76, 3), (1 - 2**-53, 3)):
        ids, logp = draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, 1.0)
        assert ids.item() == expected and logp.item() == pytest.approx(logits[0, expected].item())
    ids, _ = draw(logits, torch.tensor([0.99], dtype=torch.float64), 0.0, 1.0)
    assert ids.item() == 1


def test_samples_share_no_noise(toy):
    """Two samples of one prompt, of two prompts, of two steps agree no more often than chance."""
    sampler = TorchEngine(toy)
    prompts = some_prompts(8, 8, 8, 8)

    def sampled(**more):
        return np.array(tokens(sampler.generate(prompts, 4, max_new_tokens=64, stop=[], **more)))

    a, b = sampled(seed=1), sampled(seed=2)
    chance = 0.01                                         # untrained: nearly uniform over 512 ids, so 0.002
    for x, y in ((a, b), (a[:, :1], a[:, 1:]), (a[:1], a[1:]), (a[:-1, 1:], a[1:, :-1])):
        assert (x == y).mean() < chance
    assert (a == sampled(seed=1)).all()
    rest = sampler.generate(prompts, 2, max_new_tokens=64, stop=[], seed=1, first=2)
    assert (a[:, 2:] == np.array(tokens(rest))).all()     # an interrupted set of samples goes on
    assert (sampled(seed=1, keys=[(7, i) for i in range(4)]) == a).mean() < chance
    twice = tokens(sampler.generate(prompts[:1] * 2, max_new_tokens=64, stop=[], seed=1))
    assert twice[0] == a[0, :1].tolist() and twice[0] != twice[1]
    arrays = sampler.generate([np.array(ids) for ids in prompts], np.int64(4), max_new_tokens=64, stop=[],
                           seed=np.int32(1))
    assert (a == np.array(tokens(arrays))).all()
    seeds = {sample_seed(s, (p, 0), j) for s in range(10) for p in range(30) for j in range(30)}
    assert len(seeds) == 9000 and max(seeds) < 1 << 63


@pytest.mark.parametrize("count", [0, 1, 500])
def test_number_of_requests(count, toy):
    prompts = [[i % KNOWN, i // KNOWN] for i in range(count)]
    samples = TorchEngine(toy).generate(prompts, max_new_tokens=3, stop=[])
    assert [len(sample.tokens) for sample, in samples] == [3] * count
    if count:
        assert worst(toy, prompts, samples) <= 1e-5
        alone = TorchEngine(toy).generate(prompts[-1:], max_new_tokens=3, stop=[])
        assert tokens(alone) == tokens(samples[-1:])


# -- ends ----------------------------------------------------------------------------------------------------

def test_stops(toy):
    sampler, tok = TorchEngine(toy), toy.tokenizer
    ids = tok.encode("The")
    free, = sampler.generate([ids], max_new_tokens=60, stop=[], seed=5)
    whole = free[0].tokens
    assert free[0].finish_reason == "length" and len(whole) == 60 and free[0].text == tok.decode(whole)

    # an id ends the sample, belongs to it, and not to the text
    again, = sampler.generate([ids], max_new_tokens=60, stop=[whole[9]], seed=5)
    cut = whole.index(whole[9]) + 1
    assert again[0].tokens == whole[:cut] and again[0].finish_reason == "stop"
    assert again[0].text == tok.decode(whole[:cut - 1])

    # a string does when the text has it, be it spread over tokens; the text ends before it
    text = tok.decode(whole)
    for start, length in ((20, 3), (41, 9)):
        string = text[start:start + length]
        if "\ufffd" in string:
            continue
        again, = sampler.generate([ids], max_new_tokens=60, stop=[string], seed=5)
        assert again[0].text == text[:text.index(string)] and again[0].finish_reason == "stop"
        ended = again[0].tokens
        assert ended == whole[:len(ended)]
        assert string in tok.decode(ended) and string not in tok.decode(ended[:-1])

    # by default the eos does; a stop on the last token possible is a stop
    default, = sampler.generate([ids], max_new_tokens=60, seed=5)
    assert default[0].tokens == (whole[:whole.index(EOS) + 1] if EOS in whole else whole)
    last, = sampler.generate([ids], max_new_tokens=cut, stop=whole[9], seed=5)
    assert last[0].finish_reason == "stop" and len(last[0].tokens) == cut


def test_the_context_cuts(toy):
    sampler = TorchEngine(toy, context=20)
    short, long_ = sampler.generate(some_prompts(3, 18), max_new_tokens=10, stop=[])
    assert len(short[0].tokens) == 10 and len(long_[0].tokens) == 2 and long_[0].finish_reason == "length"


@pytest.mark.parametrize("prompts, more, message", [
    ([[]], {}, "prompt 0 is empty"),
    ([[1], [2] * 4096], {}, "prompt 1 has 4096 tokens, the context is 4096"),
    ([[1, 512]], {}, "prompt 0 has the id 512; the model knows 0 to 511"),
    ([[-1]], {}, "prompt 0 has the id -1"),
    ([[1]], dict(stop=[600]), "stop has the id 600"),
    ([[1]], dict(stop=[""]), "a letter at least"),
    ([[1]], dict(n=0), "--n=0: give at least 1"),
    ([[1]], dict(max_new_tokens=0), "--max_new_tokens=0"),
    ([[1]], dict(temperature=-1.0), "--temperature=-1.0"),
    ([[1]], dict(temperature=math.nan), "--temperature=nan"),
    ([[1]], dict(top_p=0.0), "--top_p=0.0"),
    ([[1]], dict(top_p=1.1), "--top_p=1.1"),
    ([[1]], dict(temperature=1e-40), "0, or 0.01 and more"),
    ("text", {}, "prompts are lists of token ids"),
    ([1, 2], {}, "prompts are lists of token ids"),
    ([[1.7]], {}, "an id of prompt 0 is 1.7; give whole numbers"),
    ([[1]], dict(n=1.5), "--n is 1.5"),
    ([[1]], dict(keys=[object()]), "a key is <object"),
    ([[1], [2]], dict(keys=["a", "a"]), "2 prompts, but 1 different keys"),
    ([[1], [2]], dict(keys=["a"]), "2 prompts, but 1 different keys"),
])
def test_refusals(prompts, more, message, toy):
    with pytest.raises(InputError, match=message):
        TorchEngine(toy).generate(prompts, **dict(max_new_tokens=4) | more)


def test_engine_refuses(toy, folder):
    with pytest.raises(InputError, match="--engine=vlm; did you mean 'vllm'"):
        engine(toy, "vlm")
    with pytest.raises(InputError, match="neither a folder nor a preset"):
        engine("/nowhere")
    with pytest.raises(InputError, match="--context=5000: .* max_position_embeddings = 4096"):
        engine(toy, context=5000)
    with pytest.raises(InputError, match=r"ids up to 511, the model only 131 rows: they do not belong"):
        small = load("random:toy")
        small.arch = load("random:toy").arch.__class__(**{**small.arch.__dict__, "V": 131})
        TorchEngine(small)


# -- new weights ---------------------------------------------------------------------------------------------

def disturb(model, kind, scale=1.0):
    """Changes one kind of tensor, strongly; returns the model."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if tensor_kind(name) == kind:
                p.add_(torch.randn(p.shape, generator=rng) * scale * (p.square().mean().sqrt() + 0.1))
    return model


TOYS = {"llama-tied": "toy", "nemotron-h-8b": "toy-nemotron-h", "granite-4-h-micro": "toy-h"}


def kinds_of(toy):
    return sorted({tensor_kind(name) for name, _ in load(f"random:{toy}").named_parameters()})


@pytest.mark.parametrize("name, kind", [(name, kind) for name, toy in TOYS.items() for kind in kinds_of(toy)])
def test_push_is_fresh_and_a_stale_tensor_is_named(name, kind, folder):
    """One kind keeps its old values on the way: push() stops and names it."""
    trainer, sampler = load(folder(name)), TorchEngine(load(folder(name)))
    settings = dict(prompts=some_prompts(20, 20), new_tokens=8)
    assert push(sampler, trainer, **settings) < 1e-5
    old = dict(full_tensors(load(folder(name))))
    disturb(trainer, kind)
    before = {n: p.clone() for n, p in trainer.named_parameters()}
    arrives = sampler.load_weights
    sampler.load_weights = lambda pairs: arrives(
        (n, old[n] if tensor_kind(n) == kind else t) for n, t in pairs)
    with pytest.raises(StaleWeights, match=rf"pushed again: {kind} does not arrive") as e:
        push(sampler, trainer, **settings)
    assert str(e.value).count("does not arrive") == 1
    assert all(torch.equal(p, before[n]) for n, p in trainer.named_parameters())
    sampler.load_weights = arrives
    assert push(sampler, trainer, **settings) < 1e-5


def test_a_push_cut_short_and_a_nan_are_caught(toy):
    trainer, sampler = disturb(load("random:toy"), "self_attn.v_proj.weight"), TorchEngine(load("random:toy"))
    arrives, calls = sampler.load_weights, []

    def once(pairs):
        calls.append(1)
        if len(calls) > 1:
            arrives(pairs)

    sampler.load_weights = once
    with pytest.raises(StaleWeights, match="all arrive, .* That push was cut short"):
        push(sampler, trainer)
    sampler.load_weights = arrives
    assert push(sampler, trainer, check=False) is None
    with torch.no_grad():
        trainer.trunk.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match="not a number"):
        push(sampler, trainer)


def test_load_weights_refuses_what_does_not_fit(toy):
    sampler = TorchEngine(load("random:toy"))
    whole = dict(full_tensors(toy))
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"1 of 38 tensors are missing, {name}"):
        sampler.load_weights((n, t) for n, t in whole.items() if n != name)
    with pytest.raises(EngineError, match="the last load_weights\\(\\) did not end well"):
        sampler.generate([[1]], max_new_tokens=1)            # half of it is new
    with pytest.raises(InputError, match="model has no such tensor; did you mean 'model.layers.0.mlp"):
        sampler.load_weights([("model.layers.0.mlp.upproj.weight", whole[name])])
    with pytest.raises(InputError, match=r"\[3\]: its shape is \[384, 128\]"):
        sampler.load_weights([(name, torch.zeros(3))])
    with pytest.raises(InputError, match="given twice"):
        sampler.load_weights([(name, whole[name])] * 2)
    sampler.load_weights([*whole.items(), ("lm_head.weight", whole["model.embed_tokens.weight"])])
    assert worst(toy, [[1]], sampler.generate([[1]], max_new_tokens=4, stop=[])) < 1e-5


def test_two_ranks_push_together(tmp_path):
    """What push_ranks.py says."""
    two = Process(tmp_path, f"--folder={tmp_path}/saved", world=2, stage="push_ranks", OMP_NUM_THREADS="1")
    assert two.wait(120) == 0, two.text("stderr")
    assert [two.text("stdout", rank) for rank in range(2)] == ["all is well\n"] * 2


# -- from the shell ------------------------------------------------------------------------------------------

def run(folder, *flags):
    process = Process(folder, *flags, stage="generate")
    return process.wait(), process.text("stdout"), process.text("stderr")


def test_the_command(exported, tmp_path):
    flags = f"--init={exported}", "--n=2", "--max_new_tokens=8", "--temperature=0"
    one = subprocess.run([sys.executable, os.path.join(ROOT, "generate.py"), "--prompt=-", *flags], text=True,
                         capture_output=True, timeout=120, input="What is 2 + 2?\n")
    assert one.returncode == 0, one.stderr
    status, again, errors = run(tmp_path, r"--prompt=What is 2 + 2?\n", *flags)
    assert status == 0, errors
    assert one.stdout.splitlines()[:4] == again.splitlines()[:4]
    assert one.stdout.count("What is 2 + 2?") == 2 and "8 tokens | length | mean log-prob -" in one.stdout
    assert "16 sampled in" in one.stdout


@pytest.mark.parametrize("flags, message", [
    ([], "--init: name a checkpoint"),
    (["--init=nowhere"], "neither a folder nor a preset"),
    (["--init=toy", "--dtype=fp8"], "--dtype=fp8: give float32 or bfloat16"),
    (["--init=toy", "--promt=x"], "did you mean '--prompt'"),
    (["--init=toy", "--context=2", "--prompt=one two three four"], "the context is 2"),
])
def test_the_command_refuses(flags, message, tmp_path):
    status, _, errors = run(tmp_path, *flags)
    assert status == 2 and message in errors and "Traceback" not in errors
