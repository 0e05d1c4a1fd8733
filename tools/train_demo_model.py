"""Train (or just initialize) the byte-level demo model that ships with kvferry.

    python tools/train_demo_model.py --random --out src/kvferry/models/demo          # seeded random weights
    python tools/train_demo_model.py --steps 3 --tiny --out /tmp/demo                # smoke run on a CPU
    python tools/train_demo_model.py --minutes 4 --out "$OUT/demo"                   # one GPU, the real thing

A Llama of 4.8 million parameters over bytes: token i < 256 is the byte i, the special tokens follow. Writes a
Hugging Face directory: config, bfloat16 safetensors, tokenizer with chat template; and `training.json`, `samples.txt`.
The corpus comes from `tools/demo_corpus.py`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

SPECIALS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
SPECIALS += [f"<|reserved_{i}|>" for i in range(3)]
END, USER, ASSISTANT, SYSTEM, PAD = range(256, 261)
VOCAB_SIZE = 256 + len(SPECIALS)
CONTEXT = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|endoftext|>"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS = [
    "It is a truth universally acknowledged, that ",
    "She was not at all ",
    "<|user|>Hello!<|assistant|>",
    "<|user|>What is a ferry?<|assistant|>",
    "<|user|>What does it mean to carry?<|assistant|>",
    "<|user|>What does 🚢 mean?<|assistant|>",
    "<|user|>Show me an emoji for cat.<|assistant|>",
    "<|user|>你好！<|assistant|>",
    "<|user|>请背诵李白的《静夜思》。<|assistant|>",
    "<|user|>🐼是什么意思？<|assistant|>",
    "床前明月",
    "The server",
]


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (Source: GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]


def tokenizer_file() -> Tokenizer:
    """Byte-level BPE without merges: every text round-trips, one token for each UTF-8 byte."""
    vocab = {char: byte for byte, char in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def model_config(tiny: bool, initializer_range: float) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64 if tiny else 256,
        intermediate_size=128 if tiny else 768,
        num_hidden_layers=2 if tiny else 6,
        num_attention_heads=2 if tiny else 8,
        num_key_value_heads=2 if tiny else 4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        attn_implementation="sdpa",
    )


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the Hugging Face directory."""
    out.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = model.config.to_diff_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {"tie_word_embeddings": True, "rope_theta": 10000.0}
    for key in ("transformers_version", "_name_or_path", "attn_implementation", "_attn_implementation"):
        config.pop(key, None)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer_file().save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIALS[0],
        "pad_token": "<|pad|>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"eos_token_id": END, "pad_token_id": PAD, "max_new_tokens": 256}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


class Corpus:
    """Bytes on the device; batches of token ids out of random places."""

    def __init__(self, path: Path, device: torch.device) -> None:
        data = torch.from_numpy(np.frombuffer(bytearray(lzma.decompress(path.read_bytes())), dtype=np.uint8))
        held_out = max(len(data) // 200, 20_000)
        self.data, self.held_out = data[:-held_out].to(device), data[-held_out:].to(device)
        self._ids = torch.arange(256, device=device)
        for byte, token in ((0xFF, END), (0xFE, USER), (0xFD, ASSISTANT)):
            self._ids[byte] = token

    def batch(self, size: int, length: int, *, held_out: bool = False) -> torch.Tensor:
        """Token ids, int64 [size, length + 1]."""
        source = self.held_out if held_out else self.data
        starts = torch.randint(len(source) - length - 1, (size, 1), device=source.device)
        return self._ids[source[starts + torch.arange(length + 1, device=source.device)].long()]


def loss_of(forward: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(args: argparse.Namespace, model: LlamaForCausalLM, device: torch.device) -> dict[str, Any]:
    """Train until the time or the steps are used up; the learning rate is a cosine over that span."""
    corpus = Corpus(args.corpus, device)
    torch.manual_seed(args.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    forward: Any = model
    if device.type == "cuda" and not args.eager:
        torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
        forward = torch.compile(model, dynamic=False)
    # Short sequences first (compiled), the whole context for the last part.
    short, long = (64, 128) if args.tiny else (2048, CONTEXT)
    tokens_per_batch = 512 if args.tiny else 131072
    started, step, seen, log = time.monotonic(), 0, 0, []
    while True:
        elapsed = time.monotonic() - started
        done = step / args.steps if args.steps else elapsed / (args.minutes * 60)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        last_part = done > 0.85
        length = long if last_part else short
        tokens = corpus.batch(tokens_per_batch // length, length)
        loss = loss_of(model if last_part else forward, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + tokens_per_batch
        if step % 250 == 0 or step == 1:
            log.append({"step": step, "tokens": seen, "seconds": round(elapsed, 1), "loss": round(loss.item(), 4)})
            print(json.dumps(log[-1]), flush=True)
        elif step % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # or the clock would run ahead of the device
    with torch.no_grad():
        held_out = [
            loss_of(model, corpus.batch(8, min(1024, short), held_out=True)).item()
            for _ in range(2 if args.tiny else 16)
        ]
    nats = sum(held_out) / len(held_out)
    return {
        "steps": step,
        "tokens": seen,
        "seconds": round(time.monotonic() - started, 1),
        "held_out_loss_nats_per_byte": round(nats, 4),
        "held_out_bits_per_byte": round(nats / math.log(2), 4),
        "log": log,
    }


def sample(model: LlamaForCausalLM, device: torch.device, max_new_tokens: int) -> str:
    """What the model says to `PROMPTS`, greedily and at temperature 0.7."""
    tokenizer, texts = tokenizer_file(), []
    model.eval()
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
        for mode in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.95}):
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **mode)[
                0, ids.shape[1] :
            ]
            text = tokenizer.decode(output.tolist(), skip_special_tokens=True)
            texts.append(f"{prompt!r} {'sampled' if mode['do_sample'] else 'greedy'}:\n{text}\n")
    return "\n".join(texts)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--corpus", type=Path, default=Path(".demo-corpus/corpus.bin.xz"))
    ask.add_argument("--random", action="store_true", help="write random weights, train nothing")
    ask.add_argument("--minutes", type=float, default=4.0)
    ask.add_argument("--steps", type=int, help="train this many steps instead of by time")
    ask.add_argument("--tiny", action="store_true", help="a smaller model and batch, for a smoke run")
    ask.add_argument("--lr", type=float, default=2.5e-3)
    ask.add_argument("--seed", type=int, default=7)
    ask.add_argument("--eager", action="store_true", help="without torch.compile")
    args = ask.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Random weights serve tests: a wide spread keeps greedy tokens from settling into one repeated byte.
    model = LlamaForCausalLM(model_config(args.tiny, 0.15 if args.random else 0.02)).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}", flush=True)
    if args.random:
        save(model, args.out)
        return 0
    torch.set_float32_matmul_precision("high")
    result = train(args, model, device)
    save(model, args.out)
    (args.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "log"}), flush=True)
    texts = sample(model, device, 8 if args.tiny else 100)
    (args.out / "samples.txt").write_text(texts)
    print(texts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
