"""The connector's part in vLLM's steps, with vLLM's own classes and no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


class Worker:
    """A worker half on the scheduler's thread, with a load that ends when the test says so."""

    scheduler_is_here = True

    def __init__(self) -> None:
        self.delivered: set[str] = set()

    def is_loading(self) -> bool:
        return True

    def take_delivered(self) -> set[str]:
        taken, self.delivered = self.delivered, set()
        return taken

    def take_reports(self) -> list[Any]:
        return []


@pytest.mark.filterwarnings("ignore")  # vLLM's imports warn of what it uses
def test_a_load_that_ended_after_an_empty_step_is_in_the_output_that_vllm_reads_of_it() -> None:
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    from kvferry.connector.vllm import KVFerryConnector

    worker = Worker()
    told: list[Any] = []
    connector: Any = object.__new__(KVFerryConnector)
    connector._worker, connector._worker_here = worker, worker
    connector._scheduler = SimpleNamespace(reported=told.append, sent=told.append)
    output = KVConnectorOutput(kv_connector_worker_meta=connector.build_connector_worker_meta())
    kept = ModelRunnerOutput.with_kv_conn_output_only(output).kv_connector_output
    assert kept is output  # vLLM drops one that holds nothing, and would not ask
    connector.update_connector_output(output)
    assert not output.finished_recving
    worker.delivered = {"r"}
    output.finished_recving = {"failed"}
    connector.update_connector_output(output)
    assert output.finished_recving == {"failed", "r"}
