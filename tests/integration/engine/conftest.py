"""A tiny random model, and what one instance answers with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_engine_support import Driver, Pair

from kvferry.connector.transformers.model import LoadedModel, load_model
from kvferry.connector.transformers.random_model import write_random_model

PROMPT_LENGTHS = (1, 15, 16, 17, 127, 300, 1000)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def loaded(model_path: Path) -> LoadedModel:
    return load_model(str(model_path), device="cpu")


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = random.Random(20261122)
    return [[rng.randrange(256) for _ in range(n)] for n in PROMPT_LENGTHS]


@pytest.fixture
def driver(loaded: LoadedModel) -> Callable[..., Driver]:
    return lambda **overrides: Driver(loaded, **overrides)


@pytest.fixture
def pair(loaded: LoadedModel) -> Callable[..., Pair]:
    def make(source: dict[str, Any] | None = None, target: dict[str, Any] | None = None) -> Pair:
        return Pair(loaded, source=source or {}, target=target or {})

    return make


@pytest.fixture(scope="session")
def reference(loaded: LoadedModel, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """What one instance answers to each prompt when it is alone, each on a fresh engine."""
    return [Driver(loaded).generate([p])[0] for p in prompts]
