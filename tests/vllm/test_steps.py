"""The connector in vLLM's own engine steps, with a model runner and a scheduler that only do what concerns it."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from kvferry.types import HandoffTicket, InstanceRef, Outcome, TerminalState, new_handoff_id


@pytest.mark.parametrize("scheduler_is_here, num_steps", [(True, 1), (False, 2)])
@pytest.mark.filterwarnings("ignore")  # vLLM's imports warn of what it uses
def test_of_a_load_that_ends_in_an_empty_step_vllm_knows_at_its_end(scheduler_is_here: bool, num_steps: int) -> None:
    """vLLM runs a step ahead of the output that it reads, and sleeps 1 ms after each step that computes nothing."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    from kvferry.connector.vllm import KVFerryConnector
    from kvferry.connector.vllm.metadata import Pull, StepPlan
    from kvferry.connector.vllm.seams import KVFerryMetadata
    from kvferry.connector.vllm.stream import AfterForward
    from kvferry.connector.vllm.worker import WorkerHalf

    ended: list[Outcome] = []
    node = SimpleNamespace(drop_select=lambda *_: None, released=list, outcomes=lambda: [ended.pop()] if ended else [])
    half = WorkerHalf(node, rank=0, num_ranks=1, num_layers=1, after_forward=AfterForward())  # type: ignore[arg-type]
    half.scheduler_is_here = scheduler_is_here
    reported: list[Any] = []
    connector: Any = object.__new__(KVFerryConnector)
    connector._worker, connector._worker_here = half, half if scheduler_is_here else None
    connector._pool_worker, connector._trace = None, lambda *_: None
    connector._scheduler = SimpleNamespace(reported=reported.extend, sent=lambda _: None)
    plans = deque([StepPlan(is_empty_step=True)] * 5)
    known: set[str] = set()

    def execute_model(scheduler_output: Any, non_block: bool) -> Future[Any]:
        connector.bind_connector_metadata(KVFerryMetadata(plans.popleft()))
        connector.start_load_kv(None)
        output = KVConnectorOutput()
        output.finished_sending, output.finished_recving = connector.get_finished(set())
        output.kv_connector_worker_meta = connector.build_connector_worker_meta()
        future: Future[Any] = Future()
        future.set_result(ModelRunnerOutput.with_kv_conn_output_only(output))
        return future

    def update_from_output(scheduler_output: Any, output: ModelRunnerOutput) -> dict[int, Any]:
        if output.kv_connector_output:
            connector.update_connector_output(output.kv_connector_output)
            known.update(output.kv_connector_output.finished_recving or ())
        return {}

    core = MagicMock(batch_queue=deque(maxlen=2), batch_queue_size=2, is_ec_consumer=True, is_pooling_model=False)
    core.scheduler.schedule.return_value.total_num_scheduled_tokens = 0
    core.scheduler.update_from_output = update_from_output
    core.model_executor.execute_model = execute_model

    side = InstanceRef("i", 1, ("tcp://127.0.0.1:1",))
    ticket = HandoffTicket(new_handoff_id(), "target", side, side, 30.0)
    plans.appendleft(StepPlan(is_empty_step=True, pulls=[Pull("r", ticket, b"digest", 0, [5])]))
    for _ in range(3):
        EngineCore.step_with_batch_queue(core)
    assert not known
    ended.append(Outcome(ticket.handoff, TerminalState.DELIVERED))
    for _ in range(num_steps):
        assert not known
        EngineCore.step_with_batch_queue(core)
    assert known == {"r"}
    assert [report.request_id for report in reported] == ["r"]
