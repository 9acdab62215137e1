"""The seven base models of PRISM (arXiv 2603.17074, section 3), and any other size of their families, as one
residual stack; and checkpoint arithmetic.

Every model is a flat list of residual sublayers  x = x + m * f(norm(x))  with f one of attention (a), MLP
(f), Mamba-2 (m). A layer of Llama is "af", of Granite-4-H "mf" or "af", of Nemotron-H one of "m", "f", "a".
The numbers are read from the hub's config.json (`read_config`), of a checkpoint or of presets/NAME.json.
Parameters carry the names they have on the hub (`NAMES`), so a checkpoint is loaded and saved without any
renaming, and transformers and vLLM read what `save` writes.

    model = load("granite-4-h-micro", dtype=torch.bfloat16)           # from the hub, or from its local cache
    model = load("0.15*granite-3.3-8b + 0.85*runs/mt/model")          # checkpoints are vectors
    logits = model(tokens, docs)                                      # (B, T) int64 -> (B, T, V) fp32

Notation: B batch, T tokens, C channels, H query heads, K kv heads, D head dim, F ffn, V vocab, L layers,
E Mamba inner width, S state, G groups (Mamba), P Mamba head dim.
"""

import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recomputed

import kernels
import presets
from cli import InputError, did_you_mean, write_atomic
from corpus.tokenizer import load_tokenizer, toy_tokenizer
from kernels.act import relu2, swiglu
from kernels.attention import attend_flash_attn_4, flash_attn_4
from kernels.conv1d import causal_conv1d
from kernels.loss import linear_cross_entropy
from kernels.norm import add_rms_norm, rms_norm
from kernels.rope import rotate
from kernels.ssd import chunk_length, ssd
from runtime import reshard, to_device

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:                             # torch's own attention then; the start-up line says which
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
    if not {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        varlen_attn = None                      # before torch 2.13: neither windows nor shared keys
except ImportError:
    varlen_attn = None

# -- families: names on the hub ----------------------------------------------------------------------------

class Sublayer(NamedTuple):
    """What the two modules of a residual sublayer are called inside their layer."""
    norm: str
    mixer: str


_LLAMA = dict(
    embed="model.embed_tokens",
    layers="model.layers",
    norm="model.norm",
    a=Sublayer("input_layernorm", "self_attn"),
    f=Sublayer("post_attention_layernorm", "mlp"),
)
NAMES = {                                       # where the hub keeps each part
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "granite": _LLAMA,
    "granitemoehybrid": _LLAMA | dict(
        m=Sublayer("input_layernorm", "mamba"),
        f=Sublayer("post_attention_layernorm", "shared_mlp"),
    ),
    "nemotron_h": dict(
        embed="backbone.embeddings",
        layers="backbone.layers",
        norm="backbone.norm_f",
        a=Sublayer("norm", "mixer"),
        f=Sublayer("norm", "mixer"),
        m=Sublayer("norm", "mixer"),
    ),
}


# -- the architecture ----------------------------------------------------------------------------------------

class RopeScaling(NamedTuple):
    """How Llama-3.1 stretches its RoPE, in the words of its config.json; see `rope_frequencies`."""
    factor: float                               # the low frequencies are divided by it
    low_freq_factor: float                      # low: fewer turns than this over the original length
    high_freq_factor: float                     # high: more turns than this; between them both are blended
    original_max_position_embeddings: int       # tokens


class MambaSizes(NamedTuple):
    """The sizes of a Mamba-2 sublayer."""
    heads: int
    head_dim: int                               # P
    state: int                                  # S
    groups: int                                 # G: heads of a group share B and C
    conv_width: int                             # tokens
    conv_bias: bool
    dt_limits: tuple[float, float]              # the time step is clamped between them

    @property
    def inner(self):
        """The width inside, E."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self):
        """What the convolution goes over: x, B and C."""
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True)
class Arch:
    """What the computation needs to know, read from a hub config.json by `read_config`."""
    family: str
    layers: tuple[str, ...]                     # the sublayers of each hub layer: "af", "mf", "m", ...
    C: int                                      # hidden size
    V: int                                      # vocabulary
    H: int                                      # query heads
    K: int                                      # key and value heads
    D: int                                      # head dim
    F: int                                      # MLP width
    eps: float
    tied: bool
    theta: float | None = None                  # RoPE base, None = no positions at all (NoPE)
    rope_scaling: RopeScaling | None = None     # Llama-3.1
    window: int | None = None                   # Mistral: keys visible, self included
    embed_scale: float = 1.0                    # Granite's four multipliers
    attn_scale: float | None = None             # None = 1 / sqrt(D)
    residual_scale: float = 1.0
    logits_scale: float = 1.0                   # multiplies (the hub's logits_scaling divides)
    mamba: MambaSizes | None = None
    init_std: float = 0.02
    raw: dict = field(default_factory=dict, compare=False, hash=False)    # the config.json itself, for saving

    @property
    def depth(self):
        """Sublayers in all."""
        return sum(len(layer) for layer in self.layers)


# -- families: the words of their config.json ----------------------------------------------------------------

class Spelling(NamedTuple):
    """What the families' config.json say in words of their own, or leave unsaid."""
    activation: str = "silu"                    # the one that we compute
    activation_key: str = "hidden_act"
    mlp_width_key: str = "intermediate_size"
    eps_keys: tuple = ("rms_norm_eps",)
    kinds_keys: tuple = ()                      # the list of the layers' kinds; no key: all are attention
    kinds_required: bool = False
    mlp_in_every_layer: bool = True             # behind the attention or the Mamba; else it is a layer
    head_dim: int | None = None                 # where config.json gives none; None: C / H
    positions: str = "rope"                     # rope, none, or "configured": position_embedding_type decides
    window: bool = False                        # sliding_window holds
    multipliers: bool = False                   # Granite's four


SPELLINGS = {
    "llama": Spelling(),
    "mistral": Spelling(window=True),
    "granite": Spelling(multipliers=True),
    "granitemoehybrid": Spelling(
        mlp_width_key="shared_intermediate_size",
        kinds_keys=("layer_types",),
        positions="configured",
        multipliers=True,
    ),
    "nemotron_h": Spelling(
        activation="relu2",
        activation_key="mlp_hidden_act",
        eps_keys=("layer_norm_epsilon", "rms_norm_eps"),
        kinds_keys=("hybrid_override_pattern", "layers_block_type"),
        kinds_required=True,
        mlp_in_every_layer=False,
        head_dim=128,
        positions="none",
    ),
}
# what a layer's kind is called: on the hub, in transformers 5, in Nemotron-H's pattern
KINDS = {"mamba": "m", "linear_attention": "m", "M": "m",
         "attention": "a", "full_attention": "a", "*": "a",
         "mlp": "f", "-": "f"}


class HubConfig:
    """A config.json to look things up in: many a key has one name on the hub, another in transformers 5."""

    def __init__(self, raw):
        self.raw, self.family = raw, raw.get("model_type")

    def get(self, *keys, default=None):
        """The value of the first of the keys that is there and not null."""
        for key in keys:
            if self.raw.get(key) is not None:
                return _decoded(self.raw[key])
        return default

    def need(self, *keys):
        """What `get` gives; InputError where it is nothing."""
        value = self.get(*keys)
        if value is None:
            raise InputError(f"config.json of a {self.family} model lacks {' or '.join(keys)!r}")
        return value


def _decoded(value):
    """transformers 5 writes a number that JSON lacks as {"__float__": "Infinity"}."""
    if isinstance(value, dict) and "__float__" in value:
        return float(value["__float__"])
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value


def read_config(raw):
    """A hub config.json (dict), in the hub's or in transformers 5's spelling, to an Arch. InputError on
    anything that this code does not compute (experts, biases, unknown RoPE types), so that no checkpoint runs
    as something else."""
    config = HubConfig(raw)
    family = config.family
    if family not in SPELLINGS:
        raise InputError(f"config.json: model_type {family!r} is not one of {', '.join(SPELLINGS)}")
    spelling = SPELLINGS[family]
    for key in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "num_local_experts"):
        if config.get(key):
            raise InputError(f"config.json: {key} = {raw[key]!r} is not supported (none of the seven models "
                             f"has it)")
    activation = config.get(spelling.activation_key, default=spelling.activation)
    if activation != spelling.activation:
        raise InputError(f"config.json: activation {activation!r} of a {family} model is not supported")

    layers = _read_layers(config, spelling)
    C = config.need("hidden_size")
    H = config.need("num_attention_heads")
    theta, rope_scaling = _read_rope(config, spelling)
    mamba = _read_mamba(config, C) if "m" in "".join(layers) else None
    multipliers = {}
    if spelling.multipliers:
        multipliers = dict(
            embed_scale=float(config.get("embedding_multiplier", default=1.0)),
            attn_scale=float(config.get("attention_multiplier", default=1.0)),
            residual_scale=float(config.get("residual_multiplier", default=1.0)),
            logits_scale=1.0 / float(config.get("logits_scaling", default=1.0)),
        )
    return Arch(
        family=family,
        layers=layers,
        C=C,
        V=config.need("vocab_size"),
        H=H,
        K=config.get("num_key_value_heads", default=H),
        D=config.get("head_dim", "attention_head_dim", default=spelling.head_dim or C // H),
        F=config.need(spelling.mlp_width_key),
        eps=float(config.get(*spelling.eps_keys, default=1e-6)),
        tied=bool(config.get("tie_word_embeddings", default=False)),
        theta=theta,
        rope_scaling=rope_scaling,
        window=config.get("sliding_window") if spelling.window else None,
        mamba=mamba,
        init_std=float(config.get("initializer_range", default=0.02)),
        raw=raw,
        **multipliers,
    )


def _read_layers(config, spelling):
    """The sublayers of each layer: ("af", "mf", ...), or ("m", "f", ...) where the MLP is a layer."""
    count = config.get("num_hidden_layers", default=0)
    kinds = ["attention"] * count
    if spelling.kinds_required:
        kinds = config.need(*spelling.kinds_keys)
    elif spelling.kinds_keys:
        kinds = config.get(*spelling.kinds_keys, default=kinds)
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise InputError(f"config.json: layer kinds {unknown or 'missing'}: known are {', '.join(KINDS)}")
    if count and len(kinds) != count:
        raise InputError(f"config.json: num_hidden_layers = {count}, but {len(kinds)} layer kinds are listed")
    mlp = "f" if spelling.mlp_in_every_layer else ""
    return tuple(KINDS[kind] + mlp for kind in kinds)


def _read_rope(config, spelling):
    """(theta, RopeScaling or None); theta is None where the model has no positions."""
    positions = spelling.positions
    if positions == "configured":
        positions = config.get("position_embedding_type")
    if positions != "rope":
        return None, None
    parameters = config.get("rope_parameters", default={})                       # transformers 5
    scaling = config.get("rope_scaling", default=parameters)
    theta = float(parameters.get("rope_theta") or config.get("rope_theta", default=10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"config.json: rope type {kind!r} is not supported (known: default, llama3)")
    if kind == "default":
        return theta, None
    return theta, RopeScaling(**{key: scaling[key] for key in RopeScaling._fields})


def _read_mamba(config, C):
    """The Mamba sublayers' sizes, by Granite's keys or by Nemotron-H's."""
    heads = config.need("mamba_n_heads", "mamba_num_heads")
    head_dim = config.need("mamba_d_head", "mamba_head_dim")
    if head_dim == "auto":
        head_dim = config.get("mamba_expand", default=2) * C // heads
    limits = config.get("time_step_limit", default=(0.0, math.inf))
    return MambaSizes(
        heads=heads,
        head_dim=head_dim,
        state=config.need("mamba_d_state", "ssm_state_size"),
        groups=config.need("mamba_n_groups", "n_groups"),
        conv_width=config.get("mamba_d_conv", "conv_kernel", default=4),
        conv_bias=config.get("mamba_conv_bias", "use_conv_bias", default=True),
        dt_limits=tuple(float(limit) for limit in limits),
    )


# -- models by name, folder or hub id ----------------------------------------------------------------------

def preset(name, flag="--model"):
    """The Arch of a preset's name, of a folder with a config.json, or of a hub id ("owner/name"), whose
    config.json is fetched. InputError otherwise, with the nearest names."""
    if name not in presets.names():
        if os.path.isdir(name):
            return read_config(_config_json(name, flag))
        if is_hub_id(name):
            return read_config(_config_json(fetch(name, ["config.json"], flag), flag))
        if os.sep in name:
            raise InputError(f"{flag}: there is no folder {name!r}")
    return named_preset(name, flag)


def named_preset(name, flag):
    """The Arch of a preset's name, and of nothing else."""
    known = presets.names()
    if name not in known:
        raise InputError(f"{flag}: unknown model {name!r}{did_you_mean(name, known)} "
                         f"(known: {', '.join(known)})")
    return read_config(presets.read(name))


def is_hub_id(name):
    """Whether the hub could keep a model of this name: "owner/name"."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def fetch(name, files, flag):
    """The folder of the hub's cache with the files (patterns) of a preset or a hub id; what is not there yet
    is downloaded. InputError when it cannot be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    repo = presets.hub_id(name)
    failure = f"{flag}={name}: cannot fetch {repo} from the hub"
    if repo is None:
        repo = name
        failure = f"{flag}={name} is neither a folder nor a preset, and the hub does not give it"
    try:
        return snapshot_download(repo, allow_patterns=files)
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        reason = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        raise InputError(f"{failure} ({reason}). Gated models need HF_TOKEN; offline, give a folder: "
                         f"{flag}=PATH") from None


def _config_json(folder, flag):
    """The config.json of a checkpoint's folder."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path) as f:
            return dict(json.load(f))                    # Python's json reads the bare Infinity of Nemotron-H
    except FileNotFoundError:
        raise InputError(f"{flag}: {folder!r} has no config.json, so it is no checkpoint in hub format"
                         ) from None
    except (ValueError, TypeError) as e:
        raise InputError(f"{flag}: {path} is damaged ({e}); download the checkpoint again") from None


# -- attention ---------------------------------------------------------------------------------------------

HALF = (torch.bfloat16, torch.float16)                                     # what flash kernels take


class Shared(NamedTuple):
    """What every sublayer of one forward pass shares."""
    docs: torch.Tensor | None = None            # (B, T) document ids, or None: one document a row
    lengths: list | None = None                 # SDPA: tokens of each document over the flattened (B T)
    cu_seqlens: torch.Tensor | None = None      # varlen kernels: where documents begin over the flattened
                                                # (B T) tokens, and B T behind them; int32
    max_seqlen: int | None = None               # tokens of the longest document
    cos: torch.Tensor | None = None             # (1 or B, T, 1, D/2)
    sin: torch.Tensor | None = None
    cache: object | None = None                 # generation: what earlier tokens left (engines/embedded.py)


def rope_frequencies(arch, device=None):
    """Angles per position, (D/2) fp32; Llama-3.1 divides the low frequencies by `factor` and blends
    between."""
    exponents = torch.arange(0, arch.D, 2, dtype=torch.float32, device=device) / arch.D
    frequencies = 1.0 / arch.theta ** exponents
    if arch.rope_scaling is None:
        return frequencies
    factor = arch.rope_scaling.factor
    low = arch.rope_scaling.low_freq_factor
    high = arch.rope_scaling.high_freq_factor
    original = arch.rope_scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies                # in tokens
    share = (original / wavelength - low) / (high - low)
    blended = (1 - share) * frequencies / factor + share * frequencies
    scaled = torch.where(wavelength < original / high, frequencies, blended)
    return torch.where(wavelength > original / low, frequencies / factor, scaled)


def first_tokens(docs):
    """Which tokens of docs (B, T) are the first of their document in their row: (B, T) bool."""
    is_first = torch.ones_like(docs, dtype=torch.bool)
    is_first[:, 1:] = docs[:, 1:] != docs[:, :-1]
    return is_first


def document_starts(docs):
    """Where in its row the document of each token of docs (B, T) begins: (B, T) int64."""
    index = torch.arange(docs.shape[1], device=docs.device)
    return torch.where(first_tokens(docs), index, 0).cummax(1).values


def document_lengths(docs):
    """Tokens of each document of docs (B, T), row by row: a list of ints. Waits for the device: where the
    host has the documents, data.document_lengths says the same."""
    begins = first_tokens(docs).flatten().nonzero()[:, 0]
    return F.pad(begins, (0, 1), value=docs.numel()).diff().tolist()


def cumulative(lengths, device):
    """[0, l1, l1 + l2, ...] of a list of lengths: int32, on the device, for which nothing waits."""
    sums = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return to_device(sums, device)


def attend_varlen(q, k, v, cu_seqlens, max_seqlen, scale, window=None):
    """Causal attention inside each document, by a kernel that takes packed documents. q (B, T, H, D), k and v
    (B, T, K, D), bf16; cu_seqlens and max_seqlen as `Shared` has them. Query i sees keys j with
    i - window < j <= i."""
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)              # of the queries and of the keys
    left = window - 1 if window else -1                                    # keys before the query's own
    if flash_attn_4() is not None:
        out = attend_flash_attn_4(*packed, cu_seqlens, max_seqlen, scale, window)
    elif flash_attn_varlen_func is not None:
        right = 0 if window else -1
        out = flash_attn_varlen_func(*packed, *bounds, softmax_scale=scale, causal=True,
                                     window_size=(left, right),
                                     deterministic=True)  # a resumed run must end the same
    else:
        out = varlen_attn(*packed, *bounds, scale=scale, window_size=(left, 0), enable_gqa=True)
    return out.view(q.shape)


def attend_documents(q, k, v, lengths, scale, window=None):
    """What `attend_varlen` computes, by torch's own attention and in any dtype. lengths: tokens of each
    document over the flattened (B T) tokens, None for one document a row. Neighbours of one length go
    together."""
    dtype = q.dtype
    if q.device.type == "cpu":                            # bf16 is up to three times slower there than fp32
        q, k, v = q.float(), k.float(), v.float()
    if lengths is None:
        return _attend_rows(q, k, v, scale, window).to(dtype)
    groups = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
    sizes = [length * count for length, count in groups]
    pieces = [x.flatten(0, 1).split(sizes) for x in (q, k, v)]             # of each, a tensor a group
    outs = []
    for i, (length, _) in enumerate(groups):
        rows = [piece[i].unflatten(0, (-1, length)) for piece in pieces]   # (documents, length, heads, D)
        outs.append(_attend_rows(*rows, scale, window).flatten(0, 1))
    return torch.cat(outs).view(q.shape).to(dtype)


DENSE_MASK_TOKENS = 4096        # a CPU's rows up to here have one mask, longer ones and a GPU's a block's
WINDOW_BLOCK = 1024             # queries that go together under a block's mask, at most a window of them


def _attend_rows(q, k, v, scale, window):
    """Causal attention inside each row: (B, T, heads, D)."""
    T = q.shape[1]
    mask = None
    if window and T > window:
        if q.is_cuda or T > DENSE_MASK_TOKENS:
            return _attend_windows(q, k, v, scale, window)
        index = torch.arange(T, device=q.device)
        distance = index[:, None] - index
        mask = (distance >= 0) & (distance < window)
    if q.is_cuda and q.dtype not in HALF:
        # the same of fp32, which flash does not take; copies, because this kernel knows causal rows itself
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _attend_windows(q, k, v, scale, window):
    """`_attend_rows` block by block of queries against the keys that they see, under one mask of a block's
    size. The query heads of a kv head go as one product: a GPU's flash kernel takes no mask, the
    memory-efficient one no enable_gqa before torch 2.14, and the rest would hold all scores at once."""
    T, H = q.shape[1:3]
    K = k.shape[2]
    block = min(window, WINDOW_BLOCK)
    index = torch.arange(window + block, device=q.device)
    distance = index[:block, None] + window - index                        # the first key is a window back
    hidden = ((distance < 0) | (distance >= window)).repeat_interleave(H // K, dim=0)
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)
    outs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = max(start - window, 0)
        columns = slice(first - start + window, stop - start + window)     # of the mask: these keys
        rows = q[:, start:stop].unflatten(2, (K, -1)).transpose(1, 2).flatten(2, 3)     # (B, K, rows, D)
        keys, values = k[:, first:stop].transpose(1, 2), v[:, first:stop].transpose(1, 2)
        out = F.scaled_dot_product_attention(rows, keys, values, mask[:rows.shape[2], columns], scale=scale)
        outs.append(out.unflatten(2, (stop - start, -1)).transpose(1, 2).flatten(2, 3))
    return torch.cat(outs, dim=1)


class Attention(nn.Module):
    """Grouped-query attention; cache.attend in its place while generating."""

    def __init__(self, arch):
        super().__init__()
        self.arch = arch
        C, H, K, D = arch.C, arch.H, arch.K, arch.D
        self.scale = arch.attn_scale or D ** -0.5
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)

    def forward(self, x, shared):
        heads = (-1, self.arch.D)
        q = self.q_proj(x).unflatten(-1, heads)           # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, heads)           # (B, T, K, D)
        v = self.v_proj(x).unflatten(-1, heads)
        if shared.cos is not None:
            q, k = rotate(q, k, shared.cos, shared.sin)
        scale, window = self.scale, self.arch.window
        if shared.cache is not None:
            out = shared.cache.attend(self, q, k, v, scale, window)
        elif shared.cu_seqlens is not None:
            out = attend_varlen(q, k, v, shared.cu_seqlens, shared.max_seqlen, scale, window)
        else:
            out = attend_documents(q, k, v, shared.lengths, scale, window)
        return self.o_proj(out.flatten(-2))


# -- norm, MLP, Mamba --------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight over groups of channels, computed in fp32. Optional gate: rms(x * silu(gate))
    (Mamba-2)."""

    def __init__(self, size, eps, groups=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.groups = groups

    def forward(self, x, gate=None):
        return rms_norm(x, self.weight, self.eps, self.groups, gate)

    def add(self, x, out, scale):
        """s = x + scale * out, and s normed: one pass over the stream instead of two."""
        return add_rms_norm(x, out, scale, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU as gate/up/down (Llama, Mistral, Granite 3) or with gate and up in one matrix (Granite 4);
    relu(x)^2 without a gate (Nemotron-H). The hub's layout is the layout in memory."""

    def __init__(self, arch):
        super().__init__()
        self.family = arch.family
        C, width = arch.C, arch.F
        if arch.family == "granitemoehybrid":
            self.input_linear = nn.Linear(C, 2 * width, bias=False)
            self.output_linear = nn.Linear(width, C, bias=False)
            return
        if arch.family != "nemotron_h":
            self.gate_proj = nn.Linear(C, width, bias=False)
        self.up_proj = nn.Linear(C, width, bias=False)
        self.down_proj = nn.Linear(width, C, bias=False)

    def forward(self, x, shared):
        if self.family == "nemotron_h":
            return self.down_proj(relu2(self.up_proj(x)))
        if self.family == "granitemoehybrid":
            return self.output_linear(swiglu(self.input_linear(x)))
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Mamba(nn.Module):
    """Mamba-2: in_proj -> (z, x B C, dt); short convolution over x B C; state-space scan; gated norm;
    out_proj. While generating, the cache convolves and scans."""

    def __init__(self, arch):
        super().__init__()
        self.sizes = sizes = arch.mamba
        channels = sizes.conv_channels
        self.in_proj = nn.Linear(arch.C, sizes.inner + channels + sizes.heads, bias=False)
        # holds the weights; see causal_conv1d
        self.conv1d = nn.Conv1d(channels, channels, sizes.conv_width, groups=channels, bias=sizes.conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(sizes.heads))
        self.A_log = nn.Parameter(torch.ones(sizes.heads))
        self.D = nn.Parameter(torch.ones(sizes.heads))
        self.norm = RMSNorm(sizes.inner, arch.eps, groups=sizes.groups)
        self.out_proj = nn.Linear(sizes.inner, arch.C, bias=False)

    def forward(self, x, shared):
        sizes, cache = self.sizes, shared.cache
        z, xbc, dt = self.in_proj(x).split([sizes.inner, sizes.conv_channels, sizes.heads], -1)
        if cache is None:
            xbc = causal_conv1d(xbc, self.conv1d.weight, self.conv1d.bias, shared.docs)
        else:
            xbc = cache.conv(self, xbc)
        group_states = sizes.groups * sizes.state
        x, B, C = xbc.split([sizes.inner, group_states, group_states], -1)
        x = x.unflatten(-1, (sizes.heads, sizes.head_dim))                  # (B, T, heads, P)
        B = B.unflatten(-1, (sizes.groups, sizes.state))                    # (B, T, G, S)
        C = C.unflatten(-1, (sizes.groups, sizes.state))
        # transformers clamps Nemotron-H's dt at time_step_min in this path only; mamba-ssm, vLLM and the
        # config's time_step_limit (0, inf) do not, and neither do we: log-probs must agree with generation
        dt = F.softplus(dt.float() + self.dt_bias.float())                  # (B, T, heads)
        if sizes.dt_limits != (0.0, math.inf):
            dt = dt.clamp(*sizes.dt_limits)
        A = -torch.exp(self.A_log.float())
        if cache is None:
            y = ssd(x, dt, A, B, C, self.D.float(), shared.docs)
        else:
            y = cache.scan(self, x, dt, A, B, C, self.D.float())
        return self.out_proj(self.norm(y.flatten(-2), gate=z))


# -- layers ------------------------------------------------------------------------------------------------

SUBLAYERS = {"a": Attention, "f": MLP, "m": Mamba}
# Selective recompute keeps these ops' outputs: matrix products, and attention by whatever computes it. By
# name, because a package registers its op when it is imported.
_SAVED = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "prism::flash_attn_4",
}


def _keep_or_recompute(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op.name() in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def _selective():
    return create_selective_checkpoint_contexts(_keep_or_recompute)


class Layer(nn.Module):
    """One hub layer: one or two residual sublayers. The unit of sharding, recomputation and compilation."""

    def __init__(self, arch, kinds):
        super().__init__()
        self.sublayers = [NAMES[arch.family][kind] for kind in kinds]
        self.scale = arch.residual_scale
        self.recompute = "off"                                             # off | full | selective
        for kind, sublayer in zip(kinds, self.sublayers, strict=True):
            setattr(self, sublayer.norm, RMSNorm(arch.C, arch.eps))
            setattr(self, sublayer.mixer, SUBLAYERS[kind](arch))

    def residuals(self, x, shared):
        """x (B, T, C) after the layer."""
        norms = [getattr(self, sublayer.norm) for sublayer in self.sublayers]
        mixers = [getattr(self, sublayer.mixer) for sublayer in self.sublayers]
        normed = norms[0](x)
        for mixer, next_norm in zip(mixers[:-1], norms[1:], strict=True):
            x, normed = next_norm.add(x, mixer(normed, shared), self.scale)
        # the last addition waits for no norm: carried into the next layer, a sharding unit and what
        # recomputation keeps would hold two tensors instead of one
        return torch.add(x, mixers[-1](normed, shared), alpha=self.scale)

    def body(self, x, shared):
        """`residuals`, or while training their recomputation."""
        if self.recompute == "off" or not torch.is_grad_enabled():
            return self.residuals(x, shared)
        options = dict(use_reentrant=False, preserve_rng_state=False)
        if self.recompute == "selective":
            options["context_fn"] = _selective
        return recomputed(self.residuals, x, shared, **options)

    def forward(self, x, shared):
        return self.body(x, shared)


def project(h, weight, scale, targets):
    """Logits (B, T, V) fp32, or with targets (B, T) the summed loss in nats over targets >= 0 (never holds
    the logits); or what targets, a function, makes of h (B T, C), the head's weight and the logits' scale."""
    if callable(targets):
        return targets(h.flatten(0, 1), weight, scale)
    if targets is not None:
        return linear_cross_entropy(h.flatten(0, 1), weight, targets.flatten(), scale)
    logits = (h @ weight.T).float()
    return logits if scale == 1.0 else logits * scale


class Head(nn.Linear):
    """An untied LM head, a sharding unit of its own."""

    def forward(self, h, scale, targets):
        return project(h, self.weight, scale, targets)


# -- the model ---------------------------------------------------------------------------------------------

class Trunk(NamedTuple):
    """A model's parts in the order of their use. A tuple, so that nn.Module does not register them twice."""
    embed: nn.Embedding
    layers: list[Layer]
    norm: RMSNorm
    head: Head | None                           # None: the embedding serves as the head


class Model(nn.Module):
    """The residual stack. Parameter names are the hub's; `trunk` holds the same modules in order of use."""

    def __init__(self, arch):
        super().__init__()
        self.arch = arch
        self.tokenizer = None
        names = NAMES[arch.family]
        embed = nn.Embedding(arch.V, arch.C)
        norm = RMSNorm(arch.C, arch.eps)
        layers = nn.ModuleList(Layer(arch, kinds) for kinds in arch.layers)
        head = None if arch.tied else Head(arch.C, arch.V, bias=False)
        self._register(names["embed"], embed)
        self._register(names["layers"], layers)
        self._register(names["norm"], norm)
        if head is not None:
            self._register("lm_head", head)
        self.trunk = Trunk(embed, list(layers), norm, head)

    def _register(self, path, module):
        """Puts a module where the hub's names have it, "model.layers" say."""
        *parents, leaf = path.split(".")
        parent = self
        for name in parents:
            if not hasattr(parent, name):
                setattr(parent, name, nn.Module())
            parent = getattr(parent, name)
        setattr(parent, leaf, module)

    def stream(self, tokens, docs=None, lengths=None, cache=None):
        """Yields the residual stream after the embedding and after each layer, then the final norm's
        output. lengths: as in `forward`. cache: of generation, with what came before these tokens; it says
        at which positions they are."""
        x = self.trunk.embed(tokens)
        if self.arch.embed_scale != 1.0:
            x = x * self.arch.embed_scale
        shared = self._share(x, docs, lengths, cache)
        yield x
        for layer in self.trunk.layers:
            x = layer(x, shared)
            yield x
        yield self.trunk.norm(x)

    def _share(self, x, docs, lengths, cache):
        """What the sublayers of this pass share: documents as the attention takes them, RoPE's rotations. x
        (B, T, C) is the embedded tokens."""
        B, T, _ = x.shape
        positions = torch.arange(T, device=x.device)[None]                 # within the document
        if docs is not None:
            positions = positions - document_starts(docs)
            if lengths is None:
                lengths = document_lengths(docs)
        cu_seqlens = max_seqlen = cos = sin = None
        if cache is None and "varlen" in attention_kernel(x.device, x.dtype):
            rows = [T] * B if lengths is None else lengths
            cu_seqlens, max_seqlen = cumulative(rows, x.device), max(rows)
        if self.arch.theta is not None:
            if cache is not None:
                positions = cache.positions
            frequencies = rope_frequencies(self.arch, x.device)
            angles = (positions[..., None] * frequencies)[:, :, None]
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return Shared(docs, lengths, cu_seqlens, max_seqlen, cos, sin, cache)

    def forward(self, tokens, docs=None, targets=None, lengths=None):
        """tokens, docs (B, T) int64; docs are document ids, each a contiguous run, None = one document a row.
        lengths: the documents' tokens, row by row, as a list; None = they are read from docs, for which the
        host waits. Returns logits (B, T, V) fp32; with targets (B, T) int64, -100 where not counted, the
        summed loss in nats; with a function, see `project`."""
        for x in self.stream(tokens, docs, lengths):
            h = x                                         # the last one is the final norm's output
        scale = self.arch.logits_scale
        if self.trunk.head is None:
            return project(h, self.trunk.embed.weight, scale, targets)
        return self.trunk.head(h, scale, targets)

    def hidden_states(self, tokens, docs=None):
        """L + 1 residual streams (B, T, C): after the embedding and each layer; then the final norm's
        output."""
        return list(self.stream(tokens, docs))


# -- which kernels run -------------------------------------------------------------------------------------

def attention_kernel(device, dtype):
    """Which attention runs on this device in this dtype."""
    if device.type == "cuda" and dtype in HALF:
        if flash_attn_4() is not None:
            return "FlashAttention-4 varlen"
        if flash_attn_varlen_func is not None:
            return "flash-attn varlen"
        if varlen_attn is not None:
            return "torch varlen (its gradients not deterministic)"
    line = "torch SDPA, document by document"
    return f"{line} (its gradients not deterministic)" if device.type == "cuda" else line


def choose_kernels(name, device, compiled=False):
    """Sets what --kernels asks for, for this process (see kernels/). InputError where it cannot be had."""
    if name not in kernels.CHOICES:
        raise InputError(f"--kernels={name!r} is not one of {', '.join(kernels.CHOICES)}")
    if name == "mamba-ssm":
        try:
            importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        except ImportError as e:
            raise InputError(f"--kernels=mamba-ssm: the package cannot be used here ({e}). README, on GPUs, "
                             f"says how to install it; --kernels=auto runs our own scan") from None
        if device.type != "cuda" or compiled:
            raise InputError("--kernels=mamba-ssm: runs on a GPU, and without --compile; --kernels=auto runs "
                             "anywhere")
    kernels.chosen = name


def kernels_in_use(device, dtype):
    """What runs on this device in this dtype: of the start-up line."""
    if kernels.on_triton(torch.empty(0, device=device)):
        ours = f"Triton {kernels.triton.__version__}"
        if kernels.INTERPRET:
            ours += " interpreted"
    else:
        ours = "torch"
        if device.type == "cuda" and kernels.triton is None:
            ours += " (no Triton here)"
    line = f"attention: {attention_kernel(device, dtype)} | kernels: {ours}"
    if kernels.chosen == "mamba-ssm":
        line += ", scan: mamba-ssm"
    return line


# -- sizes and work ----------------------------------------------------------------------------------------

def parameter_counts(arch):
    """Parameters by part, tied heads once: {"embed", "head", "attention", "MLP", "Mamba", "norms"}
    (MODELS.md, section 2). Built on the meta device, so 24B costs nothing. A Mamba layer's gated norm counts
    as Mamba."""
    with torch.device("meta"):
        model = Model(arch)
    trunk = model.trunk
    parts = {"a": "attention", "f": "MLP", "m": "Mamba"}
    counts = dict.fromkeys(("embed", "head", *parts.values(), "norms"), 0)

    def add(part, module):
        counts[part] += sum(p.numel() for p in module.parameters())

    add("embed", trunk.embed)
    if trunk.head is not None:
        add("head", trunk.head)
    for layer, kinds in zip(trunk.layers, arch.layers, strict=True):
        for kind, sublayer in zip(kinds, layer.sublayers, strict=True):
            add("norms", getattr(layer, sublayer.norm))
            add(parts[kind], getattr(layer, sublayer.mixer))
    add("norms", trunk.norm)
    return counts


@functools.cache
def total_parameters(arch):
    """Parameters in all, tied heads once."""
    return sum(parameter_counts(arch).values())


def keys_met(lengths, window=None):
    """Keys that the queries of documents of these lengths meet in all, causal and within the window."""
    lengths = np.asarray(lengths, dtype=np.float64)
    beyond = np.maximum(lengths - (window or math.inf), 0)
    return float((lengths * (lengths + 1) - beyond * (beyond + 1)).sum() / 2)


def flops_per_token(arch, T, attended=None):
    """Training FLOPs a token (forward x 3, no recomputation), every matrix product counted once.
    attended: mean number of keys a query meets, `keys_met` over the tokens, for the work really done; default
    T or the window, the undiscounted convention of nanoGPT and PaLM. The Mamba-2 scan counts its chunked
    form, undiscounted within the chunk."""
    if attended is None:
        attended = min(T, arch.window or T)
    C = arch.C
    total = 2 * C * arch.V                                                  # the head
    for kind in "".join(arch.layers):
        if kind == "a":
            total += 4 * C * arch.H * arch.D                                # q_proj, o_proj
            total += 4 * C * arch.K * arch.D                                # k_proj, v_proj
            total += 4 * attended * arch.H * arch.D                         # scores, values
        elif kind == "f":
            matrices = 2 if arch.family == "nemotron_h" else 3
            total += 2 * C * arch.F * matrices
        else:
            total += _mamba_flops(arch.mamba, C, T)
    return 3 * total


def _mamba_flops(sizes, C, T):
    """Forward FLOPs a token of one Mamba-2 sublayer."""
    inner, channels = sizes.inner, sizes.conv_channels
    chunk = min(chunk_length(sizes.head_dim, sizes.state), T)
    total = 2 * C * (inner + channels + sizes.heads)                        # in_proj
    total += 2 * inner * C                                                  # out_proj
    total += 2 * sizes.conv_width * channels                                # convolution
    total += 2 * chunk * sizes.groups * sizes.state                         # C B^T
    total += 2 * chunk * inner                                              # mix x
    total += 4 * inner * sizes.state                                        # state in and out
    return total


# -- checkpoints are vectors -------------------------------------------------------------------------------

HUB_FILES = ["model*.safetensors", "*.json", "tokenizer*", "*.jinja"]          # never consolidated.* or *.bin


class Folder:
    """A hub-format checkpoint on disk: config.json, model*.safetensors (with an index when sharded),
    tokenizer."""

    def __init__(self, path):
        self.path = path
        self.arch = read_config(_config_json(path, "--init"))
        self._opened = {}                                 # file name: its handle
        index = os.path.join(path, "model.safetensors.index.json")
        if not os.path.exists(index):
            self.files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
            return
        try:
            with open(index) as f:
                self.files = dict(json.load(f)["weight_map"])              # tensor name: file name
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"--init: {index} is damaged ({e!r}); download the checkpoint again") from None

    def _open(self, name):
        if name not in self._opened:
            file = os.path.join(self.path, name)
            try:
                self._opened[name] = safe_open(file, framework="pt")
            except FileNotFoundError:
                raise InputError(f"--init: {file} is missing; download or export the checkpoint again"
                                 ) from None
            except SafetensorError as e:
                raise InputError(f"--init: {file} is truncated or corrupted ({e}); fetch it again") from None
        return self._opened[name]

    def names(self):
        """The tensors' names, but of a buffer that old Llama files hold."""
        return {name for name in self.files if not name.endswith("rotary_emb.inv_freq")}

    def shape(self, name):
        return tuple(self._slice(name).get_shape())

    def _slice(self, name):
        try:
            return self._open(self.files[name]).get_slice(name)
        except SafetensorError as e:
            raise InputError(f"--init: {self.path}: the index names {name!r} in {self.files[name]}, "
                             f"which does not hold it ({e})") from None

    def read(self, name, start, stop):
        """Rows start..stop of a tensor, in the file's dtype; only these bytes are read."""
        rows = self._slice(name)
        if not rows.get_shape():                          # a scalar
            return torch.tensor(rows[...])
        return rows[start:stop]

    def tokenizer(self):
        return load_tokenizer(self.path, self.arch.raw)

    def digest(self):
        """A hash of what the checkpoint's files hold, whatever folder they are in."""
        digest = hashlib.sha256()
        weights = {"config.json", *self.files.values()}
        for name in sorted(os.listdir(self.path)):
            if name in weights or name.startswith(("tokenizer", "tekken")):
                with open(os.path.join(self.path, name), "rb") as f:
                    digest.update(name.encode())
                    while block := f.read(1 << 24):
                        digest.update(block)
        return digest.hexdigest()


class Random:
    """A preset with fresh weights. Each tensor has its own seed, so a rank can draw any slice of any
    tensor."""

    def __init__(self, name, seed=0):
        self.arch = named_preset(name, "--init")
        self.name = name
        self.seed = seed
        self.path = f"random:{name}:{seed}" if seed else f"random:{name}"
        self.shapes = shapes_of(self.arch)

    def names(self):
        return set(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def read(self, name, start, stop):
        """Rows start..stop of a tensor, float32. The whole tensor is drawn for them."""
        return self._draw(name)[start:stop]

    def _draw(self, name):
        shape = self.shapes[name]
        leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
        seed = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little", signed=True))
        if leaf == "A_log":
            return torch.arange(1, shape[0] + 1).float().log()              # Mamba-2's own initialisation
        if leaf == "dt_bias":                                               # softplus of it in 0.001 .. 0.1
            dt = torch.exp(torch.rand(shape, generator=rng) * math.log(100) + math.log(1e-3))
            return dt + torch.log(-torch.expm1(-dt))
        if leaf == "bias":
            return torch.zeros(shape)
        if len(shape) == 1:                                                 # norms, D
            return torch.ones(shape)
        if leaf == "conv1d":
            return (torch.rand(shape, generator=rng) * 2 - 1) * shape[-1] ** -0.5
        std = self.arch.init_std
        # GPT-2: residual outputs start small
        if leaf in ("o_proj", "down_proj", "output_linear", "out_proj"):
            std /= math.sqrt(self.arch.depth)
        return torch.empty(shape).normal_(0, std, generator=rng)

    def tokenizer(self):
        if presets.is_toy(self.name):
            return toy_tokenizer()
        raise InputError(f"--init={self.path}: a real model's tokenizer comes with its checkpoint; give "
                         f"--tokenizer=FOLDER")


def shapes_of(arch):
    """{hub name: shape} of every parameter."""
    with torch.device("meta"):
        model = Model(arch)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def open_checkpoint(name):
    """A Folder or Random by its name: a preset or a hub id (downloaded, or from the hub's cache), a folder,
    random:NAME[:SEED]."""
    if name.startswith("random:"):
        _, name, *seed = name.split(":", 2)
        if seed and not seed[0].isdecimal():
            raise InputError(f"--init=random:{name}:{seed[0]}: the seed must be a whole number")
        return Random(name, *map(int, seed))
    if presets.is_toy(name):
        return Random(name)
    known = presets.names()
    if name not in known and os.path.isdir(name):
        return Folder(name)
    if name in known or is_hub_id(name):
        return Folder(fetch(name, HUB_FILES, "--init"))
    raise InputError(f"--init: {name!r} is neither a folder nor a preset{did_you_mean(name, known)} "
                     f"(presets: {', '.join(known)})")


class Term(NamedTuple):
    """One term of a linear combination."""
    weight: float
    checkpoint: Folder | Random


class Init:
    """A parsed --init: a linear combination of checkpoints of one architecture. Opens every term and checks
    every tensor's name and shape against the architecture; reads nothing yet."""

    def __init__(self, text):
        self.text = text
        self.terms = _parse_terms(text)
        total = math.fsum(term.weight for term in self.terms)
        if abs(total - 1) > 1e-6:
            raise InputError(f"--init={text!r}: the coefficients sum to {total:g}, not 1: the weights would "
                             f"be scaled by it")
        self.arch = self.terms[0].checkpoint.arch
        shapes = shapes_of(self.arch)
        for _, checkpoint in self.terms:
            self._check(checkpoint, shapes)

    def _check(self, checkpoint, shapes):
        """InputError unless a checkpoint has the tensors of these {name: shape}."""
        if checkpoint.arch != self.arch:
            raise InputError(f"--init: {checkpoint.path} and {self.terms[0].checkpoint.path} are different "
                             f"architectures")
        names = checkpoint.names()
        if self.arch.tied and "lm_head.weight" in names:
            self._check_tied(checkpoint)
            names.discard("lm_head.weight")
        wrong = []
        for what, which in (("missing", shapes.keys() - names), ("unexpected", names - shapes.keys())):
            if which:
                first = ", ".join(sorted(which)[:4])
                dots = " ..." if len(which) > 4 else ""
                wrong.append(f"{len(which)} tensors {what}: {first}{dots}")
        if wrong:
            raise InputError(f"--init: {checkpoint.path} does not fit its config.json: {'; '.join(wrong)}")
        for name, shape in shapes.items():
            actual = checkpoint.shape(name)
            if actual != shape:
                raise InputError(f"--init: {checkpoint.path}: {name} has shape {list(actual)}, its "
                                 f"config.json says {list(shape)}")

    def _check_tied(self, checkpoint):
        """Some files repeat the tied matrix as the head: it must be the same one."""
        embed = NAMES[self.arch.family]["embed"] + ".weight"
        matrices = [checkpoint.read(name, 0, checkpoint.shape(name)[0]) for name in ("lm_head.weight", embed)]
        if not torch.equal(*matrices):
            raise InputError(f"--init: {checkpoint.path}: config.json ties the head, but lm_head.weight "
                             f"differs from {embed}")

    def tokenizer(self):
        """The first term's."""
        return self.terms[0].checkpoint.tokenizer()

    def identity(self):
        """16 hex digits that stand for these weights and their tokenizer: a hash over every byte of every
        file (48 GB take about half a minute)."""
        digest = hashlib.sha256()
        for weight, checkpoint in self.terms:
            content = checkpoint.path if isinstance(checkpoint, Random) else checkpoint.digest()
            digest.update(repr((weight, content)).encode())
        return digest.hexdigest()[:16]

    def read(self, name, start, stop):
        """Rows start..stop of the combination, summed in float32 (a single term stays in its own dtype)."""
        if len(self.terms) == 1:
            return self.terms[0].checkpoint.read(name, start, stop)
        return sum(weight * checkpoint.read(name, start, stop).float() for weight, checkpoint in self.terms)

    @torch.no_grad()
    def fill(self, model):
        """Into the parameters of a model, tensor by tensor; of a sharded one each rank reads only its own
        rows."""
        for name, p in model.named_parameters():
            start, local = 0, p
            if isinstance(p, DTensor):
                local = p.to_local()
                start = _first_row(p)
            stop = start + local.shape[0]
            if stop > start:
                local.copy_(self.read(name, start, stop))        # rounds to the parameter's dtype, once
        return model


def _parse_terms(text):
    """The terms of "0.15*A + 0.85*B"."""
    terms = []
    first, *others = re.split(r"\s+([+-])\s+", text.strip())               # signs and parts in turn
    signs, parts = ["+", *others[::2]], [first, *others[1::2]]
    for sign, part in zip(signs, parts, strict=True):
        match = re.fullmatch(r"(?:([^*\s]+)\s*\*\s*)?([^*\s]+)", part.strip())
        try:
            weight = float(match[1] or 1)
        except (TypeError, ValueError):
            raise InputError(f"--init: cannot read {part!r}; write NAME or '0.15*A + 0.85*B'") from None
        terms.append(Term(weight if sign == "+" else -weight, open_checkpoint(match[2])))
    return terms


def _first_row(p):
    """The first row of a DTensor that this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return offset[0]


def load(init, *, dtype=torch.float32, device="cpu"):
    """A Model with weights and tokenizer. init: a preset ("granite-4-h-micro"), a folder, a hub id,
    "random:toy-h" (of another seed than 0: "random:toy-h:1"), or a linear combination "0.15*A + 0.85*B",
    summed in float32 and rounded to dtype once. InputError names what does not fit."""
    init = Init(init)
    with torch.device("meta"):
        model = Model(init.arch)
    model = init.fill(model.to(dtype).to_empty(device=device))
    model.tokenizer = init.tokenizer()
    return model


# -- saving ------------------------------------------------------------------------------------------------

def save(model, folder, dtype=None, shard_bytes=4 << 30):
    """Hub format (safetensors, index, config.json, tokenizer), read by transformers and vLLM. Of a sharded
    model all ranks call it: tensors are gathered one at a time and rank 0 writes, holding one file's worth.
    dtype: of the file, default the parameters' own. The folder is replaced when the new one is complete;
    InputError when it cannot be written."""
    rank0 = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    temporary = f"{folder.rstrip('/')}.tmp-save"
    writer = ShardWriter(temporary, shard_bytes)
    try:
        if rank0:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
        reshard(model)
        for name, p in model.named_parameters():
            whole = p.detach()
            if isinstance(p, DTensor):
                whole = whole.full_tensor()               # all ranks take part
            if rank0:
                writer.add(name, whole.to(device="cpu", dtype=dtype or p.dtype).contiguous())
        if rank0:
            writer.finish()
            _save_config(model, temporary, dtype or p.dtype)
            _replace(folder, temporary)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{folder}: the model could not be written there ({e}); free space or name another "
                         f"folder") from None


class ShardWriter:
    """Writes tensors to safetensors files of at most shard_bytes each, as the hub names and indexes them."""

    def __init__(self, folder, shard_bytes):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.pending = {}                                 # tensors of the next file
        self.pending_bytes = 0
        self.total_bytes = 0
        self.shards = []                                  # the tensors' names, a list a file

    def add(self, name, tensor):
        if self.pending and self.pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor
        self.pending_bytes += tensor.nbytes

    def _flush(self):
        number = len(self.shards)
        save_file(self.pending, os.path.join(self.folder, f"{number}"), metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.total_bytes += self.pending_bytes
        self.pending = {}
        self.pending_bytes = 0

    def finish(self):
        """Writes the last file, names all as the hub does, and adds the index if they are several."""
        self._flush()
        count = len(self.shards)
        weight_map = {}
        for i, names in enumerate(self.shards):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(os.path.join(self.folder, f"{i}"), os.path.join(self.folder, file))
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            path = os.path.join(self.folder, "model.safetensors.index.json")
            write_atomic(path, json.dumps(index, indent=1))


def _save_config(model, folder, dtype):
    """config.json with the dtype of the files, and the tokenizer."""
    config = dict(model.arch.raw)
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    write_atomic(os.path.join(folder, "config.json"), json.dumps(config, indent=2))
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def _replace(folder, complete):
    """Puts a complete folder in the place of the one that may be there."""
    old = f"{folder.rstrip('/')}.tmp-old"
    shutil.rmtree(old, ignore_errors=True)                # of a process that was killed here
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(complete, folder)
    shutil.rmtree(old, ignore_errors=True)
