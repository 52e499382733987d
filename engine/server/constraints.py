"""This module holds what a chat request says its answer must be: a format, or calls. It does not know answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..async_llm import AsyncLLM
from ..errors import CheckpointError, ConfigError, RequestError, describe
from ..text.tools import ToolSession

__all__ = ["Constraints"]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Constraints:
    """The format and the tools of one request.

    Args:
        llm: whose template decides how calls are spelled.
        route: the request's own fields.
        sampling: its sampling parameters; gets the format that is wanted, by whatever name.

    Attributes:
        session: reads calls out of the answer; None where there are no tools to call.
        stops: strings that end the answer besides the request's own.

    Raises:
        RequestError: something is not allowed, or asks for two formats at once.
    """

    def __init__(self, llm: AsyncLLM, route: Mapping[str, Any], sampling: dict[str, Any]) -> None:
        self._source = "structured_outputs"
        self.session: ToolSession | None = None
        self.stops: tuple[str, ...] = ()
        if (wanted := _read_format(route.get("response_format"))) is not None:
            self._set(sampling, wanted, "response_format")
        if "tools" not in route and "tool_choice" not in route:
            if route.get("parallel_tool_calls") is False:
                raise RequestError("parallel_tool_calls is False; allowed: with tools only", "parallel_tool_calls")
            return
        try:
            tool_format = llm.chat_template.tool_format
        except (ConfigError, CheckpointError) as error:
            raise RequestError(str(error), "tools") from None
        session = ToolSession(
            # An empty list is what clients send that have none.
            None if route.get("tools") == [] else route.get("tools"),
            route.get("tool_choice"),
            parallel=route.get("parallel_tool_calls", True),
            tool_format=tool_format,
        )
        if session.structured_outputs is not None:
            self._set(sampling, session.structured_outputs, "tools")
        self.stops = session.stop
        if session.tools is not None:
            self.session = session

    @contextmanager
    def named(self) -> Iterator[None]:
        """Call the format in errors by the name it came under."""
        try:
            yield
        except RequestError as error:
            if error.param != "structured_outputs":
                raise
            raise RequestError(str(error).replace("structured_outputs", self._source, 1), self._source) from None

    def _set(self, sampling: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
        if "structured_outputs" in sampling:
            raise RequestError(f"{source} is given with {self._source}; allowed: one of them", source)
        sampling["structured_outputs"] = wanted
        self._source = source


def _read_format(value: Any) -> dict[str, Any] | None:
    """Return OpenAI's response_format in the sampler's words; None for free text."""
    allowed = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"name", "schema"}}'
    if value is None or value == {"type": "text"}:
        return None
    if value == {"type": "json_object"}:
        return {"json_object": True}
    if not isinstance(value, dict) or value.keys() != {"type", "json_schema"} or value["type"] != "json_schema":
        raise RequestError(f"response_format is {describe(value)}; allowed: {allowed}", "response_format")
    given, where = value["json_schema"], "response_format.json_schema"
    known = {"name": _is_name, "description": _is_text, "schema": _is_object, "strict": _is_flag}
    if not isinstance(given, dict) or not {"name", "schema"} <= given.keys():
        raise RequestError(f"{where} is {describe(given)}; allowed: {allowed}", where)
    for key, part in given.items():
        if key not in known:
            raise RequestError(f"{where} has {describe(key)}; allowed: {', '.join(known)}", f"{where}.{key[:64]}")
        if part is not None and not known[key](part):
            raise RequestError(f"{where}.{key} is {describe(part)}; allowed: what OpenAI allows", f"{where}.{key}")
    if given["schema"] is None or given["name"] is None:
        raise RequestError(f"{where} has null in place of its name or schema; allowed: both", where)
    return {"json": given["schema"]}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)
