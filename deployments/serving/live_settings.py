"""Applies the `user_config` of a deployment: settings that change while a replica runs.

An invalid `user_config` changes nothing: the replica keeps its settings and logs the reason. Raising an error would be
worse. Serve stops a replica whose `reconfigure` raises, and its replacement would fail when it starts: one mistyped
name would take the deployment down. `memserve check` and `memserve serve` refuse an invalid `user_config` before
anything is deployed.
"""

import logging
from collections.abc import Mapping
from typing import Any

from deployments.serving import logs
from deployments.settings import Settings, with_user_config

logger = logging.getLogger("memserve.settings")


class LiveSettings:
    """The current settings of one replica.

    Attributes:
        settings: the settings of `args:`, overridden by the last valid `user_config`.
    """

    def __init__(self, settings: Settings, deployment: str) -> None:
        self._base = settings
        self._deployment = deployment
        self.settings = settings

    def take(self, user_config: Mapping[str, Any] | None) -> bool:
        """Change `settings` and the log level. Returns False, and changes nothing, if `user_config` is invalid."""
        try:
            self.settings = with_user_config(self._base, self._deployment, user_config)
        except ValueError as error:
            logger.error("user_config refused, the settings are unchanged: %s", error)
            return False
        logs.set_level(self.settings.log_level)
        logger.info("user_config applied: %s", user_config)
        return True
