"""memserve beside what people use today: `make bench-peers`."""
