"""Settings from files, the environment and flags: the only module that reads either.

Precedence: defaults < preset of model-name < TOML file < ``ZK0BOT_*`` < flags. Keys are accepted
in kebab-case and snake_case; the names of zk0, the prototype, are the only aliases.
"""

import contextlib
import difflib
import json
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zk0bot.config.catalogue import Catalogue, DatasetEntry
from zk0bot.config.idle import find_idle
from zk0bot.config.models import (
    ClientConfig,
    PolicyConfig,
    RunConfig,
    ServerConfig,
    SessionsConfig,
    Settings,
)
from zk0bot.config.paths import Paths, configs_dir
from zk0bot.config.spelling import kebab, snake_keys
from zk0bot.config.uri import parse_dataset_uri
from zk0bot.errors import ConfigError, UnknownNameError

TABLES = ("run", "policy", "server", "sessions", "client")
PREFIX = "ZK0BOT_"
SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "HTTP_PROXY", "HTTPS_PROXY",
    "http_proxy", "https_proxy",
)  # fmt: skip
"""Variables that only trainers get, through a private file; a proxy's address may hold a password,
and nobody else asks anything of the outside but our own hops, which use none."""
NOT_SUPPORTED_YET = frozenset({"use_wandb", "hf_repo_id"})
"""Run-configuration keys of zk0 that have no effect here; refused by name unless they are off."""
_OFF = ("", '""', "''", "0", "0.0", "false", "none", "off")
_INHERITED = (
    "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TERM", "TMPDIR", "TMUX_TMPDIR",
    "XDG_RUNTIME_DIR", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HUB_OFFLINE", "NO_PROXY", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
_SESSION_KEYS = set(SessionsConfig.model_fields) - {"run"}
_KINDS = (RunConfig, PolicyConfig, ServerConfig, ClientConfig)
_OWN_VARIABLES = ("ZK0BOT_HOME", "ZK0BOT_SESSION", "ZK0BOT_CLIENT_DIR", "ZK0BOT_ROOT",
                  "ZK0BOT_RELEASE_URL", "ZK0BOT_COMPLETE")  # fmt: skip
_CLIENT_ALIASES = {"DATASET_URI": "dataset_uri", "DATASET_NAME": "name"}
_SERVER_ADDRESS_ALIASES = ("ZK0_SERVER_IP", "ZK0_SERVER_URL")
"""In rising precedence: the address that names its port wins."""


@dataclass(frozen=True, kw_only=True)
class Loaded[T: Settings]:
    """A settings group, and what the operator should be told about how it came about."""

    config: T
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where settings come from, in rising precedence."""

    file: Path | None = None
    """Hand-written TOML; also zk0's ``pyproject.toml``."""
    flags: Mapping[str, Any] | None = None
    """Command-line flags by field name; None values are flags that were not given."""
    pairs: tuple[str, ...] = ()
    """``key=value`` texts of ``--set``; the value is read as TOML, else as text."""
    defaults: Mapping[str, Any] | None = None
    """What a command prefers where nobody says anything else; of a run only."""


def load_paths() -> Paths:
    """The state root: ``ZK0BOT_HOME``, else ``~/.zk0bot``; where it leads, if that is a link."""
    home = os.environ.get("ZK0BOT_HOME")
    root = Path(home).expanduser().absolute() if home else Path.home() / ".zk0bot"
    return Paths(root.resolve() if root.is_symlink() else root)


def load_client_dir() -> Path:
    """The private folder of the client that this process belongs to (``ZK0BOT_CLIENT_DIR``)."""
    try:
        return Path(os.environ["ZK0BOT_CLIENT_DIR"])
    except KeyError:
        raise ConfigError(
            "ZK0BOT_CLIENT_DIR is not set", hint="zk0bot client start sets it for its processes"
        ) from None


def find_client_dir() -> Path | None:
    """``load_client_dir``, or None in a SuperExec of the server."""
    return load_client_dir() if "ZK0BOT_CLIENT_DIR" in os.environ else None


def inherited_environment() -> dict[str, str]:
    """The variables of this process that started processes get as well; without secrets."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}


def find_secrets(paths: Paths) -> dict[str, str]:
    """Tokens from the environment, and ``hf_token`` in the state root where it names none.

    Raises ConfigError when other users can read that file.
    """
    secrets = {name: os.environ[name] for name in SECRETS if os.environ.get(name)}
    token_path = paths.root / "hf_token"
    if "HF_TOKEN" not in secrets and token_path.is_file():
        if token_path.stat().st_mode & 0o077:
            raise ConfigError(f"other users can read {token_path}", hint=f"chmod 600 {token_path}")
        secrets["HF_TOKEN"] = token_path.read_text().strip()
    return secrets


def load_run(
    sources: Sources, env: Mapping[str, str] | None = None, *, default_model: str = ""
) -> Loaded[RunConfig]:
    """Settings of a run, of ``default_model`` where they name none.

    Raises ConfigError (exit status 2) naming the key and its value.
    """
    environment = _environment(env)
    layers = _layers(sources, "run", RunConfig, environment)
    policy_sources = Sources(file=sources.file, pairs=_policy_pairs(sources))
    policy_layers = _layers(policy_sources, "policy", PolicyConfig, environment)
    merged, policy = _merge(layers), _merge(policy_layers)
    name = merged.get("model_name") or policy.get("model_name") or default_model
    name = name or RunConfig().model_name
    model = {"model_name": _make_absolute(str(name))}
    preset = _preset_path(model["model_name"])
    values = {**(sources.defaults or {}), **_read_preset(preset, "run", RunConfig)}
    values |= {**merged, **model}
    values["policy"] = {**_read_preset(preset, "policy", PolicyConfig), **policy, **model}
    values["eval_datasets"] = _resolve_evaluation(values.get("eval_datasets", ()))
    config = _validate(RunConfig, values)
    notices = (
        *_epoch_notices(merged),
        *_off_notices(sources),
        *find_idle(config, merged),
        *_unknown_variables(env),
    )
    return Loaded(config=config, notices=notices)


def load_server(sources: Sources, env: Mapping[str, str] | None = None) -> Loaded[ServerConfig]:
    """Settings of the server machine."""
    layers = _layers(sources, "server", ServerConfig, _environment(env))
    config = _validate(ServerConfig, _merge(layers))
    sessions, notices = _load_sessions(sources.file, env)
    config = config.model_copy(update={"sessions": sessions})
    return Loaded(config=config, notices=notices or _unknown_variables(env))


def _load_sessions(
    file: Path | None, env: Mapping[str, str] | None
) -> tuple[SessionsConfig | None, tuple[str, ...]]:
    """Table ``[sessions]`` with the settings of its runs, and notices; None without the table."""
    if file is None or "sessions" not in _read_toml(file):
        return None, ()
    values = _check_keys(_read_table(file, "sessions"), _SESSION_KEYS, f"in {file}")
    sessions = _validate(SessionsConfig, values)
    source = file.parent / Path(sessions.config).expanduser() if sessions.config else file
    flags = {
        "num_server_rounds": sessions.rounds or None,
        "min_fit_clients": sessions.min_fit_clients or None,
    }
    loaded = load_run(Sources(file=source, flags=flags), env)
    output_dir = str(Path(loaded.config.output_dir).expanduser().absolute())
    run = loaded.config.model_copy(update={"output_dir": output_dir})
    return sessions.model_copy(update={"run": run}), loaded.notices


def load_client(sources: Sources, env: Mapping[str, str] | None = None) -> Loaded[ClientConfig]:
    """Settings of one client; a dataset's name in the catalogue becomes its URI."""
    environment = _environment(env)
    values = {**_zk0_client_values(environment)}
    notices = (*_address_notices(environment), *_unknown_variables(env))
    values |= _merge(_layers(sources, "client", ClientConfig, environment))
    values["dataset_uri"] = resolve_dataset(values.get("dataset_uri", ""))
    config = _validate(ClientConfig, values)
    folders = tuple(str(Path(name).expanduser().absolute()) for name in config.model_folders)
    config = config.model_copy(update={"model_folders": folders})
    return Loaded(config=config, notices=notices)


def load_catalogue(file: Path | None = None) -> Catalogue:
    """The datasets of ``file``, else of ``configs/datasets.toml``.

    Raises ConfigError for unknown keys, bad URIs, a name or a set that is there twice, and a set
    that both trains and measures.
    """
    return _validate(Catalogue, _read_toml(file or configs_dir() / "datasets.toml"))


def list_simulated_tasks() -> list[str]:
    """Tasks of ``sim:`` URIs: the catalogue names them all."""
    uris = [parse_dataset_uri(entry.uri) for entry in load_catalogue().clients]
    return [uri.value for uri in uris if uri.kind == "sim"]


def resolve_dataset(text: str) -> str:
    """The URI of a dataset given as URI or as a name of the catalogue."""
    if not text:
        raise ConfigError(
            "no dataset given", hint="zk0bot client start sim:touch-red, or set DATASET_URI"
        )
    return _resolve(text, load_catalogue().clients)


def _resolve(text: str, entries: Iterable[DatasetEntry]) -> str:
    if ":" in text or "/" in text:
        uri = parse_dataset_uri(text)
        if uri.kind == "local":
            return f"local:{Path(uri.value).expanduser().absolute()}"
        return str(uri)
    uris = {entry.name: entry.uri for entry in entries}
    if text not in uris:
        raise UnknownNameError.of("dataset", text, uris)
    return uris[text]


def _resolve_evaluation(texts: Any) -> Any:
    """The server's evaluation sets, each given as URI or as a name of the catalogue."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return texts  # refused with the other values
    catalogue = load_catalogue()
    return tuple(_resolve(text, (*catalogue.evaluation, *catalogue.clients)) for text in texts)


def _environment(env: Mapping[str, str] | None) -> Mapping[str, str]:
    return os.environ if env is None else env


def _layers(
    sources: Sources, table: str, kind: type[Settings], env: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Values of one table from each source, in rising precedence."""
    known = _known_keys(kind)
    file_values = _read_table(sources.file, table)
    pairs = dict(_split_pair(pair) for pair in sources.pairs)
    flags = {key: value for key, value in (sources.flags or {}).items() if value is not None}
    return [
        _check_keys(file_values, known, f"in {sources.file}"),
        _from_environment(env, kind),
        _parse_values(_check_keys(pairs, known, "given to --set"), kind),
        flags,
    ]


def _merge(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for layer in layers for key, value in layer.items()}


def _known_keys(kind: type[Settings]) -> set[str]:
    return set(kind.model_fields) - {"policy", "sessions"}


def _policy_pairs(sources: Sources) -> tuple[str, ...]:
    return tuple(
        pair.removeprefix("policy.") for pair in sources.pairs if pair.startswith("policy.")
    )


def _check_keys(values: Mapping[str, Any], known: set[str], where: str) -> dict[str, Any]:
    """``values`` with keys in snake_case; raises for one that is not known."""
    given = snake_keys(values)
    _refuse_unsupported(given, where)
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name.startswith("policy.") or name in NOT_SUPPORTED_YET:
            continue
        if name not in known:
            raise UnknownNameError.of("setting", kebab(name), map(kebab, known))
        checked[name] = value
    return checked


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError naming every key of zk0 that is set, not off, and would do nothing."""
    refused = sorted(NOT_SUPPORTED_YET & set(values) - set(_find_off(values)))
    if refused:
        names = ", ".join(repr(kebab(name)) for name in refused)
        plural = ("s", "are", "them; they") if len(refused) > 1 else ("", "is", "it; it")
        raise ConfigError(
            f"setting{plural[0]} {names} {where} {plural[1]} not supported yet",
            hint=f"remove {plural[2]} would have no effect",
        )


def _find_off(values: Mapping[str, Any]) -> list[str]:
    """Keys of missing features that are off."""
    return [k for k, value in values.items() if k in NOT_SUPPORTED_YET and _is_off(value)]


def _is_off(value: Any) -> bool:
    return str(value).lower() in _OFF


def _off_notices(sources: Sources) -> Iterable[str]:
    pairs = dict(_split_pair(pair) for pair in sources.pairs)
    for values in (_read_table(sources.file, "run"), pairs):
        for name in _find_off(snake_keys(values)):
            yield f"{kebab(name)} has no effect: zk0bot has no such feature yet"


def _from_environment(env: Mapping[str, str], kind: type[Settings]) -> dict[str, Any]:
    """``ZK0BOT_<FIELD>`` of each field of ``kind``."""
    given = {
        name: env[variable]
        for name in sorted(_known_keys(kind))
        if (variable := PREFIX + name.upper()) in env
    }
    return _parse_values(given, kind)


def _unknown_variables(env: Mapping[str, str] | None) -> tuple[str, ...]:
    """A notice for each ``ZK0BOT_`` variable that no setting reads."""
    known = {PREFIX + name.upper() for kind in _KINDS for name in _known_keys(kind)}
    given = {name for name in _environment(env) if name.startswith(PREFIX)}
    return tuple(
        f"{name} has no effect: there is no such setting"
        for name in sorted(given - known - set(_OWN_VARIABLES))
    )


def _zk0_client_values(env: Mapping[str, str]) -> dict[str, Any]:
    """What the prototype's variables say."""
    values = {field: env[name] for name, field in _CLIENT_ALIASES.items() if env.get(name)}
    for name in _SERVER_ADDRESS_ALIASES:
        if env.get(name):
            address = env[name].split("://")[-1].rstrip("/")
            values["server"] = address if ":" in address else f"{address}:{ServerConfig().port}"
    return values


def _address_notices(env: Mapping[str, str]) -> Iterable[str]:
    ignored, used = _SERVER_ADDRESS_ALIASES
    if env.get(ignored) and env.get(used):
        yield f"{ignored} has no effect: {used}={env[used]} is set too"


def _read_table(file: Path | None, table: str) -> dict[str, Any]:
    if file is None:
        return {}
    content = _read_toml(file)
    if "tool" in content:
        zk0_config = content["tool"].get("flwr", {}).get("app", {}).get("config", {})
        return dict(zk0_config) if table == "run" else {}
    for name in content:
        if name not in TABLES:
            raise UnknownNameError.of(f"table in {file}", name, TABLES)
    values = content.get(table, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{table!r} in {file} is not a table", hint=f"write [{table}]")
    return values


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no file {file}", hint="check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} is not valid TOML: {error}",
            hint='a table is [run], a setting local-steps = 40, texts in quotes: name = "red"',
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error


def preset_of(model_name: str) -> str:
    """Name of the shipped file with the settings for a model."""
    return "tiny" if model_name == "tiny" else "smolvla"


def _preset_path(model_name: str) -> Path:
    return configs_dir() / f"{preset_of(model_name)}.toml"


def _read_preset(preset: Path, table: str, kind: type[Settings]) -> dict[str, Any]:
    return _check_keys(_read_table(preset, table), _known_keys(kind), f"in {preset}")


def _make_absolute(model_name: str) -> str:
    """A local model folder by its whole path: trainers run in folders of their own."""
    folder = Path(model_name).expanduser()
    return str(folder.absolute()) if model_name != "tiny" and folder.is_dir() else model_name


def _split_pair(pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {pair!r} is not key=value", hint="--set local-steps=40")
    return key.strip(), value.strip()


def _parse_values(texts: Mapping[str, str], kind: type[Settings]) -> dict[str, Any]:
    return {
        name: _parse_value(text, kind.model_fields[name].annotation) for name, text in texts.items()
    }


def _parse_value(text: str, annotation: Any) -> Any:
    """Text as it is where text is wanted; a list also as ``a,b``; else what TOML reads."""
    if annotation is str:
        return text
    with contextlib.suppress(tomllib.TOMLDecodeError):
        value = tomllib.loads(f"value = {text}")["value"]
        is_truth_for_number = isinstance(value, bool) and annotation is not bool
        return text if is_truth_for_number else value
    if typing.get_origin(annotation) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _epoch_notices(values: Mapping[str, Any]) -> Iterable[str]:
    if values.get("local_epochs") and "local_steps" not in values:
        yield (
            f"local-epochs = {values['local_epochs']} means passes over the data; zk0 counted "
            "optimizer steps under this name: use local-steps for those"
        )


def _validate[T: Settings](kind: type[T], values: Mapping[str, Any]) -> T:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        hint = next(filter(None, map(_find_near, found)), None)
        raise ConfigError("; ".join(map(_explain, found)), hint=hint) from None


def _find_near(item: Any) -> str | None:
    """The value of a known set that is most like the one that is none of it."""
    if item["type"] != "literal_error":
        return None
    known = re.findall(r"'([^']*)'", item["ctx"]["expected"])
    near = difflib.get_close_matches(str(item["input"]).lower(), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else None


def _explain(item: Any) -> str:
    """One line of a pydantic error: the key, what is wrong, the value."""
    key = ".".join(kebab(str(part)) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # a contradiction: the message names the values
        return ": ".join(filter(None, (key, message)))
    if item["type"] == "extra_forbidden":
        return f"unknown setting {key!r}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {json.dumps(item['input'], default=str)}"
