"""tokenizer.py: the ids of transformers and tiktoken, no special id but from us, no text lost."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from corpus import tokenizer
from corpus.tokenizer import PIECES, RANKS, SPECIALS, load_tokenizer, toy_tokenizer

SOURCE = Path(os.__file__).read_text(encoding="utf-8")
SPELLED = ["<|end|>", "<|pad|>", "</s>", "<s>", "<unk>", "<|end_of_text|>", "<think>", "</think>", "[INST]"]
AWKWARD = [
    "", " ", "\n", "\r\n", "\t x", "  two", "a\u0301 \u00e9", "\x00\x07\x1b[0m", "\U0001f469\u200d\U0001f680",
    "\u6f22\u5b57 \u0645\u0631\u062d", "\u00a0\u2028\u3000x", "1 234,5 + \u0661\u0662", "\ufffd\ufeff",
    "\U0010ffff", "x" * 700, " " * 700, "\n" * 65 + " " * 9, "\\boxed{-3/4}", "a|b|c", "\u2581 and \u0120"]


def texts(n, seed=0, spelled=True):
    """AWKWARD and n strings: code, any Unicode, digits and white space, the toy's pieces, specials."""
    rng = random.Random(seed)

    def one():
        kind = rng.randrange(6 if spelled else 5)
        if kind == 0:
            start = rng.randrange(len(SOURCE))
            return SOURCE[start:start + rng.randrange(200)]
        if kind == 1:
            spans = (range(0x250), range(0xd800), range(0xe000, 0x110000))            # all but surrogates
            return "".join(chr(rng.choice(rng.choice(spans))) for _ in range(rng.randrange(25)))
        if kind == 2:
            return "".join(rng.choice(" \n\t\r\x0b\u00a009ab=-+.,</>\\_") for _ in range(rng.randrange(40)))
        if kind == 3:
            return "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
        if kind == 4:
            return "".join(rng.choice(PIECES)[:rng.randrange(1, 5)] for _ in range(rng.randrange(25)))
        return "".join(rng.choice([*SPELLED, *SPECIALS, " ", "\n", "x"]) for _ in range(rng.randrange(9)))

    return AWKWARD + [one() for _ in range(n)]


# -- the toy -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def toy():
    return toy_tokenizer()


@pytest.fixture
def saved(toy, tmp_path):
    toy.save(tmp_path / "toy")
    return tmp_path / "toy"


def test_toy_vocabulary(toy):
    assert (toy.vocab_size, toy.eos_id, toy.bos_id, toy.pad_id) == (512, 508, None, 509)
    assert len(PIECES) == len(set(PIECES)) == 252 and list(RANKS.values()) == list(range(508))
    assert not any(c.isdigit() or not c.isascii() for piece in PIECES for c in piece)
    # why tiktoken's merges and those of tokenizer.json are the same: no piece stands before a part of itself
    assert not any(PIECES[j] in PIECES[i] for i in range(252) for j in range(i + 1, 252))
    # every model and data shard of the toy world depends on this; change it knowingly
    assert toy.fingerprint == "20d7b352cad1c503b6ed7ec9023a8b17fd4bf97735480886a4f5d3c1f9c19122"


def test_toy_reads_the_world_well(toy):
    assert len(toy.encode("0123456789")) == 10                   # digits stand alone
    for text in ("<think>", " </think>", "</think>", "\n    ", "\n        ", "\\boxed", " + ", "def"):
        assert len(toy.encode(text + "1")) == 2, text
    # a prompt's ids begin the ids of prompt and response: what RL samples from is what mid-training saw
    prompt, response = "What is 17 + 5?\n", "<think> 7+5=12 </think>\n\\boxed{22}"
    assert toy.encode(prompt) + toy.encode(response) == toy.encode(prompt + response)


def test_toy_round_trip(toy):
    for text in texts(3000):
        assert toy.decode(toy.encode(text)) == text
    assert toy.encode_batch(AWKWARD) == [toy.encode(text) for text in AWKWARD]


