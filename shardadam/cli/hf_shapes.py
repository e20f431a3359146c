"""The shapes of a Hugging Face model's params, from the fields of its config alone.

For where transformers is not installed: of the architectures that are built like Llama or GPT-2.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, ...]]]


class UnknownArchitecture(ValueError):
    """It takes transformers to know this model's shapes."""


def shapes(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every param of the causal language model, in the order of registration.

    Raises:
        UnknownArchitecture: its ``model_type`` is none of those known here.
        KeyError: a field is missing.
    """
    kind = config.get("model_type")
    if kind in ("llama", "mistral", "qwen2"):
        return list(_llama(config, qkv_bias=kind == "qwen2"))
    if kind == "gpt2":
        return list(_gpt2(config))
    raise UnknownArchitecture(f"model_type {kind!r}")


def _llama(c: Mapping[str, Any], *, qkv_bias: bool) -> Shapes:
    width, inner, vocabulary = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    heads = c["num_attention_heads"]
    head = c.get("head_dim") or width // heads
    queries, keys = heads * head, (c.get("num_key_value_heads") or heads) * head
    every = bool(c.get("attention_bias", False))
    mlp_bias = bool(c.get("mlp_bias", False))
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        attention = (("q", queries, width), ("k", keys, width), ("v", keys, width))
        for name, outputs, inputs in (*attention, ("o", width, queries)):
            yield f"{at}.self_attn.{name}_proj.weight", (outputs, inputs)
            if every or (qkv_bias and name != "o"):
                yield f"{at}.self_attn.{name}_proj.bias", (outputs,)
        for name, outputs, inputs in (
            ("gate", inner, width),
            ("up", inner, width),
            ("down", width, inner),
        ):
            yield f"{at}.mlp.{name}_proj.weight", (outputs, inputs)
            if mlp_bias:
                yield f"{at}.mlp.{name}_proj.bias", (outputs,)
        yield f"{at}.input_layernorm.weight", (width,)
        yield f"{at}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    if not c.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, width)


def _gpt2(c: Mapping[str, Any]) -> Shapes:
    width = c["n_embd"]
    inner = c.get("n_inner") or 4 * width
    yield "transformer.wte.weight", (c["vocab_size"], width)
    yield "transformer.wpe.weight", (c["n_positions"], width)
    for layer in range(c["n_layer"]):
        at = f"transformer.h.{layer}"
        for name, inputs, outputs in (
            ("ln_1", 0, width),
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("ln_2", 0, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            yield f"{at}.{name}.weight", (inputs, outputs) if inputs else (outputs,)
            yield f"{at}.{name}.bias", (outputs,)
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)
    if not c.get("tie_word_embeddings", True):
        yield "lm_head.weight", (c["vocab_size"], width)
