"""The demo: `proxy` (starts everything, prints what to try), `backends`, `self_signed` (its certificates)."""
