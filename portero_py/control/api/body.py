"""The body of a registration: JSON in, a LeaseRequest or a Release out, each fault with its field's name.

It is read within bounds of size and time; the rest knows no HTTP.

Unknown fields are ignored, so that newer agents may say more. Optional fields may also be null: that is how
many serialisers write "none". A JSON true is no number. Whatever passes is safe to log.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, Final

import orjson
from aiohttp import web

from portero_py.core.model import Backend, LeaseRequest
from portero_py.core.names import normalise_service_name
from portero_py.errors import BackendRefused, BadField, BadJson, BodyTimeout, NotJson, RegistrationTooLarge

MAX_BODY: Final = 64 * 1024

#: Seconds that an admitted peer has for sending its body.
BODY_TIMEOUT: Final = 10.0

MAX_TTL: Final = 86_400
MAX_WEIGHT: Final = 1_000
MAX_IN_FLIGHT: Final = 1_000_000

_INSTANCE_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_HEALTH_PATH: Final = re.compile(r"/[\x21-\x7e]{0,1023}")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
_ZONE: Final = re.compile(r"[A-Za-z0-9._-]{1,15}")  # an interface's name (IFNAMSIZ) or number
_BROADCAST: Final = IPv4Address("255.255.255.255")

_PROTOCOLS: Final = ("http1", "h2", "h2c")


@dataclass(frozen=True, slots=True)
class Release:
    """Which lease a DELETE means: by `instance_id` or, when that is "", by `host` and `port`."""

    service: str
    instance_id: str = ""
    host: str = ""
    port: int = 0


async def read_json(request: web.Request) -> Mapping[str, Any]:
    """The JSON object that a request brings. Raises NotJson, RegistrationTooLarge, BodyTimeout, BadJson."""
    if request.content_type != "application/json":
        raise NotJson("the Content-Type must be application/json")
    if "Content-Encoding" in request.headers:
        raise NotJson("the body must not be compressed")
    return parse_json(await _read(request))


def parse_json(data: bytes) -> Mapping[str, Any]:
    """The JSON object in a body. Raises BadJson."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadJson("the body is not valid JSON") from error
    if not isinstance(body, dict):
        raise BadJson("the body must be a JSON object")
    return body


def lease_request(body: Mapping[str, Any]) -> LeaseRequest:
    """What a POST asks for. Raises BadField."""
    use_tls = _boolean(body, "use_tls")
    backend = Backend(
        host=_host(body),
        port=_port(body),
        use_tls=use_tls,
        protocol=_protocol(body),
        tls_fingerprint=_fingerprint(body, use_tls),
    )
    return LeaseRequest(
        service=_service(body),
        backend=backend,
        ttl_seconds=_number(_required(body, "ttl_seconds"), "ttl_seconds", MAX_TTL),
        instance_id=_instance_id(body),
        weight=_optional_number(body, "weight", 1, MAX_WEIGHT),
        health_path=_health_path(body),
        max_in_flight=_optional_number(body, "max_in_flight", 0, MAX_IN_FLIGHT),
    )


def release(body: Mapping[str, Any]) -> Release:
    """What a DELETE means. Raises BadField."""
    service, instance_id = _service(body), _instance_id(body)
    if instance_id:
        return Release(service, instance_id)
    if body.get("host") is None and body.get("port") is None:
        raise BadField("instance_id", "say which lease: instance_id, or host and port")
    return Release(service, host=_host(body), port=_port(body))


def check_network(host: str, networks: Sequence[IPv4Network | IPv6Network]) -> None:
    """Raises BackendRefused unless `host` (normalised) lies in one of `networks`; no networks allow all."""
    address = ip_address(host)
    if networks and not any(address in network for network in networks):
        raise BackendRefused(f"backends at {host} may not register here (--backend-cidr)")


# Private


async def _read(request: web.Request) -> bytes:
    too_large = RegistrationTooLarge(f"the body is over {MAX_BODY} bytes")
    if (request.content_length or 0) > MAX_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_large
    except TimeoutError as error:
        raise BodyTimeout(f"the body did not come within {BODY_TIMEOUT:.0f} seconds") from error
    except (web.RequestPayloadError, ConnectionError) as error:
        raise BadJson("the body broke off") from error
    return bytes(body)


def _required(body: Mapping[str, Any], field: str) -> Any:
    value = body.get(field)
    if value is None:
        raise BadField(field, f"{field} is missing")
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadField(field, f"{field} must be a string")
    return value


def _optional_text(body: Mapping[str, Any], field: str) -> str:
    value = body.get(field)
    return "" if value is None else _text(value, field)


def _number(value: Any, field: str, greatest: int) -> int:
    if type(value) is not int or not 1 <= value <= greatest:
        raise BadField(field, f"{field} must be a whole number from 1 to {greatest}")
    return value


def _optional_number(body: Mapping[str, Any], field: str, default: int, greatest: int) -> int:
    value = body.get(field)
    return default if value is None else _number(value, field, greatest)


def _boolean(body: Mapping[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise BadField(field, f"{field} must be true or false")
    return value


def _service(body: Mapping[str, Any]) -> str:
    name = normalise_service_name(_text(_required(body, "service_name"), "service_name"))
    if name is None:
        raise BadField(
            "service_name",
            "service_name must be a host name (without a port, in xn-- form), an address or *.example.com",
        )
    return name


def _host(body: Mapping[str, Any]) -> str:
    text = _text(_required(body, "host"), "host")
    if text.startswith("["):
        raise BadField("host", "host is written without brackets")
    try:
        address = ip_address(text)
    except ValueError as error:
        raise BadField("host", "host must be an IPv4 or IPv6 address") from error
    if isinstance(address, IPv6Address):
        if address.scope_id is not None and not _ZONE.fullmatch(address.scope_id):
            raise BadField("host", "host has a zone id that is no interface")
        # One spelling for one address: also what --backend-cidr looks at.
        address = address.ipv4_mapped or address
    if address.is_unspecified or address.is_multicast or address == _BROADCAST:
        raise BadField("host", f"host must be one machine's own address, not {address}")
    return str(address)


def _port(body: Mapping[str, Any]) -> int:
    return _number(_required(body, "port"), "port", 65_535)


def _instance_id(body: Mapping[str, Any]) -> str:
    text = _optional_text(body, "instance_id")
    if text and not _INSTANCE_ID.fullmatch(text):
        raise BadField("instance_id", "instance_id must be 1 to 128 visible ASCII characters")
    return text


def _protocol(body: Mapping[str, Any]) -> str:
    text = _optional_text(body, "protocol") or "http1"
    if text not in _PROTOCOLS:
        raise BadField("protocol", f"protocol must be one of {', '.join(_PROTOCOLS)}")
    if text != "http1":
        raise BadField("protocol", f"{text} backends are not supported by this version: use http1")
    return text


def _health_path(body: Mapping[str, Any]) -> str:
    text = _optional_text(body, "health_path")
    if text and not _HEALTH_PATH.fullmatch(text):
        raise BadField("health_path", "health_path must begin with / and hold visible ASCII characters only")
    return text


def _fingerprint(body: Mapping[str, Any], use_tls: bool) -> str:
    text = _optional_text(body, "tls_fingerprint").replace(":", "").lower()
    if not text:
        return ""
    if not _FINGERPRINT.fullmatch(text):
        raise BadField(
            "tls_fingerprint",
            "tls_fingerprint must be the certificate's SHA-256: 64 hex digits, colons allowed",
        )
    if not use_tls:
        raise BadField("tls_fingerprint", "tls_fingerprint needs use_tls")
    return text
