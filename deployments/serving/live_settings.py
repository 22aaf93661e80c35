"""Settings that change while a replica runs: what every deployment does with its `user_config`.

A wrong `user_config` changes nothing: the replica keeps its settings and logs why. Raising an error would be worse:
Serve stops a replica whose `reconfigure` raises, and the next one would fail as it starts, so that one mistyped name
would take the deployment down. `memserve check` and `memserve serve` refuse a wrong `user_config` before anything is
deployed.
"""

import logging
from collections.abc import Mapping
from typing import Any

from deployments.serving import logs
from deployments.settings import Settings, with_user_config

logger = logging.getLogger("memserve.settings")


class LiveSettings:
    """The settings of one replica as they are now.

    Attributes:
        settings: those of `args:`, changed by the last `user_config` that was right.
    """

    def __init__(self, settings: Settings, deployment: str) -> None:
        self._base = settings
        self._deployment = deployment
        self.settings = settings

    def take(self, user_config: Mapping[str, Any] | None) -> bool:
        """Change `settings` and the log level. Returns False, and changes nothing, if `user_config` is wrong."""
        try:
            self.settings = with_user_config(self._base, self._deployment, user_config)
        except ValueError as error:
            logger.error("user_config refused, the settings stay as they are: %s", error)
            return False
        logs.set_level(self.settings.log_level)
        logger.info("user_config applied: %s", user_config)
        return True
