"""args override the environment, unknown keys are refused by name, and every setting is documented."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from deployments.settings import EVERYDAY, Settings, absolute_log_url, first_problem, load

ROOT = Path(__file__).resolve().parents[1]


def refusal(args: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as refused:
        load(args)
    return first_problem(refused.value)


def test_args_win_and_the_environment_fills_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSERVE_MODEL__NAME", "from-environment")
    monkeypatch.setenv("MEMSERVE_STORE__EF", "99")
    settings = load({"model": {"device": "cpu"}, "store": {"ef": 64}})
    assert (settings.model.name, settings.model.device, settings.store.ef) == ("from-environment", "cpu", 64)
    assert load({"model": {"name": "from-args"}}).model.name == "from-args"
    assert load({}).store.ef == 99


def test_unknown_keys_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal({"modle": {}}) == "modle: unknown setting"
    assert refusal({"model": {"nmae": "x"}}) == "model.nmae: unknown setting"
    monkeypatch.setenv("MEMSERVE_MODEL__NMAE", "x")
    assert refusal({}) == "model.nmae: unknown setting"
    monkeypatch.delenv("MEMSERVE_MODEL__NMAE")
    monkeypatch.setenv("MEMSERVE_MODLE__NAME", "x")
    assert refusal({}) == "environment variable MEMSERVE_MODLE__NAME: unknown setting `modle`"


def test_the_variables_of_the_client_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSERVE_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("MEMSERVE_API_KEY", "ms_secret")
    assert load({}) == Settings()


def test_wrong_values_name_their_key() -> None:
    assert refusal({"model": {"device": "gpu"}}).startswith("model.device: ")
    assert refusal({"queue": {"max_batch_size": 0}}).startswith("queue.max_batch_size: ")
    assert refusal({"store": {"min_replicas": 3, "max_replicas": 2}}) == "store: min_replicas 3 is above max_replicas 2"
    assert refusal({"model": {"provider": "openai"}}) == "model: provider `openai` needs model.base_url"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load({}).model.name = "other"  # type: ignore[misc]


def test_the_shipped_config_is_valid() -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    load(config["applications"][0]["args"])


def sections(model: type[BaseModel], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += sections(kind, f"{path}{name}.")
        else:
            found.append((f"{path}{name}", field))
    return found


def test_every_setting_is_described_and_documented() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    for path, field in sections(Settings):
        assert field.description, path
        assert f"`{path}`" in page, path


def test_a_relative_sqlite_path_becomes_absolute() -> None:
    base = Path("/srv")
    assert absolute_log_url("sqlite:///data/m.db", base) == "sqlite:////srv/data/m.db"
    assert absolute_log_url("sqlite:////var/m.db", base) == "sqlite:////var/m.db"
    assert absolute_log_url("postgresql+psycopg://h/m", base) == "postgresql+psycopg://h/m"
    assert absolute_log_url("memory://", base) == "memory://"


def test_the_everyday_settings_are_twenty_of_all() -> None:
    paths = {path for path, _ in sections(Settings)}
    assert len(EVERYDAY) == len(set(EVERYDAY)) == 20
    assert set(EVERYDAY) <= paths


def test_every_description_is_a_sentence() -> None:
    for path, field in sections(Settings):
        assert field.description[0].isupper() or field.description[0] == "`", path
        assert field.description.endswith("."), path
