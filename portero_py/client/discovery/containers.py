"""One container, as an inspection shows it: whether it serves, where, and which registrations that makes.

The rules
- It serves while it runs and is not paused; one with a HEALTHCHECK, while it is healthy.
- Its port is the label's, else the only TCP port that it exposes.
- Its address is the one in the network of `portero.network`, which may be written without the project of
  Compose or the stack of Swarm before it; else in the network that the operator named; else in the only one
  that it has. Of several the first by name is taken, the same one on every start, but never Swarm's `ingress`
  while there is another.
- On the host's network it is where the host is, and in another container's network where that one is.
- A lease is named by engine, container and port: a container that is replaced never renews another's lease.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import ip_address
from typing import Any, Final

from portero_py.client.discovery.labels import Wish, few, read, shown
from portero_py.client.registrar import Registration

_ID: Final = re.compile(r"[0-9a-f]{12,64}", re.ASCII)
_TCP: Final = re.compile(r"([1-9][0-9]{0,4})/tcp", re.ASCII)
_SHORT: Final = 12
_PORTS_SHOWN: Final = 10

#: Who wrote the network's first name, as the labels of Compose and Swarm tell.
_PROJECTS: Final = ("com.docker.compose.project", "com.docker.stack.namespace")
_INGRESS: Final = "ingress"
_HOST: Final = "host"
_CONTAINER: Final = "container:"


@dataclass(frozen=True, slots=True)
class Options:
    """The operator's choice, for containers without `portero.network` and for those on the host's network."""

    network: str = ""
    host_address: str = "127.0.0.1"
    ttl_seconds: int = 60


@dataclass(frozen=True, slots=True)
class Container:
    """What matters of an inspection. `why_not` says why it does not serve, "" when it does."""

    id: str
    name: str
    why_not: str = ""
    started_at: float = 0.0  # by Docker's clock, seconds
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    network_mode: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)  # name -> address
    exposed: tuple[int, ...] = ()

    @property
    def inside(self) -> str:
        """The container whose network this one uses, "" when it has its own."""
        mode = self.network_mode
        return mode.removeprefix(_CONTAINER) if mode.startswith(_CONTAINER) else ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be registered of a container that serves; what is wrong with its labels, a clause each."""

    registrations: tuple[Registration, ...] = ()
    complaints: tuple[str, ...] = ()


def parse(inspection: object) -> Container | None:
    """What an inspection says, however odd; None when it names no container."""
    said = _mapping(inspection)
    container_id = _text(said.get("Id"))
    if not is_id(container_id):
        return None
    state, config = _mapping(said.get("State")), _mapping(said.get("Config"))
    settings = _mapping(said.get("NetworkSettings"))
    ports = {**_mapping(config.get("ExposedPorts")), **_mapping(settings.get("Ports"))}
    found = [_TCP.fullmatch(str(port)) for port in ports]
    return Container(
        container_id,
        _text(said.get("Name")).removeprefix("/") or container_id[:_SHORT],
        why_not=_why_not(state),
        started_at=_seconds(_text(state.get("StartedAt"))),
        stop_signal=_text(config.get("StopSignal")),
        labels=texts(config.get("Labels")),
        network_mode=_text(_mapping(said.get("HostConfig")).get("NetworkMode")),
        networks={
            str(name): _address_of(_mapping(endpoint))
            for name, endpoint in _mapping(settings.get("Networks")).items()
        },
        exposed=tuple(sorted({int(port[1]) for port in found if port is not None})),
    )


def wanted(
    container: Container, options: Options, engine: str = "", around: Container | None = None
) -> Wanted:
    """The registrations of a container, whether it serves or not.

    `engine` tells the containers of one Docker from another's (`engine_name`). `around` is the container
    whose network it uses, where it has none of its own.
    """
    reading = read(container.labels)
    complaints = list(reading.complaints)
    registrations: dict[tuple[str, int], Registration] = {}
    for wish in reading.wishes:
        port, wrong = _port(container, wish)
        host = ""
        if not wrong:
            host, wrong = _host(container, wish.network, options, around)
        if wrong:
            complaints.append(wrong)
        if not host:
            continue
        if (wish.service, port) in registrations:
            complaints.append(f"{wish.service} at port {port} is wanted twice: the first is taken")
            continue
        registrations[wish.service, port] = Registration(
            service_name=wish.service,
            host=host,
            port=port,
            ttl_seconds=options.ttl_seconds,
            use_tls=wish.use_tls,
            instance_id=f"{prefix_of(engine)}{container.id[:_SHORT]}-{port}",
            weight=wish.weight,
            health_path=wish.health_path,
            max_in_flight=wish.max_in_flight,
            protocol=wish.protocol,
        )
    return Wanted(tuple(registrations.values()), few(complaints))


