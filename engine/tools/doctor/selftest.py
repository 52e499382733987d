"""This module holds small runs that show whether the engine and its kernels work here. It does not know real models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .finding import Finding, Status

__all__ = ["check_kernels", "look_at_engine", "look_at_kernels"]

SECTION = "Self-test"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
PROMPTS = [[1, 2, 3], list(range(40)), [5]]
NUM_TOKENS = 12
OPS = ("rms_norm", "paged_attention_decode", "write_kv")
KERNELS_S = 240.0
"""A GPU may have to compile them first."""


def look_at_engine() -> Iterator[Finding]:
    """Generate with a tiny random model on the CPU: alone and in a batch, the tokens must be the same."""
    from ...config import EngineConfig
    from ...llm import LLM
    from ...sampling_params import SamplingParams

    name, start = "engine, torch backend", time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(TINY))
            sizes = {"kv_cache_tokens": 1024, "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 32}
            own = {"model": folder, "load_format": "dummy", "device": "cpu", "backend": "torch", "invariant": True}
            llm = LLM(config=EngineConfig.from_settings(own | sizes))
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        together = [answer.outputs[0].token_ids for answer in llm.generate(PROMPTS, params)]
        alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in PROMPTS]
    except Exception as error:  # whatever it is, that is the finding
        yield Finding(SECTION, name, Status.FAIL, repr(error), "octavo generate hello --debug shows more")
        return
    if together != alone:
        text = "tokens depend on the batch they are generated in: this torch computes wrongly here"
        yield Finding(SECTION, name, Status.FAIL, text, "pip install --force-reinstall torch")
        return
    text = f"{len(PROMPTS)} prompts, the same tokens alone and in a batch, {time.monotonic() - start:.1f} s"
    yield Finding(SECTION, name, Status.OK, text)


def look_at_kernels(*, on_gpu: bool) -> Iterator[Finding]:
    """Compare some Triton kernels with their references, in a process of their own: a kernel's fault can end one.

    Args:
        on_gpu: compiled, on the GPU; else in Triton's interpreter.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {} if on_gpu else {"TRITON_INTERPRET": "1"}
    name, start = f"kernels, {'compiled' if on_gpu else 'interpreted'}", time.monotonic()
    try:
        command = [sys.executable, "-c", f"from {__name__} import check_kernels; check_kernels()"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=KERNELS_S, check=False)
    except subprocess.TimeoutExpired:
        yield Finding(SECTION, name, Status.WARN, f"no answer after {KERNELS_S:.0f} s")
        return
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        status = Status.FAIL if on_gpu else Status.WARN
        yield Finding(SECTION, name, status, words[-1], "pip install 'triton>=3.6', or run with --backend torch")
        return
    text = f"{', '.join(OPS)} compute what their references do, {time.monotonic() - start:.1f} s"
    yield Finding(SECTION, name, Status.OK, text)


def check_kernels() -> None:
    """Run a case of middle size of a few ops on the Triton backend and compare with the float64 reference.

    Raises:
        WrongResultError: a result is further off than its bound.
    """
    import torch
    from octavo.kernels import use_backend
    from octavo.kernels.spec import generator, load_specs

    from ..bench.checking import KernelCase, check

    device = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
    for op in OPS:
        spec = load_specs()[op]
        cases = sorted((case for case in spec.cases if (case.tier, case.dtype) == ("test", "float32")), key=spec.bytes)
        case = cases[len(cases) // 2]
        inputs = spec.make_inputs(case, generator(0, op))
        inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        with use_backend("triton"):
            check(KernelCase(spec, case), inputs)
