"""What must stand in the environment where Ray is started; what Serve's controller is told there to refuse."""

import shlex
import subprocess
import sys
from typing import Any

import pytest
from ray.serve._private import application_state
from ray.serve.schema import ServeApplicationSchema

from deployments.__main__ import main
from deployments.serving.controller import check_user_configs
from deployments.serving.environment import CONTROLLER_CALLBACK, ENVIRONMENT

MEMSERVE = "deployments.app:build_app"


def test_a_shell_takes_the_environment_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--environment"]) == 0
    printed = capsys.readouterr().out
    for name, value in ENVIRONMENT.items():
        script = f'{printed}printf %s "${name}"'
        assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == value
    assert shlex.split(printed.splitlines()[0])[0] == "export"


def test_a_shell_is_not_told_of_a_callback_that_a_controller_cannot_import(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "false")  # finds nothing
    assert main(["--environment"]) == 0
    said = capsys.readouterr()
    assert CONTROLLER_CALLBACK not in said.out
    assert "RAY_SERVE_ENABLE_HA_PROXY" in said.out
    assert said.err.startswith("memserve is not installed here")


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[ServeApplicationSchema | None]:
    """The configs that Serve goes on with, in a controller that checks them."""
    gone_on_with: list[ServeApplicationSchema | None] = []

    def override(deployments: dict[str, Any], config: ServeApplicationSchema | None, *rest: Any) -> dict[str, Any]:
        gone_on_with.append(config)
        return {"deployments": deployments, "rest": rest}

    monkeypatch.setattr(application_state, "override_deployment_info", override)
    check_user_configs()
    return gone_on_with


def apply(**config: Any) -> Any:
    return application_state.override_deployment_info({"Gateway": 1}, ServeApplicationSchema(**config), "rest")  # type: ignore[arg-type, dict-item]


@pytest.mark.parametrize(
    "config",
    [
        {"import_path": MEMSERVE},
        {"import_path": MEMSERVE, "deployments": [{"name": "Gateway"}, {"name": "Store", "user_config": None}]},
        {
            "import_path": MEMSERVE,
            "args": {"queue": {"max_batch_tokens": 64}},
            "deployments": [{"name": "Embedder", "user_config": {"queue": {"max_batch_tokens": 128}}}],
        },
        # Not ours to judge: of a deployment that is not there Serve says so itself.
        {"import_path": MEMSERVE, "deployments": [{"name": "Embeder", "user_config": {"queue": 5}}]},
        {"import_path": "another:app", "deployments": [{"name": "Gateway", "user_config": {"queue": 5}}]},
    ],
)
def test_what_is_right_goes_on(applied: list[ServeApplicationSchema | None], config: dict[str, Any]) -> None:
    assert apply(**config) == {"deployments": {"Gateway": 1}, "rest": ("rest",)}
    assert applied == [ServeApplicationSchema(**config)]


def test_an_application_without_a_config_goes_on(applied: list[ServeApplicationSchema | None]) -> None:
    application_state.override_deployment_info({}, None)
    assert applied == [None]


@pytest.mark.parametrize(
    ("deployments", "reason"),
    [
        (
            [{"name": "Embedder"}, {"name": "Gateway", "user_config": {"gateway": {"max_body_bites": 4096}}}],
            "user_config of Gateway: gateway.max_body_bites: not a setting that it can change while it runs",
        ),
        (
            [{"name": "Embedder", "user_config": {"queue": {"max_batch_tokens": 7}}}],
            "user_config of Embedder: queue.max_batch_tokens: Input should be greater than or equal to 8",
        ),
    ],
)
def test_what_is_wrong_goes_no_further(
    applied: list[ServeApplicationSchema | None], deployments: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(ValueError, match="user_config of") as refused:  # Serve shows it in its status
        apply(import_path=MEMSERVE, deployments=deployments)
    assert str(refused.value) == reason
    assert applied == []
