"""Who may join and who has: every refusal, and what survives a crash, a race and tampering."""

import base64
import json
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from zk0bot.errors import ConfigError, KeyRefusedError, UnknownNameError
from zk0bot.trust.join_code import JoinCode
from zk0bot.trust.keys import NodeKey, make_node_key
from zk0bot.trust.refusal import (
    ClockError,
    JoinExpiredError,
    JoinRefusedError,
    JoinReplayedError,
    JoinUsedUpError,
    JoinWithdrawnError,
    KeyKnownError,
    NameTakenError,
    Refusal,
)
from zk0bot.trust.registry import (
    MAX_WRONG_PROOFS,
    EnrolRequest,
    NodeRecord,
    Registry,
    build_request,
)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "enrolment")


@pytest.fixture
def make_key(tmp_path: Path) -> Callable[[str], NodeKey]:
    return lambda name: make_node_key(tmp_path / "keys" / name)


def make_code(registry: Registry, name: str = "", uses: int = 1, expires_s: float = 60) -> JoinCode:
    invite, secret = registry.invite(name, uses, expires_s)
    return JoinCode(server="a:1", trust="system", invite_id=invite.invite_id, secret=secret)


def enrol(registry: Registry, code: JoinCode, key: NodeKey, name: str = "") -> NodeRecord:
    return registry.enrol(build_request(code, key, name), datetime.now(UTC))


def with_secret(code: JoinCode, secret: bytes) -> JoinCode:
    return JoinCode(server="a:1", trust="system", invite_id=code.invite_id, secret=secret)


Keys = Callable[[str], NodeKey]


def test_a_node_joins_by_its_code(registry: Registry, make_key: Keys) -> None:
    key = make_key("a")
    node = enrol(registry, make_code(registry), key, "Left arm")
    assert (node.name, node.state, node.fingerprint) == ("Left arm", "active", key.fingerprint)
    assert registry.find_active(key.public_pem) == node
    assert registry.nodes() == [node]
    assert registry.invites()[0].used_by == [key.fingerprint]
    assert not registry.invites()[0].is_open()


def test_the_name_of_the_invite_counts(registry: Registry, make_key: Keys) -> None:
    assert enrol(registry, make_code(registry, "bench"), make_key("a"), "mine").name == "bench"


def test_a_node_without_a_name_gets_one(registry: Registry, make_key: Keys) -> None:
    key = make_key("a")
    assert enrol(registry, make_code(registry), key).name == f"node-{key.fingerprint[4:10]}"


def test_a_lost_answer_is_given_again_and_is_no_second_use(
    registry: Registry, make_key: Keys
) -> None:
    code = make_code(registry, uses=2)
    node = enrol(registry, code, make_key("a"), "a")
    assert enrol(registry, code, make_key("a"), "a") == node
    assert len(registry.invites()[0].used_by) == 1
    enrol(registry, code, make_key("b"), "b")
    with pytest.raises(JoinUsedUpError):
        enrol(registry, code, make_key("c"), "c")


def test_a_replayed_request_is_refused_also_after_a_restart(
    registry: Registry, make_key: Keys, tmp_path: Path
) -> None:
    request = build_request(make_code(registry, uses=5), make_key("a"), "a")
    registry.enrol(request, datetime.now(UTC))
    with pytest.raises(JoinReplayedError):
        Registry(tmp_path / "enrolment").enrol(request, datetime.now(UTC))


def test_an_expired_code_is_refused(registry: Registry, make_key: Keys) -> None:
    request = build_request(make_code(registry, expires_s=60), make_key("a"), "a")
    with pytest.raises(JoinExpiredError):
        registry.enrol(request, datetime.now(UTC) + timedelta(seconds=61))


def test_a_withdrawn_code_is_refused_and_its_nodes_stay(registry: Registry, make_key: Keys) -> None:
    code = make_code(registry, uses=2)
    enrol(registry, code, make_key("a"), "a")
    registry.withdraw(code.invite_id)
    with pytest.raises(JoinWithdrawnError):
        enrol(registry, code, make_key("b"), "b")
    assert registry.find_active(make_key("a").public_pem)


