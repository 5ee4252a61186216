"""The client's side: sockets and bytes become requests, and responses bytes.

In reading order: `listener` (from a bound socket to a protocol), `tls` (records), `sni` (which certificate)
with `ticket_keys` (sessions that every worker can resume), `http1` and `http2` (each the `Downstream` of its
exchanges), `leaving` (the last bytes of a connection). Beside them `connection` (what the process asks of any
of them, which of them live, and how they take leave) and `doors` (listeners that stop to accept when there is
no room).
"""
