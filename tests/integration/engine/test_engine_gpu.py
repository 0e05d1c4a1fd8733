"""The engine with its KV on a GPU: the same bits alone, in company and over a handoff."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_engine_support import Driver, Pair, tokens_of

from kvferry.connector.transformers.model import LoadedModel, load_model
from kvferry.types import TerminalState

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def on_gpu(request: pytest.FixtureRequest, model_path: Path) -> Iterator[LoadedModel]:
    yield load_model(str(model_path), device="cuda", dtype=request.param)
    torch.cuda.empty_cache()


def test_alone_in_company_and_over_a_pair(on_gpu: LoadedModel, prompts: list[list[int]]) -> None:
    overrides: dict[str, Any] = {"prefill_chunk_tokens": 128, "decode_rows": 16}
    expected = [Driver(on_gpu, **overrides).generate([p])[0] for p in prompts]
    together = Driver(on_gpu, num_blocks=2048, **overrides)
    together.engine._runner.warm_up()
    assert together.engine._runner.decode_rows == 16, "rows of one batch must not depend on their place"
    assert together.generate([*prompts, *prompts]) == [*expected, *expected]
    pair = Pair(on_gpu, source=overrides, target=overrides)
    legs = [pair.submit(f"r{i}", prompts[i % 7], logprobs=0) for i in range(16)]
    pair.run()
    assert [tokens_of(decode) for _, decode in legs] == [expected[i % 7] for i in range(16)]
    assert {o.state for o in pair.target.reports} == {TerminalState.DELIVERED}
    assert pair.source.is_empty() and pair.target.is_empty()
