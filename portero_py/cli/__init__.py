"""What a person types: `main` (the root command and its flags), `backends` (token, register, agent, explain),
`certs` (list, check, revoke, rollover).
"""
