"""What is decided about certificates from a CA: the asking itself is in control/acme.

In reading order: `names` (groups of names, one certificate each), `schedule` (when the next attempt is
due), `ari` (when the CA wants it), `progress` (how far an order is, so that a crash goes on with it),
`faults` (what an answer of the CA means).
"""
