"""Pure protocol code: bytes to messages and back. No sockets, no clocks."""
