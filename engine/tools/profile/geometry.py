"""This module holds the sizes that kernels are compiled for, of a model by its name. It does not know any kernel."""

from __future__ import annotations

from octavo.kernels.aot.targets import Model

from ...runner.warmup import kernel_models
from ..plan import read_model

__all__ = ["model_sizes"]


def model_sizes(name: str) -> Model:
    """Return a model's sizes, in the dtype that it would have on a GPU; no weight is read.

    Where only some layers have a window, the sizes are those of its first kind of layer.

    Raises:
        ConfigError, CheckpointError: there is no such model, or its config is not supported.
    """
    config = read_model(name)
    return kernel_models(config, config.dtype, None)[0]
