"""How a connection to a backend is made: which protocol over which transport, in which time.

The pools know no HTTP version (`connection.py`); here it is chosen. Another one is another branch here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from portero_py.errors import ConnectTimeout
from portero_py.proxy.upstream.http1 import UpstreamHttp1

if TYPE_CHECKING:
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.proxy.upstream.connection import UpstreamConnection
    from portero_py.proxy.upstream.pool import BackendPool
    from portero_py.proxy.upstream.tls import UpstreamTls


class HttpConnector:
    """The `Connector` of a worker's pools."""

    def __init__(self, surroundings: Surroundings, tls: UpstreamTls) -> None:
        self._surroundings = surroundings
        self._tls = tls

    async def connect(self, pool: BackendPool) -> UpstreamConnection:
        """Connect to the backend of `pool`, where the connection is kept when it is idle.

        Raises ConnectTimeout when it takes too long, UpstreamTlsFailed when it is not the backend that it
        should be, and whatever the loop raises (OSError, ssl.SSLError).
        """
        surroundings = self._surroundings
        backend = pool.backend
        context = self._tls.context(backend) if backend.use_tls else None
        seconds = pool.patience.connect
        try:
            async with asyncio.timeout(seconds):
                transport, connection = await surroundings.loop.create_connection(
                    lambda: UpstreamHttp1(surroundings, pool),
                    backend.host,
                    backend.port,
                    ssl=context,
                    server_hostname=(pool.server_name or backend.host) if context else None,
                )
        except TimeoutError as failure:
            text = f"backend {backend.address} did not answer within {seconds:g} s"
            raise ConnectTimeout(text) from failure
        if context is not None:
            try:
                self._tls.check_pin(backend, transport)
            except BaseException:  # raised on: nobody has the transport yet
                transport.abort()
                raise
        return connection
