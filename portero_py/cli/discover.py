"""discover: from flags to who keeps the containers of a machine registered.

Docker is found as Docker's own commands find it: DOCKER_HOST, and for TLS over TCP DOCKER_TLS_VERIFY and
DOCKER_CERT_PATH.
"""

from __future__ import annotations

import asyncio
import os
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Final

import typer

from portero_py.cli import backends
from portero_py.cli.api import require_text
from portero_py.cli.options import RegisterSecret, RegisterSecretFile, RegisterUrl, flags_of
from portero_py.client.discovery.containers import Options
from portero_py.client.discovery.docker import discover
from portero_py.client.discovery.engine import DEFAULT_HOST, Address, parse_address
from portero_py.config import sources
from portero_py.config.values import shown
from portero_py.errors import ConfigError
from portero_py.run import logs

if TYPE_CHECKING:
    from portero_py.config.sources import Environ

app: Final = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _option(help_text: str, metavar: str = "TEXT") -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(metavar=metavar, help=help_text, show_default=False)
    return option


@app.callback()
def sources_of_backends() -> None:
    """Register backends that something else knows of."""


@app.command()
def docker(
    ctx: typer.Context,
    docker: Annotated[
        str | None,
        _option(f"Where Docker is. Default DOCKER_HOST, or {DEFAULT_HOST}; also tcp://host:port.", "URL"),
    ] = None,
    network: Annotated[
        str, _option("The network of containers that name none by portero.network.", "NAME")
    ] = "",
    host_address: Annotated[
        str, _option("Where containers on the host's network are. Default 127.0.0.1.", "IP")
    ] = "127.0.0.1",
    ttl: Annotated[
        int, typer.Option("--ttl", metavar="SECONDS", min=5, max=86400, help="The leases' length.")
    ] = 60,
    register_url: RegisterUrl = None,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    jwt_hmac_key: Annotated[str | None, _option("The key that signs tokens, taken as it is.", "KEY")] = None,
    jwt_hmac_key_file: Annotated[str | None, _option("A file that holds it.", "FILE")] = None,
    jwt_kid: Annotated[str | None, _option("The kid of the key that signs.", "KID")] = None,
    jwt_audience: Annotated[str | None, _option("The aud that tokens must have.")] = None,
    jwt_issuer: Annotated[str | None, _option("The iss that tokens must have.")] = None,
    log: Annotated[str | None, _option("error, warn, info (default) or debug.", "LEVEL")] = None,
) -> None:
    """Keep containers registered as their labels say (portero.service, ...), until SIGTERM or Ctrl-C.

    It speaks to Docker, and to the registration API as an agent does: the proxy itself never sees Docker.
    """
    require_text({"network": network})
    flags = flags_of(ctx)
    options = Options(network, _address(host_address), ttl)
    where, api = find(docker or "", os.environ), backends.api(flags, os.environ)
    logs.set_up(sources.read_one("log", flags, os.environ) or "info", os.environ)
    asyncio.run(discover(api, where, options))


def find(given: str, environ: Environ) -> Address:
    """Where Docker is. Raises ConfigError."""
    host = given or environ.get("DOCKER_HOST") or DEFAULT_HOST
    cert_path = ""
    if environ.get("DOCKER_TLS_VERIFY"):
        cert_path = environ.get("DOCKER_CERT_PATH") or os.path.expanduser("~/.docker")  # noqa: PTH111 - where nobody has a home, this raises nothing
    return parse_address(host, cert_path)


# Private


def _address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise ConfigError(f"--host-address: {shown(text)} is no IP address") from None
