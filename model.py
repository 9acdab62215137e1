"""The seven base models of PRISM (arXiv 2603.17074, section 3) as one residual stack, and checkpoint
arithmetic.

Every model is a flat list of residual sublayers  x = x + m * f(norm(x))  with f one of attention (a), MLP
(f), Mamba-2 (m). A layer of Llama is "af", of Granite-4-H "mf" or "af", of Nemotron-H one of "m", "f", "a". A
family is a table of numbers (read from the hub's config.json) and a table of names: parameters carry their
hub names, so a checkpoint is loaded and saved without any renaming, and transformers and vLLM read what
`save` writes.

    model = load("granite-4-h-micro", dtype=torch.bfloat16)           # from the hub, or from its local cache
    model = load("0.15*granite-3.3-8b + 0.85*runs/mt/model")          # checkpoints are vectors
    logits = model(tokens, docs)                                      # (B, T) int64 -> (B, T, V) fp32

Notation: B batch, T tokens, C channels, H query heads, K kv heads, D head dim, F ffn, V vocab, L layers,
E Mamba inner width, S state, G groups (Mamba), P Mamba head dim.
"""

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
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels
from kernels.act import relu2, swiglu
from kernels.conv1d import causal_conv1d
from kernels.loss import linear_cross_entropy
from kernels.norm import add_rms_norm, rms_norm
from kernels.rope import rotate
from kernels.ssd import chunk_length, ssd
from runtime import InputError, did_you_mean, reshard, write_atomic
from tokenizer import load_tokenizer, toy_tokenizer

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

_LLAMA = dict(embed="model.embed_tokens", layers="model.layers", norm="model.norm",
              a=("input_layernorm", "self_attn"), f=("post_attention_layernorm", "mlp"))
NAMES = {                                       # where the hub keeps each part; (norm, mixer) inside a layer
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "granite": _LLAMA,
    "granitemoehybrid": _LLAMA | dict(m=("input_layernorm", "mamba"),
                                      f=("post_attention_layernorm", "shared_mlp")),
    "nemotron_h": dict(embed="backbone.embeddings", layers="backbone.layers", norm="backbone.norm_f",
                       a=("norm", "mixer"), f=("norm", "mixer"), m=("norm", "mixer")),
}


@dataclass(frozen=True)
class Arch:
    """What the computation needs to know, read from a hub config.json by `read_config`."""
    family: str
    layers: tuple[str, ...]              # the sublayers of each hub layer: "af", "mf", "m", ...
    C: int                               # hidden size
    V: int                               # vocabulary
    H: int                               # query heads
    K: int                               # key and value heads
    D: int                               # head dim
    F: int                               # MLP width
    eps: float
    tied: bool
    theta: float | None = None           # RoPE base, None = no positions at all (NoPE)
    rope_scaling: tuple | None = None    # Llama-3.1: (factor, low, high, original length)
    window: int | None = None            # Mistral: keys visible, self included
    embed_scale: float = 1.0             # Granite's four multipliers
    attn_scale: float | None = None      # None = 1 / sqrt(D)
    residual_scale: float = 1.0
    logits_scale: float = 1.0            # multiplies (the hub's logits_scaling divides)
    mamba: tuple | None = None           # (heads, P, S, G, conv width, conv bias, (dt low, dt high))
    init_std: float = 0.02
    raw: dict = field(default_factory=dict, compare=False, hash=False)    # the config.json itself, for saving

    @property
    def depth(self):
        return sum(len(layer) for layer in self.layers)


