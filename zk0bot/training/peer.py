"""Who is at the other end of a Unix socket."""

import os
import socket
import struct

_CREDENTIALS = struct.Struct("3i")
"""pid, user, group (struct ucred)."""


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as this account.

    True where the system does not say (no Linux): the folder of the socket is private as well.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    return bool(user == os.geteuid())
