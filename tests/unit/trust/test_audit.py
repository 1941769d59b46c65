"""The audit log against whoever changes it, against crashes, full disks and floods of refusals."""

import contextlib
import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from zk0bot.errors import ConfigError, DiskError
from zk0bot.trust.audit import DAMAGED, RECOVERED, AuditLog, RefusalLog, read_events, verify
from zk0bot.trust.chain import AuditEvent, Mark

logger = logging.getLogger(__name__)
LOG, HEAD, PUBLIC, KEY = "audit.jsonl", "head.json", "signing.pub", "signing.key"
NUM_LINES = 30
Disk = Callable[[], contextlib.AbstractContextManager[None]]


def write_some(folder: Path, count: int = NUM_LINES) -> None:
    log = AuditLog(folder)
    for index in range(count - 1):
        log.append("round-closed", f"arm-{index % 3}", round=index, loss=0.5, note="grün", ok=True)
    log.append("run-ended", "server", state="completed", verdict=None)


def events(folder: Path) -> list[AuditEvent]:
    return [event for event in read_events(folder) if isinstance(event, AuditEvent)]


def names(folder: Path) -> list[str]:
    return [event.event for event in events(folder)]


@dataclass
class Vandal:
    """Changes one copy of a log in every way that needs no key; says which way it was."""

    folder: Path
    other: Path
    """Another service's log."""
    fork: Path
    """What this service's log would be had it gone on otherwise after ten lines; same key."""
    old_heads: list[bytes]
    """Heads that this log had before."""
    rng: random.Random
    original: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = (LOG, HEAD, PUBLIC, KEY)
        self.original = {name: (self.folder / name).read_bytes() for name in names}

    def restore(self) -> None:
        for name, content in self.original.items():
            (self.folder / name).write_bytes(content)

    def strike(self) -> str:
        """Make one change; its kind. Every other log is one without its key, as an auditor has."""
        if self.rng.random() < 0.5:
            (self.folder / KEY).unlink()
        ways = [
            self.change_byte, self.change_byte, self.drop_byte, self.add_byte, self.truncate,
            self.truncate, self.drop_lines, self.repeat_lines, self.insert_foreign_line,
            self.insert_blank, self.swap_lines, self.move_line, self.shuffle, self.replace_line,
            self.delete, self.put_back_head, self.swap_file, self.respell, self.insert_forked_line,
        ]  # fmt: skip
        while True:
            way = self.rng.choice(ways)
            name, content = way()
            if content != self.original[name]:
                break
        path = self.folder / name
        path.unlink() if content is None else path.write_bytes(content)
        return f"{way.__name__} {name}"

    def _any_file(self) -> tuple[str, bytes]:
        name = self.rng.choices([LOG, HEAD, PUBLIC], [4, 1, 1])[0]
        return name, self.original[name]

    def _lines(self) -> list[bytes]:
        return self.original[LOG].splitlines(keepends=True)

    def change_byte(self) -> tuple[str, bytes]:
        name, content = self._any_file()
        at = self.rng.randrange(len(content))
        old = content[at]
        new = self.rng.choice([old ^ 1 << self.rng.randrange(8), old ^ 32, self.rng.randrange(256)])
        return name, content[:at] + bytes([new]) + content[at + 1 :]

    def drop_byte(self) -> tuple[str, bytes]:
        name, content = self._any_file()
        at = self.rng.randrange(len(content))
        return name, content[:at] + content[at + 1 :]

    def add_byte(self) -> tuple[str, bytes]:
        name, content = self._any_file()
        at = self.rng.randrange(len(content) + 1)
        new = self.rng.choice([b" ", b"\n", b"0", b"\r", self.rng.randbytes(1)])
        return name, content[:at] + new + content[at:]

    def truncate(self) -> tuple[str, bytes]:
        name, content = self._any_file()
        return name, content[: self.rng.randrange(len(content))]

    def drop_lines(self) -> tuple[str, bytes]:
        lines = self._lines()
        at = self.rng.randrange(len(lines))
        del lines[at : at + self.rng.choice([1, 1, 2, 5])]
        return LOG, b"".join(lines)

    def repeat_lines(self) -> tuple[str, bytes]:
        lines = self._lines()
        at, to = self.rng.randrange(len(lines)), self.rng.randrange(len(lines) + 1)
        lines[to:to] = lines[at : at + self.rng.choice([1, 1, 3])]
        return LOG, b"".join(lines)

    def insert_foreign_line(self) -> tuple[str, bytes]:
        lines = self._lines()
        foreign = (self.other / LOG).read_bytes().splitlines(keepends=True)
        lines.insert(self.rng.randrange(len(lines) + 1), self.rng.choice(foreign))
        return LOG, b"".join(lines)

    def insert_forked_line(self) -> tuple[str, bytes]:
        """In place of the one of the same number: only the line before it tells them apart."""
        lines = self._lines()
        forked = (self.fork / LOG).read_bytes().splitlines(keepends=True)
        at = self.rng.randrange(10, len(forked))
        lines[at:] = self.rng.choice([forked[at:], [forked[at], *lines[at + 1 :]]])
        return LOG, b"".join(lines)

    def respell(self) -> tuple[str, bytes]:
        """Another way to write the same JSON, or the same key."""
        name = self.rng.choice([LOG, LOG, HEAD, PUBLIC])
        if name == PUBLIC:
            return name, self.original[name].replace(b"\n", self.rng.choice([b"\r\n", b" \n"]))
        lines = self.original[name].splitlines(keepends=True)
        at = self.rng.randrange(len(lines))
        value = json.loads(lines[at])
        spelling = {
            0: lambda: lines[at].replace(b",", b", ", 1),
            1: lambda: lines[at].replace(b'"seq":', b'"seq": ', 1),
            2: lambda: json.dumps(dict(reversed(value.items())), separators=(",", ":")).encode(),
            3: lambda: lines[at].replace(value["sig"].encode(), value["sig"].upper().encode()),
            4: lambda: lines[at].replace(b"\n", b"\r\n"),
            5: lambda: lines[at].replace(b'{"seq":', b'{"seq":0,"seq":', 1),
            6: lambda: lines[at].replace(b'"seq"', b'"\\u0073eq"', 1),
        }[self.rng.randrange(7)]
        lines[at] = spelling().rstrip(b"\n") + b"\n"
        return name, b"".join(lines)

    def insert_blank(self) -> tuple[str, bytes]:
        lines = self._lines()
        blank = self.rng.choice([b"\n", b" \n", b"{}\n", b"[" * 50_000 + b"\n", b"\xff\n"])
        lines.insert(self.rng.randrange(len(lines) + 1), blank)
        return LOG, b"".join(lines)

    def replace_line(self) -> tuple[str, bytes]:
        """By the line of the same number in the other log."""
        lines = self._lines()
        at = self.rng.randrange(len(lines))
        lines[at] = (self.other / LOG).read_bytes().splitlines(keepends=True)[at]
        return LOG, b"".join(lines)

    def swap_lines(self) -> tuple[str, bytes]:
        lines = self._lines()
        a, b = self.rng.sample(range(len(lines)), 2)
        lines[a], lines[b] = lines[b], lines[a]
        return LOG, b"".join(lines)

    def move_line(self) -> tuple[str, bytes]:
        lines = self._lines()
        line = lines.pop(self.rng.randrange(len(lines)))
        lines.insert(self.rng.randrange(len(lines) + 1), line)
        return LOG, b"".join(lines)

    def shuffle(self) -> tuple[str, bytes]:
        lines = self._lines()
        self.rng.shuffle(lines)
        return LOG, b"".join(lines)

    def delete(self) -> tuple[str, None]:
        return self.rng.choice([LOG, HEAD, PUBLIC]), None

    def put_back_head(self) -> tuple[str, bytes]:
        return HEAD, self.rng.choice(self.old_heads)

    def swap_file(self) -> tuple[str, bytes]:
        name = self.rng.choice([LOG, HEAD, PUBLIC])
        return name, (self.other / name).read_bytes()


