"""This module holds the scales that a checkpoint may have for keys and values in eight bits. It does not know who uses
them.

compressed-tensors calls them `self_attn.k_scale`, NVIDIA's Model Optimizer `self_attn.k_proj.k_scale`; both mean the
number that what is stored is to be multiplied with.
"""

from __future__ import annotations

import math
import re

from ..errors import CheckpointError
from .safetensors import SafetensorsStore
from .store import Entry

__all__ = ["KV_SCALE", "KVScales", "read_kv_scales"]

KV_SCALE = re.compile(r"layers\.(\d{1,4})\.self_attn\.(?:k_proj\.(?=k)|v_proj\.(?=v))?([kv])_scale")
KVScales = list[tuple[float, float]]
"""Of k and v, by layer."""


def read_kv_scales(store: SafetensorsStore, num_layers: int) -> KVScales | None:
    """Return the scales of all layers, or None where there are none.

    Raises:
        CheckpointError: a layer has none or too many, or one is no number above 0.
    """
    found: dict[tuple[int, str], Entry] = {}
    for name, entry in store.entries.items():
        if place := KV_SCALE.fullmatch(name.removeprefix("model.")):
            key = int(place[1]), place[2]
            if key in found:
                raise CheckpointError(entry.file.name, f"is there twice, also as {found[key].name!r}", name)
            found[key] = entry
    if not found:
        return None
    expected = {(layer, kind) for layer in range(num_layers) for kind in "kv"}
    for layer, kind in sorted(expected ^ found.keys()):
        fault = "is missing" if (layer, kind) in expected else f"is there, and there are {num_layers} layers"
        raise CheckpointError(store.name, f"the {kind}_scale of layer {layer} {fault}")

    def number(entry: Entry) -> float:
        value = store.read_number(entry)
        if not (value > 0 and math.isfinite(value)):
            raise CheckpointError(entry.file.name, f"is {value:g}; a scale is a number above 0", entry.name)
        return value

    return [(number(found[layer, "k"]), number(found[layer, "v"])) for layer in range(num_layers)]
