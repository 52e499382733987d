"""This package holds text: tokenizing, streaming it back, chat templates, stop strings. It does not know tensors."""

from __future__ import annotations

from .chat_template import ChatTemplate, RenderedPrompt
from .detokenizer import Detokenizer
from .stop import StopMatcher, StopResult
from .template_sandbox import TemplateLimits
from .tokenizer import Tokenizer
from .tool_calls import CallDelta, TextDelta, ToolFormat, ToolStream
from .tools import ToolSession

__all__ = [
    "CallDelta",
    "ChatTemplate",
    "Detokenizer",
    "RenderedPrompt",
    "StopMatcher",
    "StopResult",
    "TemplateLimits",
    "TextDelta",
    "Tokenizer",
    "ToolFormat",
    "ToolSession",
    "ToolStream",
]
