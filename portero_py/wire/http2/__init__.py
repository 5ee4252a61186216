"""HTTP/2 (RFC 9113): what both roles of a connection have in common, and the server as a thin role on top.

In the order in which to read it; a file needs only those above it:

    frames.py         frame headers, settings, error codes
    hpack.py          header lists to blocks and back (RFC 7541)
    heads.py          from header lists to heads: what is malformed goes no further
    blocks.py         header blocks, gathered and decoded in order
    floods.py         how much nonsense one connection may send
    ended.py          what is remembered of streams that have ended
    output.py         frames that are to be sent, the windows that hold them back, who waits for his turn
    stream.py         one stream: a message that is sent, one that is received
    streams.py        the streams of one connection, and what the peer may send on them
    connection.py     one connection: bytes in, method calls and bytes out
    server_stream.py  the server's stream: a request is received, a response is sent
    server.py         the server's connection: it reads heads of requests, and refuses

A client is two files like the last two: its stream sends heads of requests, and its connection opens streams
and reads heads of responses.
"""
