"""The control plane: registration, certificates, metrics. Plain aiohttp, off the hot path."""
