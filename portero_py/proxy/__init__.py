"""The data plane: asyncio protocols that move HTTP between clients and backends.

In reading order, which is the way of a request
    downstream/   listener, tls and sni, http1 or http2: bytes of a client become a request
    exchange      one request and its response: route, claim, send, relay, retry, release
    upstream/     pool and connector, http1: the connection to the backend, and its response
    access_log    the line that is left of it
What all of these know
    endpoints     the two ends of an exchange, and what they may call of it
    surroundings  what connections and exchanges ask of the process that they are in
    outcomes      what became of tries: told to health, the log and control; the retry budgets
    peer          who is at the other end of a client's connection
    replies       the responses that portero writes itself
    deadlines     one timer for everything
And `worker`, which composes all of it and is its life cycle. Only `run` knows the worker; only who receives a
request makes an exchange; only the connector knows which HTTP version a backend speaks.
"""
