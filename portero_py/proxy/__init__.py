"""The data plane: asyncio protocols that move HTTP between clients and backends."""