def test_toy_equals_its_tokenizer_json_and_transformers(toy, saved):
    fast, auto = load_tokenizer(saved), AutoTokenizer.from_pretrained(saved)
    many = texts(6000, seed=1)
    ids = toy.encode_batch(many)
    assert fast.encode_batch(many) == ids == [fast.encode(text) for text in many]
    assert auto(many, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    clean = texts(2000, seed=2, spelled=False)
    assert [auto.encode(text) for text in clean] == toy.encode_batch(clean)
    assert (auto.eos_token_id, auto.bos_token_id, auto.pad_token_id, len(auto)) == (508, None, 509, 512)
    rng = random.Random(3)
    for _ in range(2000):  # what an untrained model says
        some = [rng.randrange(512) for _ in range(rng.randrange(12))]
        assert toy.decode(some) == fast.decode(some) == auto.decode(some, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "granite", "granitemoehybrid", "nemotron_h"])
def test_transformers_reads_the_toy_beside_any_config(toy, saved, model_type):
    """Some model types make transformers replace the pre-tokenizer or add a bos."""
    config = {"model_type": model_type, "eos_token_id": 508, "bos_token_id": 508, "pad_token_id": 509}
    (saved / "config.json").write_text(json.dumps(config))
    auto = AutoTokenizer.from_pretrained(saved)
    assert auto.encode(SOURCE[:5000]) == toy.encode(SOURCE[:5000])
    again = load_tokenizer(saved, config)
    assert again.document("x") == toy.document("x") and again.fingerprint == toy.fingerprint    # one eos


# -- the seven -----------------------------------------------------------------------------------------------

IDS = {                                                          # MODELS.md, section 1: bos, eos, pad
    "granite-3.3-8b": (0, 0, 0), "granite-4-micro": (100257, 100257, 100256),
    "granite-4-h-micro": (100257, 100257, 100256), "llama-3.1-8b": (128000, 128001, None),
    "mistral-7b": (1, 2, None), "mistral-small-24b": (1, 2, None), "nemotron-h-8b": (1, 2, 0)}


def merges_of(alphabet=(), pre=None):
    """(vocabulary in order, merges) of a small BPE trained on the standard library."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=list(alphabet), show_progress=False)
    backend.train_from_iterator(SOURCE.splitlines(keepends=True), trainer)
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def added(text, id, special=True):
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, "special": special, **off}


def write(folder, spec, bos, eos, pad):
    """The folder of a model: tokenizer.json, tokenizer_config.json, and files that are only carried along."""
    name = {token["id"]: token["content"] for token in spec["added_tokens"]}
    if bos is not None and bos != eos:  # as Llama's and Mistral's do; ours must not double it
        text = {"Sequence": {"id": "A", "type_id": 0}}
        spec["post_processor"] = {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name[bos], "type_id": 0}}, text],
            "pair": [text],
            "special_tokens": {name[bos]: {"id": name[bos], "ids": [bos], "tokens": [name[bos]]}}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name.get(bos),
              "eos_token": {"__type": "AddedToken", "content": name[eos]},           # both spellings occur
              "pad_token": name.get(pad)}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def trained():
    return merges_of(pre_tokenizers.ByteLevel.alphabet(), pre_tokenizers.ByteLevel(add_prefix_space=False))


def byte_level(trained, bos, eos, pad):
    """A byte-level tokenizer.json with special ids where the model has them, and Granite-4's think tokens."""
    tokens, merges = trained
    special = sorted({id for id in (bos, eos, pad) if id is not None})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tags = [added(f"<|special_{id}|>", id) for id in special]
    tags += [added("<think>", 100274, False), added("</think>", 100275, False)] if eos == 100257 else []
    vocab = {token: 3 + i for i, token in enumerate(tokens)} | {tag["content"]: tag["id"] for tag in tags}
    return {"version": "1.0", "added_tokens": tags, "pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


@pytest.mark.parametrize("name", IDS)
def test_documents_of_each_model(name, trained, tmp_path):
    bos, eos, pad = IDS[name]
    folder = write(tmp_path / name, byte_level(trained, bos, eos, pad), bos, eos, pad)
    tok = load_tokenizer(folder, {"bos_token_id": bos, "eos_token_id": [eos, 7], "pad_token_id": pad})
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (bos, eos, pad)
    assert load_tokenizer(folder).fingerprint == tok.fingerprint  # ids from tokenizer_config.json
    assert tok.vocab_size == 1 + max(tok.backend.get_vocab().values())

    text = "def f(x):\n    return x + 1\n"
    inner = tok.encode(text)
    front = [bos] if name.split("-")[0] in ("llama", "mistral", "nemotron") else []
    assert tok.document(text) == front + inner + [eos] == tok.documents(["", text])[1]
    assert tok.backend.encode(text).ids == front + inner  # the trap is there: ids by default
    assert AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False) == inner

    specials = {id for id in (bos, eos, pad) if id is not None}
    forged = "".join(f"<|special_{id}|> x" for id in specials)
    assert specials.isdisjoint(tok.encode(forged)) and tok.decode(tok.encode(forged)) == forged
    assert specials.isdisjoint(pickle.loads(pickle.dumps(tok)).encode(forged))  # tokenizers' forgets
    assert tok.decode([eos]) == f"<|special_{eos}|>"
    if eos == 100257:
        assert tok.encode("<think>a</think>")[::2] == [100274, 100275]  # `special: false`: ordinary text
    for text in texts(300, seed=4):
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("space", ["prepend", "metaspace"])     # Mistral-7B's file before and after 2024
def test_sentencepiece_with_byte_fallback(space, tmp_path):
    pieces, merges = merges_of(pre=pre_tokenizers.Metaspace(prepend_scheme="never"))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    meta = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0)]
    spec = {"version": "1.0", "added_tokens": [added(text, id) for id, text in enumerate(names[:3])],
            "normalizer": prepend if space == "prepend" else None,
            "pre_tokenizer": meta if space == "metaspace" else None,
            "decoder": json.loads(decoders.Sequence(back).__getstate__()),
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                      "merges": merges, "vocab": {text: id for id, text in enumerate(names)}}}
    folder = write(tmp_path, spec, 1, 2, None)
    tok, auto = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts(1500, seed=5, spelled=False):
        ids = tok.encode(text)
        assert ids == auto.encode(text, add_special_tokens=False) and {0, 1, 2}.isdisjoint(ids)
        if "\u2581" not in text and text[:1] != " ":
            assert tok.decode(ids) == text
    assert {0, 1, 2}.isdisjoint(tok.encode("a </s><s> <unk></s>"))
    assert tok.document("a b") == [1, *tok.encode("a b"), 2] == [*auto.encode("a b"), 2]


