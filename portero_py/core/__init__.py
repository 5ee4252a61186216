"""Decisions, pure: no asyncio, socket, clock or randomness; times are arguments.

In reading order: `model` (the nouns), `names` (what a host or service name is), `registry` (the leases),
`routing_table` (what the data plane needs of them), `router` (host -> service), `health` (what a worker saw
of backends), `balancing/` (service -> backend), `retry_budget` (what may be sent twice); then `auth` and
`admission` (who may register), `certificates` and `challenges` (what TLS presents), `certificate_pairs`
(which files may become that), `counters` (what a worker counts), `expiry_queue` (what ends next), `acme/`
(when and what to ask a CA).
"""
