"""What a person types: `start` (the entry), `plain_flags` (those of a proxy that is to run), `outcome` (exit
status and complaint), `main` (the root command and its flags), `backends` (token, register, agent, explain),
`certs` (list, check, revoke, rollover).
"""
