"""The control plane: leases, certificates, the registration API. Plain aiohttp, off the hot path.

In reading order: `leases` (whoever grants or ends one does it here), `providers/` (where leases come from
beside the API), `api/` (where backends join, and operators look), `snapshot` (leases on disk) with `slots`
(whose file is which), `kept_leases` (leases in memory that outlives the process), `certificates/` (a
directory, served), `acme/` (certificates that come by themselves); then what these use: `open_server` (what
stands before an aiohttp server), `plain_http` (port 80), `tasks` (what runs for as long as the process does).

`run.control_plane` puts it together. The workers are reached by `feed` alone.
"""
