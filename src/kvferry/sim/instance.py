"""What a prefill and a decode instance have in common: one protocol table, run as production runs it.

An instance feeds events to its table, carries the actions out in order, and wakes the table when its timer says so.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from kvferry.protocol.events import Action, PeerLost, Received, Send, Stalled, Tick
from kvferry.protocol.source import SourceHandoffs
from kvferry.protocol.target import TargetHandoffs
from kvferry.sim.network import Memory, Network
from kvferry.sim.world import SETTINGS, Process, World
from kvferry.types import Incarnation

if TYPE_CHECKING:
    from kvferry.sim.router import Router
    from kvferry.sim.rules import Rules

SLACK_S = 0.15
"""What the model's own small delays may add to a bound."""


class Instance(Process):
    """A process with one protocol table."""

    table: SourceHandoffs | TargetHandoffs

    def __init__(self, world: World, name: str, network: Network, rules: Rules, memory: Memory) -> None:
        self.network, self.rules, self.memory = network, rules, memory
        self.router: Router
        self.met: dict[Incarnation, None] = {}  # peers with which a channel was open, in order
        self._pending: deque[Any] = deque()
        self._feeding = False
        self._timer_s = 0.0
        super().__init__(world, name)

    def feed(self, event: Any) -> None:
        """Give the table an event, then carry out what it says, in order; what that causes comes after."""
        self._pending.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._pending:
                event = self._pending.popleft()
                actions = self.table.handle(event, self.local_s())
                if self.world.trace is not None:
                    self._log(event, actions)
                for action in self.rules.transform(actions):
                    self.act(action, event)
                self.check()
        finally:
            self._feeding = False
        self._set_timer()

    def act(self, action: Action, event: Any) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """The invariants that one instance can tell by itself."""
        self.memory.check()
        self.table.check_integrity()

    def tick(self) -> None:
        self._timer_s = 0.0
        self.feed(Tick())

    def _set_timer(self) -> None:
        at_s = self.table.next_timer_s()
        if at_s is None:
            return
        now_s = self.local_s()
        if self._timer_s and now_s <= self._timer_s <= at_s:
            return  # a wake-up is on its way, and will look again
        self._timer_s = max(at_s, now_s)
        self.post(max(0.0, at_s - now_s) + 1e-6, self._wake, self._timer_s)

    def _wake(self, timer_s: float) -> None:
        if timer_s == self._timer_s:
            self.tick()

    def resumed(self, lag_s: float) -> None:
        if lag_s > SETTINGS.lease_ttl_s / 2:
            self.feed(Stalled(lag_s))

    def send(self, peer: Incarnation, message: Any) -> None:
        target = self.world.processes.get(peer)
        if target is not None:
            assert isinstance(target, Instance)
            self.network.send(self, target, target.receive, self.incarnation, message)

    def receive(self, peer: Incarnation, message: Any) -> None:
        self.feed(Received(peer, message))

    def crash(self) -> None:
        """Die; peers hear of it soon, or only by silence."""
        gone, met = self.incarnation, list(self.met)
        super().crash()
        self.memory.freed_by_crash(words_survive=self.rules.words_survive)
        self.met.clear()
        self._pending.clear()
        self._timer_s = 0.0
        for peer in met:
            process = self.world.processes.get(peer)
            if isinstance(process, Instance) and self.world.rng.random() < 0.7:
                process.post(self.world.rng.random() * 0.05, process.lost, gone)

    def lost(self, peer: Incarnation) -> None:
        self.feed(PeerLost(peer))

    def _log(self, event: Any, actions: list[Action]) -> None:
        self.world.log(self.name, f"{_brief(event)} -> {', '.join(_brief(a) for a in actions) or 'nothing'}")

    def stopped_s_since(self, mark_s: float) -> float:
        """For how long this process has been stopped since `stopped_total_s` was `mark_s`; with the grace after it."""
        stopped_s = self.stopped_total_s - mark_s
        return stopped_s * 1.1 + (SETTINGS.stall_grace_s if stopped_s else 0.0)


def _brief(value: Any) -> str:
    """An event or action in a line of the story."""
    match value:
        case Received():
            return f"{_brief(value.message)} received"
        case Send():
            return f"send {_brief(value.message)}"
    name = type(value).__name__
    fields = {f: getattr(value, f) for f in value.__struct_fields__}
    keys = ("handoff", "ticket", "word", "slot", "read_id", "cause", "reason", "first_run", "runs", "seal", "outcome")
    return f"{name}({' '.join(_shown(key, fields[key]) for key in keys if fields.get(key))})"


def _shown(key: str, value: Any) -> str:
    match key:
        case "handoff":
            return str(value)[:6]
        case "ticket":
            return f"{value.handoff[:6]} of {value.source.instance_id} for {value.target.instance_id}"
        case "word":
            return f"word={value % 0xFFFF:04x}"
        case "runs":
            return f"runs={len(value)}"
        case "seal":
            return f"seal={value.num_runs}"
        case "outcome":
            return f"{value.state} {value.stage or ''} {value.cause or ''}".strip()
    return f"{key}={value}"
