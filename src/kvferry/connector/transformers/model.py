"""Weights, tokenizer and identity of the model that an instance serves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash

from kvferry.connector.transformers.attention import PAGED_ATTENTION
from kvferry.connector.transformers.memory import KVGeometry
from kvferry.errors import CompatibilityError, ConfigError
from kvferry.layout import Fingerprint

DEMO_MODEL = Path(__file__).parents[2] / "models" / "demo"

_SAMPLE_BYTES = 1 << 20
_NUM_SAMPLES = 64
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

log = logging.getLogger(__name__)


class LoadedModel:
    """A causal decoder with its tokenizer, in evaluation mode on one device."""

    def __init__(
        self, name: str, model: Any, tokenizer: Any, device: torch.device, revision: str, max_model_len: int | None
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.revision = revision
        config = model.config.get_text_config(decoder=True)
        _require_plain_attention(name, config)
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.vocab_size: int = config.vocab_size
        own_limit: int = config.max_position_embeddings
        if max_model_len is not None and max_model_len > own_limit:
            raise ConfigError(f"engine.max_model_len is {max_model_len}, but {name} was made for {own_limit} tokens")
        self.max_model_len = max_model_len or own_limit
        self.max_position = own_limit - 1
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True) or getattr(config, "layer_types", None):
            window = None
        if window is not None and window < self.max_model_len:
            raise CompatibilityError(
                f"{name} attends to the last {window} tokens only, which this engine does not; set "
                f"engine.max_model_len to {window} or less"
            )
        self.mixture_of_experts = any(
            getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")
        )
        self.eos_token_ids = _eos_token_ids(model, tokenizer)

    def geometry(self, block_size: int) -> KVGeometry:
        return KVGeometry(self.num_layers, self.num_kv_heads, self.head_size, self.dtype, block_size)

    def fingerprint(self, block_size: int) -> Fingerprint:
        return Fingerprint(
            model=self.name,
            dtype=self.dtype,
            block_size=block_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            revision=self.revision,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The tokens of a conversation by the model's chat template, up to where the assistant speaks.

        Raises: ValueError (from the template) if it refuses these messages.
        """
        template = None if self.tokenizer.chat_template else _CHAT_TEMPLATE
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def load_model(
    path_or_name: str | None,
    *,
    served_name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
) -> LoadedModel:
    """Load a model from a directory, or by its Hugging Face name.

    Args:
        path_or_name: None means the demo model of this package. An existing directory is never looked up elsewhere.
        device: `auto` takes a CUDA device where there is one; `cpu`, `cuda`, `cuda:1`.
        dtype: `auto` means float32 on the CPU and the weights' own elsewhere.
    Raises:
        ConfigError: there is no such model, or a setting does not fit it.
        CompatibilityError: its architecture is not one that this engine serves.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = path_or_name or str(DEMO_MODEL)
    directory = Path(source)
    if path_or_name is None and not (directory / "config.json").is_file():
        raise ConfigError("the demo model is not in this installation: give engine.model, a path or a name")
    local = directory.is_dir()
    if not local and source.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"engine.model: there is no directory {source}; give one with config.json and *.safetensors")
    where = torch.device(_resolve_device(device))
    wanted = getattr(torch, dtype) if dtype != "auto" else ("auto" if where.type == "cuda" else torch.float32)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, local_files_only=local, dtype=wanted, attn_implementation=PAGED_ATTENTION
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {source} cannot be loaded: {error}; give a directory with config.json, *.safetensors and a "
            "tokenizer, or a name that Hugging Face knows"
        ) from error
    model.to(where).eval()
    revision = weights_revision(directory) if local else str(getattr(model.config, "_commit_hash", None) or "")
    name = served_name or ("kvferry-demo" if path_or_name is None else directory.name if local else source)
    return LoadedModel(name, model, tokenizer, where, revision, max_model_len)


def weights_revision(directory: Path) -> str:
    """An identity of the weights in a directory that does not depend on where it lies: 32 hex digits.

    Files up to 64 MiB count whole; of larger ones the size, both ends and 64 samples do.
    """
    digest = xxhash.xxh3_128()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        step = max(_SAMPLE_BYTES, (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
        with path.open("rb") as file:
            for offset in range(0, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return str(digest.hexdigest())


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"engine.device is {device}, but torch sees no CUDA device; use cpu")
    return device


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return frozenset(found)


def _require_plain_attention(name: str, config: Any) -> None:
    """Raises: CompatibilityError if some layer keeps another state than keys and values of every token."""
    foreign = {t for t in getattr(config, "layer_types", None) or () if t != "full_attention"}
    if getattr(config, "kv_lora_rank", None):
        foreign.add("latent attention")
    if getattr(config, "num_kv_shared_layers", 0):
        foreign.add("layers that share KV")
    if getattr(config, "num_hidden_layers", None) is None or getattr(config, "is_encoder_decoder", False):
        foreign.add("no plain decoder")
    if foreign:
        raise CompatibilityError(
            f"{name} ({config.model_type}) has {', '.join(sorted(foreign))}; this engine serves decoders whose every "
            "layer has full attention, such as Llama and Qwen"
        )
