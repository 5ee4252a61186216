"""The channel between the control plane and the workers: tables down, counters up.

In reading order: `feed` (publishing, whoever listens), `messages` (what is said when the workers are other
processes, as bytes), `server` (control's end), `client` (a worker's end).
"""
