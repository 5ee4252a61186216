"""Pure protocol code: bytes to messages and back. No sockets, no clocks.

In the order in which to read it:

    message.py       the one vocabulary: heads of requests and responses, whatever the HTTP version
    headers.py       which fields mean something to a proxy, and what it says of itself in them
    framing.py       bodies of HTTP/1: lengths and chunks
    http1.py         heads of HTTP/1, both ways
    http2/           HTTP/2, from frames to a server's connection
    websocket.py     where the frames of a WebSocket end, and how to take leave of its client
    client_hello.py  what a TLS client says first
"""
