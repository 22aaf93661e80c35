"""Which partition a user belongs to: a stable hash, the same in every process and every version.

A hint that keeps a user on one warm replica, and a bounded label for metrics; never a matter of correctness.
"""

import hashlib


def partition_of(tenant: str, user_id: str, partitions: int) -> int:
    """The user's partition in [0, partitions)."""
    digest = hashlib.blake2b(f"{len(tenant)}:{tenant}{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % partitions