@pytest.fixture
def vandal(tmp_path: Path) -> Vandal:
    folder, other, old_heads = tmp_path / "audit", tmp_path / "other", []
    fork = tmp_path / "fork"
    for count in (1, 9, 10, 9):
        write_some(folder, count)
        if count == 9 and not fork.exists():
            shutil.copytree(folder, fork)
        old_heads.append((folder / HEAD).read_bytes())
    write_some(folder, 1)
    write_some(other)
    write_some(fork, 20)
    assert verify(folder).ok
    assert verify(folder).lines == NUM_LINES
    return Vandal(folder=folder, other=other, fork=fork, old_heads=old_heads, rng=random.Random(7))


@pytest.mark.parametrize(
    "count", [400, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "ten-thousand"]
)
def test_every_change_is_found(vandal: Vandal, count: int) -> None:
    kinds: Counter[str] = Counter()
    missed: list[str] = []
    for _ in range(count):
        kind = vandal.strike()
        kinds[kind] += 1
        report = verify(vandal.folder)
        if report.ok or not report.first_problem:
            missed.append(kind)
        vandal.restore()
    found = kinds.total() - len(missed)
    logger.info("%d changes, %d found: %s", kinds.total(), found, dict(kinds))
    assert (kinds.total(), missed) == (count, [])
    assert len(kinds) >= 20
    assert verify(vandal.folder).ok


