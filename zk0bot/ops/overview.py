"""All that runs on this machine, and how to look at it."""

import contextlib

from zk0bot.errors import SessionAbsentError
from zk0bot.ops import record
from zk0bot.ops.machine import Machine
from zk0bot.ops.state import Status, get_server_status, list_clients


def get_status(machine: Machine) -> Status:
    """All that runs on this machine, and the last run.

    A run that a lost server has left behind is closed as failed.
    """
    clients = list_clients(machine.paths, machine.host).clients
    server = get_server_status(machine.paths, machine.host)
    if server.state == "stopped":
        with contextlib.suppress(OSError):  # a full disk; the next look closes it
            record.close_active_runs(machine.paths, "failed", "the server went away")
    return Status(
        server=server,
        clients=[client for client in clients if client.state != "stopped"],
        run=record.find_active_run(machine.paths) or record.find_last_run(machine.paths),
    )


def get_attach_command(machine: Machine, session: str) -> list[str]:
    """Command line that shows a running session. Raises SessionAbsentError."""
    if not machine.host.panes(session):
        raise SessionAbsentError(f"session {session} is not running", hint="zk0bot status")
    return machine.host.attach_command(session)
