"""When to publish layer by layer: against what the pieces really take on a link, one after the other."""

from __future__ import annotations

import itertools

import pytest

from kvferry.policy.publication import PUBLISH_S, Carried, Link, layers_a_publish, link_of

LAYERS = 36
TOKEN_BYTES = 147_456  # an 8B-sized model's, all layers


def choose(
    num_tokens: int, bytes_a_s: float, *, tokens_a_s: float = 30_000, is_last: bool = True, **more: float
) -> int:
    return layers_a_publish(
        num_layers=LAYERS,
        layer_bytes=num_tokens * TOKEN_BYTES // LAYERS,
        num_tokens=num_tokens,
        tokens_a_s=tokens_a_s,
        link=Link(bytes_a_s, 0.0, 1 << 40),
        is_last=is_last,
        **more,
    )


def ends_after_s(layers: int, num_tokens: int, bytes_a_s: float, tokens_a_s: float = 30_000) -> float:
    """A simulation, layer by layer: a publication costs when it is made; the link carries one after the other."""
    computed_s = free_s = 0.0
    pending = 0
    for layer in range(LAYERS):
        computed_s += num_tokens / tokens_a_s / LAYERS
        pending += 1
        if pending == layers or layer == LAYERS - 1:
            computed_s += PUBLISH_S
            free_s = max(free_s, computed_s) + pending * num_tokens * TOKEN_BYTES / LAYERS / bytes_a_s
            pending = 0
    return free_s


LENGTHS = (16, 128, 1_000, 8_000, 30_000)
LINKS = (0.1e9, 1e9, 10e9, 50e9, 350e9, 1800e9)


def test_a_slower_link_never_publishes_later() -> None:
    for num_tokens in LENGTHS:
        chosen = [choose(num_tokens, speed) for speed in LINKS]
        assert chosen == sorted(chosen), num_tokens


def test_a_longer_prompt_never_publishes_later() -> None:
    for speed in LINKS:
        chosen = [choose(num_tokens, speed) for num_tokens in LENGTHS]
        assert chosen == sorted(chosen, reverse=True), speed


@pytest.mark.parametrize("speed", LINKS)
def test_a_short_prompt_is_one_publication(speed: float) -> None:
    assert choose(16, speed) == LAYERS


def test_the_fast_link_of_one_gpu_takes_chunks_and_a_network_takes_layers() -> None:
    assert choose(8_000, 1800e9) == LAYERS
    assert choose(8_000, 10e9) <= 4


def test_a_dearer_publication_is_made_less_often() -> None:
    chosen = [choose(8_000, 10e9, publish_s=cost) for cost in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]


@pytest.mark.parametrize(("num_tokens", "speed"), list(itertools.product(LENGTHS, LINKS)))
def test_the_choice_is_never_worse_than_all_at_once_and_near_the_best(num_tokens: int, speed: float) -> None:
    taken = ends_after_s(choose(num_tokens, speed), num_tokens, speed)
    times = [ends_after_s(layers, num_tokens, speed) for layers in range(1, LAYERS + 1)]
    assert taken <= times[-1] + 1e-9
    assert taken <= 1.1 * min(times) + PUBLISH_S


def test_a_chunk_that_travels_while_the_next_is_computed_is_not_cut() -> None:
    assert choose(8_000, 50e9, is_last=False) == LAYERS
    # Where the link is the slower side it should not stand idle while the chunk is computed.
    assert choose(8_000, 1e9, is_last=False) < LAYERS


def test_a_pull_too_short_to_be_cut_evenly_leaves_the_layers_that_hide_the_others_travel_for_the_end() -> None:
    # 8,000 tokens: 3.4 ms on the link, 7.4 ms a layer; 1,000: 0.42 ms, which is less than a publication costs.
    assert choose(8_000, 350e9) == LAYERS - 1
    assert choose(8_000, 350e9, tokens_a_s=120_000) == LAYERS - 2
    assert choose(1_000, 350e9) == LAYERS
    assert choose(8_000, 350e9, is_last=False) == LAYERS
    assert ends_after_s(LAYERS - 1, 8_000, 350e9) < ends_after_s(LAYERS, 8_000, 350e9) - 2e-3
    given = {"num_layers": LAYERS, "layer_bytes": 1 << 20, "num_tokens": 100, "is_last": True}
    # What a small pull takes besides its bytes hides behind the last layers too.
    assert layers_a_publish(**given, tokens_a_s=1000.0, link=Link((36 << 20) / 13e-3, 10e-3, 1 << 40)) == LAYERS - 5  # type: ignore[arg-type]


def test_where_the_link_is_the_faster_side_the_last_layers_alone_are_left_rather_than_half_of_them() -> None:
    # Two H200s, 8,000 tokens in 212 ms, as their pulls were seen: 5.6 ms on the link would be two pieces of 18 layers.
    chosen = choose(8_000, 210e9, tokens_a_s=37_700)
    assert chosen == LAYERS - 1
    assert ends_after_s(chosen, 8_000, 210e9, 37_700) < ends_after_s(18, 8_000, 210e9, 37_700) - 2e-3


def test_nothing_seen_yet_is_all_at_once() -> None:
    given = {"num_layers": 4, "layer_bytes": 1 << 30, "num_tokens": 8000, "is_last": True}
    assert layers_a_publish(**given, tokens_a_s=None, link=Link(1e9, 0, 1 << 40)) == 4  # type: ignore[arg-type]
    assert layers_a_publish(**given, tokens_a_s=1000.0, link=None) == 4  # type: ignore[arg-type]
    assert link_of([]) is None
    assert link_of([Carried(0, 1.0), Carried(5, 0.0)]) is None


def test_what_small_pulls_take_is_not_the_links_fault() -> None:
    """3 ms of messages and checks for 1 MB say nothing against a link that carried 300 MB in 33 ms."""
    small = [Carried(1_000_000, 3e-3), Carried(1_000_000, 4e-3)]
    link = link_of(small)
    assert link is not None and link.seconds_for(1_000_000) == pytest.approx(0.0)
    assert link.seconds_for(300_000_000) is None
    link = link_of([*small, Carried(300_000_000, 33e-3)])
    assert link is not None
    assert link.seconds_for(300_000_000) == pytest.approx(30e-3)
    assert link.seconds_for(1_000_000) == 0.0