def test_a_change_stays_found_after_the_next_events(vandal: Vandal, tmp_path: Path) -> None:
    for index in range(150):
        copy = tmp_path / f"copy-{index}"
        kind = vandal.strike()
        shutil.copytree(vandal.folder, copy)
        vandal.restore()
        write_some(copy, 2)
        is_harmless = kind in HARMLESS and names(copy)[NUM_LINES] in (RECOVERED, DAMAGED)
        assert is_harmless or not verify(copy).ok, kind
        assert names(copy)[-1] == "run-ended", kind
        shutil.rmtree(copy)


HARMLESS = {f"put_back_head {HEAD}", f"add_byte {LOG}"}
"""An old head, or bytes after the last line: nothing is lost, and a killed writer leaves both."""


def test_an_old_log_with_its_head_is_found_by_a_head_kept_elsewhere(tmp_path: Path) -> None:
    folder, backup = tmp_path / "audit", tmp_path / "backup"
    write_some(folder, 5)
    shutil.copytree(folder, backup)
    write_some(folder, 5)
    kept = Mark.parse(verify(folder).head)
    assert verify(folder, kept).ok
    write_some(folder, 2)
    assert verify(folder, kept).ok  # an older mark of the same log
    shutil.rmtree(folder)
    shutil.copytree(backup, folder)
    assert verify(folder).ok  # what a signed chain cannot show
    assert verify(folder, kept).first_problem == (
        "line 10 with the expected hash is not in this log"
    )
    shutil.rmtree(folder)
    assert verify(folder).ok
    assert not verify(folder, kept).ok


@pytest.mark.parametrize("text", ["", "7", "7:abc", "x:" + "0" * 64, "-1:" + "0" * 64])
def test_a_head_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not the head of an audit log"):
        Mark.parse(text)


@pytest.mark.parametrize(
    ("change", "line", "problem"),
    [
        (lambda lines: [*lines[:2], b"{}\n", *lines[3:]], 3, "is no event"),
        (lambda lines: [*lines[:4], lines[4][:-1]], 5, "is cut off"),
        (lambda lines: lines[:3], 4, "lines 4 to 5 are missing"),
        (lambda lines: [*lines[:2], *lines[3:]], 3, "is number 4, where number 3 belongs"),
        (lambda lines: [line.replace(b'"round":2', b'"round":3') for line in lines], 3,
         "was changed after it was written"),
        (lambda lines: [line.replace(b'"prev":"', b'"prev":"0')[:] for line in lines], 1,
         "does not follow on the line before it"),
    ],
)  # fmt: skip
def test_the_first_problem_is_named_with_its_line(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], line: int, problem: str
) -> None:
    write_some(tmp_path, 5)
    lines = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(b"".join(change(lines)))
    report = verify(tmp_path)
    assert (report.problem_line, report.first_problem) == (line, problem)


def test_a_whole_other_log_does_not_fit_the_key_that_is_there(tmp_path: Path) -> None:
    write_some(tmp_path / "audit")
    write_some(tmp_path / "forged")
    for name in (LOG, HEAD, PUBLIC):
        shutil.copy(tmp_path / "forged" / name, tmp_path / "audit" / name)
    report = verify(tmp_path / "audit")
    assert report.first_problem == "signing.pub is not the public part of signing.key"


