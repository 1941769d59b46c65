"""Flower's SuperExec, with ClientApps forked from it instead of started anew.

A SuperExec starts a process for every message. Started from nothing, each spends 1.6 CPU-seconds
on imports; forked from a process that has them, a few milliseconds. Neither holds torch or CUDA,
which must not be forked. Same flags as ``flower-superexec``; flwr is pinned exactly.
"""

import gc
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec as superexec_loop
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supernode.runtime.run_clientapp import run_clientapp

from zk0bot.config.load import load_client_dir
from zk0bot.config.paths import order_flag
from zk0bot.federation import client_app
from zk0bot.federation.pace import hasten_pulls
from zk0bot.files import Flag

logger = logging.getLogger(__name__)
FLAG_POLL_S = 0.02
EAGER_S = 3.0
EAGER_NAP_S = 0.05
PRELOADED = client_app.app
"""Imported here so that every fork has it."""


class ForkingExecutor(SubprocessExecutor):
    """Forks for ClientApps; anything else starts as Flower starts it."""

    def __init__(self) -> None:
        self._children: set[int] = set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Run the ClientApp of ``spec`` in a child of this process."""
        if spec.task_type != TaskType.CLIENT_APP:
            return super().launch(spec)
        pid = os.fork()
        if pid == 0:
            _become_clientapp(spec)
        self._children.add(pid)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Take in the exit of children that have ended."""
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._children.discard(pid)
                if code := os.waitstatus_to_exitcode(status):
                    logger.warning("ClientApp process %d ended with status %d", pid, code)


class TaskWait:
    """How long the SuperExec sleeps between two questions for a task.

    Each question costs SuperNode and SuperExec milliseconds of CPU. An order that comes through the
    egress hop raises a flag; the task follows when its tensors are there.
    """

    def __init__(self, flag: Flag) -> None:
        self._flag = flag
        self._raised_at = -EAGER_S

    def sleep(self, seconds: float) -> None:
        """Until the flag is raised, or ``seconds``; briefly while an order is coming in."""
        end = time.monotonic() + seconds
        while (moment := time.monotonic()) < end:
            if self._flag.was_raised():
                self._raised_at = moment
            if moment - self._raised_at < EAGER_S:
                time.sleep(EAGER_NAP_S)
                return
            time.sleep(FLAG_POLL_S)


def _become_clientapp(spec: ExecutionSpec) -> NoReturn:
    """What ``flwr-clientapp`` does, in this process; it ends without the parent's clean-up."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        certificates = spec.root_certificates_path
        run_clientapp(
            runtime_api_address=spec.runtime_api_address,
            token=spec.token,
            insecure=spec.insecure,
            certificates=Path(certificates).read_bytes() if certificates else None,
            parent_pid=os.getppid(),
            runtime_dependency_install=False,
        )
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  os._exit would swallow it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Run the SuperExec until SIGTERM."""
    superexec_loop.get_executor = (  # type: ignore[attr-defined]  # the only way in, flwr 1.41.0
        lambda *args, **kwargs: ForkingExecutor()
    )
    hasten_pulls()
    vars(superexec_loop)["time"] = TaskWait(Flag(order_flag(load_client_dir())))
    gc.freeze()
    flower_superexec()


if __name__ == "__main__":
    main()
