"""This module holds the start-up: from settings to an engine that runs, phase by phase. It does not know the front."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .config import EngineConfig, GenerationConfig, ModelConfig
from .core import EngineCore
from .errors import ConfigError
from .events import Recorder
from .hardware import detect, free_gpu_bytes, is_out_of_memory, peak_gpu_bytes
from .memory import Measured, as_measured, out_of_memory, resize
from .resolve import Choice, Hardware, ResolvedConfig, gib, resolve
from .scheduler import Scheduler, SchedulerLimits
from .structured import GrammarCompiler
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .loader import Checkpoint
    from .loader.kv_scales import KVScales
    from .models.decoder import Decoder
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


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is being started, as far as it is known."""

    config: EngineConfig
    checkpoint: Checkpoint
    hardware: Hardware
    resolved: ResolvedConfig

    @property
    def model_config(self) -> ModelConfig:
        return self.checkpoint.model_config

    def explain(self, error: Exception, doing: str) -> Exception:
        """Return what to raise in the place of an error: of memory that has run out, what to change."""
        if not is_out_of_memory(error):
            return error
        return out_of_memory(error, doing, self.config, self.model_config, self.hardware, self.resolved)


MakeRunner = Callable[[ResolvedConfig], "ModelRunner"]


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
    _import_torch(phase)
    plan = _read_tables(config, phase)
    phase.explain = plan.explain
    tokenizer = _build_tokenizer(plan, phase)
    num_valid_ids = None if tokenizer is None else tokenizer.vocab_size
    model = _load_weights(plan, on_weights, phase)
    _compile_kernels(plan, num_valid_ids, phase)
    make_runner = partial(_make_runner, model, plan.checkpoint.kv_scales, num_valid_ids)
    if _is_measured(plan.resolved):
        plan = _measure(plan, make_runner, phase)
        phase.explain = plan.explain
    runner = _allocate(plan, make_runner, phase)
    plan = _capture_graphs(plan, runner, phase)
    core = EngineCore(
        Scheduler(_limits(plan, tokenizer), time.monotonic, recorder),
        runner,
        seed=config.seed,
        grammars=None if tokenizer is None else GrammarCompiler(tokenizer, plan.model_config.vocab_size),
        explain=lambda error: plan.explain(error, "run a step"),
    )
    return Engine(
        core=core,
        tokenizer=tokenizer,
        config=config,
        resolved=plan.resolved,
        model_config=plan.model_config,
        generation_config=plan.checkpoint.generation_config,
        fingerprint=plan.checkpoint.fingerprint,
        phases=tuple(phase.done),
    )


def _import_torch(phase: _Phases) -> None:
    """Import what the other phases need, and what takes long of it, in a phase of its own."""
    with phase("import torch"):
        import torch

        for module in (".loader", ".models.decoder", ".runner.model_runner"):
            import_module(module, __package__)
        phase.detail = str(torch.__version__)


def _read_tables(config: EngineConfig, phase: _Phases) -> _Plan:
    """Find the model and the machine, settle the settings, and choose the backend."""
    import torch
    from octavo import kernels

    from .loader import resolve_model

    with phase("read the checkpoint's tables"):
        checkpoint = resolve_model(config.model, load_format=config.load_format, seed=config.seed)
        hardware = detect(config.device, config.backend)
        resolved = resolve(config, checkpoint.model_config, hardware)
        try:
            kernels.use_backend(resolved.backend)
        except kernels.BackendError as error:
            raise ConfigError(str(error)) from error
        # Without a GPU `use_backend` has refused already, but for the interpreter and what only lists variants.
        runs_on_gpu = torch.cuda.is_available() and not kernels.interpreted()
        if (resolved.backend, resolved.device) == ("triton", "cpu") and runs_on_gpu:
            raise ConfigError("backend is 'triton' and device is 'cpu'; allowed: cuda, or auto")
        num_parameters = checkpoint.num_bytes(torch.int8)
        phase.detail = f"{checkpoint.model_config.family}, {num_parameters / 1e6:,.0f} M parameters"
    return _Plan(config, checkpoint, hardware, resolved)


def _build_tokenizer(plan: _Plan, phase: _Phases) -> Tokenizer | None:
    """Build the model's tokenizer, or the one that was asked for; None where there is none."""
    with phase("build the tokenizer"):
        tokenizer = _tokenizer(plan.config, plan.checkpoint)
        phase.detail = f"{tokenizer.vocab_size:,} ids" if tokenizer is not None else "none: token ids only"
    return tokenizer


