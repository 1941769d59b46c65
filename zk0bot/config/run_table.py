"""Tables of settings of a run, as experiments and search spaces hold them in TOML.

Settings come from the file alone, so that the same file is the same experiment everywhere: neither
``ZK0BOT_*`` nor the tables of another file take part.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zk0bot.config.load import Sources, load_run
from zk0bot.config.models import PolicyConfig, RunConfig
from zk0bot.config.spelling import kebab, snake_keys
from zk0bot.errors import ConfigError, UnknownNameError

_OURS = {
    "seed": "seeds says it",
    "output_dir": "--output says it",
    "eval_datasets": "all are evaluated on the same sets",
    "eval_scenes": "scenes says how many there are",
    "start_from": "all start from the same policy",
    "min_fit_clients": "all owners take part: clients says how many",
    "local_epochs": "steps are what all have in common: use local-steps",
}
"""Settings of a run that are the experiment's own."""
_RULE_KEYS = ("strategy", "aggregation", "proximal_mu")


def find_shipped(folder: Path, kind: str, name: str) -> Path:
    """The file ``name``, or ``folder``/NAME.toml; UnknownNameError with the nearest name."""
    if name.endswith(".toml") or "/" in name:
        return Path(name).expanduser()
    known = {path.stem: path for path in folder.glob("*.toml")}
    if name not in known:
        raise UnknownNameError.of(kind, name, known)
    return known[name]


def read_toml(path: Path, *, hint: str) -> dict[str, Any]:
    """The file's tables, keys in snake_case; ConfigError, with ``hint`` where there is no file."""
    try:
        return snake_keys(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", hint=hint) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def check_run(table: Any, where: str) -> dict[str, Any]:
    """Settings of a run by field name, those of the policy with ``policy.`` before them.

    UnknownNameError for a key that is none, ConfigError for one that is the experiment's own.
    """
    values = snake_keys(check_table(table, where))
    policy = snake_keys(check_table(values.pop("policy", {}), f"policy {where}"))
    refuse_unknown(values, set(RunConfig.model_fields) - {"policy"}, f"setting {where}")
    refuse_unknown(policy, set(PolicyConfig.model_fields), f"setting of the policy {where}")
    for key in values:
        if key in _OURS:
            raise ConfigError(f"{kebab(key)} cannot be set {where}", hint=_OURS[key])
    return values | {f"policy.{key}": value for key, value in policy.items()}


def build_run(values: Mapping[str, Any], clients: Any) -> RunConfig:
    """The run of all ``clients`` with these settings, named as ``check_run`` does."""
    policy = {key: value for key, value in values.items() if key.startswith("policy.")}
    flags = {key: value for key, value in values.items() if key not in policy}
    pairs = tuple(f"{key}={to_text(value)}" for key, value in policy.items())
    return load_run(
        Sources(flags={**flags, "min_fit_clients": clients}, pairs=pairs), env={}
    ).config


def without_rule(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a policy that is trained in one place is trained with."""
    return {key: value for key, value in values.items() if key not in _RULE_KEYS}


def check_table(value: Any, where: str) -> dict[str, Any]:
    """``value``, which must be a table; ConfigError."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is not a table", hint="write [run], [settings.NAME], [space]")
    return value


def refuse_unknown(values: Mapping[str, Any], known: set[str], kind: str) -> None:
    """UnknownNameError for the first key that is not ``known``."""
    for key in values:
        if key not in known:
            raise UnknownNameError.of(kind, kebab(key), map(kebab, known))


def explain(error: ValidationError) -> str:
    """What pydantic refuses, in one line, keys as they stand in files."""
    lines = []
    for item in error.errors():
        key = ".".join(kebab(str(part)) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(": ".join(filter(None, (key, message))))
    return "; ".join(lines)


def to_text(value: Any) -> str:
    """A value as ``--set KEY=VALUE`` takes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ",".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
