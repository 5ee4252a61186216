"""The backend's side: connections that are kept, made, and used for one exchange after the other.

In reading order: `connection` (what a pool asks of one, whatever its HTTP version), `pool` (which of them
takes a request), `connector` (how one is made) with `tls` (which context, and is it the right backend?),
`http1` (the `Upstream` of its exchanges).
"""