def _load_weights(plan: _Plan, on_weights: Progress | None, phase: _Phases) -> Decoder:
    """Build the model with its weights."""
    import torch

    from .loader.transfer import CudaLink
    from .models.decoder import Decoder

    checkpoint, resolved = plan.checkpoint, plan.resolved
    with phase("load the weights"):
        link, start = CudaLink() if resolved.device == "cuda" else None, time.monotonic()
        model = Decoder(
            plan.model_config,
            lambda allocate, on_loaded: checkpoint.load_weights(allocate, on_loaded, on_weights, link=link),
            dtype=getattr(torch, resolved.dtype),
            device=torch.device(resolved.device),
            max_model_len=resolved.max_model_len,
            layout=resolved.weight_layout,
            invariant=resolved.invariant,
        )
        phase.detail = f"{resolved.weight_bytes / 2**20:,.0f} MiB in {resolved.dtype}"
        if checkpoint.file_bytes:
            phase.detail += f", read at {checkpoint.file_bytes / (time.monotonic() - start) / 1e9:,.2f} GB/s"
    return model


def _compile_kernels(plan: _Plan, num_valid_ids: int | None, phase: _Phases) -> None:
    """Compile, where there is a GPU, every kernel that the engine can launch."""
    from octavo import kernels

    if plan.resolved.backend != "triton" or kernels.interpreted():
        return
    with phase(name := "compile the kernels"):
        from .runner.warmup import warm_kernels

        phase.detail = warm_kernels(
            plan.model_config, plan.resolved, num_valid_ids=num_valid_ids, on_progress=phase.progress(name)
        )


def _make_runner(
    model: Decoder, kv_scales: KVScales | None, num_valid_ids: int | None, resolved: ResolvedConfig
) -> ModelRunner:
    """Build a runner with a KV pool of its own."""
    from .runner.kv_cache import allocate_kv_cache, storage_dtype
    from .runner.model_runner import ModelRunner
    from .runner.sampler import Sampler

    cache = allocate_kv_cache(
        model.config,
        num_blocks=resolved.num_blocks,
        block_size=resolved.block_size,
        dtype=storage_dtype(resolved.kv_cache_dtype),
        device=model.device,
        scales=kv_scales,
    )
    sampler = Sampler(resolved.max_num_seqs, model.config.vocab_size, num_valid_ids=num_valid_ids, device=model.device)
    return ModelRunner(
        model,
        cache,
        sampler,
        max_num_seqs=resolved.max_num_seqs,
        max_model_len=resolved.max_model_len,
        block_size=resolved.block_size,
        invariant=resolved.invariant,
        graphs=resolved.graphs,
    )


def _is_measured(resolved: ResolvedConfig) -> bool:
    """Whether memory is measured before the KV pool is sized: a CPU's is shared with all that runs there."""
    return resolved.device == "cuda"


def _measure(plan: _Plan, make_runner: MakeRunner, phase: _Phases) -> _Plan:
    """Run the largest step on as few blocks as it can do with, and size the KV pool by what that took."""
    from .runner.largest_step import largest_step

    with phase("measure the largest step"):
        step = largest_step(plan.resolved)
        small = replace(plan.resolved, num_blocks=int(step.block_ids.max()), graphs=False)
        peak_bytes = peak_gpu_bytes(lambda: make_runner(small).execute(step).wait())
        measured = Measured(free_gpu_bytes(), peak_bytes - small.kv_cache_bytes)
        phase.detail = _told(plan.resolved, measured)
        hardware = as_measured(plan.model_config, plan.hardware, plan.resolved, measured)
        resolved = resize(plan.config, plan.model_config, hardware, plan.resolved)
    return replace(plan, hardware=hardware, resolved=resolved)


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


def _allocate(plan: _Plan, make_runner: MakeRunner, phase: _Phases) -> ModelRunner:
    """Build the runner that serves."""
    with phase("allocate the KV cache"):
        runner = make_runner(plan.resolved)
        block_size, tokens = plan.resolved.block_size, plan.resolved.num_blocks * plan.resolved.block_size
        phase.detail = f"{tokens:,} tokens in blocks of {block_size}, {_stored(plan.resolved, plan.checkpoint)}"
    return runner


def _capture_graphs(plan: _Plan, runner: ModelRunner, phase: _Phases) -> _Plan:
    """Capture, on a GPU, the graphs of all batch sizes: nobody who is served waits for one."""
    if not plan.resolved.graphs or plan.resolved.device != "cuda":
        return plan
    with phase(name := "capture the graphs"):
        phase.detail = runner.capture_graphs(phase.progress(name), required=plan.config.graphs is True)
    if runner.graphs is not None:
        return plan
    others = (choice for choice in plan.resolved.choices if choice.name != "graphs")
    choices = (*others, Choice("graphs", "false", "none could be captured"))
    return replace(plan, resolved=replace(plan.resolved, graphs=False, choices=choices))


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


def _limits(plan: _Plan, tokenizer: Tokenizer | None) -> SchedulerLimits:
    config, resolved, checkpoint = plan.config, plan.resolved, plan.checkpoint
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
