"""What a connection writes by itself is what h11 would write, and goes out at once."""

from __future__ import annotations

import socket

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.server.connection import _Parser
from octavo.engine.server.run import bind
from octavo.engine.server.settings import ServerSettings

HEADERS = {
    "no length": [("content-type", "text/event-stream")],
    "chunked": [("transfer-encoding", "chunked")],
    "a length": [("content-length", "12")],
}


def sent(connection: h11.Connection, request: bytes, headers: list[tuple[str, str]], pieces: list[bytes]) -> bytes:
    connection.receive_data(request)
    while not isinstance(connection.next_event(), h11.EndOfMessage):
        pass
    response = h11.Response(status_code=200, headers=headers, reason="OK")
    events = [response, *(h11.Data(data=piece) for piece in pieces), h11.EndOfMessage()]
    return b"".join(connection.send(event) or b"" for event in events)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("framing", HEADERS)
@given(pieces=st.lists(st.binary(max_size=40), max_size=5))
def test_chunks_are_framed_as_h11_would(framing: str, method: bytes, version: bytes, pieces: list[bytes]) -> None:
    if method == b"HEAD":
        pieces = [b"" for _ in pieces]
    elif framing == "a length":
        pieces = [*(b"" for _ in pieces), b"twelve bytes"]
    ours, theirs = _Parser(1 << 14), h11.Connection(h11.SERVER)
    for _ in range(2):
        request = method + b" / HTTP/" + version + b"\r\nhost: x\r\n\r\n"
        assert sent(ours, request, HEADERS[framing], pieces) == sent(theirs, request, HEADERS[framing], pieces)
        assert (ours.our_state, ours.their_state) == (theirs.our_state, theirs.their_state)
        if ours.our_state is not h11.DONE or ours.their_state is not h11.DONE:
            return
        ours.start_next_cycle()
        theirs.start_next_cycle()


def test_what_is_written_goes_out_at_once() -> None:
    with bind(ServerSettings(port=0)) as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
