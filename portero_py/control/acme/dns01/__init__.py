"""The dns-01 challenge: a TXT record at the name, made and removed by portero.

In reading order: `records` (what is made, checked, written down and removed), `hook` (a program that makes
records), `updates` (or updates by RFC 2136), `zones` (where a record belongs, and who serves it), `questions`
(to name servers). The last three load dnspython, and are loaded when there is first a record to make.
"""