def read_config(raw):
    """A hub config.json (dict), in the hub's or in transformers 5's spelling, to an Arch. InputError on
    anything that this code does not compute (experts, biases, unknown RoPE types), so that no checkpoint runs
    as something else."""
    family = raw.get("model_type")
    if family not in NAMES:
        raise InputError(f"config.json: model_type {family!r} is not one of {', '.join(NAMES)}")

    def get(*keys, default=None):
        for key in keys:
            if raw.get(key) is not None:
                value = raw[key]
                return (float(value["__float__"]) if isinstance(value, dict) and "__float__" in value else
                        value)
        if default is KeyError:
            raise InputError(f"config.json of a {family} model lacks {' or '.join(keys)!r}")
        return default

    for key in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "num_local_experts"):
        if get(key):
            raise InputError(f"config.json: {key} = {raw[key]!r} is not supported (none of the seven models "
                             f"has it)")
    act = get("mlp_hidden_act" if family == "nemotron_h" else "hidden_act",
              default="relu2" if family == "nemotron_h" else "silu")
    if act != ("relu2" if family == "nemotron_h" else "silu"):
        raise InputError(f"config.json: activation {act!r} of a {family} model is not supported")

    # the sublayers of each layer
    n = get("num_hidden_layers", default=0)
    kinds = {"mamba": "m", "linear_attention": "m", "attention": "a", "full_attention": "a", "mlp": "f",
             "M": "m", "*": "a", "-": "f"}
    mixers = (get("hybrid_override_pattern", "layers_block_type", default=KeyError)
              if family == "nemotron_h" else get("layer_types", default=["attention"] * n)
              if family == "granitemoehybrid" else ["attention"] * n)
    unknown = sorted(set(mixers) - set(kinds))
    if unknown or not mixers:
        raise InputError(f"config.json: layer kinds {unknown or 'missing'}: known are {', '.join(kinds)}")
    if n and len(mixers) != n:
        raise InputError(f"config.json: num_hidden_layers = {n}, but {len(mixers)} layer kinds are listed")
    layers = tuple(kinds[m] + ("" if family == "nemotron_h" else "f") for m in mixers)

    # positions
    C, H = get("hidden_size", default=KeyError), get("num_attention_heads", default=KeyError)
    rope = get("rope_parameters", default={})
    scaling = get("rope_scaling", default=rope)
    theta = float(rope.get("rope_theta") or get("rope_theta", default=10000.0))
    if family == "nemotron_h" or (family == "granitemoehybrid" and get("position_embedding_type") != "rope"):
        theta, scaling = None, {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"config.json: rope type {kind!r} is not supported (known: default, llama3)")
    llama3 = tuple(scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor",
                                        "original_max_position_embeddings")) if kind == "llama3" else None
    mamba = None
    if "m" in "".join(layers):
        low, high = (float(z["__float__"] if isinstance(z, dict) else z)
                     for z in get("time_step_limit", default=(0.0, math.inf)))
        mamba = (get("mamba_n_heads", "mamba_num_heads", default=KeyError),
                 get("mamba_d_head", "mamba_head_dim", default=KeyError),
                 get("mamba_d_state", "ssm_state_size", default=KeyError),
                 get("mamba_n_groups", "n_groups", default=KeyError),
                 get("mamba_d_conv", "conv_kernel", default=4),
                 get("mamba_conv_bias", "use_conv_bias", default=True), (low, high))
        if mamba[1] == "auto":
            mamba = (mamba[0], get("mamba_expand", default=2) * C // mamba[0], *mamba[2:])
    granite = family.startswith("granite")
    return Arch(
        family, layers, C, get("vocab_size", default=KeyError), H, get("num_key_value_heads", default=H),
        get("head_dim", "attention_head_dim", default=128 if family == "nemotron_h" else C // H),
        get("shared_intermediate_size" if family == "granitemoehybrid" else "intermediate_size",
            default=KeyError),
        float(get("layer_norm_epsilon" if family == "nemotron_h" else "rms_norm_eps", "rms_norm_eps",
                  default=1e-6)),
        bool(get("tie_word_embeddings", default=False)), theta, llama3,
        get("sliding_window") if family == "mistral" else None,
        float(get("embedding_multiplier", default=1.0)) if granite else 1.0,
        float(get("attention_multiplier", default=1.0)) if granite else None,
        float(get("residual_multiplier", default=1.0)) if granite else 1.0,
        1.0 / float(get("logits_scaling", default=1.0)) if granite else 1.0,
        mamba, float(get("initializer_range", default=0.02)), raw)


# -- presets: the hub's config.json of each model ----------------------------------------------------------
# Read from the checkpoint's own file whenever there is one; these serve --dry_run, random: and the parameter
# counts.

def _hub(kind, arch, C, layers, H, K, F, V, ids, **more):
    bos, eos, pad = ids
    return dict(model_type=kind, architectures=[arch], hidden_size=C, num_hidden_layers=layers,
                num_attention_heads=H, num_key_value_heads=K, vocab_size=V, hidden_act="silu",
                attention_bias=False, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad,
                torch_dtype="bfloat16",
                ) | ({"shared_intermediate_size": F, "num_local_experts": 0, "num_experts_per_tok": 0,
                      "intermediate_size": F} if kind == "granitemoehybrid" else
                     {"intermediate_size": F}) | more


_GRANITE = dict(rms_norm_eps=1e-5, rope_theta=1e7, tie_word_embeddings=True, embedding_multiplier=12.0,
                residual_multiplier=0.22, max_position_embeddings=131072)
_LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
_NEMOTRON = dict(layer_norm_epsilon=1e-5, rms_norm_eps=1e-5, hidden_act="relu2", mlp_hidden_act="relu2",
                 mlp_bias=False, conv_kernel=4, use_conv_bias=True, mamba_proj_bias=False, use_bias=False,
                 tie_word_embeddings=False, time_step_limit=[0.0, math.inf], residual_in_fp32=False)
_MISTRAL = dict(rms_norm_eps=1e-5, max_position_embeddings=32768, tie_word_embeddings=False)
_PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_TOY = (508, 508, 509)                                    # the toy tokenizer's eos = bos, and pad


def _mamba(heads, p, s, g, chunk):
    return dict(mamba_n_heads=heads, mamba_d_head=p, mamba_d_state=s, mamba_n_groups=g, mamba_d_conv=4,
                mamba_expand=2, mamba_chunk_size=chunk, mamba_conv_bias=True, mamba_proj_bias=False)


def _granite4(layer_types, position, **more):
    return _GRANITE | dict(position_embedding_type=position, layer_types=layer_types) | more


PRESETS = {                                               # name: (hub id or None, config.json)
    "granite-3.3-8b": ("ibm-granite/granite-3.3-8b-base", _hub(
        "granite", "GraniteForCausalLM", 4096, 40, 32, 8, 12800, 49152, (0, 0, 0), **_GRANITE,
        attention_multiplier=0.0078125, logits_scaling=16.0)),
    "granite-4-micro": ("ibm-granite/granite-4.0-micro-base", _hub(
        "granitemoehybrid", "GraniteMoeHybridForCausalLM", 2560, 40, 40, 8, 8192, 100352,
        (100257, 100257, 100256), **_granite4(["attention"] * 40, "rope"), attention_multiplier=0.015625,
        logits_scaling=10.0)),
    "granite-4-h-micro": ("ibm-granite/granite-4.0-h-micro-base", _hub(
        "granitemoehybrid", "GraniteMoeHybridForCausalLM", 2048, 40, 32, 8, 8192, 100352,
        (100257, 100257, 100256),
        **_granite4(["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)], "nope"),
        **_mamba(64, 64, 128, 1, 256), attention_multiplier=0.015625, logits_scaling=8.0)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", _hub(
        "llama", "LlamaForCausalLM", 4096, 32, 32, 8, 14336, 128256, (128000, 128001, None),
        rms_norm_eps=1e-5, rope_theta=5e5, rope_scaling=_LLAMA3 | dict(original_max_position_embeddings=8192),
        max_position_embeddings=131072, tie_word_embeddings=False)),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", _hub(
        "mistral", "MistralForCausalLM", 4096, 32, 32, 8, 14336, 32000, (1, 2, None), **_MISTRAL,
        rope_theta=1e4, sliding_window=4096)),
    "mistral-24b": ("mistralai/Mistral-Small-24B-Base-2501", _hub(
        "mistral", "MistralForCausalLM", 5120, 40, 32, 8, 32768, 131072, (1, 2, None), **_MISTRAL,
        rope_theta=1e8, head_dim=128, sliding_window=None)),    # 5120 / 32 = 160: the file's head_dim decides
    "nemotron-h-8b": ("nvidia/Nemotron-H-8B-Base-8K", _hub(
        "nemotron_h", "NemotronHForCausalLM", 4096, 52, 32, 8, 21504, 131072, (1, 2, 0), **_NEMOTRON,
        head_dim=128, attention_head_dim=128, hybrid_override_pattern=_PATTERN, mamba_num_heads=128,
        mamba_head_dim=64, ssm_state_size=128, n_groups=8, chunk_size=128, max_position_embeddings=8192)),
    # toys, under 2M parameters: the same families, the embedded world (world.py), random weights
    "toy-llama": (None, _hub("llama", "LlamaForCausalLM", 128, 4, 4, 2, 384, 512, _TOY, rms_norm_eps=1e-5,
                             rope_theta=1e4, max_position_embeddings=4096, tie_word_embeddings=True,
                             initializer_range=0.05)),
    "toy-mistral": (None, _hub("mistral", "MistralForCausalLM", 128, 4, 4, 2, 384, 512, _TOY, **_MISTRAL,
                               rope_theta=1e4, sliding_window=128, initializer_range=0.05)),
    "toy-granite": (None, _hub("granite", "GraniteForCausalLM", 128, 4, 4, 2, 384, 512, _TOY, **_GRANITE,
                               attention_multiplier=0.03125, logits_scaling=4.0, initializer_range=0.05)),
    "toy-granite-4": (None, _hub("granitemoehybrid", "GraniteMoeHybridForCausalLM", 128, 4, 4, 2, 384, 512,
                                 _TOY, **_granite4(["attention"] * 4, "rope"), attention_multiplier=0.03125,
                                 logits_scaling=4.0, initializer_range=0.05)),
    "toy-granite-4-h": (None, _hub("granitemoehybrid", "GraniteMoeHybridForCausalLM", 128, 4, 4, 2, 384, 512,
                                   _TOY, **_granite4(["mamba", "mamba", "attention", "mamba"], "nope"),
                                   **_mamba(8, 32, 32, 1, 32), attention_multiplier=0.03125,
                                   logits_scaling=4.0, initializer_range=0.05)),
    "toy-nemotron-h": (None, _hub("nemotron_h", "NemotronHForCausalLM", 128, 8, 4, 2, 512, 512, _TOY,
                                  **_NEMOTRON, head_dim=32, attention_head_dim=32,
                                  hybrid_override_pattern="M-M-*-M-", mamba_num_heads=8, mamba_head_dim=32,
                                  ssm_state_size=32, n_groups=2, chunk_size=32,
                                  max_position_embeddings=4096)),
}
PRESETS["toy"] = PRESETS["toy-llama"]
PRESETS["toy-h"] = PRESETS["toy-granite-4-h"]


def preset(name, flag="--model"):
    """The Arch of a named preset; InputError with the nearest names otherwise."""
    if name not in PRESETS:
        raise InputError(f"{flag}: unknown model {name!r}{did_you_mean(name, PRESETS)} "
                         f"(known: {', '.join(PRESETS)})")
    return read_config(PRESETS[name][1])


# -- the sublayers -----------------------------------------------------------------------------------------

class Shared(NamedTuple):
    """What every sublayer of one forward pass shares."""
    docs: torch.Tensor | None            # (B, T) document ids, or None: one document a row
    lengths: list | None                 # SDPA: document lengths over the flattened (B T) tokens, or None
    edges: tuple | None                  # varlen kernels: where documents begin and end over (B T), int32;
                                         # tokens of the longest
    cos: torch.Tensor | None             # (1 or B, T, 1, D/2)
    sin: torch.Tensor | None
    cache: object | None = None          # generation: what earlier tokens left behind (generate.py)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over groups of channels, computed in fp32. Optional gate: rms(x * silu(gate))
    (Mamba-2)."""

    def __init__(self, size, eps, groups=1):
        super().__init__()
        self.weight, self.eps, self.groups = nn.Parameter(torch.ones(size)), eps, groups

    def forward(self, x, gate=None):
        return rms_norm(x, self.weight, self.eps, self.groups, gate)

    def add(self, x, out, scale):
        """s = x + scale * out, and s normed: one pass over the stream instead of two."""
        return add_rms_norm(x, out, scale, self.weight, self.eps)


def rope_frequencies(arch, device=None):
    """Angles per position, (D/2) fp32; Llama-3.1 divides the low frequencies by `factor` and blends
    between."""
    inv = 1.0 / arch.theta ** (torch.arange(0, arch.D, 2, dtype=torch.float32, device=device) / arch.D)
    if arch.rope_scaling is None:
        return inv
    factor, low, high, original = arch.rope_scaling
    wave = 2 * math.pi / inv
    blend = (original / wave - low) / (high - low)
    middle = (1 - blend) * inv / factor + blend * inv
    return torch.where(wave > original / low, inv / factor, torch.where(wave < original / high, inv, middle))


def attend(q, k, v, scale, window, lengths, edges=None):
    """Causal attention inside each document. q (B, T, H, D), k and v (B, T, K, D); documents as `Shared` has
    them, lengths = edges = None for one a row. Query i sees keys j with i - window < j <= i."""
    B, T, H, D = q.shape
    if edges is not None:
        left, (edges, longest) = window - 1 if window else -1, edges
        given = *(z.flatten(0, 1) for z in (q, k, v)), edges, edges, longest, longest
        if flash_attn_varlen_func is not None:            # deterministic: a resumed run must end the same
            out = flash_attn_varlen_func(*given, softmax_scale=scale, causal=True, deterministic=True,
                                         window_size=(left, 0 if window else -1))
        else:
            out = varlen_attn(*given, scale=scale, window_size=(left, 0), enable_gqa=True)
        return out.view(B, T, H, D)

    def one(q, k, v):                                     # (B, T, heads, D) of whole documents of one length
        t, mask = q.shape[1], None
        if window and t > window:
            i = torch.arange(t, device=q.device)
            mask = (i[:, None] >= i) & (i[:, None] - i < window)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale,
                                             enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    dtype = q.dtype
    if q.device.type == "cpu":                            # bf16 is up to three times slower there than fp32
        q, k, v = q.float(), k.float(), v.float()
    if lengths is None:
        return one(q, k, v).to(dtype)
    runs = [(t, len(list(same))) for t, same in itertools.groupby(lengths)]      # equal neighbours at once
    pieces = zip(*(z.flatten(0, 1).split([t * n for t, n in runs]) for z in (q, k, v)), strict=True)
    return torch.cat([one(*(z.unflatten(0, (-1, t)) for z in piece)).flatten(0, 1)
                      for piece, (t, _) in zip(pieces, runs, strict=True)]).view(B, T, H, D).to(dtype)


class Attention(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.arch, (C, H, K, D) = arch, (arch.C, arch.H, arch.K, arch.D)
        self.q_proj, self.o_proj = nn.Linear(C, H * D, bias=False), nn.Linear(H * D, C, bias=False)
        self.k_proj, self.v_proj = nn.Linear(C, K * D, bias=False), nn.Linear(C, K * D, bias=False)

    def forward(self, x, shared):
        D = self.arch.D
        q, k, v = (proj(x).unflatten(-1, (-1, D)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if shared.cos is not None:
            q, k = rotate(q, k, shared.cos, shared.sin)
        scale, window = self.arch.attn_scale or D ** -0.5, self.arch.window
        out = (attend(q, k, v, scale, window, shared.lengths, shared.edges) if shared.cache is None else
               shared.cache.attend(self, q, k, v, scale, window))
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """SwiGLU as gate/up/down (Llama, Mistral, Granite 3) or with gate and up in one matrix (Granite 4);
    relu(x)^2 without a gate (Nemotron-H). The hub's layout is the layout in memory."""

    def __init__(self, arch):
        super().__init__()
        C, F_ = arch.C, arch.F
        if arch.family == "granitemoehybrid":
            self.input_linear, self.output_linear = (nn.Linear(C, 2 * F_, bias=False),
                                                     nn.Linear(F_, C, bias=False))
        else:
            if arch.family != "nemotron_h":
                self.gate_proj = nn.Linear(C, F_, bias=False)
            self.up_proj, self.down_proj = nn.Linear(C, F_, bias=False), nn.Linear(F_, C, bias=False)
        self.family = arch.family

    def forward(self, x, shared):
        if self.family == "nemotron_h":
            return self.down_proj(relu2(self.up_proj(x)))
        if self.family == "granitemoehybrid":
            return self.output_linear(swiglu(self.input_linear(x)))
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Mamba(nn.Module):
    """Mamba-2: in_proj -> (z, x B C, dt); short convolution over x B C; state-space scan; gated norm;
    out_proj."""

    def __init__(self, arch):
        super().__init__()
        heads, P, S, G, width, bias, self.dt_limit = arch.mamba
        self.heads, self.P, self.S, self.G, self.E = heads, P, S, G, heads * P
        conv = self.E + 2 * G * S
        self.in_proj = nn.Linear(arch.C, self.E + conv + heads, bias=False)
        # holds the weights; see causal_conv1d
        self.conv1d = nn.Conv1d(conv, conv, width, groups=conv, bias=bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(heads)) for _ in range(3))
        self.norm = RMSNorm(self.E, arch.eps, groups=G)
        self.out_proj = nn.Linear(self.E, arch.C, bias=False)

    def forward(self, x, shared):
        gs = self.G * self.S
        z, xbc, dt = self.in_proj(x).split([self.E, self.E + 2 * gs, self.heads], -1)
        xbc = (causal_conv1d(xbc, self.conv1d.weight, self.conv1d.bias, shared.docs) if shared.cache is None
               else shared.cache.conv(self, xbc))
        x, B, C = xbc.split([self.E, gs, gs], -1)
        # transformers clamps Nemotron-H's dt at time_step_min in this path only; mamba-ssm, vLLM and the
        # config's time_step_limit (0, inf) do not, and neither do we: log-probs must agree with generation
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if self.dt_limit != (0.0, math.inf):
            dt = dt.clamp(*self.dt_limit)
        terms = (x.unflatten(-1, (self.heads, self.P)), dt, -torch.exp(self.A_log.float()),
                 B.unflatten(-1, (self.G, self.S)), C.unflatten(-1, (self.G, self.S)), self.D.float())
        y = ssd(*terms, shared.docs) if shared.cache is None else shared.cache.scan(self, *terms)
        return self.out_proj(self.norm(y.flatten(-2), gate=z))