def test_a_last_line_that_was_changed_is_no_crash(tmp_path: Path) -> None:
    write_some(tmp_path, 3)
    log = tmp_path / LOG
    log.write_bytes(log.read_bytes().replace(b'"completed"', b'"cancelled"'))
    write_some(tmp_path, 1)
    assert names(tmp_path)[3:] == [DAMAGED, "run-ended"]
    assert verify(tmp_path).problem_line == 3


def test_a_line_torn_anywhere_is_put_aside_and_noted(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    write_some(folder, 3)
    head = (folder / HEAD).read_bytes()
    whole = (folder / LOG).read_bytes()
    write_some(folder, 1)
    last = (folder / LOG).read_bytes()[len(whole) :]
    for cut in range(1, len(last) + 1, 29):
        copy = tmp_path / str(cut)
        shutil.copytree(folder, copy)
        (copy / LOG).write_bytes(whole + last[:cut])  # the writer was killed here
        (copy / HEAD).write_bytes(head)
        assert not verify(copy).ok
        AuditLog(copy).append("server-started", "me")
        assert verify(copy).ok
        assert names(copy)[3:] == [RECOVERED, "server-started"]
        [kept] = copy.glob("torn-*.part")
        assert kept.read_bytes() == last[:cut]
        assert events(copy)[3].details == {"late_head": False, "kept": kept.name, "bytes": cut}


def test_a_line_without_its_head_is_kept_and_noted(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    write_some(folder, 3)
    head = (folder / HEAD).read_bytes()
    write_some(folder, 1)
    (folder / HEAD).write_bytes(head)
    (folder / ".head.json.x7").touch()
    assert verify(folder).problem_line == 4
    AuditLog(folder).append("server-started", "me")
    assert verify(folder).ok
    assert names(folder)[3:] == ["run-ended", RECOVERED, "server-started"]
    assert not (folder / ".head.json.x7").exists()


def test_a_writer_killed_while_it_made_the_key_is_no_damage(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    write_some(folder, 1)
    (folder / LOG).unlink()
    (folder / HEAD).write_bytes(b'{"seq":0,"hash":"' + b"0" * 64 + b'","sig":""}\n')
    (folder / "signing.key").unlink()
    write_some(folder, 2)
    assert (verify(folder).ok, len(names(folder))) == (True, 2)


@pytest.mark.parametrize("lost", [[LOG], [HEAD], [PUBLIC], ["signing.key"], [LOG, HEAD],
                                  [LOG, "signing.key"], [LOG, HEAD, "signing.key"]],
                         ids=" ".join)  # fmt: skip
def test_a_lost_file_is_noted_and_never_accepted(tmp_path: Path, lost: list[str]) -> None:
    write_some(tmp_path, 3)
    for name in lost:
        (tmp_path / name).unlink()
    write_some(tmp_path, 2)
    assert DAMAGED in names(tmp_path)
    assert names(tmp_path)[-1] == "run-ended"
    assert not verify(tmp_path).ok


def test_nothing_of_an_event_is_there_when_the_disk_is_full(
    tmp_path: Path, full_disk: Disk
) -> None:
    folder = tmp_path / "audit"
    with full_disk(), pytest.raises(DiskError, match="cannot write to the audit log"):
        AuditLog(folder).append("server-started", "me")
    assert verify(folder).lines == 0
    write_some(folder, 3)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with full_disk(), pytest.raises(DiskError):
        AuditLog(folder).append("run-started", "me")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write_some(folder, 1)
    assert (verify(folder).ok, len(names(folder))) == (True, 4)


def test_a_line_whose_head_finds_no_room_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_some(tmp_path, 3)
    before = (tmp_path / LOG).read_bytes()

    def refuse(path: Path, content: bytes) -> None:
        assert (tmp_path / LOG).read_bytes() != before
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("zk0bot.trust.audit._save", refuse)
        with pytest.raises(DiskError, match="No space left"):
            AuditLog(tmp_path).append("run-started", "me")
    assert (tmp_path / LOG).read_bytes() == before
    assert verify(tmp_path).ok


def test_threads_append_one_after_the_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: write_some(tmp_path, 10), range(4)))
    assert (verify(tmp_path).ok, verify(tmp_path).lines) == (True, 40)


def test_what_comes_from_outside_is_bounded_and_escaped(tmp_path: Path) -> None:
    evil = "\x1b[2J\n\udc80‮" + "🤖" * 5000
    AuditLog(tmp_path).append("request-refused", evil, path=evil, size=float("nan"))
    AuditLog(tmp_path).append("request-refused", "b")
    assert (tmp_path / LOG).read_bytes().count(b"\n") == 2
    assert (tmp_path / LOG).read_bytes().isascii()
    assert (verify(tmp_path).ok, names(tmp_path)) == (True, ["request-refused"] * 2)
    assert len(str(events(tmp_path)[0].details["path"])) == 1000
    assert events(tmp_path)[0].details["size"] == "nan"


def test_the_files_are_private(tmp_path: Path) -> None:
    write_some(tmp_path / "audit", 2)
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "audit").iterdir()} == {0o600}


