"""memserve beside other servers: `make bench-peers`."""
