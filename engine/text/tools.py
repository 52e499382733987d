"""This module holds the tools of one request: what is valid, how a model is told of them, what an answer may look like.
It does not know HTTP or how an answer is constrained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..errors import RequestError, describe
from ..json_schema import json_rule, unknown_keyword
from ..output_format import MAX_OUTPUT_FORMAT_BYTES, check_output_format
from .tool_calls import CLOSE, OPEN, ToolFormat, ToolStream

__all__ = ["ToolSession", "check_tools", "detect_tool_format", "tool_preamble"]

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 1 << 19
MAX_DESCRIPTION_CHARS = 16384
MAX_FORCED_CALLS = 8
"""Of one answer that must call: a weak model would not end by itself."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def detect_tool_format(template: str) -> ToolFormat:
    """Return how a model with this chat template spells calls."""
    if "<function=" in template:
        return "qwen"
    if OPEN not in template and ("<|python_tag|>" in template or '"parameters": dictionary' in template):
        return "llama"
    return "hermes"


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Return copies of the tools a request names, in which nothing can be wrong.

    Args:
        tools: [{"type": "function", "function": {"name", "description", "parameters", "strict"}}, ...].

    Raises:
        RequestError: one is not allowed; `param` is its place, such as tools[0].function.name.
    """
    if not isinstance(tools, (list, tuple)) or not 1 <= len(tools) <= MAX_TOOLS:
        count = f"has {len(tools)} entries" if isinstance(tools, (list, tuple)) else f"is {describe(tools)}"
        raise RequestError(f"tools {count}; allowed: a list of 1 to {MAX_TOOLS}", "tools")
    checked = [_check_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in checked]
    for index, name in enumerate(names):
        if name in names[:index]:
            _refuse(f"tools[{index}].function.name", name, "a name that no other tool has")
    if len(json.dumps(checked, ensure_ascii=False).encode()) > MAX_TOOLS_BYTES:
        raise RequestError(f"tools are too large; allowed: {MAX_TOOLS_BYTES // 1024} KB together", "tools")
    return checked


def tool_preamble(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return what tells a model of its tools whose template does not: words that Hermes and Qwen are trained on."""
    listed = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        f"{OPEN}{CLOSE} XML tags:\n"
        f'{OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSE}'
    )


class ToolSession:
    """The tools of one request.

    Args:
        tools: as a request gives them; None: none.
        tool_choice: "none", "auto", "required" or {"type": "function", "function": {"name": ...}}; None: "auto".
        parallel: whether one answer may hold several calls.
        tool_format: how the model spells calls; see `ChatTemplate.tool_format`.

    Attributes:
        tools: for `ChatTemplate.encode`; None where the model is not to be told of any.
        structured_outputs: for the sampling parameters; None where the answer is free.
        stop: stop strings beside the request's own: what would follow is not wanted.

    Raises:
        RequestError: names the place of what is not allowed.
    """

    def __init__(
        self, tools: Any, tool_choice: Any = None, *, parallel: bool = True, tool_format: ToolFormat = "hermes"
    ) -> None:
        checked = [] if tools is None else check_tools(tools)
        mode, named = _check_choice(tool_choice, [tool["function"]["name"] for tool in checked])
        self.tools = checked if checked and mode != "none" else None
        self._format: ToolFormat = tool_format
        self._parallel = parallel
        schemas = {
            tool["function"]["name"]: tool["function"].get("parameters", _NO_ARGUMENTS) for tool in self.tools or ()
        }
        self._schemas: Mapping[str, Mapping[str, Any]] = schemas
        self.stop: tuple[str, ...] = ()
        self.structured_outputs: dict[str, Any] | None = None
        if mode == "required":
            self.structured_outputs = self._grammar(checked, named)
        elif self.tools and any(tool["function"].get("strict") for tool in checked):
            self.structured_outputs = self._grammar(checked, None, is_optional=True)
        elif self.tools and not parallel and tool_format != "llama":
            self.stop = (CLOSE,)

    def stream(self) -> ToolStream:
        """Return what reads one answer: each of the n choices has its own."""
        return ToolStream(self._schemas, self._format, parallel=self._parallel)

    def _grammar(
        self, tools: Sequence[Mapping[str, Any]], named: str | None, *, is_optional: bool = False
    ) -> dict[str, Any]:
        """Return the grammar of answers whose calls are valid; each schema is a root of its own, for its references."""
        bare = self._format == "llama"
        key = "parameters" if bare else "arguments"
        names, rules = [], []
        for index, tool in enumerate(tools):
            name = tool["function"]["name"]
            if named not in (None, name):
                continue
            schema = self._schemas[name]
            if keyword := unknown_keyword(schema):
                where = f"tools[{index}].function.parameters"
                allowed = "keywords that a call can be made to follow"
                raise RequestError(f"{where} has {keyword[:200]!a}; allowed: {allowed}", where)
            head = json.dumps(f'{{"name": "{name}", "{key}": ')
            names.append(f"call_{index}")
            rules.append(f'call_{index}: {head} arguments_{index} "}}"\narguments_{index}: {json_rule(schema)}')
        one = " | ".join(names)
        most = MAX_FORCED_CALLS if self._parallel and named is None and not bare else 1
        if bare:
            start = "start: call" + (" | text\ntext: /([^{](.|\\n)*)?/" if is_optional else "")
        elif is_optional:
            start = f'start: tagged{{0,{most}}} text\ntext: TEXT\nTEXT: /(.|\\n)*/\nopening[lazy]: TEXT "{OPEN}"\n'
            start += f'tagged: opening "\\n" call "\\n{CLOSE}"'
        else:
            more = f' ("\\n" tagged){{0,{most - 1}}}' if most > 1 else ""
            start = f'start: tagged{more}\ntagged: "{OPEN}\\n" call "\\n{CLOSE}"'
        lark = "\n".join((start, f"call: {one}", *rules))
        try:
            return check_output_format({"grammar": lark})
        except ValueError:
            allowed = f"{MAX_OUTPUT_FORMAT_BYTES // 1024} KB together where calls must be valid"
            raise RequestError(f"tools are too large; allowed: {allowed}", "tools") from None