SUBLAYERS = {"a": Attention, "f": MLP, "m": Mamba}
# selective recompute keeps these outputs
_SAVED = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
          torch.ops.aten._scaled_dot_product_flash_attention.default,
          torch.ops.aten._scaled_dot_product_efficient_attention.default,
          torch.ops.aten._scaled_dot_product_cudnn_attention.default,
          torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
          *([torch.ops.torch_attn._varlen_attn.default] if varlen_attn is not None else [])}


def _selective():
    return create_selective_checkpoint_contexts(
        lambda ctx, op, *args, **kw: (CheckpointPolicy.MUST_SAVE if op in _SAVED else
                                      CheckpointPolicy.PREFER_RECOMPUTE))


class Layer(nn.Module):
    """One hub layer: one or two residual sublayers. The unit of sharding, recomputation and compilation."""

    def __init__(self, arch, kinds):
        super().__init__()
        self.sublayers = [NAMES[arch.family][kind] for kind in kinds]          # (norm, mixer) names, in order
        self.scale, self.recompute = arch.residual_scale, "off"                # off | full | selective
        for kind, (norm, mixer) in zip(kinds, self.sublayers, strict=True):
            setattr(self, norm, RMSNorm(arch.C, arch.eps))
            setattr(self, mixer, SUBLAYERS[kind](arch))

    def residuals(self, x, shared):
        # the last addition waits for no norm: carried into the next layer, a sharding unit and what
        # recomputation keeps would hold two tensors instead of one
        normed = getattr(self, self.sublayers[0][0])(x)
        for i, (_, mixer) in enumerate(self.sublayers, 1):
            out = getattr(self, mixer)(normed, shared)
            if i == len(self.sublayers):
                return torch.add(x, out, alpha=self.scale)
            x, normed = getattr(self, self.sublayers[i][0]).add(x, out, self.scale)

    def body(self, x, shared):
        if self.recompute == "off" or not torch.is_grad_enabled():
            return self.residuals(x, shared)
        more = {} if self.recompute == "full" else {"context_fn": _selective}
        return checkpoint(self.residuals, x, shared, use_reentrant=False, preserve_rng_state=False, **more)

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

