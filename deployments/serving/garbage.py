"""Makes Python search a replica less often for cycles of dead objects.

Python searches all objects whenever the objects that survived have grown by a quarter since the last full search. Serve
freezes the objects that a replica made as it started, and frozen objects do not count. Waiting requests and cached
vectors therefore soon make up that quarter, again and again: a gateway with 2,000 requests in progress and 10,000
vectors in its cache stopped two to three times a second, for 200 to 400 ms each, and found nothing. Cycles that die
young, such as those of exceptions, are found by the searches of young objects, which this module does not change.
"""

import gc

# Collections of the middle generation before a full one. Each runs after about 7,000 objects were made and not freed,
# so that dead cycles that were not found young hold at most about two million objects.
_FULL_AFTER = 300


def collect_old_seldom() -> None:
    """Search all objects of this process thirty times less often than by default, and young objects as before."""
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _FULL_AFTER)
