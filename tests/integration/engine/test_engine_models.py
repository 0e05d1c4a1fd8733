"""Architectures: Llama-like decoders are served as plain transformers serves them, others are refused with a reason."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests_engine_support import Driver

from kvferry.connector.transformers.model import load_model, weights_revision
from kvferry.connector.transformers.random_model import write_random_model
from kvferry.errors import CompatibilityError, ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}


def write(directory: Path, tokenizer_from: Path, config: Any) -> Path:
    """A model of another architecture with the tiny model's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, directory / name)
    return directory


@pytest.mark.parametrize(
    "make_config",
    [
        lambda: transformers.Qwen2Config(**SIZES),
        lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
        lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
        lambda: transformers.Qwen3MoeConfig(
            **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
    ],
    ids=["qwen2", "qwen3", "mistral", "qwen3-moe"],
)
def test_greedy_equals_plain_transformers(
    make_config: Callable[[], Any], tmp_path: Path, model_path: Path, prompts: list[list[int]]
) -> None:
    loaded = load_model(str(write(tmp_path / "m", model_path, make_config())), device="cpu")
    driver = Driver(loaded)
    driver.engine._runner.warm_up()
    chosen = [prompts[0], prompts[3], prompts[5]]
    answers = driver.generate(chosen)
    assert answers == [Driver(loaded, decode_rows=driver.engine._runner.decode_rows).generate([p])[0] for p in chosen]
    for prompt, (tokens, _) in zip(chosen, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    assert driver.is_empty()


@pytest.mark.parametrize(
    ("make_config", "reason"),
    [
        (lambda: transformers.MistralConfig(**SIZES, sliding_window=64), "last 64 tokens only"),
        (
            lambda: transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=1),
            "sliding_attention",
        ),
        (lambda: transformers.MambaConfig(vocab_size=258, hidden_size=64, num_hidden_layers=2), "linear_attention"),
    ],
    ids=["mistral-window", "qwen2-window", "mamba"],
)
def test_other_attention_is_refused_by_name(
    make_config: Callable[[], Any], reason: str, tmp_path: Path, model_path: Path
) -> None:
    directory = write(tmp_path / "m", model_path, make_config())
    with pytest.raises(CompatibilityError, match=reason):
        load_model(str(directory), device="cpu")


def test_a_window_is_served_up_to_its_length(tmp_path: Path, model_path: Path) -> None:
    directory = write(tmp_path / "m", model_path, transformers.MistralConfig(**SIZES, sliding_window=64))
    assert load_model(str(directory), device="cpu", max_model_len=64).max_model_len == 64


def test_the_revision_names_the_weights_and_not_their_place(tmp_path: Path, model_path: Path) -> None:
    copied = Path(shutil.copytree(model_path, tmp_path / "elsewhere"))
    assert weights_revision(copied) == weights_revision(model_path)
    other = write_random_model(tmp_path / "other", seed=1)
    assert weights_revision(other) != weights_revision(model_path)
    first, second = (load_model(str(p), device="cpu", served_name="m") for p in (model_path, other))
    with pytest.raises(CompatibilityError, match="revision"):
        first.fingerprint(16).require_equal(second.fingerprint(16))


def test_settings_that_do_not_fit_the_model_are_named(model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_model_len is 5000"):
        load_model(str(model_path), device="cpu", max_model_len=5000)
    with pytest.raises(ConfigError, match=r"prefill_chunk_tokens is 40"):
        Driver(load_model(str(model_path), device="cpu"), prefill_chunk_tokens=40)


def test_the_demo_model_speaks_chat() -> None:
    loaded = load_model(None, device="cpu")
    tokens = loaded.encode_chat([{"role": "user", "content": "What is a ferry?"}])
    assert loaded.decode(tokens, skip_special_tokens=True).startswith("What is a ferry?")
    assert loaded.name == "kvferry-demo" and loaded.eos_token_ids
