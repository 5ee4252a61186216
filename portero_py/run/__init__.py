"""Processes, and what is put together in them.

In reading order: `main_process` (who stays while versions come and go) with `generation` and `channel` (what
one start of the program knows of it), `supervisor` (the composition root: one process, or a parent that forks
and watches),
`single_process` (everything on one loop), `processes` (children as their parent sees them), `children`
(what runs in them), `control_plane` (the control plane put together), `live_configuration` (the
configuration read again), `preflight` (what would keep it from working); then what these use:
`held_signals`, `signals`, `sockets`, `systemd`, `logs`, `tuning`, `slack` (memory given back), `debugging`
(state machines under watch).
"""
