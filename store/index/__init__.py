"""Caches of the log, one per user: in memory, and as snapshots on local disk.

A cache holds nothing that the log did not hold at the cache's `version`. It catches up by applying the changes after
that version, in order. It is never rolled back or repaired: if it may be wrong, it is dropped and rebuilt from the log.
"""