def test_withdrawing_an_unknown_invite_is_refused(registry: Registry) -> None:
    for invite_id in ("0" * 12, "../nodes/x", ""):
        with pytest.raises(UnknownNameError):
            registry.withdraw(invite_id)


def test_guesses_of_secret_and_of_invite_get_one_answer(registry: Registry, make_key: Keys) -> None:
    code = make_code(registry)
    known = with_secret(code, b"guess" * 3 + b"!")
    unknown = JoinCode(server="a:1", trust="system", invite_id="0" * 12, secret=code.secret)
    answers = []
    for guess in (known, unknown):
        with pytest.raises(JoinRefusedError) as caught:
            enrol(registry, guess, make_key("a"), "a")
        answers.append(caught.value.to_dict())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("spoil", ["expire", "withdraw", "use up"])
def test_who_has_not_the_secret_learns_nothing_of_the_state_of_an_invite(
    registry: Registry, make_key: Keys, spoil: str
) -> None:
    code = make_code(registry)
    at = datetime.now(UTC)
    if spoil == "withdraw":
        registry.withdraw(code.invite_id)
    elif spoil == "use up":
        enrol(registry, code, make_key("a"), "a")
    else:
        at += timedelta(days=1)
    request = build_request(with_secret(code, b"x" * 16), make_key("b"), "b", at)
    with pytest.raises(JoinRefusedError):
        registry.enrol(request, at)


def test_twenty_wrong_secrets_lock_an_invite(registry: Registry, make_key: Keys) -> None:
    code, key = make_code(registry), make_key("a")
    for _ in range(MAX_WRONG_PROOFS - 1):
        with pytest.raises(JoinRefusedError):
            enrol(registry, with_secret(code, b"x" * 16), key)
    assert registry.invites()[0].is_open()
    with pytest.raises(JoinRefusedError):
        enrol(registry, with_secret(code, b"x" * 16), key)
    assert registry.invites()[0].is_locked
    with pytest.raises(JoinRefusedError):
        enrol(registry, code, key)


