"""The demonstration: makes a federation on this machine, runs it, compares, reports, stops it all.

It goes through the same functions as the commands do, below a state root of its own, so that a real
server or client on this machine is not disturbed.
"""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from zk0bot.config.models import ClientConfig, ServerConfig
from zk0bot.config.paths import Paths
from zk0bot.errors import ConfigError, RunError, SessionAbsentError, SessionExistsError
from zk0bot.files import private_dir, read_json, read_record, write_json
from zk0bot.ops import record, runs, services
from zk0bot.ops.child import Child
from zk0bot.ops.demo_plan import (
    DemoOptions,
    Owner,
    baseline_plan,
    build_client_config,
    build_run_config,
    build_server_config,
    choose_owners,
    policy_plan,
)
from zk0bot.ops.health import find_gateway
from zk0bot.ops.process import free_ports
from zk0bot.ops.services import Machine
from zk0bot.ops.specs import helper_process
from zk0bot.ops.state import find_trainer, list_client_slugs
from zk0bot.records import RunRecord, RunState, TrainerState, Verdict
from zk0bot.report.comparison import (
    ComparisonPlan,
    ComparisonProgress,
    ComparisonResult,
    PolicyScore,
)
from zk0bot.report.demo import (
    CHART_NAME,
    FEDERATED,
    PAGE_NAME,
    RESULT_NAME,
    DemoResult,
    Film,
    ModelResult,
    build_label,
    build_model_result,
    judge_demo,
)
from zk0bot.report.history import load_policy_losses

FIRST_SERVER_PORT = 19092
POLL_S = 0.2
