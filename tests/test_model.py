"""The seven models against transformers, on tiny random checkpoints: logits, streams, loss, gradients, packed
documents, greedy text, both config spellings, three shards. fp32; dense 1e-5, hybrids 2e-4 (another order of
the scan's sums)."""

import json
import os
import shutil

import pytest
import torch
from checkpoints import FAMILIES, ROOMY, make, respell, write_tokenizer
from safetensors.torch import load_file, save_file

import evaluate
import midtrain
import model
import presets
import rl
from cli import InputError, parse
from model import Init, Model, flops_per_token, keys_met, load, parameter_counts, preset, read_config, save

HYBRID = ("granite-4-h-micro", "nemotron-h-8b")
T = 29


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (folder, transformers model), made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = str(tmp_path_factory.mktemp(name))
            made[name] = folder, make(name, folder)
            write_tokenizer(folder)
        return made[name]
    return get


def close(ours, theirs, name):
    bound = 2e-4 if name in HYBRID else 1e-5
    scale = max(1.0, theirs.abs().max().item())
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= bound * scale


@pytest.mark.parametrize("spelling", ["transformers 5", "hub"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parity(name, spelling, checkpoints, tmp_path):
    folder, oracle = checkpoints(name)
    assert len([f for f in os.listdir(folder) if f.endswith(".safetensors")]) >= 3
    if spelling == "hub":
        folder = shutil.copytree(folder, tmp_path / "hub")
        respell(folder)
    ours = load(str(folder))
    tokens = torch.randint(0, 131, (2, T), generator=torch.Generator().manual_seed(1))

    theirs = oracle(tokens, output_hidden_states=True)
    close(ours(tokens), theirs.logits, name)
    streams = ours.hidden_states(tokens)
    assert len(streams) == len(theirs.hidden_states) + 1          # ours has the raw last stream as well
    for a, b in zip(streams[:-2] + streams[-1:], theirs.hidden_states, strict=True):
        close(a, b, name)

    # loss and gradients: transformers' mean over the same tokens
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    loss = ours(tokens, targets=targets) / (2 * (T - 1))
    reference = oracle(tokens, labels=tokens).loss
    close(loss, reference, name)
    loss.backward()
    oracle.zero_grad()
    reference.backward()
    theirs = {k.replace("model.", "backbone.", 1) if "nemotron" in name and k.startswith("model.") else k: p
              for k, p in oracle.named_parameters()}
    theirs = {k.replace("backbone.embed_tokens", "backbone.embeddings")
              .replace("backbone.norm.", "backbone.norm_f."): p for k, p in theirs.items()}
    own = dict(ours.named_parameters())
    assert own.keys() == theirs.keys()
    for key, p in own.items():
        grad, expected = p.grad, theirs[key].grad
        if (key.endswith(("embeddings.weight", "embed_tokens.weight"))
                and oracle.config.pad_token_id is not None):
            # transformers' padding_idx drops that row's gradient
            keep = torch.arange(131) != oracle.config.pad_token_id
            grad, expected = grad[keep], expected[keep]
        norm = expected.norm().item()
        assert (grad - expected).norm().item() <= (2e-4 if name in HYBRID else 1e-5) * max(norm, 1e-3), key

    # greedy text, the whole sequence again for every token
    ids = mine = tokens[:1, :5]
    for _ in range(12):
        ids = torch.cat([ids, oracle(ids).logits[:, -1:].argmax(-1)], 1)
        mine = torch.cat([mine, ours(mine)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, mine)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_equal_documents_alone(name, checkpoints):
    """A packed row against transformers on each document by itself; 17 and 11 are no multiples of any chunk
    or window."""
    folder, oracle = checkpoints(name)
    ours = load(folder)
    lengths = [17, 1, 11, 40]
    tokens = torch.randint(0, 131, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    docs = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = ours(tokens, docs)
    for piece, logits in zip(tokens.split(lengths, 1), packed.split(lengths, 1), strict=True):
        close(logits, oracle(piece).logits, name)


@pytest.mark.parametrize("name", [n for n in presets.names() if presets.is_toy(n)])
def test_one_document_never_touches_another(name):
    """Bit by bit, forward, with other tokens in the middle document; rows long enough for several scan
    chunks."""
    model = load(f"random:{name}")
    tokens = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(3))
    docs = torch.stack([torch.bucketize(torch.arange(300), torch.tensor(edges), right=True) for edges in
                        ([37, 180, 201], [100, 101, 290])])
    before = model(tokens, docs)
    changed = tokens.clone()
    here = docs == 1
    changed[here] = (changed[here] + 7) % 512
    after = model(changed, docs)
    assert torch.equal(before[~here], after[~here])
    assert not torch.equal(before[here], after[here])


# parameters by part, to the digit (MODELS.md, section 2; the Nemotron-H total equals a published
# weight-by-weight analysis)
COUNTS = {
    "granite-3.3-8b": (8_170_835_968, 201_326_592, 0, 1_677_721_600, 6_291_456_000, 0, 331_776),
    "granite-4-micro": (3_402_836_480, 256_901_120, 0, 629_145_600, 2_516_582_400, 0, 207_360),
    "granite-4-h-micro": (3_191_396_096, 205_520_896, 0, 41_943_040, 2_013_265_920, 930_500_352, 165_888),
    "llama-3.1-8b": (8_030_261_248, 525_336_576, 525_336_576, 1_342_177_280, 5_637_144_576, 0, 266_240),
    "mistral-7b": (7_241_732_096, 131_072_000, 131_072_000, 1_342_177_280, 5_637_144_576, 0, 266_240),
    "mistral-24b": (23_572_403_200, 671_088_640, 671_088_640, 2_097_152_000, 20_132_659_200, 0, 414_720),
    "nemotron-h-8b": (8_100_852_736, 536_870_912, 536_870_912, 167_772_160, 4_227_858_432, 2_631_263_232,
                      217_088),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    counts = parameter_counts(preset(name))
    assert (sum(counts.values()), *counts.values()) == COUNTS[name]


def test_toys_are_small():
    for name in presets.names():
        if presets.is_toy(name):
            assert sum(parameter_counts(preset(name)).values()) < 2_000_000


@pytest.mark.parametrize("name", FAMILIES)
def test_export_reads_back(name, checkpoints, tmp_path):
    """What save writes loads in transformers with equal logits, in one file and in shards, and in ours bit by
    bit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, _ = checkpoints(name)
    ours = load(folder)
    tokens = torch.randint(0, 131, (1, T), generator=torch.Generator().manual_seed(4))
    for part, size in (("one", 4 << 30), ("many", 20_000)):
        out = str(tmp_path / part)
        save(ours, out, shard_bytes=size)
        assert (part == "many") == os.path.exists(os.path.join(out, "model.safetensors.index.json"))
        close(ours(tokens), AutoModelForCausalLM.from_pretrained(out).eval()(tokens).logits, name)
        again = load(out)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
        text = "def f(x):\n    return 12 + x  # <|end|>"
        assert AutoTokenizer.from_pretrained(out).decode(again.tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", [n for n in presets.names() if n.startswith("toy-")])
def test_toys_are_read_by_transformers(name, tmp_path):
    """The presets' own config.json (the hub's spelling, written by us) means the same to transformers."""
    from transformers import AutoModelForCausalLM
    ours = load(f"random:{name}")
    save(ours, str(tmp_path / "m"))
    oracle = AutoModelForCausalLM.from_pretrained(str(tmp_path / "m")).eval()
    tokens = torch.randint(0, 508, (1, 150), generator=torch.Generator().manual_seed(5))
    # Nemotron-H's dt falls under transformers' clamp here (0.001, in this path only): compare the others
    # exactly
    bound = 1e-1 if "nemotron" in name else 2e-4
    assert (ours(tokens) - oracle(tokens).logits).abs().max() < bound


# -- presets -----------------------------------------------------------------------------------------------

def strict(text):
    """JSON of the standard, which knows no infinity."""
    def refuse(constant):
        raise ValueError(constant)
    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", presets.names())
def test_presets(name, tmp_path):
    """A file of strict JSON, which transformers reads as our reader does, with or without the infinity."""
    from transformers import AutoConfig
    name = {"toy": "toy-llama", "toy-h": "toy-granite-4-h"}.get(name, name)
    with open(os.path.join(os.path.dirname(presets.__file__), f"{name}.json")) as f:
        text = f.read()
    raw = strict(text)
    assert raw.pop("_name_or_path", None) == presets.hub_id(name)
    assert presets.is_toy(name) == (presets.hub_id(name) is None) == name.startswith("toy")
    assert presets.is_toy(name) or model.is_hub_id(presets.hub_id(name))
    assert read_config(raw) == preset(name)                             # {"__float__": "Infinity"}
    assert read_config(json.loads(json.dumps(presets.read(name)))) == preset(name)           # Infinity
    (tmp_path / "config.json").write_text(text)
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")                          # in transformers 5's spelling
    assert preset(str(tmp_path / "again")) == preset(name)


def test_a_file_dropped_is_a_preset(tmp_path, monkeypatch):
    """Llama-3.2-1B by its config.json: none of ours, with the parameters that its page counts (1.24B)."""
    folder = shutil.copytree(os.path.dirname(presets.__file__), tmp_path / "presets")
    monkeypatch.setattr(presets, "_FOLDER", str(folder))
    raw = strict((folder / "llama-3.1-8b.json").read_text())
    raw |= dict(_name_or_path="meta-llama/Llama-3.2-1B", hidden_size=2048, num_hidden_layers=16, head_dim=64,
                intermediate_size=8192, tie_word_embeddings=True)
    raw["rope_scaling"]["factor"] = 32.0
    (folder / "llama-3.2-1b.json").write_text(json.dumps(raw))
    assert "llama-3.2-1b" in presets.names() and presets.hub_id("llama-3.2-1b") == "meta-llama/Llama-3.2-1B"
    assert sum(parameter_counts(preset("llama-3.2-1b")).values()) == 1_235_814_400
    cfg = parse(midtrain.Config, ["--model=llama-3.2-1b"], midtrain.recipe)
    assert (cfg.steps, cfg.seq_len, cfg.lr) == (25_000, 8192, 5e-5)


def test_aliases():
    for alias, name in (("toy", "toy-llama"), ("toy-h", "toy-granite-4-h")):
        assert presets.read(alias) == presets.read(name) and presets.is_toy(alias)
    assert not presets.is_toy("no-such") and presets.hub_id("no-such") is None


# -- models of any size: a folder, a hub id ------------------------------------------------------------------

ANY_SIZE = ("llama-tied", "mistral-7b", "granite-3.3-8b", "granite-4-h-micro", "nemotron-h-8b")


def flags(stage, *argv):
    return parse(stage.Config, list(argv), stage.recipe)


@pytest.fixture
def no_group_left():
    """A run in this process that ended in an error keeps its process group."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ANY_SIZE)
def test_a_folder_as_model(name, tmp_path, world_data, capsys, monkeypatch, no_group_left):
    """A checkpoint whose sizes no preset has, of each family: the paper's recipe, dry run, two steps, export,
    evaluation of what was exported."""
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "given")
    make(name, folder, **ROOMY)
    write_tokenizer(folder)
    cfg = flags(midtrain, f"--model={folder}", "--dry_run=True")
    assert (cfg.steps, cfg.seq_len, cfg.batch, cfg.lr) == (25_000, 8192, 128, 5e-5)
    midtrain.main(cfg)
    plan = capsys.readouterr().out
    total = sum(parameter_counts(preset(folder)).values())
    assert f"{folder}: {total:,} parameters" in plan

    midtrain.main(flags(midtrain, f"--model={folder}", "--steps=2", "--warmup=0", "--batch=2", "--seq_len=32",
                        "--eval_every=0", "--eval_rows=1", "--dtype=float32", "--export_dtype=float32",
                        "--peak_tflops=1", "--mixture=base", f"--data={world_data}", "--run=run"))
    assert f"{total:,} parameters" in capsys.readouterr().out
    before, after = load(folder), load("run/model")
    assert after.arch == before.arch
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    result = evaluate.main(flags(evaluate, "--model=run/model", "--tasks=toy-math", "--problems=2",
                                 "--context=96", "--dtype=float32", "--run=eval"))
    assert result["init"] == "run/model" and result["tasks"]["toy-math"]["problems"] == 2


def test_init_must_be_of_the_models_sizes(tmp_path, world_data, monkeypatch, no_group_left):
    """--model may be a folder or a preset; the message names the preset that would fit, or the folder."""
    monkeypatch.chdir(tmp_path)
    for folder, name in (("dense", "llama-tied"), ("hybrid", "granite-4-h-micro")):
        make(name, str(tmp_path / folder), **ROOMY)
        write_tokenizer(str(tmp_path / folder))
    small = ["--seq_len=32", f"--data={world_data}", "--run=run"]
    for wanted, given, fix in (("dense", "random:toy", "--model=toy-llama$"),
                               ("dense", "hybrid", "--model=hybrid$"),
                               ("toy", "dense", "--model=dense$")):
        with pytest.raises(InputError, match=rf"--init={given} is a .* not the {wanted} of --model; .*{fix}"):
            midtrain.main(flags(midtrain, f"--model={wanted}", f"--init={given}", *small))


def test_a_hub_id_as_model(tmp_path, monkeypatch):
    """config.json alone is fetched for the plan, the weights for --init; unreachable, one readable line."""
    import huggingface_hub
    make("nemotron-h-8b", str(tmp_path / "here"), **ROOMY)
    write_tokenizer(str(tmp_path / "here"))
    fetched = []

    def snapshot_download(repo, allow_patterns):
        fetched.append((repo, allow_patterns))
        return str(tmp_path / "here")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        arch = preset("some-lab/Nemotron-H-4B")
        assert arch == preset(str(tmp_path / "here"))
        assert fetched == [("some-lab/Nemotron-H-4B", ["config.json"])]
        assert Init("some-lab/Nemotron-H-4B").arch == arch
        assert fetched[1] == ("some-lab/Nemotron-H-4B", model.HUB_FILES)
        for stage in (midtrain, rl, evaluate):
            stage.check(flags(stage, "--model=some-lab/Nemotron-H-4B"), 1)
    for call, flag in ((preset, "--model"), (load, "--init")):                 # HF_HUB_OFFLINE: conftest
        with pytest.raises(InputError) as e:
            call("some-lab/other")
        assert str(e.value).startswith(f"{flag}=some-lab/other is neither a folder nor a preset, and the ")
        assert str(e.value).endswith(f"offline, give a folder: {flag}=PATH")


@pytest.mark.parametrize("name, says", [
    ("mistral-24", "unknown model 'mistral-24'; did you mean 'mistral-24b'? (known: granite-3.3-8b"),
    ("no/such/folder", "there is no folder 'no/such/folder'"),
    (".", "'.' has no config.json, so it is no checkpoint"),
])
def test_models_that_cannot_be_had(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as e:
        preset(name)
    assert str(e.value).startswith("--model") and says in str(e.value)


# -- checkpoint arithmetic ---------------------------------------------------------------------------------

def test_linear_combination_is_summed_in_float32_and_rounded_once(checkpoints, tmp_path):
    a = load("random:toy", dtype=torch.bfloat16)
    save(a, str(tmp_path / "a"))
    b = load("random:toy", dtype=torch.bfloat16)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    save(b, str(tmp_path / "b"))
    merged = load(f"0.15*{tmp_path / 'a'} + 0.85*{tmp_path / 'b'}", dtype=torch.bfloat16)
    back = load(f"2*{tmp_path / 'a'} - 1*{tmp_path / 'b'}")
    for (name, m), n, p, q in zip(merged.named_parameters(), back.parameters(), a.parameters(),
                                  b.parameters(), strict=True):
        assert (m.dtype == torch.bfloat16
                and torch.equal(m, (0.15 * p.float() + 0.85 * q.float()).bfloat16())), name
        # mergekit's bf16 sum is 0.196 % too large, 38 % of entries differ
        exact = 0.15 * p.double() + 0.85 * q.double()
        assert p.ndim == 1 or abs((m.double() * exact).sum() / exact.square().sum() - 1) < 1e-4
        assert (m != exact.bfloat16()).double().mean() < 0.01                   # near-ties of the float32 sum
        assert torch.allclose(n.double(), 2 * p.double() - q.double(), atol=1e-6)
    close_to = load(f"1.0*{tmp_path / 'a'}", dtype=torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(close_to.parameters(), a.parameters(), strict=True))


def test_random_weights_are_a_function_of_name_and_seed():
    a, b = load("random:toy-h"), load("random:toy-h")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    weights = [p for p in a.parameters() if p.ndim == 2]
    assert all(not torch.equal(x[:4, :4], y[:4, :4]) for x, y in zip(weights, weights[1:], strict=False))
    other = load("random:toy-h:1")
    assert other.tokenizer.vocab_size == a.tokenizer.vocab_size
    assert not any(torch.equal(x, y) for x, y in zip(weights, [p for p in other.parameters() if p.ndim == 2],
                                                     strict=True))
    half = load("0.5*random:toy-h + 0.5*random:toy-h:1")
    first = next(iter(half.state_dict()))
    torch.testing.assert_close(half.state_dict()[first],
                               (a.state_dict()[first] + other.state_dict()[first]) / 2)


# -- refusals ----------------------------------------------------------------------------------------------

def _edit(folder, change):
    file = os.path.join(folder, "model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
     "1 tensors missing: model.layers.2.mlp.up_proj.weight"),
    (lambda t: t.update(surprise=torch.ones(2)), "1 tensors unexpected: surprise"),
    (lambda t: t.update({"model.norm.weight": torch.ones(7)}),
     "model.norm.weight has shape [7], its config.json says [128]"),
])
def test_wrong_tensors_are_refused_by_name(change, says, tmp_path):
    save(load("random:toy"), str(tmp_path / "m"))
    _edit(tmp_path / "m", change)
    with pytest.raises(InputError) as e:
        load(str(tmp_path / "m"))
    assert says in str(e.value)


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path):
    save(load("random:toy"), str(tmp_path / "m"))
    _edit(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(str(tmp_path / "m"))
    _edit(tmp_path / "m", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(InputError, match="ties the head, but lm_head.weight differs"):
        load(str(tmp_path / "m"))


@pytest.mark.parametrize("change, says", [
    (dict(model_type="gpt2"), "model_type 'gpt2'"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(hidden_act="gelu"), "'gelu'"),
    (dict(rope_scaling={"rope_type": "yarn"}), "'yarn'"),
    (dict(hidden_size=None), "hidden_size"),
])
def test_configs_that_mean_something_else_are_refused(change, says):
    with pytest.raises(InputError) as e:
        read_config(presets.read("toy") | change)
    assert says in str(e.value)


@pytest.mark.parametrize("init, says", [
    ("mistral-24", "did you mean 'mistral-24b'"),
    ("random:toyy", "did you mean 'toy'"),
    ("random:toy:one", "the seed must be a whole number"),
    ("0.2*random:toy + 0.85*random:toy", "sum to 1.05"),
    ("0.5*random:toy + 0.5*random:toy-h", "different architectures"),
    ("x*random:toy", "cannot read"),
    ("/nowhere", "neither a folder nor a preset"),
])
def test_init_errors_name_the_fix(init, says):
    with pytest.raises(InputError) as e:
        load(init)
    assert says in str(e.value)


def test_flops_of_a_dense_model_are_six_times_its_matrices():
    arch = preset("llama-3.1-8b")
    counts = parameter_counts(arch)
    matrices = counts["attention"] + counts["MLP"] + counts["head"]
    attention = 12 * len(arch.layers) * arch.H * arch.D * 8192
    assert flops_per_token(arch, 8192) == 6 * matrices + attention
    assert flops_per_token(arch, 8192, 4096.5) == 6 * matrices + attention * 4096.5 / 8192


def test_keys_met_counts_every_query():
    for lengths, window in (([5], None), ([5, 1, 9], 4), ([3, 4], 4), ([8192], 4096)):
        brute = sum(min(i, window or i) for n in lengths for i in range(1, n + 1))
        assert keys_met(lengths, window) == brute


def test_the_model_runs_in_bfloat16():
    model = load("random:toy-h", dtype=torch.bfloat16)
    exact = load("random:toy-h")
    tokens = torch.randint(0, 512, (1, 100), generator=torch.Generator().manual_seed(6))
    assert (model(tokens) - exact(tokens)).abs().max() < 0.2
    assert Model(preset("toy")).tokenizer is None


@pytest.mark.skipif(model.varlen_attn is None, reason="torch before 2.13: its varlen kernel lacks windows")
def test_varlen_attention_takes_what_we_give(monkeypatch):
    """Where there is a GPU without flash-attn: torch's own, here on tensors without memory."""
    monkeypatch.setattr(model, "flash_attn_varlen_func", None)
    q, k = (torch.empty(2, 64, heads, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
            for heads in (8, 2))
    for window in (None, 16):
        cu_seqlens = torch.empty(5, device="meta", dtype=torch.int32)
        out = model.attend_varlen(q, k, k, cu_seqlens, 64, 0.1, window)
        assert out.shape == q.shape
        out.backward(torch.empty_like(out))
        assert k.grad.shape == k.shape
    assert model.attention_kernel(torch.device("cuda"), torch.bfloat16).startswith("torch varlen")
    assert model.attention_kernel(torch.device("cuda"), torch.float32).startswith("torch SDPA")


@pytest.mark.parametrize("docs", [None, [[0] * 9 + [1] * 20 + [2] * 3, [0] * 32], [[4, *[5] * 31]] * 2])
def test_documents_as_a_varlen_kernel_is_told(docs, monkeypatch):
    """The model by a varlen kernel, here a loop over its cu_seqlens, is the model document by document."""
    def loop(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size, deterministic):
        assert cu_q is cu_k and cu_q.dtype == torch.int32 and max_q == max_k == int(cu_q.diff().max())
        assert causal and deterministic and window_size == (127, 0)                # the toy's
        bounds = cu_q.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(q)
        outs = [model.attend_documents(*(x[None, a:b] for x in (q, k, v)), None, softmax_scale, 128)[0]
                for a, b in zip(bounds, bounds[1:], strict=False)]
        return torch.cat(outs)

    toy = load("random:toy-mistral")
    tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(7))
    docs = None if docs is None else torch.tensor(docs)
    expected = toy(tokens, docs)
    monkeypatch.setattr(model, "attention_kernel", lambda device, dtype: "flash-attn varlen")
    monkeypatch.setattr(model, "flash_attn_varlen_func", loop)
    assert torch.allclose(toy(tokens, docs), expected, atol=1e-5)


def test_kernels_that_cannot_be_had():
    for name in ("tritn", "mamba-ssm"):
        with pytest.raises(InputError, match="--kernels"):
            model.choose_kernels(name, torch.device("cpu"))
