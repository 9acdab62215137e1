"""What every engine takes and gives: requests, samples, stops, seeds, the distribution sampled from."""

import hashlib
import math
import operator
from collections import Counter
from dataclasses import dataclass, field

import torch

from cli import InputError, did_you_mean
from model import NAMES

# -- requests: the same for both engines ---------------------------------------------------------------------

class EngineError(InputError):
    """The engine died, stalled or went wrong; the message says which side, and what is known of it."""


@dataclass
class Sample:
    """One answer. logprobs: of each token, under the distribution it was sampled from. text: the tokens
    decoded, without the stop that ended them ("" where there is no tokenizer)."""
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str                   # stop: ended by itself | length: cut by max_new_tokens or context
    text: str


@dataclass
class Request:
    """The n samples of one prompt."""
    ids: list[int]
    seeds: list[int]                     # one a sample
    room: int                            # new tokens at most
    index: int = 0                       # which prompt it is
    samples: list = field(default_factory=list)


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
        ends = [at for at in map(text.find, self.strings) if at >= 0]
        return text[:min(ends)] if ends else text


def sample_seed(seed, key, index):
    """63 bits from the run's seed, the prompt's key and the index of the sample: seeds that are near each
    other, or shared by prompts, make samples agree (RL.md, finding 4)."""
    digest = hashlib.sha256(repr(plain((seed, key, index))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def plain(key):
    """A key as Python's own ints, texts and tuples: equal keys, whatever made them, give equal noise."""
    if isinstance(key, tuple | list):
        return tuple(map(plain, key))
    return key if isinstance(key, str) else whole(key, "a key")


def whole(number, what):
    """A whole number (numpy's and torch's too) as an int."""
    try:
        return operator.index(number)
    except TypeError:
        raise InputError(f"{what} is {number!r:.60}; give whole numbers (for keys also texts and tuples)"
                         ) from None


def plan(engine, prompts, n, max_new_tokens, temperature, top_p, stop, seed, keys, first):
    """Checks what an engine's generate() was given; returns ([Request], Stops). InputError names what does
    not fit."""
    context, known, tokenizer = engine.context, engine.known, engine.tokenizer
    n, max_new_tokens = whole(n, "--n"), whole(max_new_tokens, "--max_new_tokens")
    for name, value, ok, need in (("n", n, n >= 1, "at least 1"),
                                  ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
                                  # vLLM would sample at 0.01 below it
                                  ("temperature", temperature, temperature == 0
                                   or 0.01 <= temperature < math.inf, "0, or 0.01 and more"),
                                  ("top_p", top_p, 0 < top_p <= 1, "over 0 and up to 1")):
        if not ok:
            raise InputError(f"--{name}={value}: give {need}")
    if stop is None:
        stop = [] if tokenizer is None else [tokenizer.eos_id]
    stop = list(stop) if isinstance(stop, list | tuple | set) else [stop]
    stops = Stops([whole(s, "stop") for s in stop if not isinstance(s, str)],
                  [s for s in stop if isinstance(s, str)])
    prompts = list(prompts)
    if any(isinstance(ids, str) or not hasattr(ids, "__iter__") for ids in prompts):
        raise InputError("prompts are lists of token ids, one a prompt: tokenizer.encode(text) makes one")
    prompts = [[whole(id, f"an id of prompt {i}") for id in ids] for i, ids in enumerate(prompts)]
    if stops.strings and (tokenizer is None or "" in stops.strings):
        raise InputError(f"stop={stop!r}: a string needs a tokenizer, and a letter at least")
    for what, ids in [("stop", stops.ids)] + [(f"prompt {i}", ids) for i, ids in enumerate(prompts)]:
        if ids and not 0 <= min(ids) <= max(ids) < known:
            wrong = max(ids) if max(ids) >= known else min(ids)
            raise InputError(f"{what} has the id {wrong}; the model knows 0 to {known - 1}: was it encoded "
                             f"by another tokenizer?")
    if keys is None:                     # a prompt is its tokens; a second copy of it is another prompt
        seen = Counter()
        keys = []
        for ids in map(tuple, prompts):
            keys.append((ids, seen[ids]))
            seen[ids] += 1
    keys = list(map(plain, keys))
    if len(set(keys)) != len(prompts):
        raise InputError(f"{len(prompts)} prompts, but {len(set(keys))} different keys: prompts that share a "
                         f"key would share their noise")
    requests = []
    for i, (ids, key) in enumerate(zip(prompts, keys, strict=True)):
        if not ids:
            raise InputError(f"prompt {i} is empty: give one token at least (the eos begins a new document)")
        if len(ids) >= context:
            raise InputError(f"prompt {i} has {len(ids)} tokens, the context is {context}: nothing can "
                             f"follow; shorten it, or raise --context")
        seeds = [sample_seed(seed, key, first + j) for j in range(n)]
        requests.append(Request(ids, seeds, min(max_new_tokens, context - len(ids))))
    return requests, stops


def context_of(arch, context):
    """Tokens of a prompt and its answer: context, or if that is 0 what config.json allows."""
    longest = arch.raw.get("max_position_embeddings") or 0
    if longest and context > longest or not (context or longest):
        raise InputError(f"--context={context}: the model's config.json says max_position_embeddings = "
                         f"{longest or 'nothing'}")
    return context or longest


def checked(pairs, arch, shapes):
    """(hub name, tensor) pairs as they come, with names and shapes compared with the architecture's; a tied
    head follows its embedding. InputError on what does not belong, came twice, or in the end is missing."""
    missing, embed = dict(shapes), NAMES[arch.family]["embed"] + ".weight"
    for name, tensor in pairs:
        if arch.tied and name == "lm_head.weight":
            continue
        if missing.get(name) != tuple(tensor.shape):
            raise InputError(f"load_weights: {name} {list(tensor.shape)}: " + (
                f"its shape is {list(shapes[name])}" if name in missing else "given twice" if name in shapes
                else f"this {arch.family} model has no such tensor{did_you_mean(name, shapes)}"))
        del missing[name]
        yield name, tensor.detach()
        if arch.tied and name == embed:
            yield "lm_head.weight", tensor.detach()
    if missing:
        raise InputError(f"load_weights: {len(missing)} of {len(shapes)} tensors are missing, "
                         f"{next(iter(missing))} for one; give them all, or the model is half old, half new")


def known_ids(arch, tokenizer):
    """How many ids can be sampled: those with a text. InputError if the model has fewer rows than that."""
    if tokenizer is None:
        return arch.V
    if tokenizer.vocab_size > arch.V:
        raise InputError(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model only {arch.V} "
                         f"rows: they do not belong together; take the tokenizer that came with the model")
    return tokenizer.vocab_size


def log_distribution(logits, temperature=1.0, top_p=1.0):
    """Log-probs (..., V) fp32 that a sampler with these settings draws from; temperature 0 counts as 1. top-p
    keeps the most probable ids until their mass reaches top_p, the one that crosses it included."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if top_p == 1:
        return logp
    ordered, index = logp.sort(-1, descending=True)
    mass = ordered.exp().cumsum(-1)
    dropped = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, index, mass - ordered.exp() >= top_p)
    return logp.masked_fill(dropped, -math.inf).log_softmax(-1)


def draw(logits, uniform, temperature, top_p):
    """Token ids (B) and their log-probs (B) from logits (B, V), by inverting the cumulative distribution at
    uniform (B) fp64 in [0, 1): one number decides a token, so near-equal logits draw equal tokens."""
    logp = log_distribution(logits, temperature, 1.0 if temperature == 0 else top_p)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        cumulative = logp.double().exp_().cumsum_(-1)     # fp32 would lose ids of a large vocabulary
        ids = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        ids.clamp_(max=logits.shape[1] - 1)               # NaN: the caller sees it in the log-prob
    return ids, logp.gather(1, ids[:, None])[:, 0]
