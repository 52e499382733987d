"""This module holds the reference that octavo's own torch backend is, in a wider dtype, a text at a time. It does not
know transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from octavo import kernels
from octavo.kernels.activation import reference as activation

from ...layers.linear import Linear
from ...loader import Checkpoint
from ...models.decoder import Allocate, Decoder, OnLoaded
from .conditions import make_conditions
from .forced import ForcedRun
from .reference import Answers
from .texts import Text
from .weights import unpacked

__all__ = ["TorchReference"]

_BLOCK_SIZE = 64
_SAME_CODE = "both sides run the torch backend's"
_SAME_LOADER = "both sides read it through octavo's loader"
ENGINE_OPS = ("rms_norm", "layer_norm", "write_kv", "paged_attention_prefill", "paged_attention_decode", "activation")


class TorchReference:
    """The same decoder on the torch backend, one text at a time in one piece.

    Its weights are those of the engine's dtype, widened: random ones depend on the dtype that they are drawn in.

    Args:
        checkpoint: the model.
        dtype: of the reference; wider than the engine's where there is room.
        engine_dtype: what eager mode runs in.
        device: where.
        max_model_len: the longest text, in tokens.
        backend: the engine's, to say what the two have in common.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        engine_dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        backend: str,
    ) -> None:
        self._checkpoint, self._device = checkpoint, device
        self._engine_dtype = engine_dtype
        self._max_model_len = max_model_len
        self._decoder = self._load(dtype)
        self.name = "torch"
        self.title = f"octavo's torch backend, {str(dtype).removeprefix('torch.')}"
        self.has_eager = dtype != engine_dtype
        self.checks_weights = False
        self.parameters = _Parameters(self._decoder)
        self.shared: Mapping[str, str] = {
            "weights": _SAME_LOADER,
            "embedding": "both sides run torch's",
            "projections": "both sides run torch's matrix product",
            "rotations": "both sides take them from the same table",
        } | (dict.fromkeys(ENGINE_OPS, _SAME_CODE) if backend == "torch" else {})

    @torch.inference_mode()
    def answers(self, token_ids: list[int]) -> Answers:
        """Run one text in one piece."""
        texts = [Text("", token_ids)]
        alone = make_conditions(texts, _BLOCK_SIZE)[0]
        run = ForcedRun(self._decoder, texts, alone, max_model_len=self._max_model_len, invariant=False)
        # Choosing a backend anew would take away what stands between ops and their callers.
        is_chosen = kernels.current_backend() == "torch"
        with nullcontext() if is_chosen else kernels.use_backend("torch"):
            (step,) = run.steps()
            logits = self._decoder.logits(step.states[-1])
        return Answers(logits.float().cpu(), [state.float().cpu() for state in step.states])

    def become_eager(self) -> None:
        """Run in the engine's dtype from now on."""
        self._decoder = self._load(self._engine_dtype)
        self.parameters = _Parameters(self._decoder)

    def _load(self, dtype: torch.dtype) -> Decoder:
        def load(_allocate: Allocate, on_loaded: OnLoaded) -> None:
            self._checkpoint.load_weights(
                lambda _name, shape: torch.empty(shape, dtype=self._engine_dtype, device=self._device),
                lambda name, tensor: on_loaded(name, tensor.to(dtype)),
            )

        return Decoder(
            self._checkpoint.model_config,
            load,
            dtype=dtype,
            device=self._device,
            max_model_len=self._max_model_len,
            layout="plain",
        )


class _Parameters:
    """See `Parameters`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._modules = dict(decoder.modules())
        self._config = decoder.config

    def weight(self, name: str) -> torch.Tensor:
        """See `Parameters`."""
        module = self._modules[name]
        if not isinstance(module, Linear):
            return module.weight
        config = self._config
        num_inputs = {"o": config.num_q_heads * config.head_dim, "down": config.intermediate_size}
        size = num_inputs.get(name.rpartition(".")[2], config.hidden_size)
        return unpacked(module, size, self._decoder.dtype, self._decoder.device)

    def bias(self, name: str) -> torch.Tensor | None:
        """See `Parameters`."""
        return self._modules[name].bias

    def eps(self, name: str) -> float:
        """See `Parameters`."""
        return self._config.norm_eps

    def scale(self, layer: int) -> float:
        """See `Parameters`."""
        return float(self._config.head_dim**-0.5)

    def window(self, layer: int) -> int | None:
        """See `Parameters`."""
        return self._config.window(layer)

    def activation(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `Parameters`."""
        return partial(activation.ungated_activation, kind=self._config.activation)

    def head_norms(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return None: they are those that the op is given."""
        return None

    def rotations(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Return None: they are those that the op is given."""
        return None
