import subprocess
import sys
from typing import Any

import pytest
import torch

from kvferry.connector.transformers.params import RequestError, SamplingParams
from kvferry.connector.transformers.sampling import Sampler

EOS = frozenset({9})


def draw(logits: list[float], tokens: list[int] | None = None, num_prompt: int = 0, **params: Any) -> int:
    sampler = Sampler(SamplingParams(**params), 0, EOS)
    return sampler.draw(torch.tensor(logits), tokens or [], num_prompt).token_id


def draws(num: int, logits: list[float], **params: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**params), 0, EOS)
    return [sampler.draw(torch.tensor(logits), [], 0).token_id for _ in range(num)]


LOGITS = [1.0, 3.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 2.9]


def test_greedy_takes_the_likeliest() -> None:
    assert draw(LOGITS, temperature=0) == 1


def test_a_seed_repeats_and_another_index_differs() -> None:
    assert draws(50, LOGITS, seed=7) == draws(50, LOGITS, seed=7)
    assert draws(50, LOGITS, seed=7) != draws(50, LOGITS, seed=8)
    other = Sampler(SamplingParams(seed=7), 1, EOS)
    assert draws(50, LOGITS, seed=7) != [other.draw(torch.tensor(LOGITS), [], 0).token_id for _ in range(50)]


def test_a_negative_or_large_seed_is_taken() -> None:
    assert draws(3, LOGITS, seed=-1) == draws(3, LOGITS, seed=-1)
    assert len(draws(3, LOGITS, seed=2**63)) == 3


def test_filters_leave_only_the_likeliest() -> None:
    assert set(draws(300, LOGITS, seed=1, top_k=2)) == {1, 9}
    assert set(draws(300, LOGITS, seed=1, top_p=0.01)) == {1}
    assert set(draws(300, LOGITS, seed=1, min_p=0.85)) == {1, 9}
    assert set(draws(300, [0.0, 0.0, -50.0], seed=1, top_p=0.99)) == {0, 1}


def test_frequencies_follow_the_probabilities() -> None:
    seen = draws(4000, [0.0, 1.0986], seed=3)
    assert 0.72 < sum(seen) / len(seen) < 0.78
    assert sum(draws(4000, [0.0, 1.0986], seed=3, temperature=0.25)) / 4000 > 0.97


def test_penalties_and_bias_change_the_choice() -> None:
    tokens = [5, 1, 1, 1]
    assert draw(LOGITS, tokens, 1, temperature=0, frequency_penalty=1.0) == 9
    assert draw(LOGITS, tokens, 1, temperature=0, presence_penalty=0.2) == 9
    assert draw(LOGITS, tokens, 4, temperature=0, presence_penalty=2.0) == 1, "the prompt is not penalised"
    assert draw(LOGITS, tokens, 4, temperature=0, repetition_penalty=2.0) == 9
    assert draw(LOGITS, temperature=0, logit_bias={3: 100.0}) == 3


def test_no_end_before_min_tokens() -> None:
    ends = [0.0] * 9 + [5.0]
    assert draw(ends, [1], 1, temperature=0, min_tokens=1) != 9
    assert draw(ends, [1, 2], 1, temperature=0, min_tokens=1) == 9


def test_logprobs_are_those_of_the_model() -> None:
    sampler = Sampler(SamplingParams(temperature=0, logprobs=2), 0, EOS)
    drawn = sampler.draw(torch.tensor(LOGITS), [], 0)
    expected = torch.log_softmax(torch.tensor(LOGITS), -1)
    assert drawn.logprob == pytest.approx(float(expected[1]))
    assert [t for t, _ in drawn.alternatives] == [1, 9]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ("",)}, "stop"),
        ({"logit_bias": {300: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as refused:
        SamplingParams(**params).check(300)
    assert refused.value.param == named and refused.value.status == 400


def test_the_package_and_its_command_import_no_torch() -> None:
    code = (
        "import sys, kvferry.connector.transformers, kvferry.connector.transformers.scheduler;"
        "import kvferry.connector.transformers.command;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
