"""Certificates from a CA, without anybody's doing. What is decided about them is in `core.acme`.

In reading order: `renewals` (all certificates, for as long as portero runs), `wanted` (which names), `looks`
(what there is to do about each), `repeats` (nothing over and over), `order` (one certificate's way from the
CA to its folder), `challenges` (what is shown to the CA meanwhile), `files` and `folder` (the state
directory, the certificate directory), `pairs` (keys and certificates), `locks` (between instances).

Talking to the CA: `clients` (one for all orders), `account`, `client` (the protocol), `network` and `replies`
(requests, answers), `daemon_threads` (where that blocks).
"""
