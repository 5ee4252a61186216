"""What Docker says of containers, as its API writes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any


def id_of(name: str) -> str:
    """The id of the container that the tests call so."""
    return hashlib.sha256(name.encode()).hexdigest()


def inspection(
    name: str,
    labels: Mapping[str, str] | None = None,
    *,
    networks: Mapping[str, str] | None = None,
    ports: tuple[str, ...] = ("8080/tcp",),
    mode: str = "",
    health: str = "",
    started: int = 1,
    stop_signal: str = "",
    **state: object,
) -> dict[str, Any]:
    """GET /containers/ID/json, with what matters and some of what does not."""
    networks = {"bridge": "172.17.0.2"} if networks is None else networks
    return {
        "Id": id_of(name),
        "Name": f"/{name}",
        "RestartCount": 0,
        "State": {
            "Status": "running",
            "Running": True,
            "Paused": False,
            "Restarting": False,
            "Dead": False,
            "StartedAt": f"2026-01-01T00:00:{started:02d}.5Z",
            **({"Health": {"Status": health, "FailingStreak": 0, "Log": []}} if health else {}),
            **state,
        },
        "Config": {
            "ExposedPorts": {port: {} for port in ports} or None,
            "Labels": dict({"portero.service": "app.example"} if labels is None else labels),
            **({"StopSignal": stop_signal} if stop_signal else {}),
        },
        "HostConfig": {"NetworkMode": mode or next(iter(networks), "none")},
        "NetworkSettings": {
            "Ports": dict.fromkeys(ports),
            "IPAddress": "",
            "Networks": {
                network: {
                    "IPAMConfig": None,
                    "IPAddress": "" if ":" in address else address,
                    "GlobalIPv6Address": address if ":" in address else "",
                }
                for network, address in networks.items()
            },
        },
    }
