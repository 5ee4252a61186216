"""Service -> backend: one file a policy.

In reading order: `policy` (what one is and may decide by), `round_robin` (the policy that there is),
`choice` (who is tried before whom, in every policy), `balancers` (the table of policies, and all services
of one worker).
"""
