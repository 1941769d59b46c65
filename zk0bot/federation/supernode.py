"""Flower's SuperNode with shorter waits; same flags as ``flower-supernode``."""

import os
import shutil
import sys
import time
from types import SimpleNamespace

from flwr.common.constant import APP_DIR
from flwr.supercore.utils import get_flwr_home
from flwr.supernode import main as runtime_api
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

from zk0bot.config.load import load_client_dir
from zk0bot.config.paths import app_lock
from zk0bot.federation.app_watch import AppWatch, start_afresh
from zk0bot.federation.http_layers import with_whole_bodies
from zk0bot.federation.pace import hasten
from zk0bot.files import private_dir

LONGEST_NAP_S = 0.1


def empty_apps() -> None:
    """Leave no unpacked bundle behind: Flower would run what lies there without another look.

    Only this account may write to the folder from now on.
    """
    apps = get_flwr_home() / APP_DIR
    if apps.is_symlink():
        apps.unlink()
    shutil.rmtree(apps, ignore_errors=True)
    private_dir(private_dir(get_flwr_home()) / APP_DIR)


def hasten_supernode(watch: AppWatch) -> None:
    """Let the SuperNode nap 0.1 s where it sleeps 3 s after an empty pull or 0.5 s for a reply.

    The gateway holds an empty pull anyway, so this does not ask more often. While it waits for a
    reply, ``watch`` looks whether there can be one. Hard-coded in
    flwr.supernode.start_client_internal of 1.41.0.
    """

    def nap(seconds: float) -> None:
        time.sleep(min(seconds, LONGEST_NAP_S))
        watch.look()

    module = vars(start_client_internal)
    assert module["time"] is time
    module["time"] = SimpleNamespace(sleep=nap)
    module["_push_messages"] = watch.guard(module["_push_messages"])
    module["_pull_and_store_message"] = start_afresh(module["_pull_and_store_message"])


def take_whole_bodies() -> None:
    """What the ClientApp sends reaches Flower's handlers in one piece, not in many of 64 KiB."""
    module = vars(runtime_api)
    create = module["create_app"]
    module["create_app"] = lambda **settings: with_whole_bodies(create(**settings))


def main() -> None:
    """Run the SuperNode until SIGTERM, or until its loop ends.

    Flower's own process lives on without its loop, connected to nothing; this one ends, so that it
    is started again.
    """
    empty_apps()
    hasten_supernode(AppWatch(app_lock(load_client_dir())))
    hasten()
    take_whole_bodies()
    code = 1
    try:
        flower_supernode()
        sys.stderr.write("the SuperNode has lost its server\n")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
