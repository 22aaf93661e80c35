"""What all deployments do with `user_config`: take what is right, refuse what is wrong and go on as before.

Serve stops a replica whose `reconfigure` raises, and the next one would fail as it starts: a wrong key would take the
deployment down. Serve's controller refuses it before (deployments/serving/controller.py); where it did not, a wrong
`user_config` changes nothing here, and the log says why.
"""

import logging
from collections.abc import Mapping
from typing import Any

from deployments.settings import Settings, live

logger = logging.getLogger("ray.serve")


class LiveSettings:
    """The settings of one replica, as they are now."""

    def __init__(self, settings: Settings, deployment: str) -> None:
        self._base = settings
        self._deployment = deployment
        self._level: int | None = None  # that `logging_config` set, while `log_level` overrides it
        self.settings = settings

    def take(self, user_config: Mapping[str, Any] | None) -> bool:
        """Change `settings` and the log level; False where `user_config` is wrong, and then nothing has changed."""
        try:
            self.settings = live(self._base, self._deployment, user_config)
        except ValueError as error:
            logger.error("refused, the settings stay as they are: %s", error)
            return False
        if self.settings.log_level is not None:
            self._level = logger.level if self._level is None else self._level
            logger.setLevel(self.settings.log_level)
        elif self._level is not None:
            logger.setLevel(self._level)
            self._level = None
        logger.info("user_config taken: %s", user_config)
        return True
