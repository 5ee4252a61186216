"""The options that several modules of commands share: who speaks to the registration API, and about whom."""

from __future__ import annotations

from typing import Annotated

import typer

from portero_py.control.api.body import MAX_WAIT

RegisterUrl = Annotated[
    str | None,
    typer.Option(
        "--register-url",
        "--api",
        metavar="URL",
        help="The registration API. Default http://127.0.0.1:18080.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.", show_default=False)]
InstanceId = Annotated[
    str, typer.Option("--instance-id", metavar="ID", help="Names the backend in its service.")
]
AnyHost = Annotated[str, typer.Option("--host", metavar="IP", help="The backend's address.")]
AnyPort = Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="The backend's port.")]
Wait = Annotated[
    float,
    typer.Option(
        "--wait", metavar="SECONDS", min=0, max=MAX_WAIT, help="Wait so long at most; too short: status 1."
    ),
]
RegisterSecret = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The shared secret of all backends.", show_default=False)
]
RegisterSecretFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="A file that holds it.", show_default=False)
]


def flags_of(ctx: typer.Context) -> dict[str, str | list[str] | bool | None]:
    """What was given, by the flags' names without their dashes."""
    return {name.replace("_", "-"): value or None for name, value in ctx.params.items()}
