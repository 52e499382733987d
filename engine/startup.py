"""This module holds the start-up: from settings to an engine that runs, phase by phase. It does not know the front."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .config import EngineConfig, GenerationConfig, ModelConfig
from .core import EngineCore
from .errors import ConfigError
from .events import Recorder
from .hardware import detect, free_gpu_bytes, peak_gpu_bytes
from .memory import Measured, out_of_memory, resize
from .resolve import ResolvedConfig, gib, resolve
from .scheduler import Scheduler, SchedulerLimits
from .structured import GrammarCompiler
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .loader import Checkpoint
    from .runner.model_runner import ModelRunner

__all__ = ["Engine", "StartupPhase", "start_engine"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class StartupPhase(NamedTuple):
    """Where time went at start-up."""

    name: str
    seconds: float
    detail: str


@dataclass(frozen=True, slots=True)
class Engine:
    """A running core and what fronts need to know of it."""

    core: EngineCore
    tokenizer: Tokenizer | None
    config: EngineConfig
    resolved: ResolvedConfig
    model_config: ModelConfig
    generation_config: GenerationConfig
    fingerprint: str
    """Tells models apart; see `Checkpoint`."""
    phases: tuple[StartupPhase, ...]


PROGRESS_PERIOD_S = 1.0
"""Between two words on how far a phase is."""


class _Phases:
    """Times the phases and tells of each as it begins."""

    def __init__(self, on_phase: Callable[[str], None] | None) -> None:
        self.done: list[StartupPhase] = []
        self.detail = ""
        self.explain: Callable[[Exception, str], Exception] = lambda error, _doing: error
        """Given what a phase has raised and the phase's name: what to raise in its place."""
        self._on_phase = on_phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._on_phase is not None:
            self._on_phase(name)
        self.detail = ""
        start = time.monotonic()
        try:
            yield
        except Exception as error:
            told = self.explain(error, name)
            if told is error:
                raise
            raise told from error
        self.done.append(StartupPhase(name, time.monotonic() - start, self.detail))

    def progress(self, name: str) -> Progress:
        """Return what tells, now and then, how far the phase is that begins now."""
        start = told = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            if self._on_phase is not None and now - told >= PROGRESS_PERIOD_S:
                told = now
                self._on_phase(f"{name}: {done} of {total}, {now - start:.0f} s")

        return tell


def start_engine(
    config: EngineConfig,
    *,
    on_phase: Callable[[str], None] | None = None,
    on_weights: Progress | None = None,
    recorder: Recorder | None = None,
) -> Engine:
    """Load a model and build an engine around it.

    Args:
        config: the settings.
        on_phase: called with the name of each phase as it begins; while kernels are compiled also with how far that is,
            "compile the kernels: 12 of 44, 9 s".
        on_weights: called with (bytes read, bytes in all) while weights are read.
        recorder: takes every event of the run.

    Raises:
        ConfigError, CheckpointError, CapacityError: it cannot be started.
    """
    phase = _Phases(on_phase)
    with phase("import torch"):
        import torch
        from octavo import kernels

        from .loader import resolve_model
        from .loader.transfer import CudaLink
        from .models.decoder import Decoder
        from .runner.kv_cache import allocate_kv_cache, storage_dtype
        from .runner.model_runner import ModelRunner
        from .runner.sampler import Sampler

        phase.detail = str(torch.__version__)
    with phase("read the checkpoint's tables"):
        checkpoint = resolve_model(config.model, load_format=config.load_format, seed=config.seed)
        model_config = checkpoint.model_config
        hardware = detect(config.device, config.backend)
        resolved = resolve(config, model_config, hardware)
        dtype, device = getattr(torch, resolved.dtype), torch.device(resolved.device)
        try:
            kernels.use_backend(resolved.backend)
        except kernels.BackendError as error:
            raise ConfigError(str(error)) from error
        # Without a GPU `use_backend` has refused already, but for the interpreter and what only lists variants.
        runs_on_gpu = torch.cuda.is_available() and not kernels.interpreted()
        if (resolved.backend, resolved.device) == ("triton", "cpu") and runs_on_gpu:
            raise ConfigError("backend is 'triton' and device is 'cpu'; allowed: cuda, or auto")
        phase.detail = f"{model_config.family}, {checkpoint.num_bytes(torch.int8) / 1e6:,.0f} M parameters"

    def explain(error: Exception, doing: str) -> Exception:
        if not isinstance(error, torch.OutOfMemoryError):
            return error
        return out_of_memory(error, doing, config, model_config, hardware, resolved)

    phase.explain = explain
    with phase("build the tokenizer"):
        tokenizer = _tokenizer(config, checkpoint)
        phase.detail = f"{tokenizer.vocab_size:,} ids" if tokenizer is not None else "none: token ids only"
    with phase("load the weights"):
        link, start = CudaLink() if device.type == "cuda" else None, time.monotonic()
        model = Decoder(
            model_config,
            lambda allocate, on_loaded: checkpoint.load_weights(allocate, on_loaded, on_weights, link=link),
            dtype=dtype,
            device=device,
            max_model_len=resolved.max_model_len,
            layout=resolved.weight_layout,
            invariant=resolved.invariant,
        )
        phase.detail = f"{resolved.weight_bytes / 2**20:,.0f} MiB in {resolved.dtype}"
        if checkpoint.file_bytes:
            phase.detail += f", read at {checkpoint.file_bytes / (time.monotonic() - start) / 1e9:,.2f} GB/s"
    if resolved.backend == "triton" and not kernels.interpreted():
        with phase(name := "compile the kernels"):
            from .runner.warmup import warm_kernels

            num_valid_ids = None if tokenizer is None else tokenizer.vocab_size
            phase.detail = warm_kernels(
                model_config, resolved, num_valid_ids=num_valid_ids, on_progress=phase.progress(name)
            )

    def make_runner(num_blocks: int, graphs: bool) -> ModelRunner:
        return ModelRunner(
            model,
            allocate_kv_cache(
                model_config,
                num_blocks=num_blocks,
                block_size=resolved.block_size,
                dtype=storage_dtype(resolved.kv_cache_dtype),
                device=device,
                scales=checkpoint.kv_scales,
            ),
            Sampler(
                resolved.max_num_seqs,
                model_config.vocab_size,
                num_valid_ids=None if tokenizer is None else tokenizer.vocab_size,
                device=device,
            ),
            max_num_seqs=resolved.max_num_seqs,
            max_model_len=resolved.max_model_len,
            block_size=resolved.block_size,
            invariant=resolved.invariant,
            graphs=graphs,
        )

    if _is_measured(resolved):
        with phase("measure the largest step"):
            measured = _measure(resolved, lambda num_blocks: make_runner(num_blocks, False))
            phase.detail = _told(resolved, measured)
            resolved = resize(config, model_config, hardware, resolved, measured)
    with phase("allocate the KV cache"):
        runner = make_runner(resolved.num_blocks, resolved.graphs)
        tokens = resolved.num_blocks * resolved.block_size
        phase.detail = f"{tokens:,} tokens in blocks of {resolved.block_size}, {_stored(resolved, checkpoint)}"
    if runner.graphs is not None and resolved.device == "cuda":
        with phase(name := "capture the graphs"):
            phase.detail = runner.capture_graphs(phase.progress(name), required=config.graphs is True)
        resolved = replace(resolved, graphs=runner.graphs is not None)
    limits = _limits(config, resolved, checkpoint, tokenizer)
    return Engine(
        core=EngineCore(
            Scheduler(limits, time.monotonic, recorder),
            runner,
            seed=config.seed,
            grammars=None if tokenizer is None else GrammarCompiler(tokenizer, model_config.vocab_size),
            explain=lambda error: explain(error, "run a step"),
        ),
        tokenizer=tokenizer,
        config=config,
        resolved=resolved,
        model_config=model_config,
        generation_config=checkpoint.generation_config,
        fingerprint=checkpoint.fingerprint,
        phases=tuple(phase.done),
    )


