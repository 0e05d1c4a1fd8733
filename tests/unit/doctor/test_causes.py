"""Every cause and error code that the code can give has a meaning and a remedy. The set is derived from the source."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kvferry.pool.client  # noqa: F401  (has a KVError of its own)
from kvferry.doctor.causes import SECTIONS, Section, cause_of, causes
from kvferry.errors import ConfigError, KVError, NoInstanceAvailable, PoolError
from kvferry.pool.attachment import CANCELLED
from kvferry.protocol import details
from kvferry.protocol.target import _PROBLEM_OF_BOTH
from kvferry.router.errors import _CODES
from kvferry.router.fleet import _NO_FAULT_OF_THE_EDGE
from kvferry.router.steps import PLANNED_DIRECT

ROOT = Path(__file__).parents[3] / "src" / "kvferry"
ELSEWHERE = ("doctor", "sim", "testing", "cluster")
"""The doctor speaks of causes, the simulator makes them up."""

GIVES: dict[str, tuple[int | None, str | None]] = {
    "BadRequest": (None, "code"),
    "ConnectFailed": (1, "cause"),
    "DeadlinePassed": (0, "cause"),
    "Failure": (0, "cause"),
    "Outcome": (3, "cause"),
    "PeerLost": (1, "cause"),
    "Placement": (2, "reason"),
    "ReadFailed": (2, "cause"),
    "RequestError": (None, "code"),
    "Verdict": (2, "cause"),
    "_conclude": (4, "cause"),
    "_finish": (2, "cause"),
    "_outcome": (3, "cause"),
    "error_body": (None, "code"),
    "error_event": (None, "code"),
}
"""Callables of the rooms that give causes: which argument it is."""
FILLED_IN = {"http_": {"http_400", "http_429", "http_500", "http_503"}}
FILLED_IN["refused_"] = {f"refused_{reason}" for reason in details.REFUSED if reason != "duplicate"}
FILLED_IN["source_"] = {f"source_{reason}" for reason in details._GONE if reason not in _PROBLEM_OF_BOTH}
"""The sets that formatted causes stand for, by what they begin with."""


@cache
def sources() -> list[tuple[str, ast.Module]]:
    paths = ((path.relative_to(ROOT), path) for path in sorted(ROOT.rglob("*.py")))
    return [
        (str(where), ast.parse(path.read_text()))
        for where, path in paths
        if where.parts[0] not in ELSEWHERE and "bench" not in where.parts
    ]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call, ast.AST]]:
    """Each call with its name and the function that it stands in."""

    def walk(node: ast.AST, function: ast.AST) -> Iterator[tuple[str, ast.Call, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                name = getattr(child.func, "attr", None) or getattr(child.func, "id", "")
                yield name, child, function
            yield from walk(child, child if isinstance(child, ast.FunctionDef) else function)

    return walk(tree, tree)


def argument(call: ast.Call, position: int | None, keyword: str | None) -> ast.expr | None:
    for given in call.keywords:
        if given.arg == keyword:
            return given.value
    return call.args[position] if position is not None and position < len(call.args) else None


def words(expression: ast.expr, function: ast.AST) -> set[str]:
    """The causes that an expression may give. What is passed on (attribute, parameter) was found where it began."""
    match expression:
        case ast.Constant(value=str() as text):
            return {text}
        case ast.Constant(value=None) | ast.Attribute() | ast.Call():
            return set()
        case ast.IfExp(body=body, orelse=orelse):
            return words(body, function) | words(orelse, function)
        case ast.BoolOp(values=values):
            return set().union(*(words(value, function) for value in values))
        case ast.JoinedStr(values=[ast.Constant(value=str() as start), *_]):
            return FILLED_IN[start]
        case ast.Name(id=name):
            given = [
                node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
            ]
            return set().union(*(words(value, function) for value in given))
    raise AssertionError(f"what does {ast.unparse(expression)} give? This test must be able to tell")


@cache
def given_in_the_code() -> dict[str, str]:
    """Cause -> a place that gives it."""
    found: dict[str, str] = {}
    for where, tree in sources():
        for name, call, function in calls(tree):
            if name not in GIVES or (expression := argument(call, *GIVES[name])) is None:
                continue
            if where.startswith("connector") and name == "Failure":
                continue  # an event that carries a RequestError
            found |= dict.fromkeys(words(expression, function), f"{where}:{call.lineno}")
    return found


def leaves(kind: type[KVError]) -> Iterator[type[KVError]]:
    for child in kind.__subclasses__():
        yield child
        yield from leaves(child)


def cause_given_by(kind: type[KVError]) -> str:
    prop = kind.cause
    assert isinstance(prop, property) and prop.fget is not None
    return str(prop.fget(kind.__new__(kind)))


def test_the_derivation_sees_what_is_known_to_be_there() -> None:
    found = given_in_the_code()
    known = {
        "source_silent",
        "serving_stalled",
        "deadline_exceeded",
        "refused_closed",
        "http_503",
        "first_token_differs",
    }
    assert known <= set(found)
    assert {"overloaded", "superseded", "no_prefill_instance", "outcome_unknown", "internal_error"} <= set(found)


def test_each_cause_that_the_code_gives_has_a_meaning() -> None:
    lacking = {cause: where for cause, where in given_in_the_code().items() if cause_of(cause) is None}
    assert not lacking, "add them to src/kvferry/doctor/causes.toml"


def test_each_error_class_has_a_meaning_for_requests_and_for_the_pool() -> None:
    pools_own = {cause_given_by(kind) for kind in leaves(PoolError)} | {PoolError("").cause}
    for kind in leaves(KVError):
        cause = cause_given_by(kind)
        if cause not in pools_own - {"lease_expired", "pool_exhausted"}:
            assert cause_of(cause), kind
        if kind not in (ConfigError, NoInstanceAvailable):
            assert cause_of(cause, section="pool"), kind


def test_each_reason_of_the_protocol_has_a_meaning() -> None:
    """What the source answers, what either side refuses: a cause or a sentence, whichever it becomes."""
    gone, refused = set[str](), set[str]()
    for where, tree in sources():
        if where not in ("protocol/source.py", "protocol/tables.py", "protocol/target.py"):
            continue
        for name, call, function in calls(tree):
            told = argument(call, 2, "reason") if name in ("_gone", "Refused") else argument(call, None, "gone")
            if told is not None and name in ("_gone", "_close", "Refused"):
                (refused if name == "Refused" else gone).update(words(told, function))
    assert gone - {"busy"} == set(details._GONE), "`busy` is asked again and ends nothing"
    assert refused == set(details.REFUSED)


def test_what_the_policy_and_the_router_name_is_known() -> None:
    (tree,) = (tree for where, tree in sources() if where == "router/requests.py")
    (function,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_direct_reason")
    returned = {
        node.value
        for each in ast.walk(function)
        if isinstance(each, ast.Return) and each.value is not None
        for node in ast.walk(each.value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value
    } - {"use_beam_search"}
    assert returned < PLANNED_DIRECT
    for cause in PLANNED_DIRECT | _NO_FAULT_OF_THE_EDGE:
        assert cause_of(cause), cause
    for code in _CODES.values():
        assert code in causes()["http"], code
    for cause in (CANCELLED, "evicted", "internal_error"):
        assert cause_of(cause, section="pool"), cause


def test_errors_of_a_server_have_a_code() -> None:
    for where, tree in sources():
        for name, call, _ in calls(tree):
            status = argument(call, None, "status")
            if name == "RequestError" and isinstance(status, ast.Constant) and status.value >= 500:
                assert argument(call, None, "code") is not None, f"{where}:{call.lineno}"


@pytest.mark.parametrize("section", SECTIONS)
def test_no_entry_is_for_a_cause_that_nothing_gives(section: Section) -> None:
    given = (
        set(given_in_the_code())
        | PLANNED_DIRECT
        | set(_CODES.values())
        | {"http_4xx", "http_5xx", CANCELLED, "evicted"}
    )
    given |= {cause_given_by(kind) for kind in leaves(KVError)}
    given |= _PROBLEM_OF_BOTH
    assert {key.rpartition("/")[2] for key in causes()[section]} <= given


def test_texts_are_whole_and_have_no_names_but_the_two_instances() -> None:
    for section in SECTIONS:
        for name, cause in causes()[section].items():
            for text in (cause.meaning, cause.mend):
                assert text and not text.endswith("."), name
                fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
                assert fields <= ({"prefill", "decode"} if section == "request" else set()), name


def test_a_stage_and_a_status_choose_the_meaning() -> None:
    late, full = cause_of("deadline_exceeded", "waiting"), cause_of("deadline_exceeded", "reserving")
    assert late and full and "{prefill}" in late.meaning and "full" in full.meaning
    gone = cause_of("peer_gone", "decode")
    assert gone == cause_of("peer_gone", "streaming") != cause_of("peer_gone", "waiting")
    assert gone and gone.named(decode="d-7").meaning.startswith("the router lost d-7")
    assert cause_of("http_418") == causes()["request"]["http_4xx"]
    assert cause_of("http_503") != cause_of("http_500") == causes()["request"]["http_5xx"]
    assert cause_of("of_later_days") is None
    assert cause_of("peer_gone", section="pool") == causes()["pool"]["peer_gone"]