def _check_choice(choice: Any, names: Sequence[str]) -> tuple[str, str | None]:
    """Return "none", "auto" or "required", and the one tool that is required, if it is one."""
    if choice is None:
        choice = "auto"
    if isinstance(choice, str) and choice in ("none", "auto", "required"):
        if choice == "required" and not names:
            _refuse("tool_choice", choice, "none or auto where there are no tools")
        return choice, None
    if isinstance(choice, Mapping) and choice.keys() == {"type", "function"} and choice["type"] == "function":
        function = choice["function"]
        if isinstance(function, Mapping) and function.keys() == {"name"}:
            name = function["name"]
            if not isinstance(name, str) or name not in names:
                _refuse("tool_choice.function.name", name, "the name of one of the tools")
            return "required", name
    allowed = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    _refuse("tool_choice", choice, allowed)


def _check_tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.keys() != {"type", "function"} or tool["type"] != "function":
        _refuse(where, tool, '{"type": "function", "function": {...}}')
    function, where = tool["function"], f"{where}.function"
    if not isinstance(function, Mapping):
        _refuse(where, function, "an object")
    for key in function:
        if key not in ("name", "description", "parameters", "strict"):
            raise RequestError(
                f"{where} has {describe(key)}; allowed: name, description, parameters, strict",
                f"{where}.{str(key)[:64]}",
            )
    checked: dict[str, Any] = {}
    name = checked["name"] = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(f"{where}.name", name, "1 to 64 of a-z, A-Z, 0-9, _ and -")
    if (description := function.get("description")) is not None:
        if not isinstance(description, str) or len(description) > MAX_DESCRIPTION_CHARS or not _encodes(description):
            _refuse(f"{where}.description", description, f"a string of at most {MAX_DESCRIPTION_CHARS} characters")
        checked["description"] = description
    if (parameters := function.get("parameters")) is not None:
        try:
            schema = checked["parameters"] = check_output_format({"json": parameters})["json"]
        except ValueError:
            schema = {}
        if isinstance(parameters, str) or schema.get("type") != "object":
            allowed = 'a JSON schema of "type": "object", of at most 64 KB, 32 deep'
            _refuse(f"{where}.parameters", parameters, allowed)
        properties = schema.get("properties", {})
        if not isinstance(properties, dict) or not all(isinstance(each, (dict, bool)) for each in properties.values()):
            _refuse(f"{where}.parameters.properties", properties, "an object of JSON schemas")
    if (strict := function.get("strict")) is not None:
        if not isinstance(strict, bool):
            _refuse(f"{where}.strict", strict, "true or false")
        checked["strict"] = strict
    return {"type": "function", "function": checked}


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(where: str, value: Any, allowed: str) -> NoReturn:
    raise RequestError(f"{where} is {describe(value)}; allowed: {allowed}", where)