@pytest.mark.slow
def test_real_tekken_vocabulary(tmp_path):
    """Mistral-Small's vocabulary as mistral-common has it: 1000 special ids, then 130072 byte sequences."""
    common = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    file = Path(common.__file__).parents[2] / "data" / "tekken_240911.json"
    tekken = common.Tekkenizer.from_file(file)
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["config"]["default_num_special_tokens"] == 1000
    ranks = {tekken.id_to_byte_piece(1000 + i): i for i in range(tekken.n_words - 1000)}
    toy = json.loads(toy_tokenizer().files["tokenizer.json"])
    letters = {id: text for text, id in toy["model"]["vocab"].items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    names = [f"<SPECIAL_{i}>" for i in range(1000)]
    names[:3] = ["<unk>", "<s>", "</s>"]
    merges = [[spelled[token[:cut]], spelled[token[cut:]]] for token in ranks for cut in range(1, len(token))
              if token[:cut] in ranks and token[cut:] in ranks]
    vocab = {text: id for id, text in enumerate(names)} | {spelled[t]: 1000 + ranks[t] for t in ranks}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pattern = {"Regex": data["config"]["pattern"]}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    spec = {"version": "1.0", "added_tokens": [added(text, id) for id, text in enumerate(names)],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "decoder": level,
            "model": {"type": "BPE", "ignore_merges": True, "merges": merges, "vocab": vocab}}
    tok = load_tokenizer(write(tmp_path, spec, 1, 2, None))
    assert tok.vocab_size == 131072
    for text in texts(1000, seed=6):
        ids = tok.encode(text)
        assert ids == tekken.encode(text, bos=False, eos=False) and tok.decode(ids) == text


# -- files, fingerprint, errors ------------------------------------------------------------------------------

@pytest.fixture
def llama(trained, tmp_path):
    return write(tmp_path / "llama", byte_level(trained, 128000, 128001, None), 128000, 128001, None)


def edit(folder, change, file="tokenizer.json"):
    spec = json.loads((folder / file).read_text())
    change(spec)
    (folder / file).write_text(json.dumps(spec, indent=2))
    return folder


def test_save_copies_the_files(llama, tmp_path):
    tok = load_tokenizer(llama)
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    (llama / "tokenizer.json").write_text("changed behind our back")  # a hub cache cleaned in mid-run
    tok.save(tmp_path / "deep" / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "deep" / "out").iterdir()} == before
    assert load_tokenizer(tmp_path / "deep" / "out").fingerprint == tok.fingerprint


