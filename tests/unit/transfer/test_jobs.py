"""The queue of transfers: order by priority, bounds, dropping, closing. Its threads run; nothing sleeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from kvferry.errors import TransportClosed
from kvferry.transfer.jobs import Job, JobQueue
from kvferry.transport.base import StopToken

WAIT_S = 60.0


class Story:
    """What happened, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.errors: dict[str, BaseException | None] = {}
        self._finished = threading.Semaphore(0)

    def job(
        self,
        name: str,
        *,
        peer: object = "peer",
        priority: int = 0,
        nbytes: int = 1,
        steps: int = 1,
        during: Callable[[], None] = lambda: None,
    ) -> Job:
        left = iter(range(steps - 1, -1, -1))

        def step() -> bool:
            self.events.append(name)
            during()
            return bool(next(left))

        def finish(error: BaseException | None) -> None:
            self.errors[name] = error
            self._finished.release()

        return Job(peer=peer, priority=priority, nbytes=nbytes, step=step, finish=finish, stop=StopToken())

    def await_finished(self, count: int) -> None:
        for _ in range(count):
            assert self._finished.acquire(timeout=WAIT_S)


class Gate:
    """Lets a step begin, and holds it until `open`."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.open.wait(WAIT_S)


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    queue = JobQueue(threads=1, per_peer=1, max_bytes=100)
    yield queue
    queue.close()


def test_a_greater_priority_goes_first_also_between_slices(story: Story, queue: JobQueue) -> None:
    gate = Gate()
    queue.submit(story.job("write-back", steps=3, during=gate))
    assert gate.entered.wait(WAIT_S)
    queue.submit(story.job("low", priority=-1))
    queue.submit(story.job("read", priority=5))
    gate.open.set()
    story.await_finished(3)
    assert story.events == ["write-back", "read", "write-back", "write-back", "low"]


def test_one_peer_cannot_hold_every_thread(story: Story) -> None:
    queue = JobQueue(threads=2, per_peer=1, max_bytes=100)
    gate = Gate()
    queue.submit(story.job("stuck", peer="stopped", during=gate))
    assert gate.entered.wait(WAIT_S)
    queue.submit(story.job("also stuck", peer="stopped"))
    queue.submit(story.job("other"))
    story.await_finished(1)
    assert story.events == ["stuck", "other"]
    gate.open.set()
    queue.close()


def test_bytes_in_flight_are_bounded_but_one_job_always_runs(story: Story) -> None:
    queue = JobQueue(threads=3, per_peer=3, max_bytes=100)
    gate = Gate()
    queue.submit(story.job("large", nbytes=500, during=gate))
    assert gate.entered.wait(WAIT_S)
    queue.submit(story.job("small"))
    assert queue.bytes_in_flight == 500
    gate.open.set()
    story.await_finished(2)
    assert story.events == ["large", "small"]
    queue.close()
    assert queue.bytes_in_flight == 0


def test_a_dropped_job_never_runs_and_a_running_one_cannot_be_dropped(story: Story, queue: JobQueue) -> None:
    gate = Gate()
    running, waiting = story.job("running", during=gate), story.job("waiting")
    queue.submit(running)
    assert gate.entered.wait(WAIT_S)
    queue.submit(waiting)
    assert queue.drop(waiting) and not queue.drop(waiting) and not queue.drop(running)
    gate.open.set()
    story.await_finished(1)
    assert story.events == ["running"]


def test_errors_reach_the_one_who_waits(story: Story, queue: JobQueue) -> None:
    def fail() -> None:
        raise KeyError("x")

    queue.submit(story.job("bad", during=fail))
    queue.submit(story.job("good"))
    story.await_finished(2)
    assert isinstance(story.errors["bad"], KeyError) and story.errors["good"] is None


def test_closing_fails_what_waits_and_stops_what_runs(story: Story) -> None:
    queue = JobQueue(threads=1, per_peer=1, max_bytes=100)
    gate = Gate()
    running = story.job("running", steps=2, during=gate)
    queue.submit(running)
    assert gate.entered.wait(WAIT_S)
    queue.submit(story.job("waiting"))
    closing = threading.Thread(target=queue.close)
    closing.start()
    story.await_finished(1)
    assert isinstance(story.errors["waiting"], TransportClosed) and running.stop.is_set()
    gate.open.set()
    closing.join(WAIT_S)
    assert isinstance(story.errors["running"], TransportClosed)
    with pytest.raises(TransportClosed):
        queue.submit(story.job("late"))
