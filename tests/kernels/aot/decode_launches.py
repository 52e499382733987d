"""This program runs engines on a GPU that is not there and prints which kernels each step without a prompt launches.

What it prints: for each kind of request a list of steps, each a list of kernels' names in the order of their launches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from octavo.engine.core import EngineCore
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.kernels.common.compiled import COMPILED
from random_engine import CONFIGS, Nothing, answer_with_reference, as_on_a_gpu, compiling_nothing

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 1.0, "frequency_penalty": 0.5},
    "with log-probabilities": {"temperature": 0.0, "logprobs": 3},
}
PROMPTS = ([3] * 530, [4] * 20, [5] * 7)  # one of more than a split


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", choices=CONFIGS, default="llama")
    parser.add_argument("--graphs", action="store_true", help="run the stand-in of captured graphs")
    arguments = parser.parse_args()
    launches: list[str] = []
    steps: list[list[str]] = []
    run, step = Nothing.run, EngineCore.step

    def noted_run(self: Nothing, *args: object) -> None:
        launches.append(self.kernel)
        run(self, *args)

    def noted_step(self: EngineCore) -> Any:
        launches.clear()
        result = step(self)
        steps.append(launches[:])
        return result

    found = {}
    with tempfile.TemporaryDirectory() as folder, as_on_a_gpu(), compiling_nothing():
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[arguments.config]))
        llm = LLM(
            folder, load_format="dummy", backend="triton", device="cpu", dtype="float32", block_size=16,
            kv_cache_tokens=4096, max_num_seqs=16, max_num_batched_tokens=600, graphs=arguments.graphs,
        )  # fmt: skip
        answer_with_reference("sample", "log_softmax_top", "expand_rows")
        with mock.patch.object(Nothing, "run", noted_run), mock.patch.object(EngineCore, "step", noted_step):
            for name, settings in REQUESTS.items():
                steps.clear()
                params = SamplingParams(max_tokens=4, ignore_eos=True, seed=1, **settings)
                llm.generate(PROMPTS, params)
                found[name] = [each for each in steps if each and "_prefill" not in each]
    print(json.dumps({"steps": found, "num_late": COMPILED.num_late}))


if __name__ == "__main__":
    main()