def _is_measured(resolved: ResolvedConfig) -> bool:
    """Whether memory is measured before the KV pool is sized: a CPU's is shared with all that runs there."""
    return resolved.device == "cuda"


def _measure(resolved: ResolvedConfig, make_runner: Callable[[int], ModelRunner]) -> Measured:
    """Run the largest step on as few blocks as it can do with."""
    from .runner.largest_step import largest_step

    step = largest_step(resolved)
    num_blocks = int(step.block_ids.max())
    pool_bytes = (num_blocks + 1) * resolved.block_size * resolved.kv_bytes_per_token
    peak_bytes = peak_gpu_bytes(lambda: make_runner(num_blocks).execute(step).wait())
    return Measured(free_gpu_bytes(), peak_bytes - pool_bytes)


def _told(resolved: ResolvedConfig, measured: Measured) -> str:
    """Say what a measurement has shown, and warn where more was found than was reckoned with."""
    if measured.step_bytes > resolved.step_bytes:
        log.warning(
            "the largest step takes %s, which is more than the %s reckoned with; the KV pool leaves room for it",
            gib(measured.step_bytes),
            gib(resolved.step_bytes),
        )
    return (
        f"{gib(measured.step_bytes)}, predicted {gib(resolved.step_bytes)}; {gib(measured.free_bytes)} free without it"
    )


def _stored(resolved: ResolvedConfig, checkpoint: Checkpoint) -> str:
    """Say how keys and values are stored, and what becomes of scales that the checkpoint has for them."""
    if resolved.kv_cache_dtype == "fp8":
        return "fp8, with scales of 1" if checkpoint.kv_scales is None else "fp8, with the checkpoint's scales"
    unused = "; the checkpoint's scales are for fp8" if checkpoint.kv_scales is not None else ""
    return f"{resolved.kv_cache_dtype}{unused}"


def _tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer | None:
    """Return the model's tokenizer, or the one that was asked for; None where there is none."""
    if config.tokenizer is not None:
        folder: Path | None = Path(config.tokenizer)
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"tokenizer is {config.tokenizer!r}; allowed: a folder with a tokenizer.json")
    else:
        folder = checkpoint.tokenizer_folder
    if folder is not None:
        tokenizer = Tokenizer.from_folder(folder)
    elif checkpoint.tokenizer_metadata is not None:
        tokenizer = Tokenizer.from_gguf(checkpoint.tokenizer_metadata, file=config.model)
    else:
        return None
    width = checkpoint.model_config.vocab_size
    if tokenizer.vocab_size > width:
        raise ConfigError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1} and the model's logits are {width} wide; "
            "allowed: a tokenizer that fits the model"
        )
    return tokenizer


def _limits(
    config: EngineConfig, resolved: ResolvedConfig, checkpoint: Checkpoint, tokenizer: Tokenizer | None
) -> SchedulerLimits:
    eos = checkpoint.generation_config.eos_token_ids
    if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
        eos = (tokenizer.eos_token_id,)
    return SchedulerLimits(
        vocab_size=checkpoint.model_config.vocab_size,
        max_model_len=resolved.max_model_len,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        num_blocks=resolved.num_blocks,
        block_size=resolved.block_size,
        eos_token_ids=frozenset(eos),
        model_id=checkpoint.fingerprint,
        prefix_caching=config.cache.prefix_caching,
        policy=config.scheduler.policy,
        faults=config.faults,
        max_steps_in_flight=2 if resolved.overlap else 1,
    )
