"""The settings: what they are, and where they come from.

In reading order: `model` (the validated configuration, frozen), `sources` (flag > environment > file >
default, one table of all settings), `values` (how each kind of value is read and refused).
"""
