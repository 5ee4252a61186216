"""Service -> backend: one file a policy.

In reading order: `policy` (what one is and may decide by), `weights` (how much each backend is to get),
`round_robin`, `least_requests`, `random_two`, `rendezvous` with `source` and `hash` (the policies that there
are), `choice` (who is tried before whom, in every policy), `balancers` (the table of policies, and all
services of one worker).
"""
