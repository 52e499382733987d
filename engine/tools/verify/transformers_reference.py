"""This module holds the reference that Hugging Face's transformers is: eager attention, its own reading of the files.
It does not know our loader or decoder.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError
from .reference import Answers

__all__ = ["TransformersReference"]

_PARTS = {
    "attention_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_GPT2_PARTS = {
    "attention_norm": ("ln_1",),
    "mlp_norm": ("ln_2",),
    "qkv": ("attn.c_attn",),
    "o": ("attn.c_proj",),
    "up": ("mlp.c_fc",),
    "down": ("mlp.c_proj",),
}


class TransformersReference:
    """A model as transformers loads and runs it, whole texts at a time.

    Norms and softmax round to float32 inside transformers, whatever the dtype asked for.

    Args:
        source: a folder, a .gguf file, or a hub id that is in the local cache.
        dtype: of the reference; wider than the engine's where there is room.
        engine_dtype: what eager mode runs in.
        device: where.

    Raises:
        ConfigError: transformers is not installed, or cannot read the model.
    """

    def __init__(self, source: str | Path, *, dtype: torch.dtype, engine_dtype: torch.dtype, device: torch.device):
        try:
            import transformers
        except ModuleNotFoundError:
            raise ConfigError(
                "--against hf needs transformers, which comes with: pip install 'octavo[verify]'\n"
                "--against torch compares with octavo's own torch backend"
            ) from None
        self._model = _load(transformers, source).to(device)
        _convert(self._model, dtype)
        self._engine_dtype = engine_dtype
        self.name = "hf"
        self.title = f"transformers {transformers.__version__}, eager, {str(dtype).removeprefix('torch.')}"
        self.shared: Mapping[str, str] = {}
        self.has_eager = dtype != engine_dtype
        self.checks_weights = True
        self.parameters = _Parameters(self._model)

    @torch.inference_mode()
    def answers(self, token_ids: list[int]) -> Answers:
        """Run one text in one piece."""
        before_norm: list[torch.Tensor] = []
        final_norm = self.parameters.module("final_norm")
        hook = final_norm.register_forward_pre_hook(lambda _module, inputs: before_norm.append(inputs[0]))
        try:
            output = self._model(
                torch.tensor([token_ids], device=self._model.device), output_hidden_states=True, use_cache=False
            )
        finally:
            hook.remove()
        states = [*output.hidden_states[:-1], before_norm[-1], output.hidden_states[-1]]
        return Answers(output.logits[0].float().cpu(), [state[0].float().cpu() for state in states])

    def become_eager(self) -> None:
        """Run in the engine's dtype from now on."""
        _convert(self._model, self._engine_dtype)


def _load(transformers: Any, source: str | Path) -> Any:
    path = Path(source)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source)}
    if path.is_file():
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    logging = transformers.utils.logging
    level, is_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # the bars of the GGUF reader know no flag
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"transformers cannot read {path.name}: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.set_verbosity(level)
        if is_bar:
            logging.enable_progress_bar()
    return model.eval()


def _convert(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of the weights; buffers, the rotations' frequencies among them, stay as they were computed."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class _Parameters:
    """See `Parameters`; names lead into the model's own modules."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._is_gpt2 = hasattr(model, "transformer")
        self._base = model.transformer if self._is_gpt2 else model.model
        self._layers = self._base.h if self._is_gpt2 else self._base.layers

    def module(self, name: str) -> Any:
        """Return the module of a name that is made of one."""
        (module,) = self._modules(name)
        return module

    def _modules(self, name: str) -> list[Any]:
        if name == "final_norm":
            return [self._base.ln_f if self._is_gpt2 else self._base.norm]
        if name == "lm_head":
            return [self._model.lm_head]
        _, layer, part = name.split(".")
        parts = _GPT2_PARTS if self._is_gpt2 else _PARTS
        return [self._layers[int(layer)].get_submodule(each) for each in parts[part]]

    def weight(self, name: str) -> torch.Tensor:
        """See `Parameters`."""
        weights = []
        for module in self._modules(name):
            is_conv = type(module).__name__ == "Conv1D"  # GPT-2 keeps [in, out]
            weights.append(module.weight.data.T if is_conv else module.weight.data)
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def bias(self, name: str) -> torch.Tensor | None:
        """See `Parameters`."""
        biases = [getattr(module, "bias", None) for module in self._modules(name)]
        found = [bias.data for bias in biases if bias is not None]
        assert len(found) in (0, len(biases)), f"{name}: some parts have a bias and some have none"
        return torch.cat(found) if found else None

    def eps(self, name: str) -> float:
        """See `Parameters`."""
        module = self.module(name)
        return float(module.eps if self._is_gpt2 else module.variance_epsilon)

    def _attention(self, layer: int) -> Any:
        return self._layers[layer].attn if self._is_gpt2 else self._layers[layer].self_attn

    def scale(self, layer: int) -> float:
        """See `Parameters`."""
        attention = self._attention(layer)
        return float(attention.scaling if hasattr(attention, "scaling") else attention.head_dim**-0.5)

    def window(self, layer: int) -> int | None:
        """See `Parameters`."""
        config = self._model.config
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and kinds[layer] != "sliding_attention":
            return None
        window: int | None = getattr(config, "sliding_window", None)
        return window

    def activation(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `Parameters`."""
        mlp = self._layers[layer].mlp
        function: Callable[[torch.Tensor], torch.Tensor] = mlp.act if self._is_gpt2 else mlp.act_fn
        return function

    def head_norms(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """See `Parameters`."""
        attention = self._attention(layer)
        if not hasattr(attention, "q_norm"):
            return None
        return attention.q_norm.weight.data, attention.k_norm.weight.data, float(attention.q_norm.variance_epsilon)

    def rotations(self, positions: torch.Tensor) -> torch.Tensor | None:
        """See `Parameters`."""
        if self._is_gpt2:
            return None
        some = torch.empty(0, dtype=torch.float32, device=self._model.device)
        cos, sin = self._base.rotary_emb(some, positions[None].to(self._model.device))
        half = cos.shape[-1] // 2  # transformers repeats them for the second half of each head
        return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
