"""This module holds the reading of a tokenizer's files in a folder. It does not know what is built from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..errors import CheckpointError

__all__ = ["TOKENIZER", "TokenizerFiles", "read_tokenizer_files"]

TOKENIZER: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
MAX_TOKENIZER_BYTES: Final = 256 << 20
MAX_CONFIG_BYTES: Final = 16 << 20
NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizerFiles(NamedTuple):
    """What a folder says of its tokenizer."""

    tokenizer: bytes
    """tokenizer.json as it is."""
    named_tokens: dict[str, str]
    """Of `NAMES` those that there are."""
    chat_template: str | None


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json, and beside it tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    Raises:
        CheckpointError: tokenizer.json is missing, or a file is too large or damaged.
    """
    data = _read(folder / TOKENIZER, MAX_TOKENIZER_BYTES)
    if data is None:
        raise CheckpointError(TOKENIZER, "is missing; only the tokenizers format is supported, not tokenizer.model")
    config = _read_json(folder / CONFIG)
    named = {name: _token_text(value) for name, value in _read_json(folder / "special_tokens_map.json").items()}
    named |= {name: _token_text(value) for name, value in config.items() if name in NAMES}
    named_tokens = {name: text for name, text in named.items() if name in NAMES and text is not None}
    return TokenizerFiles(data, named_tokens, _template(folder, config))


def _read(path: Path, max_bytes: int) -> bytes | None:
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(path.name, f"cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise CheckpointError(path.name, f"has more than {max_bytes} bytes")
    return data


def _read_text(path: Path) -> str | None:
    data = _read(path, MAX_CONFIG_BYTES)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(path.name, f"is no UTF-8 at byte {error.start}") from error


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path.name, f"is no JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(path.name, "is not a JSON object")
    return value


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the template of its own file, else the configuration's; of several named ones, "default"."""
    source = _read_text(folder / "chat_template.jinja")
    if source is not None:
        return source
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(CONFIG, "chat_template is neither a string nor a list of named ones")
    return value
