"""Tiny random checkpoints of the seven models' families, written by transformers: the oracle's side of the
parity tests.

Sizes are odd on purpose: heads that do not divide the width, GQA, several Mamba groups, a window shorter than
the text, RoPE scaling that touches every frequency band, vocabularies that are no multiple of anything.
"""

import json
import os

import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from corpus.tokenizer import toy_tokenizer

_COMMON = dict(vocab_size=131, hidden_size=36, num_hidden_layers=3, num_attention_heads=6,
               num_key_value_heads=2, intermediate_size=52, max_position_embeddings=256, bos_token_id=1,
               eos_token_id=2, pad_token_id=None, initializer_range=0.15)
_GRANITE = _COMMON | dict(embedding_multiplier=7.0, attention_multiplier=0.21, residual_multiplier=0.37,
                          logits_scaling=3.0, tie_word_embeddings=True)
_HYBRID = _GRANITE | dict(shared_intermediate_size=44, num_local_experts=0, num_experts_per_tok=0,
                          mamba_n_heads=6, mamba_d_head=12, mamba_d_state=10, mamba_n_groups=1,
                          mamba_chunk_size=8, mamba_expand=2)
ROPE = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32)

FAMILIES = {
    "granite-3.3-8b": (GraniteForCausalLM, GraniteConfig, _GRANITE),
    "granite-4-micro": (GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, _HYBRID | dict(
        layer_types=["attention"] * 3, position_embedding_type="rope")),
    "granite-4-h-micro": (GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, _HYBRID | dict(
        layer_types=["mamba", "attention", "mamba"], position_embedding_type="nope")),
    "llama-3.1-8b": (LlamaForCausalLM, LlamaConfig, _COMMON | dict(
        rope_parameters=ROPE, tie_word_embeddings=False)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, _COMMON | dict(
        rope_parameters=ROPE, tie_word_embeddings=True)),
    "mistral-7b": (MistralForCausalLM, MistralConfig, _COMMON | dict(sliding_window=9)),
    "mistral-24b": (MistralForCausalLM, MistralConfig, _COMMON | dict(sliding_window=None, head_dim=10)),
    "nemotron-h-8b": (NemotronHForCausalLM, NemotronHConfig, dict(
        vocab_size=131, hidden_size=36, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
        intermediate_size=52,
        layers_block_type=["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
        mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=10, n_groups=3, chunk_size=8, expand=2,
        initializer_range=0.15, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        pad_token_id=0)),
}


# a vocabulary that the toy tokenizer's 512 ids fit into, and some rows of padding
ROOMY = dict(vocab_size=515, bos_token_id=508, eos_token_id=508, pad_token_id=None)


def make(name, folder, shards=3, seed=0, **more):
    """Writes a checkpoint in transformers 5's spelling into `folder`, in `shards` files; returns the
    transformers model. more: of the config, ROOMY for instance."""
    cls, config, sizes = FAMILIES[name]
    torch.manual_seed(seed)
    oracle = cls(config(**sizes | more)).float().eval()
    with torch.no_grad():                  # transformers starts norms at 1, biases at 0: nothing to compare
        for key, p in oracle.named_parameters():
            if p.ndim == 1 and "norm" in key:
                p.uniform_(0.5, 1.5)
            if key.endswith(("conv1d.bias", ".D")):
                p.normal_(0, 0.5)
            if key.endswith("dt_bias"):    # transformers clamps Nemotron-H's dt at 0.001: stay above it
                p.uniform_(-3, 1)
            if key.endswith("A_log"):
                p.uniform_(-1, 1.5)
    size = sum(p.nbytes for p in oracle.parameters())
    oracle.save_pretrained(folder, max_shard_size=size // shards if shards > 1 else "5GB")
    return oracle


def write_tokenizer(folder):
    """The toy's, beside the checkpoint's own config.json."""
    config = open(os.path.join(folder, "config.json")).read()
    toy_tokenizer().save(folder)
    open(os.path.join(folder, "config.json"), "w").write(config)


def respell(folder):
    """Rewrites config.json of a folder into the hub's own (transformers 4) spelling; see MODELS.md."""
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        raw = json.load(f)
    rope = raw.pop("rope_parameters", None)
    if rope:
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    raw["torch_dtype"] = raw.pop("dtype", "float32")
    if raw["model_type"] == "granitemoehybrid":
        raw["layer_types"] = [{"linear_attention": "mamba", "full_attention": "attention"}.get(k, k)
                              for k in raw["layer_types"]]
    if raw["model_type"] == "nemotron_h":
        kinds = raw.pop("layers_block_type")
        raw["hybrid_override_pattern"] = "".join(
            {"linear_attention": "M", "full_attention": "*", "mlp": "-"}[k] for k in kinds)
        raw["num_hidden_layers"] = len(kinds)
        raw["attention_head_dim"] = raw.pop("head_dim")
        raw["time_step_limit"] = [0.0, float("inf")]  # json writes the bare Infinity, as in the hub's file
    with open(path, "w") as f:
        json.dump(raw, f)
