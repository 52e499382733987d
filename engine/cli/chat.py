"""This module holds `octavo chat`: a conversation in a terminal or over pipes. It does not know tensors."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError
from ..sampling_params import SamplingParams
from .answers import beyond_text
from .endings import FAILED, OK, Interrupt
from .flags import Options, parameter_from_text
from .startup_lines import start_llm
from .terminal import error_line, show, stderr

if TYPE_CHECKING:
    from ..llm import LLM
    from ..step import RequestOutput

__all__ = ["chat"]

HELP = """\
/reset              forget the conversation
/system TEXT        set the system message and start afresh; without TEXT: the model's own
/params             show the sampling parameters
/params NAME=VALUE  set one, as in /params temperature=0.7; without a value: the default again
/help               this list
/exit               leave; Ctrl-D does too, Ctrl-C stops an answer"""


def chat(
    system: Annotated[str | None, typer.Option(help="The system message.", metavar="TEXT")] = None,
    *,
    options: Options,
) -> int:
    """Talk with a model.

    Without a terminal, each line of stdin is a message and stdout gets the answers.
    """
    _check_shown(options.sampling)
    llm = start_llm(options.config, quiet=options.quiet)
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    conversation = Conversation(llm, options.sampling, system)
    if is_interactive:
        stderr().print("/help lists what else there is", style="dim")
    num_failed = 0
    for line in _lines(is_interactive):
        if line.startswith("/"):
            if line in ("/exit", "/quit"):
                break
            conversation.command(line)
        elif line and not conversation.say(line):
            num_failed += 1
    return FAILED if num_failed and not is_interactive else OK


class Conversation:
    """The messages so far and how to answer them.

    Args:
        llm: the engine.
        sampling: the parameters to begin with.
        system: the system message; None: whatever the model's template says.
    """

    def __init__(self, llm: LLM, sampling: Any, system: str | None) -> None:
        self._llm = llm
        self._sampling = dict(sampling)
        self._system = system
        self.messages: list[dict[str, str]] = []
        self._reset()

    def say(self, text: str) -> bool:
        """Answer a message on stdout, token by token; return whether there is an answer.

        What was not answered at all is not kept, so that it can be said again in other words.
        """
        if any("\udc80" <= each <= "\udcff" for each in text):
            error_line("the message is not UTF-8")
            return False
        self.messages.append({"role": "user", "content": text})
        output: RequestOutput | None = None
        num_shown = 0
        error = None
        with Interrupt() as interrupt:
            try:
                answers = self._llm.stream(self.messages, SamplingParams.from_mapping(self._sampling))
                for output in answers:
                    show(output.outputs[0].text[num_shown:], end="")
                    num_shown = len(output.outputs[0].text)
                    if interrupt.wanted:
                        answers.close()
                        break
            except RequestError as refused:
                error = str(refused)
        if output is not None:
            show("")
            if output.outputs[0].finish_reason == "error":
                error = output.outputs[0].error or "the engine gave no reason"
        if error is not None or output is None:
            self.messages.pop()
            error_line(self._explained(error or "stopped before the first token"))
            return False
        answer = output.outputs[0]
        self.messages.append({"role": "assistant", "content": answer.text})
        if interrupt.wanted:
            stderr().print("(stopped)", style="dim")
        elif answer.finish_reason == "length":
            stderr().print(f"({self._why_cut(output)})", style="dim")
        return True

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/help":
            stderr().print(HELP)
        elif name == "/reset":
            self._reset()
            stderr().print("(the conversation is forgotten)", style="dim")
        elif name == "/system":
            self._system = argument or None
            self._reset()
            what = "set" if argument else "is the model's own"
            stderr().print(f"(system message {what}, the conversation starts afresh)", style="dim")
        elif name == "/params":
            self._set(argument)
        else:
            error_line(f"there is no {name}; allowed: /reset /system /params /help /exit")

    def _reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _set(self, argument: str) -> None:
        name, equals, text = (part.strip() for part in argument.partition("="))
        try:
            if argument and not equals:
                raise RequestError(f"/params {argument} has no =; write /params temperature=0.7")
            if text:
                changed = self._sampling | {name: parameter_from_text(name, text)}
                _check_shown(changed)
                self._sampling = changed
            elif argument:
                SamplingParams.from_mapping({name: None})
                self._sampling.pop(name, None)
        except RequestError as error:
            error_line(str(error))
            return
        effective = self._llm.params(self._sampling)
        given = {name: getattr(effective, name) for name in ("temperature", "top_p", "top_k", "min_p")} | self._sampling
        stderr().print("  ".join(f"{name}={json.dumps(value)}" for name, value in given.items()), style="dim")

    def _explained(self, error: str) -> str:
        """Return the error with the way out, where the conversation has grown too long."""
        max_model_len = self._llm.engine.resolved.max_model_len
        try:
            num_tokens = len(self._llm.chat_template.encode(self.messages)) if self.messages else 0
        except RequestError:
            return error
        if "tokens; allowed" in error and num_tokens:
            return f"{error}. The conversation before it has {num_tokens} of {max_model_len}: /reset forgets it"
        return error

    def _why_cut(self, output: RequestOutput) -> str:
        num_tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
        max_model_len = self._llm.engine.resolved.max_model_len
        if num_tokens >= max_model_len:
            return f"cut: the context of {max_model_len:,} tokens is full; /reset starts afresh"
        return "cut at max_tokens; /params max_tokens= allows all that the context holds"


def _check_shown(sampling: Mapping[str, Any]) -> None:
    """Refuse what a conversation has no place for."""
    hidden = (["n"] if sampling.get("n", 1) != 1 else []) + beyond_text(sampling)
    if hidden:
        raise RequestError(f"a chat shows one text and cannot show {', '.join(hidden)}; use octavo generate --chat")


def _lines(is_interactive: bool) -> Iterator[str]:
    """Yield what the user says, line by line, until the end of input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # As in a C locale: bytes that are no UTF-8 spoil one message, not the conversation.
        sys.stdin.reconfigure(errors="surrogateescape")
    if not is_interactive:
        for line in sys.stdin:
            yield line.strip()
        return
    import readline  # noqa: F401 (importing it gives input() editing and history)

    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            show("")
            return
        except KeyboardInterrupt:
            stderr().print("\n(Ctrl-D or /exit leaves)", style="dim")
