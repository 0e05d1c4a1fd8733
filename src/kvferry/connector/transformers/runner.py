"""Forward passes over the paged memory, in shapes that depend on nothing but settings and a token's position."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from kvferry.config import EngineSettings
from kvferry.connector.transformers.cache import PagedCache, RowSlots
from kvferry.connector.transformers.memory import KVMemory
from kvferry.connector.transformers.model import LoadedModel
from kvferry.connector.transformers.scheduler import Pass
from kvferry.errors import CompatibilityError, ConfigError

PAD_TOKEN = 0
"""Fills a chunk's rows behind the prompt; causal attention keeps every real row from seeing it."""

CPU_CHUNK_TOKENS = 64
CUDA_CHUNK_TOKENS = 512
CPU_DECODE_ROWS = 8
CUDA_DECODE_ROWS = 32

OnLayer = Callable[[int], None]
log = logging.getLogger(__name__)


class PassShape(NamedTuple):
    """Tokens of a prompt in one pass, and sequences in a pass of single tokens; both padded."""

    chunk_tokens: int
    decode_rows: int


def pass_shape(settings: EngineSettings, loaded: LoadedModel) -> PassShape:
    """The shapes that the settings ask for, or what suits the device.

    A mixture of experts decodes one row at a time: how many rows an expert gets, and so the shape of its products,
    depends on all rows of a pass.

    Raises: ConfigError: the chunk is no multiple of the block size.
    """
    on_cuda, block_size = loaded.device.type == "cuda", settings.block_size
    chunk_tokens = settings.prefill_chunk_tokens
    if chunk_tokens is None:
        chunk_tokens = -(-(CUDA_CHUNK_TOKENS if on_cuda else CPU_CHUNK_TOKENS) // block_size) * block_size
    if chunk_tokens % block_size:
        raise ConfigError(
            f"engine.prefill_chunk_tokens is {chunk_tokens}, it must be a multiple of engine.block_size {block_size}"
        )
    decode_rows = settings.decode_rows or (CUDA_DECODE_ROWS if on_cuda else CPU_DECODE_ROWS)
    return PassShape(chunk_tokens, 1 if loaded.mixture_of_experts else decode_rows)


class Runner:
    """Runs chunks of one prompt, and single tokens of up to `decode_rows` sequences at once.

    A pass of single tokens always has `decode_rows` rows, empty ones included: matrix products of one shape give a
    row the same bits wherever it stands and whatever stands beside it. `warm_up` tries that on this machine.
    """

    def __init__(self, loaded: LoadedModel, memory: KVMemory, shape: PassShape) -> None:
        self._model = loaded.model
        self._decoder = loaded.model.base_model
        self._device = loaded.device
        self._vocab_size = loaded.vocab_size
        self._last_position = loaded.max_position
        self._memory = memory
        self._cache = PagedCache(memory)
        self._cache_argument = _cache_argument(loaded.model)
        self._chunk_tokens = shape.chunk_tokens
        self.decode_rows = shape.decode_rows

    @torch.inference_mode()
    def run_chunk(self, work: Pass, on_layer: OnLayer) -> None:
        """Compute one chunk of a prompt and write its KV.

        Args:
            on_layer: called with each layer, in order, when that layer's KV of this pass is in memory.
        """
        tokens = work.sequence.tokens[work.grid_start : work.grid_start + work.num_rows]
        tokens += [PAD_TOKEN] * (work.num_rows - len(tokens))
        with self._pass([self._slots(work)], on_layer):
            self._decoder(**self._inputs([tokens], [work.grid_start]))

    @torch.inference_mode()
    def run_tokens(self, works: Sequence[Pass], on_layer: OnLayer) -> torch.Tensor:
        """Compute one token of each sequence and write its KV.

        Args:
            works: at most `decode_rows`, each of one token.
        Returns:
            float32 [len(works), vocab_size] on the CPU: logits of the tokens after these.
        """
        tokens = [w.sequence.tokens[w.first] for w in works]
        return self._tokens_pass(tokens, [w.first for w in works], [self._slots(w) for w in works], on_layer)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run each kind of pass without writing, and see whether rows are independent of their company.

        If they are not, every pass of single tokens gets one row from here on, which is slower and always exact.

        Raises: CompatibilityError: the model's KV or its attention is not what its configuration says.
        """
        nothing = RowSlots(0, self._memory.slots([], 0, 0), self._memory.slots([], 0, 0))
        try:
            with self._pass([nothing], lambda layer: None):
                self._decoder(**self._inputs([[PAD_TOKEN] * self._chunk_tokens], [0]))
            alone = self._tokens_pass([1], [0], [nothing], lambda layer: None)[0]
            for place in range(1, self.decode_rows):
                company = [(place * 31 + i * 7) % self._vocab_size for i in range(place)]
                tokens = [*company, 1]
                logits = self._tokens_pass(tokens, [0] * len(tokens), [nothing] * len(tokens), lambda layer: None)
                if not torch.equal(logits[-1], alone):
                    log.warning("rows of one batch differ by their place on this machine: decoding one at a time")
                    self.decode_rows = 1
                    break
        except (TypeError, AttributeError) as error:
            raise CompatibilityError(
                f"{type(self._model).__name__} does not go through transformers' attention interface and cache "
                f"({error}); this engine serves Llama-like decoders only"
            ) from error

    def _tokens_pass(
        self, tokens: list[int], positions: list[int], slots: list[RowSlots], on_layer: OnLayer
    ) -> torch.Tensor:
        num_empty = self.decode_rows - len(tokens)
        inputs = self._inputs([[t] for t in tokens + [PAD_TOKEN] * num_empty], positions + [0] * num_empty)
        with self._pass([*slots, *[None] * num_empty], on_layer):
            logits = self._model(**inputs, logits_to_keep=1).logits
        real: torch.Tensor = logits[: len(tokens), -1].float().cpu()
        return real

    def _slots(self, work: Pass) -> RowSlots:
        table = work.sequence.block_table
        return RowSlots(
            num_past=work.grid_start,
            past=self._memory.slots(table, 0, work.grid_start),
            written=self._memory.slots(table, work.first, work.stop),
            write_from=work.first - work.grid_start,
        )

    def _inputs(self, tokens: list[list[int]], starts: list[int]) -> dict[str, object]:
        # Only padding can lie beyond the model's last position, and models that look positions up have no more.
        positions = [
            [min(s + i, self._last_position) for i in range(len(t))] for s, t in zip(starts, tokens, strict=True)
        ]
        return {
            "input_ids": torch.tensor(tokens, dtype=torch.int64, device=self._device),
            "position_ids": torch.tensor(positions, dtype=torch.int64, device=self._device),
            self._cache_argument: self._cache,
            "use_cache": True,
        }

    def _pass(self, slots: Sequence[RowSlots | None], on_layer: OnLayer) -> _LayerWatch:
        return _LayerWatch(self._cache, slots, on_layer, on_cuda=self._device.type == "cuda")


def _cache_argument(model: Any) -> str:
    """What this model's forward pass calls its cache: transformers 5.24 renamed it, model family by family."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _LayerWatch:
    """Around one forward pass: tells of each layer once its bytes are there, on CUDA when its kernels have ended."""

    def __init__(
        self, cache: PagedCache, slots: Sequence[RowSlots | None], on_layer: OnLayer, *, on_cuda: bool
    ) -> None:
        self._on_layer = on_layer
        self._enqueued: list[torch.cuda.Event] = []
        cache.begin(slots, self._record if on_cuda else on_layer)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            for layer, event in enumerate(self._enqueued):
                event.synchronize()
                self._on_layer(layer)

    def _record(self, layer: int) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._enqueued.append(event)
