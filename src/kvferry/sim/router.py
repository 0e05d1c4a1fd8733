"""A model of the router: picks a pair, dispatches both legs, forwards the current attempt's answer, tries again."""

from __future__ import annotations

from kvferry.sim.decode import Decode
from kvferry.sim.instance import Instance
from kvferry.sim.network import Network
from kvferry.sim.prefill import Prefill
from kvferry.sim.rules import Rules
from kvferry.sim.world import SETTINGS, Broken, World
from kvferry.types import HandoffId, HandoffTicket, InstanceRef, Outcome, TerminalState

MAX_ATTEMPTS = 2
PATIENCE_S = 1.5
"""How much longer than deadline + lease the router waits for the first byte: D may have to recompute."""


class Attempt:
    """One handoff of a request."""

    def __init__(self, handoff: HandoffId, prefill: Prefill, decode: Decode) -> None:
        self.handoff, self.prefill, self.decode = handoff, prefill, decode


class Request:
    """One client's request."""

    def __init__(self, name: str, num_blocks: int, first_block: int) -> None:
        self.name, self.num_blocks, self.first_block = name, num_blocks, first_block
        self.attempts: list[Attempt] = []
        self.answered_by: HandoffId | None = None
        self.end: TerminalState | None = None


class Router:
    """Never crashes here: to the instances, a router's crash is the same as its closing all connections."""

    def __init__(
        self, world: World, network: Network, rules: Rules, prefills: list[Prefill], decodes: list[Decode]
    ) -> None:
        self._world, self._network, self._rules = world, network, rules
        self._prefills, self._decodes = prefills, decodes
        self.requests: list[Request] = []
        self._by_handoff: dict[HandoffId, Request] = {}

    def arrive(self, name: str) -> None:
        """A client asks."""
        rng, plan = self._world.rng, self._world.plan
        num_blocks = rng.randint(2, min(4, plan.prefill_blocks, plan.decode_blocks))
        request = Request(name, num_blocks, rng.choice((0, 0, 0, 0, 1, 1, num_blocks)))
        self.requests.append(request)
        self._try(request)

    def abort(self, request: Request) -> None:
        """The client leaves."""
        if request.end is None:
            self._world.log("client", f"{request.name} leaves")
            self._finish(request, TerminalState.ABORTED)
            self._cancel(request.attempts[-1])

    def _try(self, request: Request) -> None:
        world, rng, plan = self._world, self._world.rng, self._world.plan
        prefill, decode = rng.choice(self._prefills), rng.choice(self._decodes)
        handoff = HandoffId(f"{rng.getrandbits(128):032x}")
        attempt = Attempt(handoff, prefill, decode)
        request.attempts.append(attempt)
        self._by_handoff[handoff] = request
        source = InstanceRef(prefill.name, prefill.incarnation, ("sim",))
        target = InstanceRef(decode.name, decode.incarnation, ("sim",))
        number = len(request.attempts) - 1
        digest = request.name.encode()
        theirs = b"another" if plan.prompt_mismatch and rng.random() < plan.prompt_mismatch else digest
        needed = request.num_blocks - request.first_block
        world.log("router", f"{request.name} attempt {number} is {handoff[:6]}: {prefill.name} to {decode.name}")
        to_p = HandoffTicket(handoff, "source", source, target, plan.deadline_s, number)
        to_d = HandoffTicket(handoff, "target", source, target, plan.deadline_s, number)
        self._network.request(prefill, prefill.prefill, to_p, request.num_blocks, digest)
        self._network.request(decode, decode.decode, to_d, needed, request.first_block, theirs)
        world.at(plan.deadline_s + SETTINGS.lease_ttl_s + PATIENCE_S, self._give_up, request, attempt, "no answer")

    def hear(self, decode: Decode, handoff: HandoffId, outcome: Outcome | None, final: bool) -> None:
        """A chunk of D's answer is on its way here."""
        delay_s = 0.001 + self._world.rng.random() * 0.01
        self._world.at(delay_s, self._forward, handoff, outcome, final)

    def _forward(self, handoff: HandoffId, outcome: Outcome | None, final: bool) -> None:
        request = self._by_handoff[handoff]
        if request.end is not None or outcome is None:
            return
        current = request.attempts[-1]
        if handoff != current.handoff and not self._rules.forward_all:
            self._world.counts["late_answers"] += 1
            return
        if outcome.state is TerminalState.FAILED:
            self._give_up(request, current, "it failed")
            return
        if request.answered_by not in (None, handoff):
            raise Broken("I6", f"the client of {request.name} got bytes of {request.answered_by} and of {handoff}")
        request.answered_by = handoff
        if final:
            self._finish(request, outcome.state)

    def lost(self, instance: Instance) -> None:
        """The connections to an instance broke; as far as the router can tell, it has died."""
        for request in self.requests:
            if request.end is None and request.attempts[-1].decode is instance:
                self._give_up(request, request.attempts[-1], f"{instance.name} is lost")

    def _give_up(self, request: Request, attempt: Attempt, why: str) -> None:
        """Try once more if nothing has reached the client; otherwise end honestly."""
        if request.end is not None or request.attempts[-1] is not attempt:
            return
        if request.answered_by is not None and why == "no answer":
            # It streams; if its end does not come either, the instance is dead.
            self._world.at(5.0, self._give_up, request, attempt, "no end")
            return
        self._world.log("router", f"gives up {attempt.handoff[:6]}: {why}")
        self._cancel(attempt)
        if request.answered_by is None and len(request.attempts) < MAX_ATTEMPTS:
            self._try(request)
        else:
            self._finish(request, TerminalState.FAILED)

    def _cancel(self, attempt: Attempt) -> None:
        """Close both legs' connections."""
        remaining_s = self._world.plan.deadline_s
        self._network.request(attempt.prefill, attempt.prefill.cancel, attempt.handoff, remaining_s)
        self._network.request(attempt.decode, attempt.decode.cancel, attempt.handoff, remaining_s)

    def _finish(self, request: Request, end: TerminalState) -> None:
        if request.end is not None:
            raise Broken("I5", f"{request.name} ended as {request.end}, then as {end}")
        request.end = end
        self._world.counts[f"request_{end}"] += 1
