"""The worker half's side of the pool, against a pool that only writes down what it is told."""

from types import SimpleNamespace

import pytest

from kvferry.connector.vllm import stats
from kvferry.connector.vllm.metadata import PoolLoad, PoolSave, StepPlan
from kvferry.connector.vllm.pool_worker import PoolWorkerHalf


class Pending:
    """A value that comes when the test says so."""

    def __init__(self, ended):
        self.value, self.cancelled, self._ended = None, False, ended

    def done(self):
        return self.value is not None

    def result(self, timeout_s=None):
        assert self.done(), "nothing may wait here"
        return self.value

    def cancel(self):
        self.cancelled = True
        if not self.done():
            self.value = self._ended


class FakePool:
    def __init__(self):
        self.loads, self.saves = [], []

    def load(self, hashes, block_ids):
        self.loads.append((hashes, block_ids, Pending(loaded(0))))
        return self.loads[-1][2]

    def save(self, hashes, block_ids, *, first, length):
        self.saves.append((hashes, block_ids, first, length, Pending(saved(0, refused=len(hashes), cause="cancelled"))))
        return self.saves[-1][4]


class Later:
    """A device that has not come to the end of its forwards."""

    is_asynchronous = True

    def __init__(self):
        self.actions = []

    def do(self, action):
        self.actions.append(action)

    def complete(self):
        while self.actions:
            self.actions.pop(0)()


def loaded(num_blocks, cause=None):
    return SimpleNamespace(
        num_blocks=num_blocks, nbytes=100 * num_blocks, tiers={"host": num_blocks}, duration_s=0.5, cause=cause
    )


def saved(stored, duplicates=0, refused=0, cause=None):
    return SimpleNamespace(stored=stored, duplicates=duplicates, refused=refused, nbytes=100 * stored, cause=cause)


class Half:
    def __init__(self):
        self.pool, self.device, self.good, self.data = FakePool(), Later(), [], stats.empty()
        self.half = PoolWorkerHalf(
            self.pool,
            after_forward=self.device,
            on_loaded=self.good.append,
            count_load=lambda a, wanted: stats.count_load(self.data, a, wanted),
            count_saved=lambda a: stats.count_saved(self.data, a),
        )

    def step(self, finished=(), **plan):
        made = StepPlan(**plan)
        self.half.begin_step(made)
        self.half.start_loads(made)
        self.half.save(made)
        return self.half.finished(set(finished))


@pytest.fixture
def made():
    return Half()


LOAD = PoolLoad("r", [b"a", b"b", b"c"], [7, 8, 9])
SAVE = PoolSave("r", 1, 4, [b"b", b"c"], [8, 9])


def test_a_load_ends_the_wait_once_with_all_its_blocks(made):
    assert made.step(pool_loads=[LOAD]) == (set(), set())
    assert not made.half.is_idle()
    made.device.complete()
    assert made.pool.loads[0][:2] == ([b"a", b"b", b"c"], [7, 8, 9])
    made.pool.loads[0][2].value = loaded(3)
    assert made.step() == (set(), {"r"})
    assert (made.half.take_failed_blocks(), made.good) == (set(), [[7, 8, 9]])
    assert made.step() == (set(), set())
    assert made.half.is_idle()
    assert made.data["pool_loads"] == {"whole": 1}
    assert (made.data["pool_loaded_blocks"], made.data["pool_loaded_bytes"]) == ({"host": 3}, 300)


@pytest.mark.parametrize("num_blocks, failed", [(0, {7, 8, 9}), (2, {9})])
def test_what_did_not_come_is_an_error_not_later_than_the_end_of_the_wait(made, num_blocks, failed):
    made.step(pool_loads=[LOAD])
    made.device.complete()
    made.pool.loads[0][2].value = loaded(num_blocks, cause="peer_gone")
    assert made.step() == (set(), {"r"})
    assert made.half.take_failed_blocks() == failed
    assert made.half.take_failed_blocks() == set()
    assert made.good == ([[7, 8]] if num_blocks else []), "blocks that hold nothing are shown to nobody"
    assert made.data["pool_loads"] == {"peer_gone": 1}


def test_a_load_begins_behind_the_forwards_before_its_step_and_not_behind_its_own(made):
    plan = StepPlan(pool_loads=[LOAD])
    made.half.begin_step(plan)
    assert made.pool.loads == [], "an earlier forward may still write into these blocks"
    assert not made.half.is_idle()
    assert made.half.finished(set()) == (set(), set())
    own_forward = len(made.device.actions)
    made.half.start_loads(plan)
    assert len(made.device.actions) == own_forward, "what it waits for was marked before the step's own forward"
    made.device.complete()
    assert made.pool.loads[0][:2] == ([b"a", b"b", b"c"], [7, 8, 9])


def test_nothing_is_saved_before_the_forward_has_completed(made):
    made.step(pool_saves=[SAVE])
    assert made.pool.saves == []
    made.device.complete()
    assert made.pool.saves[0][:4] == ([b"b", b"c"], [8, 9], 1, 4)


def test_blocks_stay_until_they_are_saved_and_vllm_has_finished(made):
    assert made.step(pool_saves=[SAVE]) == (set(), set())
    assert made.step(finished=["r", "a stranger"]) == (set(), set()), "the forward has not completed"
    made.device.complete()
    assert made.step() == (set(), set())
    assert made.half.holds("r")
    made.pool.saves[0][4].value = saved(1, duplicates=1)
    assert made.step() == ({"r"}, set())
    assert made.step() == (set(), set())
    assert not made.half.holds("r") and made.half.is_idle()
    assert made.data["pool_saved_blocks"] == {"stored": 1, "duplicate": 1}


def test_saves_that_ended_first_wait_for_vllm(made):
    made.step(pool_saves=[SAVE])
    made.device.complete()
    made.pool.saves[0][4].value = saved(0, refused=2, cause="pool_exhausted")
    assert made.step() == (set(), set())
    assert made.step(finished=["r"]) == ({"r"}, set())
    assert made.data["pool_save_failures"] == {"pool_exhausted": 1}
    assert made.data["pool_saved_blocks"] == {"refused": 2}


def test_a_preemption_stops_saves_before_the_blocks_have_new_owners(made):
    made.step(pool_saves=[SAVE])
    made.device.complete()
    made.step(pool_saves=[PoolSave("r", 3, 4, [b"d"], [3])])
    plan = StepPlan(pool_drops=["r"])
    made.half.begin_step(plan)
    assert made.pool.saves[0][4].cancelled
    # The second save's forward had not completed: it must not begin any more.
    made.device.complete()
    assert len(made.pool.saves) == 1
    assert made.half.is_idle()
    assert made.step(finished=["r"]) == (set(), set()), "vLLM holds nothing for it"


def test_a_request_is_saved_again_after_its_preemption(made):
    made.step(pool_saves=[SAVE])
    made.step(pool_drops=["r"], pool_saves=[PoolSave("r", 0, 4, [b"a"], [1])])
    made.device.complete()
    assert [s[:2] for s in made.pool.saves] == [([b"a"], [1])]
    made.pool.saves[0][4].value = saved(1)
    assert made.step(finished=["r"]) == ({"r"}, set())


def test_a_drop_of_the_same_step_is_done_once(made):
    plan = StepPlan(pool_drops=["r"], pool_saves=[SAVE])
    made.half.begin_step(plan)
    made.half.start_loads(plan)
    made.half.save(plan)
    made.device.complete()
    assert len(made.pool.saves) == 1