class Model(nn.Module):
    """The residual stack. Parameter names are the hub's; `trunk` holds the same modules in order of use."""

    def __init__(self, arch):
        super().__init__()
        self.arch, self.tokenizer, names = arch, None, NAMES[arch.family]
        embed, norm = nn.Embedding(arch.V, arch.C), RMSNorm(arch.C, arch.eps)
        layers = nn.ModuleList(Layer(arch, kinds) for kinds in arch.layers)
        head = None if arch.tied else Head(arch.C, arch.V, bias=False)
        for path, module in ((names["embed"], embed), (names["layers"], layers), (names["norm"], norm),
                             ("lm_head", head)):
            *parents, leaf = path.split(".")
            at = self
            for name in parents:
                if not hasattr(at, name):
                    setattr(at, name, nn.Module())
                at = getattr(at, name)
            if module is not None:
                setattr(at, leaf, module)
        self.trunk = (embed, list(layers), norm, head)    # a tuple, so that nothing is registered twice

    def stream(self, tokens, docs=None, cache=None):
        """Yields the residual stream after the embedding and after each layer, then the final norm's
        output. cache: of generation, with what came before these tokens; it says at which positions they
        are."""
        embed, layers, norm, _ = self.trunk
        B, T = tokens.shape
        x = embed(tokens)
        if self.arch.embed_scale != 1.0:
            x = x * self.arch.embed_scale
        lengths = edges = cos = sin = None
        varlen = cache is None and "varlen" in attention_kernel(x.device, x.dtype)
        start = torch.zeros(1, 1, dtype=torch.int64, device=tokens.device)
        index = torch.arange(T, device=tokens.device)[None]
        if docs is not None:
            first = torch.ones_like(docs, dtype=torch.bool)
            first[:, 1:] = docs[:, 1:] != docs[:, :-1]
            start = torch.where(first, index, 0).cummax(1).values
            begins = first.flatten().nonzero()[:, 0]      # waits for the device, as the lengths below do
            ends = torch.cat([begins[1:], begins.new_full((1,), B * T)])
            if not varlen:
                lengths = (ends - begins).tolist()
        if varlen:
            ends = torch.arange(1, B + 1, device=x.device) * T if docs is None else ends
            edges = F.pad(ends, (1, 0)).int(), T if docs is None else int((ends - begins).max())
        if self.arch.theta is not None:
            positions = index - start if cache is None else cache.positions
            angles = (positions[..., None] * rope_frequencies(self.arch, tokens.device))[:, :, None]
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        shared = Shared(docs, lengths, edges, cos, sin, cache)
        yield x
        for layer in layers:
            x = layer(x, shared)
            yield x
        yield norm(x)

    def forward(self, tokens, docs=None, targets=None):
        """tokens, docs (B, T) int64; docs are document ids, each a contiguous run, None = one document a row.
        Returns logits (B, T, V) fp32; with targets (B, T) int64, -100 where not counted, the summed loss in
        nats; with a function, see `project`."""
        for h in self.stream(tokens, docs):
            x = h
        embed, _, _, head = self.trunk
        scale = self.arch.logits_scale
        return project(x, embed.weight, scale, targets) if head is None else head(x, scale, targets)

    def hidden_states(self, tokens, docs=None):
        """L + 1 residual streams (B, T, C): after the embedding and each layer; then the final norm's
        output."""
        return list(self.stream(tokens, docs))


