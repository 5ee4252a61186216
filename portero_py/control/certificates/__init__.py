"""Certificates in a directory, as operators and ACME put them there.

In reading order: `files` (the directory, read: which pairs can be served, why the others cannot), `store`
(the table that is served, kept equal to it). What is decided about them is in `core.certificate_pairs` and
`core.certificates`.
"""
