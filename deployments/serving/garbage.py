"""How often Python looks for cycles of dead objects in a replica.

It looks through all objects whenever those that have stayed alive are a quarter more than at the last time. Serve
freezes what a replica made as it started, which counts for nothing then, so that requests that wait, and vectors that
are kept, soon are that quarter, again and again: a gateway with 2,000 requests in progress and 10,000 vectors in its
cache stopped two to three times a second for 200 to 400 ms, and found nothing. Cycles that die young, as those of
exceptions do, are found among the young.
"""

import gc

# Collections of the middle generation, each of which comes when some 7,000 objects more were made than freed: what dead
# cycles can hold that were not found young stays at some two million objects.
_FULL_AFTER = 300


def collect_old_seldom() -> None:
    """Look through all of this process's objects thirty times less often; through the young ones as before."""
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _FULL_AFTER)
