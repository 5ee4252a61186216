"""Where leases come from beside the API: a source is a file here.

Read `provider` first, the contract of all; then `static`, a fixed list, the simplest of them.
"""
