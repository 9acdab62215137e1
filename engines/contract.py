"""What every engine takes and gives: requests, samples, stops, seeds, the distribution sampled from.

An engine has
    generate(prompts, n, *, max_new_tokens, temperature, top_p, stop, seed, keys, first, on_sample)
        -> for each prompt a list of n Samples
    load_weights(pairs)      new weights from (hub name, whole tensor) pairs
    sleep(), wake()          its GPU memory is free between the two; where that discards the weights (vLLM),
                             load_weights() comes before the next generate()
    close()
and the attributes tokenizer (or None), context (tokens of a prompt and its answer), known (how many ids can
be sampled) and dtype.
"""

import hashlib
import math
import operator
from collections import Counter
from dataclasses import dataclass

import torch

from cli import InputError, did_you_mean
from model import NAMES, load


class EngineError(InputError):
    """The engine died, stalled or went wrong; the message says which side, and what is known of it."""


# -- requests and samples ------------------------------------------------------------------------------------

@dataclass
class Sample:
    """One answer."""
    tokens: list[int]                    # the stop token included, where one ended it
    logprobs: list[float]                # of each token, under the distribution it was sampled from, in nats
    finish_reason: str                   # stop: ended by itself | length: cut by max_new_tokens or context
    text: str                            # decoded, without the stop that ended it ("" without a tokenizer)


@dataclass
class Request:
    """The samples of one prompt."""
    index: int                           # which prompt it is
    ids: list[int]                       # the prompt
    seeds: list[int]                     # one a sample
    max_tokens: int                      # new tokens of a sample, at most
    samples: list                        # a Sample each once it has ended, None before


@dataclass
class Stops:
    """What ends a sample: any of these ids, or a decoded text with any of these strings in it."""
    ids: list[int]
    strings: list[str]

    def text(self, tokenizer, tokens, finish_reason):
        """The text of a sample, without the stop that ended it."""
        if tokenizer is None:
            return ""
        if finish_reason == "stop" and tokens[-1] in self.ids:
            tokens = tokens[:-1]
        text = tokenizer.decode(tokens)
        places = [text.find(string) for string in self.strings]
        return text[:min((place for place in places if place >= 0), default=len(text))]


def make_requests(engine, prompts, *, n, max_new_tokens, temperature, top_p, stop, seed, keys, first):
    """What an engine's generate() was given, checked: ([Request], one a prompt; Stops). InputError names what
    does not fit."""
    n = whole_number(n, "--n")
    max_new_tokens = whole_number(max_new_tokens, "--max_new_tokens")
    _check_settings(n, max_new_tokens, temperature, top_p)
    stops = _read_stops(stop, engine.tokenizer)
    _check_ids("stop", stops.ids, engine.known)
    prompts = _read_prompts(prompts)
    for i, ids in enumerate(prompts):
        _check_ids(f"prompt {i}", ids, engine.known)
    keys = _prompt_keys(prompts, keys)
    requests = []
    for i, (ids, key) in enumerate(zip(prompts, keys, strict=True)):
        _check_length(i, ids, engine.context)
        seeds = [sample_seed(seed, key, first + j) for j in range(n)]
        max_tokens = min(max_new_tokens, engine.context - len(ids))
        requests.append(Request(i, ids, seeds, max_tokens, samples=[None] * n))
    return requests, stops


def _check_settings(n, max_new_tokens, temperature, top_p):
    def need(name, value, fits, what):
        if not fits:
            raise InputError(f"--{name}={value}: give {what}")

    need("n", n, n >= 1, "at least 1")
    need("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")
    # vLLM would sample at 0.01 below it
    usable = temperature == 0 or 0.01 <= temperature < math.inf
    need("temperature", temperature, usable, "0, or 0.01 and more")
    need("top_p", top_p, 0 < top_p <= 1, "over 0 and up to 1")


def _read_stops(stop, tokenizer):
    """Stops from an id, a string or several of them; None is the tokenizer's eos."""
    if stop is None:
        stop = [] if tokenizer is None else [tokenizer.eos_id]
    stop = list(stop) if isinstance(stop, list | tuple | set) else [stop]
    strings = [s for s in stop if isinstance(s, str)]
    ids = [whole_number(s, "stop") for s in stop if not isinstance(s, str)]
    if strings and (tokenizer is None or "" in strings):
        raise InputError(f"stop={stop!r}: a string needs a tokenizer, and a letter at least")
    return Stops(ids, strings)


def _read_prompts(prompts):
    """Prompts as lists of ints."""
    lists = []
    for i, ids in enumerate(prompts):
        if isinstance(ids, str) or not hasattr(ids, "__iter__"):
            raise InputError("prompts are lists of token ids, one a prompt: tokenizer.encode(text) makes one")
        lists.append([whole_number(id, f"an id of prompt {i}") for id in ids])
    return lists


def _check_ids(name, ids, known):
    if not ids or 0 <= min(ids) <= max(ids) < known:
        return
    wrong = max(ids) if max(ids) >= known else min(ids)
    raise InputError(f"{name} has the id {wrong}; the model knows 0 to {known - 1}: was it encoded by "
                     f"another tokenizer?")


