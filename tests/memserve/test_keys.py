"""`memserve keys` on a log: what it makes and prints, and its exit status."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from memserve import command
from store import Key, Store, credential_of


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """A store on the log, as of a server that runs meanwhile."""
    store = Store.open(url, dim=4, model="test")
    yield store
    store.close()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command.memserve, ["keys", *arguments], prog_name="memserve")


def find(store: Store, secret: str) -> Key | None:
    credential = credential_of(secret)
    assert credential is not None
    return store.find_keys([credential])[0]


def test_a_key_that_is_made_is_found_by_a_running_server(store: Store, url: str) -> None:
    result = run("create", "--log", url, "--tenant", "acme", "--user", "ann", "--label", "phone", "--expires", "90d")
    assert result.exit_code == 0
    key = find(store, result.stdout.strip())
    assert key is not None and key.expires_at is not None
    assert (key.tenant, key.user_id, key.scopes, key.label) == ("acme", "ann", ("read", "write"), "phone")
    assert 89.9 < (key.expires_at - key.created_at).total_seconds() / 86_400 <= 90
    assert result.stderr == (
        f"key {key.id} of tenant acme, for user ann, with read, write, until {key.expires_at:%Y-%m-%d %H:%M}. "
        "The key is shown once.\n"
    )


def test_the_first_key_makes_the_log(url: str, tmp_path: Path) -> None:
    result = run("create", "--log", url, "--tenant", "acme", "--scopes", "admin, read")
    assert (result.exit_code, re.fullmatch(r"ms_[0-9a-f]{16}_[0-9a-f]{64}\n", result.stdout) is not None) == (0, True)
    store = Store.open(url, dim=4, model="test")
    key = find(store, result.stdout.strip())
    store.close()
    assert key is not None and (key.user_id, key.scopes, key.expires_at) == (None, ("read", "admin"), None)


def test_json_has_all_of_a_key(url: str) -> None:
    made = json.loads(run("create", "--log", url, "--tenant", "acme", "--requests-per-minute", "60", "--json").stdout)
    secret = made.pop("key")
    assert secret.startswith(f"ms_{made['id']}_")
    assert (made["tenant"], made["scopes"], made["requests_per_minute"]) == ("acme", ["read", "write"], 60)
    listed = run("list", "--log", url, "--json").stdout
    assert json.loads(listed) == [made]
    assert secret[-64:] not in listed


def test_a_list_shows_the_state_of_each_key(store: Store, url: str) -> None:
    ann = store.create_key("acme", user_id="ann", label="phone").key
    other = store.create_key("globex", scopes=("read",)).key
    store.revoke_key("globex", other.id)
    lines = run("list", "--log", url).stdout.splitlines()
    assert [re.split(r"  +", line) for line in lines[:1]] == [
        ["ID", "TENANT", "USER", "SCOPES", "STATE", "LAST USED", "LABEL"]
    ]
    revoked, valid = (re.split(r"  +", line) for line in lines[1:])
    assert revoked[:4] == [other.id, "globex", "(all)", "read"] and revoked[4].startswith("revoked 20")
    assert valid == [ann.id, "acme", "ann", "read,write", "valid", "never", "phone"]
    assert len(run("list", "--log", url, "--tenant", "acme").stdout.splitlines()) == 2


def test_a_key_of_any_tenant_is_revoked_by_its_id(store: Store, url: str) -> None:
    made = store.create_key("acme")
    result = run("revoke", "--log", url, made.key.id)
    assert result.exit_code == 0
    assert re.fullmatch(
        rf"key {made.key.id} of tenant acme was revoked at \d{{4}}-\d\d-\d\d \d\d:\d\d\n", result.stdout
    )
    assert find(store, made.secret) is None
    assert run("revoke", "--log", url, made.key.id).stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revoke", "0123456789abcdef"], "id: there is no key '0123456789abcdef'"),
        (["create", "--tenant", ".."], "tenant: must not be . or .., which clients remove from a URL's path"),
        (["create", "--tenant", "a", "--scopes", "all"], "scopes: must be one or more of read, write, admin"),
        (
            ["create", "--tenant", "a", "--user", "ann", "--scopes", "admin"],
            "scopes: must not hold admin if the key is bound to a user",
        ),
    ],
)
def test_an_error_is_one_line(store: Store, url: str, arguments: list[str], message: str) -> None:
    result = run(arguments[0], "--log", url, *arguments[1:])
    assert (result.exit_code, result.stderr) == (1, f"memserve keys {arguments[0]}: {message}\n")
    assert store.keys("a").keys == []


@pytest.mark.parametrize("arguments", [["list"], ["revoke", "0123456789abcdef"]])
def test_a_log_that_is_not_there_is_not_made(tmp_path: Path, arguments: list[str]) -> None:
    result = run(*arguments, "--log", f"sqlite:///{tmp_path}/typo.db")
    assert result.exit_code == 1
    assert f"There is no log at {tmp_path}/typo.db" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("period", ["", "0d", "90", "d", "1.5d", "90 d", "10000d", "1y", "-1d"])
def test_a_wrong_period_is_refused(period: str) -> None:
    result = run("create", "--log", "sqlite:///x", "--tenant", "a", "--expires", period)
    assert result.exit_code == 2
    assert f"{period!r} is not a period such as 12h, 90d or 8w." in result.stderr


def test_the_log_is_that_of_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "serve_config.yaml"
    args = {"store": {"url": "sqlite:///folder/log.db"}}
    config.write_text(yaml.safe_dump({"applications": [{"args": args}]}))
    assert run("create", "--tenant", "acme").exit_code == 0
    assert (tmp_path / "folder" / "log.db").exists()
    config.write_text("[]")
    result = run("create", "--tenant", "acme")
    assert result.exit_code == 1
    assert result.stderr.startswith("memserve keys create: serve_config.yaml: needs exactly one entry")
    assert result.stderr.endswith("; name the log by --log\n")


def test_without_a_config_file_the_log_is_that_of_the_environment_or_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("create", "--tenant", "acme").exit_code == 0
    assert (tmp_path / "data" / "memserve.db").exists()
    monkeypatch.setenv("MEMSERVE_STORE__URL", f"sqlite:///{tmp_path}/other.db")
    assert run("create", "--tenant", "acme").exit_code == 0
    assert (tmp_path / "other.db").exists()
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump({"applications": [{}]}))
    assert len(run("list").stdout.splitlines()) == 2