def attention_kernel(device, dtype):
    """What `attend` runs on this device in this dtype."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        if flash_attn_varlen_func is not None:
            return "flash-attn varlen"
        if varlen_attn is not None:
            return "torch varlen (its gradients not deterministic)"
    return "torch SDPA, document by document"


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
        rest = f"Triton {kernels.triton.__version__}" + (" interpreted" if kernels.INTERPRET else "")
    else:
        rest = "torch" + (" (no Triton here)" if device.type == "cuda" and kernels.triton is None else "")
    return (f"attention: {attention_kernel(device, dtype)} | kernels: {rest}"
            + (", scan: mamba-ssm" if kernels.chosen == "mamba-ssm" else ""))


# -- sizes and work ----------------------------------------------------------------------------------------

def parameter_counts(arch):
    """Parameters by part, tied heads once: {"embed", "head", "attention", "MLP", "Mamba", "norms"}
    (MODELS.md, section 2). Built on the meta device, so 24B costs nothing. A Mamba layer's gated norm counts
    as Mamba."""
    with torch.device("meta"):
        model = Model(arch)
    counts = dict.fromkeys(("embed", "head", "attention", "MLP", "Mamba", "norms"), 0)
    embed, layers, norm, head = model.trunk

    def size(module):
        return sum(p.numel() for p in module.parameters())

    counts["embed"], counts["head"], counts["norms"] = size(embed), size(head) if head else 0, size(norm)
    for layer, kinds in zip(layers, arch.layers, strict=True):
        for kind, (name, mixer) in zip(kinds, layer.sublayers, strict=True):
            counts["norms"] += size(getattr(layer, name))
            counts[{"a": "attention", "f": "MLP", "m": "Mamba"}[kind]] += size(getattr(layer, mixer))
    return counts


def keys_met(lengths, window=None):
    """Keys that the queries of documents of these lengths meet in all, causal and within the window."""
    lengths = np.asarray(lengths, dtype=np.float64)
    over = np.maximum(lengths - (window or math.inf), 0)
    return float((lengths * (lengths + 1) - over * (over + 1)).sum() / 2)


def flops_per_token(arch, T, attended=None):
    """Training FLOPs a token (forward x 3, no recomputation), every matrix product counted once.
    attended: mean number of keys a query meets, `keys_met` over the tokens, for the work really done; default
    T or the window, the undiscounted convention of nanoGPT and PaLM. The Mamba-2 scan counts its chunked
    form, undiscounted within the chunk."""
    attended = min(T, arch.window or T) if attended is None else attended
    C, total = arch.C, 2 * arch.C * arch.V                                        # the head
    for kind in "".join(arch.layers):
        if kind == "a":
            total += 4 * C * arch.H * arch.D + 4 * C * arch.K * arch.D
            total += 4 * attended * arch.H * arch.D
        elif kind == "f":
            total += 2 * C * arch.F * (2 if arch.family == "nemotron_h" else 3)
        else:
            heads, P, S, G, width, *_ = arch.mamba
            E, Q = heads * P, min(chunk_length(P, S), T)
            total += 2 * C * (2 * E + 2 * G * S + heads) + 2 * E * C         # in_proj, out_proj
            total += 2 * width * (E + 2 * G * S)                             # convolution
            total += 2 * Q * G * S + 2 * Q * heads * P + 4 * heads * P * S   # C B^T, mix x, state in and out
    return 3 * total


# -- checkpoints are vectors -------------------------------------------------------------------------------

class Folder:
    """A hub-format checkpoint on disk: config.json, model*.safetensors (with an index when sharded),
    tokenizer."""

    def __init__(self, path):
        self.path, config = path, os.path.join(path, "config.json")
        try:
            with open(config) as f:
                raw = dict(json.load(f))                 # Python's json reads the bare Infinity of Nemotron-H
        except FileNotFoundError:
            raise InputError(f"--init: {path!r} has no config.json, so it is no checkpoint in hub format"
                             ) from None
        except (ValueError, TypeError) as e:
            raise InputError(f"--init: {config} is damaged ({e}); download the checkpoint again") from None
        self.arch = read_config(raw)
        index = os.path.join(path, "model.safetensors.index.json")
        if os.path.exists(index):
            try:
                with open(index) as f:
                    self.files = dict(json.load(f)["weight_map"])
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(f"--init: {index} is damaged ({e!r}); download the checkpoint again"
                                 ) from None
        else:
            self.files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")

    def _open(self, name):
        self._handles = getattr(self, "_handles", {})
        if name not in self._handles:
            file = os.path.join(self.path, name)
            try:
                self._handles[name] = safe_open(file, framework="pt")
            except FileNotFoundError:
                raise InputError(f"--init: {file} is missing; download or export the checkpoint again"
                                 ) from None
            except SafetensorError as e:
                raise InputError(f"--init: {file} is truncated or corrupted ({e}); fetch it again") from None
        return self._handles[name]

    def names(self):
        return {n for n in self.files if not n.endswith("rotary_emb.inv_freq")}  # a buffer of old Llama files

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
        return rows[start:stop] if rows.get_shape() else torch.tensor(rows[...])

    def tokenizer(self):
        return load_tokenizer(self.path, self.arch.raw)

    def digest(self):
        """A hash of what the checkpoint's files hold, whatever folder they are in."""
        found = hashlib.sha256()
        known = {"config.json", *self.files.values()}
        for name in sorted(os.listdir(self.path)):
            if name in known or name.startswith(("tokenizer", "tekken")):
                with open(os.path.join(self.path, name), "rb") as f:
                    found.update(name.encode())
                    while block := f.read(1 << 24):
                        found.update(block)
        return found.hexdigest()