@given(
    st.sampled_from(sorted(EnrolRequest.model_fields)),
    st.integers(0, 999),
    st.characters(min_codepoint=32, max_codepoint=126),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_a_request_with_any_field_changed_is_refused(
    registry: Registry, make_key: Keys, field: str, position: int, other: str
) -> None:
    request = build_request(make_code(registry), make_key("a"), "arm")
    plain = request.model_dump(mode="json")
    index = position % len(plain[field])
    plain[field] = plain[field][:index] + other + plain[field][index + 1 :]
    try:
        altered = EnrolRequest.model_validate_json(json.dumps(plain))
    except ValidationError:
        return
    if altered == request:
        return  # nothing changed, or another spelling of the same time
    with pytest.raises((JoinRefusedError, KeyRefusedError)):
        registry.enrol(altered, datetime.now(UTC))


def test_the_key_must_be_the_senders(registry: Registry, make_key: Keys) -> None:
    mine, theirs, code = make_key("a"), make_key("b"), make_code(registry)
    stolen = NodeKey(private=mine.private, public_pem=theirs.public_pem)
    with pytest.raises(KeyRefusedError):
        enrol(registry, code, stolen)


@pytest.mark.parametrize(
    ("off_s", "words"), [(-301, "0:05:01 .* behind"), (3600, "1:00:00 .* ahead")]
)
def test_a_clock_that_is_off_is_told_by_how_much(
    registry: Registry, make_key: Keys, off_s: int, words: str
) -> None:
    now = datetime.now(UTC)
    request = build_request(make_code(registry), make_key("a"), "", now + timedelta(seconds=off_s))
    with pytest.raises(ClockError, match=words):
        registry.enrol(request, now)


def test_a_name_is_given_once_however_it_is_spelt(registry: Registry, make_key: Keys) -> None:
    enrol(registry, make_code(registry), make_key("a"), "Left Arm")
    for name in ("left-arm", "LEFT_ARM", " left  arm ", "\uff4ceft arm"):
        with pytest.raises(NameTakenError):
            enrol(registry, make_code(registry), make_key("b"), name)
        with pytest.raises(ConfigError, match="has joined already"):
            registry.invite(name)
    assert enrol(registry, make_code(registry), make_key("b"), "right arm").name == "right arm"
    assert enrol(registry, make_code(registry), make_key("c"), "機械").name == "機械"
    assert enrol(registry, make_code(registry), make_key("d"), "腕").name == "腕"


def test_a_name_that_a_terminal_would_obey_is_refused(registry: Registry, make_key: Keys) -> None:
    for name in ("a\x1b[2J", "a\nb", "a\u202eb"):
        with pytest.raises(NameTakenError, match="cannot be a node's name"):
            enrol(registry, make_code(registry), make_key("a"), name)
        with pytest.raises(ConfigError):
            registry.invite(name)


@pytest.mark.parametrize(
    ("name", "uses", "expires_s"),
    [("", 0, 60), ("", 1001, 60), ("", 1, 0), ("", 1, 1e9), ("a", 2, 60)],
)
def test_terms_that_cannot_be_are_refused(
    registry: Registry, name: str, uses: int, expires_s: float
) -> None:
    with pytest.raises(ConfigError):
        registry.invite(name, uses, expires_s)


def test_a_revoked_node_is_out_for_good(registry: Registry, make_key: Keys, tmp_path: Path) -> None:
    code, key = make_code(registry, uses=5), make_key("a")
    enrol(registry, code, key, "arm")
    assert registry.revoke("ARM").state == "revoked"
    for other in (registry, Registry(tmp_path / "enrolment")):
        assert other.find_active(key.public_pem) is None
        found = other.find(key.public_pem)
        assert found
        assert found.state == "revoked"
    with pytest.raises(JoinWithdrawnError):
        enrol(registry, code, key, "arm")
    with pytest.raises(JoinWithdrawnError):  # nor with a new key by the code it still has
        enrol(registry, code, make_key("b"), "arm")
    with pytest.raises(KeyKnownError):  # nor the old key by a new code: Flower takes a key once
        enrol(registry, make_code(registry), key, "arm")
    assert enrol(registry, make_code(registry), make_key("b"), "arm").name == "arm"


def test_a_node_is_revoked_by_the_start_of_its_fingerprint(
    registry: Registry, make_key: Keys
) -> None:
    key = make_key("a")
    enrol(registry, make_code(registry), key, "arm")
    with pytest.raises(UnknownNameError):
        registry.revoke(key.fingerprint[4:7])
    assert registry.revoke(key.fingerprint[:12]).name == "arm"


def test_revoking_an_unknown_node_offers_the_nearest(registry: Registry, make_key: Keys) -> None:
    enrol(registry, make_code(registry), make_key("a"), "left-arm")
    with pytest.raises(UnknownNameError) as caught:
        registry.revoke("left-amr")
    assert caught.value.hint == "did you mean 'left-arm'?"


def test_a_node_that_left_frees_its_name(registry: Registry, make_key: Keys) -> None:
    key = make_key("a")
    enrol(registry, make_code(registry), key, "arm")
    assert registry.leave(key.fingerprint).state == "left"
    assert registry.find_active(key.public_pem) is None
    enrol(registry, make_code(registry), make_key("b"), "arm")
    with pytest.raises(UnknownNameError):
        registry.leave(key.fingerprint)


def test_two_nodes_race_for_one_use(registry: Registry, make_key: Keys, tmp_path: Path) -> None:
    code = make_code(registry)
    keys = [make_key(str(index)) for index in range(6)]

    def attempt(key: NodeKey) -> str:
        try:
            return enrol(Registry(tmp_path / "enrolment"), code, key, key.fingerprint[4:]).state
        except Refusal as refusal:
            return refusal.code

    with ThreadPoolExecutor(6) as pool:
        answers = sorted(pool.map(attempt, keys))
    assert answers == ["active", *["join_used_up"] * 5]


def test_local_nodes_need_no_code(registry: Registry, make_key: Keys) -> None:
    key = make_key("a")
    node = registry.enrol_local("arm", key.public_pem)
    assert registry.enrol_local("arm", key.public_pem) == node
    with pytest.raises(NameTakenError):
        registry.enrol_local("arm", make_key("b").public_pem)
    registry.revoke("arm")
    with pytest.raises(KeyKnownError):
        registry.enrol_local("arm", key.public_pem)


def test_each_change_raises_the_flag(registry: Registry, make_key: Keys) -> None:
    flag = registry.changed
    code = make_code(registry, uses=2)
    assert flag.was_raised()
    enrol(registry, code, make_key("a"), "a")
    assert flag.was_raised()
    registry.leave(make_key("a").fingerprint)
    assert flag.was_raised()
    assert not flag.was_raised()


def test_changes_of_another_process_are_seen_at_once(
    registry: Registry, make_key: Keys, tmp_path: Path
) -> None:
    other = Registry(tmp_path / "enrolment")
    for index in range(20):
        key = make_key(str(index))
        assert other.find_active(key.public_pem) is None
        registry.enrol_local(str(index), key.public_pem)
        assert other.find_active(key.public_pem)
        registry.revoke(str(index))
        assert other.find_active(key.public_pem) is None


def test_a_change_within_one_tick_of_the_file_systems_clock_is_seen(
    registry: Registry, make_key: Keys, tmp_path: Path
) -> None:
    nodes = tmp_path / "enrolment" / "nodes"
    moment = time.time_ns()
    os.utime(nodes, ns=(moment, moment))
    assert registry.find_active(make_key("a").public_pem) is None
    registry.enrol_local("a", make_key("a").public_pem)
    os.utime(nodes, ns=(moment, moment))
    assert registry.find_active(make_key("a").public_pem)


def test_the_server_keeps_neither_secret_nor_code(registry: Registry, tmp_path: Path) -> None:
    code = make_code(registry)
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    forms = [code.secret, code.secret.hex().encode(), base64.b64encode(code.secret)]
    assert not any(form in held for form in [*forms, code.encode().encode()])
    assert "key" not in registry.invites()[0].model_dump()


def test_files_are_private(registry: Registry, make_key: Keys, tmp_path: Path) -> None:
    enrol(registry, make_code(registry), make_key("a"), "a")
    folder = tmp_path / "enrolment"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.rglob("*.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "{}", "[" * 10_000, '{"name": "a"}'])
def test_a_damaged_file_shuts_out_one_node_and_no_other(
    registry: Registry, make_key: Keys, tmp_path: Path, text: str
) -> None:
    for name in ("a", "b"):
        registry.enrol_local(name, make_key(name).public_pem)
    identity = make_key("a").fingerprint[4:]
    (tmp_path / "enrolment" / "nodes" / f"{identity}.json").write_text(text)
    fresh = Registry(tmp_path / "enrolment")
    assert fresh.find_active(make_key("a").public_pem) is None
    assert fresh.find_active(make_key("b").public_pem)


def test_a_record_with_the_key_of_another_lets_nobody_in(
    registry: Registry, make_key: Keys, tmp_path: Path
) -> None:
    node = registry.enrol_local("a", make_key("a").public_pem)
    path = tmp_path / "enrolment" / "nodes" / f"{node.fingerprint[4:]}.json"
    forged = node.model_copy(update={"public_key": make_key("b").public_pem.decode()})
    path.write_text(forged.model_dump_json())
    assert Registry(tmp_path / "enrolment").find_active(make_key("b").public_pem) is None


def test_a_request_says_nothing_of_its_content_when_it_is_not_one(
    registry: Registry, make_key: Keys
) -> None:
    body = build_request(make_code(registry), make_key("a"), "a").model_dump(mode="json")
    with pytest.raises(ValidationError) as caught:
        EnrolRequest.model_validate_json(json.dumps({**body, "nonce": "canary-5"}))
    assert "canary-5" not in str(caught.value)