def test_a_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / LOG).symlink_to(victim)
    with pytest.raises(DiskError):
        AuditLog(tmp_path / "audit").append("server-started", "me")
    assert victim.read_text() == ""


@dataclass
class Clock:
    at: float = 0.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def refusals(tmp_path: Path, clock: Clock) -> Iterator[RefusalLog]:
    yield RefusalLog(AuditLog(tmp_path), max_pairs=4, clock=clock)


def lines_of(folder: Path) -> list[tuple[str, object, object]]:
    return [(e.actor, e.details["reason"], e.details.get("repeats", "")) for e in events(folder)]


def test_the_first_refusal_is_written_at_once_its_repeats_as_one_line(
    tmp_path: Path, clock: Clock, refusals: RefusalLog
) -> None:
    for _ in range(1000):
        refusals.refuse("10.0.0.9", "no key", path="/v1/fleet/pull")
    assert lines_of(tmp_path) == [("10.0.0.9", "no key", "")]
    assert events(tmp_path)[0].details["path"] == "/v1/fleet/pull"
    refusals.refuse("10.0.0.9", "revoked")
    clock.at = 61
    refusals.flush()
    assert lines_of(tmp_path)[1:] == [("10.0.0.9", "revoked", ""), ("10.0.0.9", "no key", 999)]
    refusals.flush()
    assert len(lines_of(tmp_path)) == 3


def test_one_who_goes_on_costs_one_line_in_ever_longer_windows(
    tmp_path: Path, clock: Clock, refusals: RefusalLog
) -> None:
    for second in range(24 * 3600):
        clock.at = float(second)
        refusals.refuse("10.0.0.9", "no key")
    refusals.close()
    lines = lines_of(tmp_path)
    assert sum(1 if count == "" else int(str(count)) for _, _, count in lines) == 24 * 3600
    assert len(lines) <= 32
    clock.at += 3601
    refusals.flush()
    clock.at += 3601
    refusals.refuse("10.0.0.9", "no key")
    assert lines_of(tmp_path)[-1] == ("10.0.0.9", "no key", "")  # a new beginning, at once


def test_a_flood_of_peers_takes_neither_memory_nor_disk(
    tmp_path: Path, clock: Clock, refusals: RefusalLog
) -> None:
    for index in range(100_000):
        clock.at = index / 1000
        refusals.refuse(f"10.0.{index // 256}.{index}", f"path /{index}" + "x" * 1000)
    assert len(refusals._repeats) <= 4
    refusals.close()
    lines = lines_of(tmp_path)
    assert len(lines) <= 2 * (2 * 4 + 1)
    assert sum(1 if count == "" else int(str(count)) for _, _, count in lines) == 100_000
    assert (tmp_path / LOG).stat().st_size < 20_000


def test_a_refusal_stands_when_the_disk_is_full_and_is_written_later(
    tmp_path: Path, clock: Clock, refusals: RefusalLog, full_disk: Disk
) -> None:
    write_some(tmp_path, 1)
    with full_disk():
        refusals.refuse("10.0.0.9", "no key")
        refusals.refuse("10.0.0.9", "no key")
    refusals.close()
    assert events(tmp_path)[-1].details == {"reason": "no key", "repeats": 2}