class Random:
    """A preset with fresh weights. Each tensor has its own seed, so a rank can draw any slice of any
    tensor."""

    def __init__(self, name, seed=0):
        self.arch, self.name, self.seed = preset(name, "--init"), name, seed
        self.path = f"random:{name}" + f":{seed}" * (seed != 0)
        with torch.device("meta"):
            self.shapes = {n: tuple(p.shape) for n, p in Model(self.arch).named_parameters()}

    def names(self):
        return set(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def read(self, name, start, stop):
        shape, leaf = self.shapes[name], name.removesuffix(".weight").rsplit(".", 1)[-1]
        seed = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little", signed=True))
        if leaf == "A_log":
            return torch.arange(1, shape[0] + 1).float().log()[start:stop]  # Mamba-2's own initialisation
        if leaf == "dt_bias":                                               # softplus of it in 0.001 .. 0.1
            dt = torch.exp(torch.rand(shape, generator=rng) * math.log(100) + math.log(1e-3))
            return (dt + torch.log(-torch.expm1(-dt)))[start:stop]
        if leaf == "bias":
            return torch.zeros(shape)[start:stop]
        if len(shape) == 1:                                                 # norms, D
            return torch.ones(shape)[start:stop]
        if leaf == "conv1d":
            return (torch.rand(shape, generator=rng) * 2 - 1)[start:stop] * shape[-1] ** -0.5
        std = self.arch.init_std
        # GPT-2: residual outputs start small
        if leaf in ("o_proj", "down_proj", "output_linear", "out_proj"):
            std /= math.sqrt(self.arch.depth)
        return torch.empty(shape).normal_(0, std, generator=rng)[start:stop]

    def tokenizer(self):
        if PRESETS[self.name][0] is None:
            return toy_tokenizer()
        raise InputError(f"--init={self.path}: a real model's tokenizer comes with its checkpoint; give "
                         f"--tokenizer=FOLDER")


HUB_FILES = ["model*.safetensors", "*.json", "tokenizer*", "*.jinja"]          # never consolidated.* or *.bin


def _term(name):
    """One term of --init: a preset (hub download, or its cache), random:NAME[:SEED], or a folder."""
    if name.startswith("random:"):
        _, name, *seed = name.split(":", 2)
        if seed and not seed[0].isdecimal():
            raise InputError(f"--init=random:{name}:{seed[0]}: the seed must be a whole number")
        return Random(name, *map(int, seed))
    if name in PRESETS and PRESETS[name][0] is None:
        return Random(name)
    if name in PRESETS:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
        try:
            return Folder(snapshot_download(PRESETS[name][0], allow_patterns=HUB_FILES))
        except (HfHubHTTPError, OSError) as e:
            raise InputError(f"--init={name}: cannot fetch {PRESETS[name][0]} from the hub "
                             f"({type(e).__name__}: {str(e).splitlines()[0]}). Gated models need HF_TOKEN; "
                             f"offline, give a folder: --init=PATH") from None
    if os.path.isdir(name):
        return Folder(name)
    raise InputError(f"--init: {name!r} is neither a folder nor a preset{did_you_mean(name, PRESETS)} "
                     f"(presets: {', '.join(PRESETS)})")


class Init:
    """A parsed --init: a linear combination of checkpoints of one architecture. Opens every term and checks
    every tensor's name and shape against the architecture; reads nothing yet."""

    def __init__(self, text):
        self.text, self.terms = text, []
        parts = re.split(r"\s+([+-])\s+", text.strip())
        for sign, part in zip(["+"] + parts[1::2], parts[::2], strict=True):
            match = re.fullmatch(r"(?:([^*\s]+)\s*\*\s*)?([^*\s]+)", part.strip())
            try:
                weight = float(match[1] or 1)
            except (TypeError, ValueError):
                raise InputError(f"--init: cannot read {part!r}; write NAME or '0.15*A + 0.85*B'") from None
            self.terms.append((weight if sign == "+" else -weight, _term(match[2])))
        total = math.fsum(w for w, _ in self.terms)
        if abs(total - 1) > 1e-6:
            raise InputError(f"--init={text!r}: the coefficients sum to {total:g}, not 1: the weights would "
                             f"be scaled by it")
        self.arch = self.terms[0][1].arch
        with torch.device("meta"):
            expected = {n: tuple(p.shape) for n, p in Model(self.arch).named_parameters()}
        for _, term in self.terms:
            self._check(term, expected)

    def _check(self, term, expected):
        if term.arch != self.arch:
            raise InputError(f"--init: {term.path} and {self.terms[0][1].path} are different architectures")
        names = term.names()
        # some files repeat the tied matrix: it must be the same one
        if self.arch.tied and "lm_head.weight" in names:
            embed = NAMES[self.arch.family]["embed"] + ".weight"
            if not torch.equal(*(term.read(n, 0, term.shape(n)[0]) for n in ("lm_head.weight", embed))):
                raise InputError(f"--init: {term.path}: config.json ties the head, but lm_head.weight "
                                 f"differs from {embed}")
            names.discard("lm_head.weight")
        missing, extra = sorted(expected.keys() - names), sorted(names - expected.keys())
        if missing or extra:
            def say(what, which):
                return f"{len(which)} tensors {what}: {', '.join(which[:4])}{' ...' * (len(which) > 4)}"

            raise InputError(f"--init: {term.path} does not fit its config.json: " + "; ".join(
                say(what, which) for what, which in (("missing", missing), ("unexpected", extra)) if which))
        for name, shape in expected.items():
            if term.shape(name) != shape:
                raise InputError(f"--init: {term.path}: {name} has shape {list(term.shape(name))}, its "
                                 f"config.json says {list(shape)}")

    def tokenizer(self):
        return self.terms[0][1].tokenizer()

    def identity(self):
        """16 hex digits that stand for these weights and their tokenizer: a hash over every byte of every
        file (48 GB take about half a minute)."""
        found = hashlib.sha256()
        for weight, term in self.terms:
            found.update(repr((weight, term.path if isinstance(term, Random) else term.digest())).encode())
        return found.hexdigest()[:16]

    def read(self, name, start, stop):
        """Rows start..stop of the combination, summed in float32 (a single term stays in its own dtype)."""
        if len(self.terms) == 1:
            return self.terms[0][1].read(name, start, stop)
        return sum(weight * term.read(name, start, stop).float() for weight, term in self.terms)

    @torch.no_grad()
    def fill(self, model):
        """Into the parameters of a model, tensor by tensor; of a sharded one each rank reads only its own
        rows."""
        for name, p in model.named_parameters():
            start, stop, local = 0, p.shape[0], p
            if isinstance(p, DTensor):
                local = p.to_local()
                _, (start, *_) = _local_rows(p)
                stop = start + local.shape[0]
            if stop > start:
                local.copy_(self.read(name, start, stop))        # rounds to the parameter's dtype, once
        return model


def _local_rows(p):
    """Shape and global offset of this rank's part of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)


def load(init, *, dtype=torch.float32, device="cpu"):
    """A Model with weights and tokenizer. init: a preset ("granite-4-h-micro"), a folder, "random:toy-h"
    (of another seed than 0: "random:toy-h:1"), or a linear combination "0.15*A + 0.85*B", summed in float32
    and rounded to dtype once. InputError names what does not fit."""
    init = Init(init)
    with torch.device("meta"):
        model = Model(init.arch)
    model = init.fill(model.to(dtype).to_empty(device=device))
    model.tokenizer = init.tokenizer()
    return model


def save(model, folder, dtype=None, shard_bytes=4 << 30):
    """Hub format (safetensors, index, config.json, tokenizer), read by transformers and vLLM. Of a sharded
    model all ranks call it: tensors are gathered one at a time and rank 0 writes, holding one file's worth.
    dtype: of the file, default the parameters' own. The folder is replaced when the new one is complete;
    InputError when it cannot be written."""
    rank0 = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    temporary = f"{folder.rstrip('/')}.tmp-save"
    try:
        if rank0:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
        weight_map, batch, size, files = {}, {}, 0, 0   # batch: the tensors of the next file, size: its bytes
        reshard(model)

        def flush():
            nonlocal batch, size, files
            save_file(batch, os.path.join(temporary, f"{files}"), metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(batch, files))
            batch, size, files = {}, 0, files + 1

        for name, p in model.named_parameters():
            full = p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
            if not rank0:
                continue
            full = full.to(device="cpu", dtype=dtype or p.dtype).contiguous()
            if batch and size + full.nbytes > shard_bytes:
                flush()
            batch[name], size = full, size + full.nbytes
        if rank0:
            flush()
            _finish_save(model, folder, temporary, weight_map, files, dtype or p.dtype)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{folder}: the model could not be written there ({e}); free space or name another "
                         f"folder") from None


def _finish_save(model, folder, temporary, weight_map, files, dtype):
    """Names the files as the hub does, adds index, config and tokenizer, and puts the folder in its place."""
    names = {i: "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
             for i in range(files)}
    for i, name in names.items():
        os.rename(os.path.join(temporary, f"{i}"), os.path.join(temporary, name))
    if files > 1:
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        index = {"metadata": {"total_size": size},
                 "weight_map": {name: names[i] for name, i in weight_map.items()}}
        write_atomic(os.path.join(temporary, "model.safetensors.index.json"), json.dumps(index, indent=1))
    config = dict(model.arch.raw)
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    write_atomic(os.path.join(temporary, "config.json"), json.dumps(config, indent=2))
    if model.tokenizer is not None:
        model.tokenizer.save(temporary)
    old = f"{folder.rstrip('/')}.tmp-old"
    shutil.rmtree(old, ignore_errors=True)                # of a process that was killed here
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
