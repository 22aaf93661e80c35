"""Compares memserve with other servers: `make bench-peers`."""