def test_fingerprint_tells_ids_not_spelling(llama, toy):
    first = load_tokenizer(llama).fingerprint
    assert first != toy.fingerprint and len(first) == 64

    def older(spec):                                             # the way of 2023: merges as "a b"
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    assert load_tokenizer(edit(llama, older)).fingerprint == first
    assert load_tokenizer(edit(llama, lambda spec: spec.update(post_processor=None))).fingerprint == first
    other = load_tokenizer(llama, {"bos_token_id": None}).fingerprint  # documents would begin otherwise
    assert other != first
    third = load_tokenizer(edit(llama, lambda spec: spec["model"]["merges"].pop())).fingerprint
    assert third not in (first, other)


def test_no_truncation_nor_padding(llama):
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3,
           "pad_type_id": 0, "pad_token": "!"}
    before = load_tokenizer(llama).encode_batch(["x", SOURCE[:500]])
    assert len(before[1]) > 64
    tok = load_tokenizer(edit(llama, lambda spec: spec.update(truncation=cut, padding=pad)))
    assert tok.encode_batch(["x", SOURCE[:500]]) == before == [tok.encode("x"), tok.encode(SOURCE[:500])]


def test_lone_surrogates(llama, toy):
    for tok in (load_tokenizer(llama), toy):
        assert tok.encode("a\ud83d b") == tok.encode("a\ufffd b") == tok.encode_batch(["a\ud83d b"])[0]


def test_decode_refuses_unknown_ids(llama, toy):
    for tok in (load_tokenizer(llama), toy):
        assert tok.decode([]) == ""
        for id in (tok.vocab_size, -1):
            with pytest.raises(ValueError, match=f"id {id} has no text.*vocab_size is {tok.vocab_size}"):
                tok.decode([5, id])


@pytest.mark.parametrize("there, says", [
    (None, "no such folder"), ((), "no tokenizer.json; fetch it"),
    (("tokenizer.model",), "only tokenizer.model; transformers can convert"),
    (("tekken.json",), "only tekken.json; transformers can convert")])
def test_missing_file(there, says, tmp_path):
    folder = tmp_path / "checkpoint"
    for name in there or ():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    if there == ():
        folder.mkdir()
    with pytest.raises(ValueError, match=f"checkpoint: .*{says}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "version https://git-lfs.github.com/spec/v1", "[1, 2", "\x00\xff"])
def test_corrupt_file(file, content, llama):
    (llama / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"llama: {file} cannot be read .*fetch it"):
        load_tokenizer(llama)


def test_truncated_tokenizer_json(llama):
    text = (llama / "tokenizer.json").read_text()
    for end in (len(text) // 2, len(text) - 1):
        (llama / "tokenizer.json").write_text(text[:end])
        with pytest.raises(ValueError, match="llama: tokenizer.json cannot be read"):
            load_tokenizer(llama)


def test_special_ids_that_make_no_sense(llama):
    with pytest.raises(ValueError, match="no eos: name eos_token_id"):
        load_tokenizer(llama, {"eos_token_id": None})
    for wrong in (999999, -1, "</s>"):
        with pytest.raises(ValueError, match="llama: eos is .*none of the 128002 tokens.*eos_token_id"):
            load_tokenizer(llama, {"eos_token_id": wrong})
    with pytest.raises(ValueError, match="pad is 99999"):        # between the ids that exist
        load_tokenizer(llama, {"pad_token_id": 99999})
    edit(llama, lambda spec: spec["added_tokens"][-1].update(special=False))
    with pytest.raises(ValueError, match="eos is .*a document could forge it.*special: true"):
        load_tokenizer(llama)


def test_known_files_only(llama):
    (llama / "model.safetensors").write_bytes(b"weights")
    files = set(load_tokenizer(llama).files)
    assert files == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files <= set(tokenizer.FILES)
