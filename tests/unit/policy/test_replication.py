"""Copies of hot blocks: which, where, how many; and what is fetched ahead from disk."""

from __future__ import annotations

from kvferry.policy.replication import BlockHeat, HeatTable, admit_replicas, choose_node, deserve_replica, leave_first
from kvferry.policy.tiering import admit_prefetch

A, B, C = "tcp://a:1", "tcp://b:1", "tcp://c:1"


def block(name: str, heat: float, depth: int = 0, root: bytes = b"r", holders: tuple[str, ...] = ()) -> BlockHeat[str]:
    return BlockHeat(name, heat, depth, root, holders)


def test_heat_fades_and_what_is_cold_is_forgotten() -> None:
    table = HeatTable[str]()
    for _ in range(4):
        table.use(["hot", "warm"])
    table.use(["hot", "hot", "cold"])
    assert table.at_least(4.0) == ["hot", "warm"]
    table.fade()
    assert (table.heat("hot"), table.heat("warm"), table.heat("cold")) == (3.0, 2.0, 0.5)
    table.fade()
    table.fade()
    assert table.heat("hot") == 0.75
    table.fade()
    assert len(table) == 0


def test_hot_blocks_with_too_few_copies_deserve_one_more() -> None:
    blocks = [
        block("cold", 3.9),
        block("deep", 5, 2),
        block("root", 5, 0),
        block("hottest", 9),
        block("had", 9, 0, b"r", (A,)),
    ]
    chosen = deserve_replica(blocks, least_heat=4.0, max_copies=2, limit=10)
    assert [b.name for b in chosen] == ["hottest", "root", "deep"]
    assert [b.name for b in deserve_replica(blocks, least_heat=4.0, max_copies=3, limit=2)] == ["hottest", "had"]
    assert deserve_replica(blocks, least_heat=4.0, max_copies=1, limit=10) == []


def test_a_drained_node_hands_on_what_was_used_again_and_is_nowhere_else() -> None:
    blocks = [
        block("once", 0),
        block("tail", 3, 7),
        block("head", 3, 1),
        block("elsewhere", 9, 0, b"r", (B,)),
        block("top", 4),
    ]
    assert [b.name for b in leave_first(blocks)] == ["top", "head", "tail"]


def test_a_prompt_s_blocks_go_to_one_node_and_prompts_spread() -> None:
    prompts = [bytes([n]) * 32 for n in range(60)]
    for root in prompts:
        assert len({choose_node(block(str(n), 5, n, root), [A, B, C]) for n in range(5)}) == 1
    chosen = [choose_node(block("x", 5, 0, root), [A, B, C]) for root in prompts]
    assert {A, B, C} == set(chosen)
    # A node that leaves moves its own prompts only.
    without_c = [choose_node(block("x", 5, 0, root), [A, B]) for root in prompts]
    assert all(now == before for now, before in zip(without_c, chosen, strict=True) if before != C)
    assert choose_node(block("x", 5, 0, b"r", (A, B)), [A, B]) is None
    assert choose_node(block("x", 5, 0, b"r", (A,)), [A, B]) == B


def test_copies_fill_what_is_free_and_a_share_beyond_it() -> None:
    def admitted(wanted: int, free: int, replicas: int, coming: int = 0) -> int:
        return admit_replicas(
            wanted, num_slabs=100, num_free=free, num_replicas=replicas, num_coming=coming, max_share=0.25
        )

    assert admitted(10, free=100, replicas=0) == 10
    assert admitted(100, free=60, replicas=30) == 60
    assert admitted(100, free=0, replicas=0) == 25
    assert admitted(100, free=0, replicas=20, coming=3) == 2
    assert admitted(100, free=0, replicas=40) == 0


def test_prefetches_leave_the_disk_to_gets_and_do_not_flood_memory() -> None:
    assert admit_prefetch(wanted=10, num_slabs=100, num_loading=0, waiting_gets=0) == 10
    assert admit_prefetch(wanted=100, num_slabs=100, num_loading=5, waiting_gets=0) == 20
    assert admit_prefetch(wanted=100, num_slabs=100, num_loading=30, waiting_gets=0) == 0
    assert admit_prefetch(wanted=1, num_slabs=2, num_loading=0, waiting_gets=0) == 1
    assert admit_prefetch(wanted=10, num_slabs=100, num_loading=0, waiting_gets=1) == 0
