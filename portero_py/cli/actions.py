"""drain, ready, pause, stop and resume: from flags to the API, from its answers to text and an exit status.

A drain or a ready of a service is one of each of its backends. All of them begin before any is waited for,
and one that leaves meanwhile is left out. The exit status is 0 when all is as it was to be, and what was
waited for has come.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Annotated, Any, Final

import typer

from portero_py.cli.api import OpenApi, require_text
from portero_py.cli.options import (
    AnyHost,
    AnyPort,
    AsJson,
    InstanceId,
    RegisterSecret,
    RegisterSecretFile,
    RegisterUrl,
    Wait,
    flags_of,
)
from portero_py.control.api.body import MAX_MESSAGE, MAX_PAUSE
from portero_py.core.names import normalise_service_name
from portero_py.errors import ConfigError, RegistrationRefused

ServiceName = Annotated[str, typer.Option("--service", metavar="NAME", help="The service's name.")]

Found = dict[str, Any]


#: The commands that `change_backends` is, and their help.
OF_BACKENDS: Final = {
    "drain": (
        "Send nothing new to a backend, or to all of a service; --wait until nothing is in flight there."
    ),
    "ready": "End the drain of a backend, or of all of a service; --wait until they are ready.",
}


def change_backends(
    ctx: typer.Context,
    service: ServiceName,
    instance_id: InstanceId = "",
    host: AnyHost = "",
    port: AnyPort = 0,
    wait: Wait = 0.0,
    register_url: RegisterUrl = None,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    as_json: AsJson = False,
) -> None:
    """Do what the command is called: one of `OF_BACKENDS`."""
    verb = str(ctx.command.name)
    require_text({"service": service, "instance_id": instance_id, "host": host})
    if bool(host) != bool(port):
        raise ConfigError(f"{verb} needs --host and --port together")
    which: Found = {}
    if instance_id:
        which = {"instance_id": instance_id}
    elif host:
        which = {"host": host, "port": port}
    api = OpenApi(flags_of(ctx), os.environ)
    found = asyncio.run(_change(api, verb, service, which, wait))
    if as_json:
        typer.echo(json.dumps({"service_name": service, "backends": found}))
    else:
        typer.echo("\n".join(map(_line, found)) if found else f"{service}: no backend")
    is_missing = any(each["in_flight"] if verb == "drain" else each["state"] != "ready" for each in found)
    raise typer.Exit(1 if not found or (wait and is_missing) else 0)


def pause(
    ctx: typer.Context,
    service: ServiceName,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            metavar="N",
            min=1,
            max=MAX_PAUSE,
            help="How long a request is held, then it is a 503.",
        ),
    ],
    register_url: RegisterUrl = None,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    as_json: AsJson = False,
) -> None:
    """Hold the requests of a service until it is resumed."""
    flags = flags_of(ctx)
    typer.echo(_change_service("pause", flags, service, as_json=as_json, seconds=seconds))


def stop(
    ctx: typer.Context,
    service: ServiceName,
    message: Annotated[
        str,
        typer.Option(
            "--message", metavar="TEXT", help=f"What clients are shown, up to {MAX_MESSAGE} characters."
        ),
    ] = "",
    register_url: RegisterUrl = None,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    as_json: AsJson = False,
) -> None:
    """Answer the requests of a service with 503 until it is resumed."""
    flags = flags_of(ctx)
    typer.echo(_change_service("stop", flags, service, as_json=as_json, message=message))


def resume(
    ctx: typer.Context,
    service: ServiceName,
    register_url: RegisterUrl = None,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    as_json: AsJson = False,
) -> None:
    """Serve the requests of a service that was paused or stopped."""
    typer.echo(_change_service("resume", flags_of(ctx), service, as_json=as_json))


# Private


def _change_service(
    verb: str, flags: dict[str, str | list[str] | bool | None], service: str, *, as_json: bool, **more: object
) -> str:
    """What to print."""
    body = {"service_name": service, **more}
    require_text(body)
    found = asyncio.run(_post(OpenApi(flags, os.environ), f"/services/{verb}", body))
    if as_json:
        return json.dumps(found)
    held = f": a request is held for up to {found['seconds']:g} s" if "seconds" in found else ""
    return f"{found['service_name']}: {found['state']}{held}"


async def _post(api: OpenApi, path: str, body: Found) -> Found:
    async with api:
        return await api.post(path, body)


async def _change(api: OpenApi, verb: str, service: str, which: Found, wait_seconds: float) -> list[Found]:
    path, ends_at = f"/backends/{verb}", time.monotonic() + wait_seconds
    async with api:
        if which:
            return [await api.post(path, {"service_name": service, **which}, wait_seconds)]
        meant = await _backends_of(api, service)
        if wait_seconds:
            for each in meant:
                await _post_if_there(api, path, each, 0.0)
        answers = []
        for each in meant:
            answer = await _post_if_there(api, path, each, max(ends_at - time.monotonic(), 0.0))
            if answer is not None:
                answers.append(answer)
        return answers


async def _backends_of(api: OpenApi, service: str) -> list[Found]:
    listing = await api.backends()
    name = normalise_service_name(service)
    return [
        {"service_name": name, "instance_id": backend["instance_id"]}
        for each in listing["services"]
        if each["service_name"] == name
        for backend in each["backends"]
    ]


async def _post_if_there(api: OpenApi, path: str, which: Found, wait_seconds: float) -> Found | None:
    try:
        return await api.post(path, which, wait_seconds)
    except RegistrationRefused as error:
        if error.reason_given == "no_such_lease":
            return None
        raise


def _line(found: Found) -> str:
    host = f"[{found['host']}]" if ":" in found["host"] else found["host"]
    address = f"{host}:{found['port']}"
    instance = "" if found["instance_id"] == address else f" ({found['instance_id']})"
    return f"{found['service_name']} at {address}{instance}: {found['state']}, {found['in_flight']} in flight"
