"""The audit logs of this machine: looking at one, checking them all."""

import textwrap
from collections import deque
from pathlib import Path

from zk0bot.config.paths import audit_dir
from zk0bot.ops.machine import Machine
from zk0bot.ops.naming import find_client
from zk0bot.ops.state import WIDTH, list_client_slugs
from zk0bot.records import Record
from zk0bot.trust.audit import AuditReport, read_events, verify
from zk0bot.trust.chain import AuditEvent, Mark, Value

_INDENT = " " * 7


class AuditList(Record):
    """The newest events of one log, oldest first."""

    log: str
    """``server`` or ``client NAME``."""
    events: list[AuditEvent]
    unreadable: list[int]
    """Numbers of all lines that hold no event."""

    def to_text(self) -> str:
        if not self.events and not self.unreadable:
            return f"{self.log}: no events"
        lines = [f"{'NO':>5}  {'TIME (UTC)':<19}  {'EVENT':<17}  BY"]
        lines += [text for event in self.events for text in _describe(event)]
        if self.unreadable:
            first = f"line {self.unreadable[0]} holds no event; zk0bot audit verify"
            lines.append(_wrap(f"{len(self.unreadable)} damaged: {first}", "", "  "))
        return "\n".join(lines)


class LogReport(Record):
    """What was found in the log of one service."""

    log: str
    """``server`` or ``client NAME``."""
    report: AuditReport

    def to_text(self) -> str:
        found = self.report
        if found.ok and not found.lines:
            return _wrap(f"{self.log}: no events yet", "", "  ")
        span = f"{found.lines} lines"
        if found.first_at:
            span += f", {_minute(found.first_at)} to {_minute(found.last_at)} UTC"
        verdict = "ok" if found.ok else f"PROBLEM{_where(found)}: {_plain(found.first_problem)}"
        text = _wrap(f"{self.log}: {span}: {verdict}", "", "  ")
        return f"{text}\n  head {found.head}" if found.ok else text


class AuditCheck(Record):
    """What ``zk0bot audit verify`` found."""

    ok: bool
    logs: list[LogReport]

    def to_text(self) -> str:
        return "\n".join(log.to_text() for log in self.logs)


def check_logs(machine: Machine, client: str | None, head: str | None) -> AuditCheck:
    """Check the logs of the server and of every client of this machine, or of one client.

    ``head``, as an earlier check printed it, must lie in the log of the client, else the server's.
    Raises UnknownNameError, ConfigError.
    """
    expected = Mark.parse(head) if head else None
    folders = [_find_log(machine, client)]
    if client is None:
        folders += [_find_log(machine, slug) for slug in list_client_slugs(machine.paths)]
    logs = []
    for name, folder in folders:
        report = verify(folder, expected if name == folders[0][0] else None)
        logs.append(LogReport(log=name, report=report))
    return AuditCheck(ok=all(log.report.ok for log in logs), logs=logs)


def list_events(machine: Machine, client: str | None, lines: int, event: str | None) -> AuditList:
    """The last ``lines`` events of the server, or of one client; ``event`` picks one kind.

    Raises UnknownNameError.
    """
    name, folder = _find_log(machine, client)
    found: deque[AuditEvent] = deque(maxlen=lines)
    unreadable = []
    for item in read_events(folder):
        if isinstance(item, int):
            unreadable.append(item)
        elif event is None or item.event == event:
            found.append(item)
    return AuditList(log=name, events=list(found), unreadable=unreadable)


def _find_log(machine: Machine, client: str | None) -> tuple[str, Path]:
    if client is None:
        return "server", audit_dir(machine.paths.server_dir)
    slug = find_client(machine, client)
    return f"client {slug}", audit_dir(machine.paths.client_dir(slug))


def _where(found: AuditReport) -> str:
    return "" if found.problem_line is None else f" in line {found.problem_line}"


def _describe(event: AuditEvent) -> list[str]:
    at = event.at[:19].replace("T", " ")
    heading = f"{event.seq:>5}  {at}  {event.event:<17}  {_plain(event.actor)}"
    details = ", ".join(f"{name} {_format(value)}" for name, value in event.details.items())
    lines = [heading if len(heading) <= WIDTH else f"{heading[: WIDTH - 1]}…"]
    return [*lines, _wrap(details, _INDENT, "  ")] if details else lines


def _format(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _plain(str(value)) or "-"


def _minute(at: str) -> str:
    return at[:16].replace("T", " ")


def _plain(text: str) -> str:
    """``text`` without what a terminal would act on: others may have chosen it."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def _wrap(text: str, indent: str, hang: str) -> str:
    """``text`` within 80 columns, long words broken."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + hang,
        break_on_hyphens=False,
    )
