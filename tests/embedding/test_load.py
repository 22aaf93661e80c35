"""Loading the model that the settings describe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deployments import embedding
from deployments.embedding.load import load_model, resolve
from deployments.errors import ModelUnavailable


def test_the_default_name_resolves_to_the_packaged_folder(minilm_folder: Path) -> None:
    assert Path(resolve("all-MiniLM-L6-v2")) == minilm_folder


def test_a_folder_and_a_hub_name_resolve_to_themselves(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("intfloat/e5-small-v2") == "intfloat/e5-small-v2"


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./missing", "~/missing", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"There is no model at '{name}': it is not a folder"):
        load_model("local", name)


def test_a_hub_model_that_is_not_on_disk_is_not_downloaded() -> None:
    with pytest.raises(ModelUnavailable) as unavailable:
        load_model("local", "no-such-owner/no-such-model")
    assert str(unavailable.value) == (
        "The model 'no-such-owner/no-such-model' is neither a folder nor in the hub cache, and allow_download is off."
    )


def imported_by(script: str, *packages: str) -> list[str]:
    """Run a script in a new process. Returns those of the packages that it has imported."""
    script += f"; import sys; print(*sorted(set({packages}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_resolving_a_name_imports_nothing_heavy() -> None:
    script = (
        "from deployments.embedding.load import load_model, resolve; resolve('all-MiniLM-L6-v2'); load_model('fake')"
    )
    assert imported_by(script, "torch", "transformers", "sentence_transformers", "openai", "ray") == []


def test_only_the_local_models_import_torch() -> None:
    modules = [f"deployments.embedding.{file.stem}" for file in Path(embedding.__path__[0]).glob("[!_]*.py")]
    assert {f"deployments.embedding.{name}" for name in ("engine", "load", "model", "remote")} < set(modules)
    script = f"import deployments.batcher, {', '.join(modules)}"
    assert imported_by(script, "torch", "transformers", "sentence_transformers", "ray") == []


def test_the_fake_model_takes_its_size_from_the_settings() -> None:
    info = load_model("fake", dim=8, max_tokens=12).info
    assert (info.dim, info.max_tokens) == (8, 12)