def _check_length(i, ids, context):
    if not ids:
        raise InputError(f"prompt {i} is empty: give one token at least (the eos begins a new document)")
    if len(ids) >= context:
        raise InputError(f"prompt {i} has {len(ids)} tokens, the context is {context}: nothing can follow; "
                         f"shorten it, or raise --context")


# -- seeds ---------------------------------------------------------------------------------------------------

def sample_seed(seed, key, index):
    """63 bits from the run's seed, the prompt's key and the index of the sample: seeds that are near each
    other, or shared by prompts, make samples agree (RL.md, finding 4)."""
    parts = _plain((seed, key, index))
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _prompt_keys(prompts, keys):
    """A key a prompt. Without keys a prompt's tokens are its key, and a second copy is another prompt."""
    if keys is None:
        copies = Counter()
        keys = []
        for ids in map(tuple, prompts):
            keys.append((ids, copies[ids]))
            copies[ids] += 1
    keys = [_plain(key) for key in keys]
    different = len(set(keys))
    if different != len(prompts):
        raise InputError(f"{len(prompts)} prompts, but {different} different keys: prompts that share a key "
                         f"would share their noise")
    return keys


def _plain(key):
    """A key as Python's own ints, texts and tuples: equal keys of any origin give equal noise."""
    if isinstance(key, tuple | list):
        return tuple(map(_plain, key))
    return key if isinstance(key, str) else whole_number(key, "a key")


def whole_number(number, name):
    """A whole number (numpy's and torch's too) as an int."""
    try:
        return operator.index(number)
    except TypeError:
        raise InputError(f"{name} is {number!r:.60}; give whole numbers (for keys also texts and tuples)"
                         ) from None


# -- what fits the model -------------------------------------------------------------------------------------

def load_model(init, dtype, device=None):
    """The Model that --init names, in the dtype of this name, on device or, if None, on the GPU if there is
    one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load(init, dtype=getattr(torch, dtype), device=device)


def compute_dtype(model):
    """The dtype that a model computes in; a sharded one keeps fp32 masters all the same."""
    return getattr(model, "compute_dtype", next(model.parameters()).dtype)


def context_of(arch, context):
    """Tokens of a prompt and its answer: context, or if that is 0 what config.json allows."""
    longest = arch.raw.get("max_position_embeddings") or 0
    if longest and context > longest or not (context or longest):
        raise InputError(f"--context={context}: the model's config.json says max_position_embeddings = "
                         f"{longest or 'nothing'}")
    return context or longest


def known_ids(arch, tokenizer):
    """How many ids can be sampled: those with a text. InputError if the model has fewer rows than that."""
    if tokenizer is None:
        return arch.V
    if tokenizer.vocab_size > arch.V:
        raise InputError(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model only {arch.V} "
                         f"rows: they do not belong together; take the tokenizer that came with the model")
    return tokenizer.vocab_size


def check_weights(pairs, arch, shapes):
    """(hub name, tensor) pairs as they come, with names and shapes compared with the architecture's; a tied
    head follows its embedding. InputError on what does not belong, came twice, or in the end is missing."""
    missing = dict(shapes)
    embedding = NAMES[arch.family]["embed"] + ".weight"
    for name, tensor in pairs:
        if arch.tied and name == "lm_head.weight":
            continue
        if missing.get(name) != tuple(tensor.shape):
            if name in missing:
                problem = f"its shape is {list(shapes[name])}"
            elif name in shapes:
                problem = "given twice"
            else:
                problem = f"this {arch.family} model has no such tensor{did_you_mean(name, shapes)}"
            raise InputError(f"load_weights: {name} {list(tensor.shape)}: {problem}")
        del missing[name]
        yield name, tensor.detach()
        if arch.tied and name == embedding:
            yield "lm_head.weight", tensor.detach()
    if missing:
        raise InputError(f"load_weights: {len(missing)} of {len(shapes)} tensors are missing, "
                         f"{next(iter(missing))} for one; give them all, or the model is half old, half new")


# -- the distribution sampled from ---------------------------------------------------------------------------

def log_distribution(logits, temperature=1.0, top_p=1.0):
    """Log-probs (..., V) fp32 that a sampler with these settings draws from; temperature 0 counts as 1. top-p
    keeps the most probable ids until their mass reaches top_p, the one that crosses it included."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if top_p == 1:
        return logp
    ordered, index = logp.sort(-1, descending=True)
    probabilities = ordered.exp()
    mass_before = probabilities.cumsum(-1) - probabilities
    dropped = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, index, mass_before >= top_p)
    return logp.masked_fill(dropped, -math.inf).log_softmax(-1)


def draw(logits, uniform, temperature, top_p):
    """Token ids (B) and their log-probs (B) from logits (B, V), by inverting the cumulative distribution at
    uniform (B) fp64 in [0, 1): one number decides a token, so near-equal logits draw equal tokens."""
    if temperature == 0:
        logp = log_distribution(logits)
        ids = logits.argmax(-1)
    else:
        logp = log_distribution(logits, temperature, top_p)
        cumulative = logp.double().exp_().cumsum_(-1)     # fp32 would lose ids of a large vocabulary
        target = uniform[:, None] * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
        ids.clamp_(max=logits.shape[1] - 1)               # NaN: the caller sees it in the log-prob
    return ids, logp.gather(1, ids[:, None])[:, 0]
