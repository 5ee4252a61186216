"""The registration API: an endpoint or a page is a file here, and a row in `application`.

In reading order: `application` (the routes), `registration` (POST and DELETE of /register), `body` (what they
may say), `backends` (GET /backends), `actions` (drain, ready, pause, stop, resume), `waits` (answers that
come later), `status` (/health, /livez, /readyz), `metrics` (/metrics), `answers` and `problems` (what is
answered when all is well, and when not).
"""
