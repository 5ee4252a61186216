"""portero-py: the reverse proxy that backends join by themselves."""

__version__ = "0.1.0"
