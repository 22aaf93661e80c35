"""What Serve's controller checks besides: a wrong `user_config` is refused before a replica is told of it.

Serve hands `user_config` on as it is, and stops a replica that refuses it. Ray calls `check_user_configs` as its
controller starts (deployments/serving/environment.py), and from then on such a config is a failed deploy like any
other wrong one: `serve status` says why, and what ran before runs on, all of it. Where Ray was started without that,
replicas refuse it for themselves (deployments/serving/live_settings.py).
"""

from collections.abc import Mapping
from typing import Any

from ray.serve._private import application_state
from ray.serve.schema import ServeApplicationSchema

from deployments.settings import LIVE, live, load

BUILD_APP = "deployments.app:build_app"


def check_user_configs() -> None:
    """Have the controller of this process check each config of memserve that it applies."""
    apply = application_state.override_deployment_info

    def checked(deployments: Any, config: ServeApplicationSchema | None, *rest: Any, **options: Any) -> Any:
        if config is not None and config.import_path == BUILD_APP:
            _check(config.model_dump(exclude_unset=True))
        return apply(deployments, config, *rest, **options)

    application_state.override_deployment_info = checked


def _check(application: Mapping[str, Any]) -> None:
    """Raises ValueError, which Serve shows in its status."""
    settings = load(application.get("args") or {})
    for deployment in application.get("deployments") or []:
        if deployment["name"] in LIVE:  # of another one Serve says that there is none
            live(settings, deployment["name"], deployment.get("user_config"))
