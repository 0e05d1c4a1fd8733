"""The engine: takes requests, steps, tells their sinks. One thread; requests come in by a queue."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from kvferry.config import EngineSettings, HandoffSettings
from kvferry.connector.transformers.answer import Answer
from kvferry.connector.transformers.handoffs import HandoffPort, Handoffs
from kvferry.connector.transformers.legs import Legs
from kvferry.connector.transformers.memory import KVMemory
from kvferry.connector.transformers.model import LoadedModel
from kvferry.connector.transformers.params import RequestError
from kvferry.connector.transformers.pool import BlockPool
from kvferry.connector.transformers.pool_traffic import PoolPort, PoolTraffic
from kvferry.connector.transformers.runner import Runner, pass_shape
from kvferry.connector.transformers.scheduler import Pass, Scheduler
from kvferry.connector.transformers.sequence import Failure, GenerationRequest, Sequence, State
from kvferry.connector.transformers.snapshot import EngineSnapshot
from kvferry.hashing import block_hashes, root_hash
from kvferry.types import Outcome

IDLE_WAIT_S = 0.05
"""An idle loop looks at the handoff node at least so often, should a wake-up have come between two looks."""

log = logging.getLogger(__name__)


class _Abort(NamedTuple):
    request_id: str


class Engine:
    """Schedule, run, postprocess.

    `submit`, `abort`, `wake` and `snapshot` may be called from any thread; everything else belongs to the thread that
    calls `step`. A sequence's blocks are freed by `_let_go` alone, and only once no handoff binds them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        memory: KVMemory,
        settings: EngineSettings,
        *,
        handoff: HandoffSettings | None = None,
        port: HandoffPort | None = None,
        pool: PoolPort | None = None,
        report: Callable[[Outcome], None] = lambda outcome: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        port: the handoff node, None for an instance that takes part in no handoff.
        pool: the attachment to the KV pool, None without one.
        report: called with each outcome of the target side, on the engine's thread; must not block.
        """
        self.loaded = loaded
        self.settings = settings
        self._block_size = settings.block_size
        shape = pass_shape(settings, loaded)
        self._fingerprint = loaded.fingerprint(settings.block_size).digest()
        self._pool = BlockPool(memory.num_blocks)
        self._scheduler = Scheduler(
            self._pool,
            block_size=settings.block_size,
            chunk_tokens=shape.chunk_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            prefix_cache=settings.prefix_cache,
        )
        self._runner = Runner(loaded, memory, shape)
        self._traffic = (
            None
            if pool is None
            else PoolTraffic(pool, self._scheduler, block_size=settings.block_size, let_go=self._let_go)
        )
        self._legs = (
            None
            if port is None
            else Legs(
                Handoffs(
                    port,
                    num_layers=memory.geometry.num_layers,
                    block_size=settings.block_size,
                    root_of=self._root_of,
                ),
                self._scheduler,
                handoff or HandoffSettings(),
                fail=self._fail,
                let_go=self._let_go,
                recover=self._load_then,
                report=report,
                clock=clock,
            )
        )
        self._commands: queue.SimpleQueue[GenerationRequest | _Abort] = queue.SimpleQueue()
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._requests: dict[str, list[Sequence]] = {}
        self._siblings: dict[str, list[Sequence]] = {}
        self._answers: dict[Sequence, Answer] = {}
        self._arrived: list[Sequence] = []
        self._draining: set[Sequence] = set()
        self._checked = False
        self._step = 0
        self._totals = {"prompt": 0, "computed": 0, "reused": 0, "generated": 0}
        self.snapshot = EngineSnapshot(num_blocks=memory.num_blocks, free_blocks=memory.num_blocks)

    # From any thread

    def check(self, request: GenerationRequest) -> None:
        """Raises: RequestError: the request can never be served here."""
        request.params.check(self.loaded.vocab_size)
        limit, num_prompt = self.loaded.max_model_len, len(request.prompt)
        if num_prompt == 0:
            raise RequestError("the prompt is empty, it must have at least one token", param="prompt")
        if num_prompt + request.params.max_tokens > limit:
            raise RequestError(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{num_prompt + request.params.max_tokens} tokens ({num_prompt} in the prompt, "
                f"{request.params.max_tokens} in the completion). Please reduce the length of either.",
                param="prompt" if num_prompt >= limit else "max_tokens",
                code="context_length_exceeded",
            )
        foreign = [t for t in request.prompt if not 0 <= t < self.loaded.vocab_size]
        if foreign:
            raise RequestError(
                f"token {foreign[0]} is not in the vocabulary of {self.loaded.vocab_size} tokens", param="prompt"
            )

    def submit(self, request: GenerationRequest) -> None:
        """Queue a checked request; from now on its sink is called until a last piece for each answer or a failure."""
        self._commands.put(request)
        self.wake()

    def abort(self, request_id: str) -> None:
        """Give a request up: its sink is not called again, its blocks are freed. Unknown ids are ignored."""
        self._commands.put(_Abort(request_id))
        self.wake()

    def wake(self) -> None:
        """Make an idle loop look around now."""
        self._woken.set()

    @property
    def healthy(self) -> bool:
        """Whether the serving thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        """Warm up and serve on a thread of its own.

        Raises: CompatibilityError: the model's KV is not of the shape that its configuration says.
        """
        self._runner.warm_up()
        self._thread = threading.Thread(target=self._serve, name="kvferry-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; requests in progress end with an error. Idempotent."""
        self._stopping.set()
        self.wake()
        if self._thread is not None:
            self._thread.join()

    # The serving thread

    def _serve(self) -> None:
        try:
            while not self._stopping.is_set():
                self._woken.clear()
                if not self.step():
                    self._woken.wait(IDLE_WAIT_S)
        finally:
            stopping = self._stopping.is_set()
            if not stopping:
                log.critical("the serving loop of the engine died; its requests fail, the instance is unhealthy")
            why = (
                "the instance is stopping" if stopping else "the engine's serving loop died; its log has the traceback"
            )
            error = RequestError(why, code="unhealthy", status=503)
            for request_id in list(self._requests):
                self._fail(request_id, error)
            while not self._commands.empty():
                command = self._commands.get()
                if isinstance(command, GenerationRequest):
                    command.sink(Failure(error))

    def step(self) -> bool:
        """One round. Returns whether any pass ran; if none did, there is nothing to do but wait."""
        self._step += 1
        self._take_commands()
        if self._legs:
            self._legs.follow()
        if self._traffic:
            self._traffic.follow()
        for sequence in self._scheduler.admit():
            self._totals["reused"] += sequence.num_cached
            self._begin(sequence)
        self._expect_arrived()
        passes = self._scheduler.schedule()
        tokens, chunks = [w for w in passes if w.yields_token], [w for w in passes if not w.yields_token]
        for batch in _batched(tokens, self._runner.decode_rows):
            self._run_tokens(batch)
        for work in chunks:
            self._run_chunk(work)
        if not passes:
            self._check_when_idle()
        self._take_snapshot()
        return bool(passes)

    def _begin(self, sequence: Sequence) -> None:
        """A sequence got its blocks. What is not here comes by its handoff, or from the pool, or is computed."""
        legs = self._legs
        if legs is None:
            self._load_then(sequence, lambda: None)
        elif legs.brings(sequence):
            legs.begin(sequence)
        else:
            self._load_then(sequence, lambda: legs.begin(sequence))

    def _expect_arrived(self) -> None:
        """Tell the pool of the requests that came since the last step and must wait."""
        arrived, self._arrived = self._arrived, []
        for sequence in arrived:
            if self._traffic and sequence.state is State.WAITING and not (self._legs and self._legs.brings(sequence)):
                self._traffic.expect(sequence)

    def _load_then(self, sequence: Sequence, then: Callable[[], None]) -> None:
        if self._traffic:
            self._traffic.load(sequence, then)
        else:
            then()

    def _run_tokens(self, batch: list[Pass]) -> None:
        batch = self._still_wanted(batch)
        if not batch:
            return
        logits = self._runner.run_tokens(batch, self._on_layer(batch))
        for work, row in zip(batch, logits, strict=True):
            self._after_pass(work)
            self._admit_siblings(work.sequence)
            self._extend(work.sequence, row)

    def _run_chunk(self, work: Pass) -> None:
        if self._still_wanted([work]):
            self._runner.run_chunk(work, self._on_layer([work]))
            self._after_pass(work)

    def _still_wanted(self, works: list[Pass]) -> list[Pass]:
        """A cancelled request must not wait for the passes of all the others."""
        self._take_commands()
        self._checked = False
        return [w for w in works if w.sequence.state is State.RUNNING]

    def _on_layer(self, works: list[Pass]) -> Callable[[int], None]:
        return self._legs.publisher(works) if self._legs else lambda layer: None

    def _after_pass(self, work: Pass) -> None:
        sequence = work.sequence
        self._scheduler.advance(work)
        self._totals["computed"] += max(0, min(work.stop, sequence.num_prompt) - work.first)
        if self._legs:
            self._legs.after_pass(work)
        if self._traffic:
            self._traffic.after_pass(work)

    def _extend(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Draw the next token of an answer and tell it."""
        self._totals["generated"] += 1
        piece = self._answers[sequence].extend(logits)
        if piece.finish_reason is not None:
            self._finish(sequence)
            # Who has the last piece may ask at once whether the blocks are free.
            self._take_snapshot()
        sequence.request.sink(piece)

    def _take_commands(self) -> None:
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Abort):
                self._abort(command.request_id)
            else:
                self._accept(command)

    def _accept(self, request: GenerationRequest) -> None:
        prompt = request.prompt
        num_reusable = (len(prompt) - 1) // self._block_size * self._block_size
        hashes = block_hashes(prompt[:num_reusable], self._block_size, self._root_of(request.namespace))
        first, *rest = (Sequence(request, i, hashes) for i in range(request.params.n))
        try:
            if request.ticket is not None and self._legs is None:
                raise RequestError("this instance takes part in no handoff", param="kv_transfer_params")
            self._scheduler.add(first)
        except RequestError as error:
            request.sink(Failure(error))
            return
        self._requests[request.request_id] = [first, *rest]
        for sequence in (first, *rest):
            self._answers[sequence] = Answer(sequence, self.loaded, self.loaded.eos_token_ids)
        if rest:
            self._siblings[request.request_id] = rest
        self._totals["prompt"] += len(prompt)
        self._arrived.append(first)
        if self._legs:
            self._legs.expect(first)

    def _admit_siblings(self, first: Sequence) -> None:
        """The other answers to a prompt wait until its blocks can be found by prefix."""
        siblings = self._siblings.pop(first.request.request_id, [])
        self._scheduler.waiting.extendleft(reversed(siblings))

    def _finish(self, sequence: Sequence) -> None:
        """An answer is complete."""
        self._retire(sequence)
        if all(s.state is State.FINISHED for s in self._requests[sequence.request.request_id]):
            del self._requests[sequence.request.request_id]

    def _fail(self, request_id: str, error: RequestError) -> None:
        """End a request with an error; what it holds is freed."""
        sequences = self._requests.get(request_id)
        if sequences:
            self._abort(request_id, error.message)
            self._take_snapshot()
            sequences[0].request.sink(Failure(error))

    def _abort(self, request_id: str, reason: str = "the client gave the request up") -> None:
        for sequence in self._requests.pop(request_id, []):
            if sequence.state is not State.FINISHED:
                if self._legs:
                    self._legs.cancel(sequence, reason)
                if self._traffic:
                    self._traffic.cancel(sequence)
                self._retire(sequence)
        self._siblings.pop(request_id, None)

    def _retire(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._answers.pop(sequence, None)
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Free a finished sequence's blocks, unless a handoff or the pool still reads or writes them."""
        if any(bound is not None and bound.holds(sequence) for bound in (self._legs, self._traffic)):
            self._draining.add(sequence)
        else:
            self._draining.discard(sequence)
            self._scheduler.release(sequence)

    def _root_of(self, namespace: str) -> bytes:
        return root_hash(self._fingerprint, namespace)

    def _check_when_idle(self) -> None:
        """Once each time the engine falls idle: every block is accounted for."""
        scheduler = self._scheduler
        if self._checked or scheduler.waiting or scheduler.running or scheduler.parked or self._draining:
            return
        if self._traffic and self._traffic.num_open:
            return
        self._checked = True
        self._pool.check_integrity()
        if self._pool.num_held:
            raise RuntimeError(f"{self._pool.num_held} blocks are held though no request is left: a bug, they leaked")
        if self._legs is not None:
            self._legs.check_integrity()
        if self._traffic is not None:
            self._traffic.check_integrity()

    def _take_snapshot(self) -> None:
        pool, scheduler = self._pool, self._scheduler
        self.snapshot = EngineSnapshot(
            step=self._step,
            num_blocks=pool.num_blocks,
            free_blocks=pool.num_free,
            held_blocks=pool.num_held,
            cached_blocks=pool.num_cached,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            parked=len(scheduler.parked),
            draining=len(self._draining),
            handoffs=self._legs.num_open if self._legs else 0,
            prompt_tokens=self._totals["prompt"],
            computed_prompt_tokens=self._totals["computed"],
            reused_prompt_tokens=self._totals["reused"],
            generated_tokens=self._totals["generated"],
            pooled_prompt_tokens=self._traffic.num_loaded_blocks * self._block_size if self._traffic else 0,
            pool_transfers=self._traffic.num_open if self._traffic else 0,
        )


def _batched(works: list[Pass], size: int) -> list[list[Pass]]:
    return [works[i : i + size] for i in range(0, len(works), size)]
