"""Save tiny random-weight checkpoints whose greedy output depends on every part of the KV cache.

    python tools/make_tiny_models.py OUTDIR [NAME ...]      NAME: llama qwen3 mixtral qwen3moe gemma3 (default: all)

Every process that loads one gets the same weights. `initializer_range` is 0.2: with the usual 0.02, or with
vLLM's dummy weights, such a small model falls into a loop of two tokens and hides wrong KV. The tokenizer is
byte-level, so that any text is valid.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

GEOMETRY = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "qwen3moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 256, "decoder_sparse_step": 1},
    ),
    # Layers of two kinds: vLLM keeps a block table for each.
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "sliding_window": 256,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 64,
        },
    ),
}


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Three specials, 256 bytes, and filler tokens up to `vocab_size`; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    vocab |= {f"[w{i}]": i for i in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
    )


def save(name: str, folder: Path) -> None:
    """Write the checkpoint `name` to `folder / name`."""
    config_class, model_class, extra = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**GEOMETRY, **extra)).to(torch.bfloat16)
    model.generation_config.do_sample = False
    model.save_pretrained(folder / name)
    byte_tokenizer(GEOMETRY["vocab_size"]).save_pretrained(folder / name)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters in {folder / name}")


def main(arguments: list[str]) -> int:
    if not arguments or (unknown := set(arguments[1:]) - set(MODELS)):
        print(__doc__, file=sys.stderr)
        if arguments:
            print(f"unknown models {sorted(unknown)}; there are {sorted(MODELS)}", file=sys.stderr)
        return 2
    for name in arguments[1:] or MODELS:
        save(name, Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
