"""The image, the manifests and the monitoring in deploy/: what can be checked without a container engine."""

import ast
import gzip
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deployments.app import _options
from deployments.serving.plan import read_config
from deployments.settings import EmbedderSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCHEMAS = Path(__file__).parent  # of other projects, without their descriptions
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
_OF_RAY = re.compile(r"\bray_[a-z_]+")
_KINDS = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def schema(name: str) -> Any:
    return json.loads(gzip.decompress((SCHEMAS / name).read_bytes()))


def closed(part: Any) -> Any:
    """A schema in which objects have no other fields than those that it lists: Kubernetes drops others silently."""
    if isinstance(part, list):
        return [closed(one) for one in part]
    if not isinstance(part, dict):
        return part
    made = {name: closed(value) for name, value in part.items()}
    if "properties" in part and not part.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def rayservice() -> Any:
    manifest, _ = yaml.safe_load_all((DEPLOY / "kubernetes" / "rayservice.yaml").read_text())
    return manifest


def test_the_dockerfile_has_no_findings_of_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [hadolint, "--no-color", "--failure-threshold", "warning", DEPLOY / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_dockerfile_copies_exists_and_reaches_the_builder() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source
        for line in (DEPLOY / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert len(copied) >= 8
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source in sent, source


def test_the_image_asks_for_keys_and_listens_for_other_machines() -> None:
    config, settings = read_config(DEPLOY / "serve_config.yaml")
    assert (config["http_options"]["host"], settings.auth.mode) == ("0.0.0.0", "keys")


def test_the_config_for_gpus_can_be_served(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "serve_config.gpu.yaml").read_text())
    assert config["applications"][0]["args"]["model"].pop("device") == "cuda"  # which this machine may lack
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    _, settings = read_config(path)
    assert settings.embedder.num_gpus == 0.33


def test_embedders_run_on_the_kind_of_card_that_is_asked_for() -> None:
    options = _options(EmbedderSettings(max_replicas=1, num_cpus=1.0, num_gpus=0.33, accelerator_type="H100"))
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.33, "accelerator_type": "H100"}
    options = _options(EmbedderSettings(max_replicas=1, num_cpus=1.0, num_gpus=0.33))
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.33}


def test_compose_yaml_follows_the_specification_of_compose() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    jsonschema.Draft202012Validator(schema("compose-spec.json.gz")).validate(compose)
    for service in compose["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), port
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).is_dir(), volume


def test_the_rayservice_follows_the_schema_of_kuberay() -> None:
    jsonschema.validate(rayservice(), closed(schema("rayservice-1.7.0.json.gz")))


def test_a_misspelt_field_of_a_rayservice_is_found() -> None:
    manifest = rayservice()
    manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(manifest, closed(schema("rayservice-1.7.0.json.gz")))


def test_the_application_in_the_rayservice_can_be_served(tmp_path: Path) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(rayservice()["spec"]["serveConfigV2"])
    _, settings = read_config(path)
    assert settings.auth.mode == "keys"
    assert rayservice()["spec"]["rayClusterConfig"]["rayVersion"] == PINS["ray"]


def own_metrics() -> set[str]:
    """The names under which Ray exports the metrics of deployments/metrics.py."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "deployments" / "metrics.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _KINDS:
            name = ast.literal_eval(node.args[0])
            found |= {f"ray_{name}{suffix}" for suffix in _KINDS[node.func.id]}
    return found


def metrics_of_serve() -> str:
    """The source of the installed Serve, which names its metrics without the prefix of Ray and the suffixes."""
    ray = find_spec("ray")
    assert ray is not None and ray.origin is not None
    sources = Path(ray.origin).parent.joinpath("serve", "_private").glob("*.py")
    return "\n".join(path.read_text() for path in sources).replace("{protocol_name}", "http")


@pytest.mark.parametrize("path", ["grafana/dashboards/memserve.json", "prometheus/alerts.yml"])
def test_dashboards_and_alerts_use_metrics_that_exist(path: str) -> None:
    used = set(_OF_RAY.findall((DEPLOY / path).read_text()))
    ours = {name for name in used if name.startswith("ray_memserve_")}
    assert len(ours) >= 3
    assert ours <= own_metrics()
    source = metrics_of_serve()
    others = used - ours
    assert others
    for name in others:
        assert f'"{re.sub("_(total|bucket|sum|count)$", "", name.removeprefix("ray_"))}' in source, name


def promtool(*command: str | Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_the_configuration_and_the_rules() -> None:
    promtool("check", "config", "--syntax-only", DEPLOY / "prometheus" / "prometheus.yml")
    promtool("check", "rules", DEPLOY / "prometheus" / "alerts.yml")


def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", DEPLOY / "prometheus" / "alerts_test.yml")
