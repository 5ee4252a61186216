"""What a request passes on its way into a service that has a policy: each gate is a file here.

Read `gate` first, the contract of all.
"""