def engine_name(info: Mapping[str, Any]) -> str:
    """A short name for one Docker, from what it says of itself; "" when it does not.

    Machines that were cloned may share an ID, but hardly the host name too.
    """
    said = f"{_text(info.get('ID'))}\n{_text(info.get('Name'))}"
    return hashlib.sha256(said.encode()).hexdigest()[:8] if said.strip() else ""


def prefix_of(engine: str) -> str:
    """How the instance ids of one Docker's containers begin."""
    return f"docker-{engine}-" if engine else "docker-"


def is_id(text: str) -> bool:
    """Whether it may be the id of a container, which goes into paths and instance ids."""
    return _ID.fullmatch(text) is not None


def texts(value: object) -> dict[str, str]:
    """The texts of a JSON object: labels, attributes."""
    return {str(name): text for name, text in _mapping(value).items() if isinstance(text, str)}


# Private


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _seconds(time: str) -> float:
    try:
        return max(datetime.fromisoformat(time).timestamp(), 0.0)
    except (ValueError, OverflowError, OSError):
        return 0.0


def _why_not(state: Mapping[str, Any]) -> str:
    if state.get("Running") is not True or state.get("Restarting") or state.get("Dead"):
        return "it does not run"
    if state.get("Paused"):
        return "it is paused"
    health = _text(_mapping(state.get("Health")).get("Status"))
    if health == "starting":
        return "it is not healthy yet"
    return "it is unhealthy" if health == "unhealthy" else ""


def _address_of(endpoint: Mapping[str, Any]) -> str:
    for key in ("IPAddress", "GlobalIPv6Address"):
        try:
            return str(ip_address(_text(endpoint.get(key))))
        except ValueError:
            continue
    return ""


def _port(container: Container, wish: Wish) -> tuple[int, str]:
    """The port, and what is wrong."""
    if wish.port:
        return wish.port, ""
    if len(container.exposed) == 1:
        return container.exposed[0], ""
    if not container.exposed:
        return 0, "it exposes no port: say which by portero.port"
    listed = ", ".join(map(str, container.exposed[:_PORTS_SHOWN]))
    more = ", ..." if len(container.exposed) > _PORTS_SHOWN else ""
    return 0, f"it exposes the ports {listed}{more}: say which by portero.port"


def _host(container: Container, network: str, options: Options, around: Container | None) -> tuple[str, str]:
    """The address, and what is wrong: with both, it is a guess."""
    if container.inside:
        if around is None:
            return "", f"the container whose network it uses, {container.inside[:_SHORT]}, is not there"
        if around.inside:
            return "", f"the container whose network it uses, {around.name}, has none of its own"
        container = around
    addresses = {name: address for name, address in container.networks.items() if address}
    if network:
        name = _find(container, network, addresses)
        if name:
            return addresses[name], ""
        if not _is_on_host(container) or network != _HOST:
            return "", f"it has no address in network {shown(network)}, only in: {_listed(addresses)}"
    if _is_on_host(container):
        return options.host_address, ""
    name = _find(container, options.network, addresses) if options.network else ""
    if name:
        return addresses[name], ""
    names = sorted(set(addresses) - {_INGRESS}) or sorted(addresses)
    if not names:
        return "", "it has no address in any network"
    if options.network:
        return addresses[names[0]], (
            f"it has no address in network {shown(options.network)}, the one in {shown(names[0])} is taken"
        )
    if len(names) > 1:
        return addresses[names[0]], (
            f"it is in the networks {', '.join(names)}, its address in {names[0]} is taken: "
            "say which by portero.network or --network"
        )
    return addresses[names[0]], ""


def _find(container: Container, network: str, addresses: Mapping[str, str]) -> str:
    """The network's full name, "" when the container is not in it."""
    projects = [container.labels[label] for label in _PROJECTS if container.labels.get(label)]
    names = [network, *(f"{project}_{network}" for project in projects)]
    return next((name for name in names if name in addresses), "")


def _is_on_host(container: Container) -> bool:
    return container.network_mode == _HOST or _HOST in container.networks


def _listed(addresses: Mapping[str, str]) -> str:
    return ", ".join(sorted(addresses)) or "none"
