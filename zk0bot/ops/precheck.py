"""What is refused before anything is started: addresses, data, servers that do not answer."""

import ipaddress
import ssl
from importlib.metadata import version
from pathlib import Path

from zk0bot.config.episode import read_episodes
from zk0bot.config.load import list_simulated_tasks
from zk0bot.config.models import ClientConfig, ServerConfig
from zk0bot.config.uri import parse_dataset_uri
from zk0bot.errors import ConfigError, ServiceError, UnknownNameError
from zk0bot.ops import enrolment
from zk0bot.ops.health import find_gateway
from zk0bot.records import GatewayHealth
from zk0bot.version import __version__


def refuse_unreachable(server: str, tls: ssl.SSLContext | None) -> GatewayHealth:
    """Raises ServiceError unless a zk0bot server of the same version answers at HOST:PORT.

    Without ``tls`` over plain HTTP.
    """
    host, port = _split_address(server)
    health = find_gateway(host, port, tls)
    if health is None:
        raise ServiceError(
            f"no zk0bot server answers at {server}",
            hint="zk0bot server start on the server machine; --server HOST:PORT names another",
        )
    for what, theirs, ours in (
        ("zk0bot", health.zk0bot_version, __version__),
        ("Flower", health.flwr_version, version("flwr")),
    ):
        if theirs != ours:
            raise ServiceError(
                f"the server at {server} runs {what} {theirs}, this machine {ours}",
                hint="install the same zk0bot version on both sides",
            )
    return health


def build_local_tls(config: ServerConfig) -> ssl.SSLContext | None:
    """To ask this machine's own gateway for its health; None with ``insecure``.

    Nothing is sent and nothing but health believed, so the certificate is not checked: an own one
    need not name this machine.
    """
    if config.insecure:
        return None
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def complete(config: ServerConfig) -> ServerConfig:
    """With an address that others can reach, where the server listens on all of them."""
    if config.listen_host != "0.0.0.0" or config.public_hosts:
        return config
    return config.model_copy(update={"public_hosts": (enrolment.find_primary_address(),)})


def local(host: str) -> str:
    """The address at which this machine itself reaches a listener on ``host``."""
    return "127.0.0.1" if host == "0.0.0.0" else host


def refuse_public(config: ServerConfig) -> None:
    """Raises ConfigError for a host that is no address of this machine, or for plain HTTP there."""
    host = config.listen_host
    try:
        address = ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ConfigError(
            f"host {host!r} is not an IPv4 address of this machine",
            hint="--host 0.0.0.0 listens on all; --public-host NAME is what clients use",
        ) from None
    if config.insecure and not address.is_loopback:
        raise ConfigError(
            f"host {host!r} is not localhost or 127.x.x.x, and --insecure encrypts nothing",
            hint="leave out --insecure",
        )
    if config.port == config.superlink_port:
        raise ConfigError(
            f"port and superlink-port are both {config.port}",
            hint="set ZK0BOT_PORT and ZK0BOT_SUPERLINK_PORT to different ones",
        )


def refuse_bad_data(config: ClientConfig) -> None:
    """Raises ConfigError for what is known to be wrong before anything starts."""
    read_episodes(config.episodes)
    uri = parse_dataset_uri(config.dataset_uri)
    if uri.kind == "local" and not Path(uri.value).expanduser().is_dir():
        raise ConfigError(
            f"there is no folder {uri.value}", hint="local:/path is a LeRobotDataset's folder"
        )
    if uri.kind == "sim":
        task, known = uri.value.partition("?")[0], list_simulated_tasks()
        if task not in known:
            raise UnknownNameError.of("simulated task", task, known)


def _split_address(server: str) -> tuple[str, int]:
    host, colon, port = server.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"server {server!r} is not HOST:PORT", hint="such as 127.0.0.1:9092")
    return host, int(port)
