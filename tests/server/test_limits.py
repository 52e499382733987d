"""Clients that send too much, too slowly, or do not read."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from octavo.engine.errors import ConfigError
from octavo.engine.server.settings import Limits, ServerSettings
from octavo.engine.server.sse import EventStream

from .raw import connect, get, post, read_response, send
from .serving import WAIT_S, Running, fake_text, serving

SHORT = 0.3


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    """Serve with little patience: every time is short, every queue small."""
    limits = Limits(
        body_bytes=10_000, header_s=SHORT, body_s=SHORT, keep_alive_s=SHORT, queue_s=SHORT, ping_s=SHORT / 2
    )
    # A row for one sequence only; a fake model of long sequences, so that a request can last.
    engine = {"max_num_seqs": 1, "max_model_len": 1 << 20, "kv_cache_tokens": 1 << 20, "max_num_batched_tokens": 64}
    with serving(ServerSettings(port=0, limits=limits), engine, max_unread=16) as running:
        yield running


def _closed(sock: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def test_limits_are_checked() -> None:
    assert Limits.from_texts({"body_bytes": "5", "ping_s": "0.5"}) == Limits(body_bytes=5, ping_s=0.5)
    for texts in ({"nothing": "5"}, {"body_bytes": "-1"}, {"body_bytes": "1.5"}, {"ping_s": "nan"}, {"ping_s": "inf"}):
        with pytest.raises(ConfigError, match=next(iter(texts))):
            Limits.from_texts(texts)


def test_large_body(impatient: Running) -> None:
    response = post(impatient, "/v1/completions", b" " * 10_001)
    assert (response.status, response.headers["connection"]) == (413, "close")
    assert "10000" in response.error["message"]
    # Without a declared length it is refused when it has come to that size.
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    response = send(impatient, head + b"Transfer-Encoding: chunked\r\n\r\n" + 4 * chunk + b"0\r\n\r\n")
    assert response.status == 413


def test_huge_body_is_refused_before_it_is_read(impatient: Running) -> None:
    with connect(impatient) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000000000\r\n\r\n"
        )
        assert read_response(sock).status == 413


def test_body_in_crumbs(fake: Running) -> None:
    """One-byte chunks cost more to take apart than to send."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    response = send(fake, head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 3000)
    assert response.status == 400
    assert "pieces" in response.error["message"]
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"prompt": "a", "max_tokens": 1}') + b"0\r\n\r\n"
    assert send(fake, head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks).status == 200


def test_large_headers(fake: Running) -> None:
    many = {f"X-{index}": "1" for index in range(101)}
    assert get(fake, "/livez", many).status == 431
    assert get(fake, "/livez", dict(list(many.items())[:90])).status == 200
    for headers in ({"X-Long": "a" * 17_000}, {f"X-{index}": "a" * 4000 for index in range(5)}):
        response = get(fake, "/livez", headers)
        assert response.status == 431
        assert "16384" in response.error["message"]
    # As it never ends, it is refused before it is complete.
    response = send(fake, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 40_000)
    assert response.status == 431
    assert get(fake, "/livez?" + "a" * 17_000).status == 431


def test_what_is_no_http(fake: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    both = b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    for data in (b"\x16\x03\x01 hello\r\n\r\n", head + b"Transfer-Encoding: gzip\r\n\r\n", head + both):
        response = send(fake, data)
        assert response.status == 400
        assert response.error["type"] == "invalid_request_error"


def test_whole_urls_are_targets(fake: Running) -> None:
    for target in ("http://localhost/livez", "HTTP://localhost:80/livez?a=b"):
        assert get(fake, target).body == b"ok\n"
    for target, status in (
        ("http://localhost", 200),
        ("http://localhost/none", 404),
        ("*", 404),
        ("ftp://localhost/livez", 404),
        ("//livez", 404),
        ("/http://localhost/livez", 404),
    ):
        assert get(fake, target).status == status, target


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_proposed_protocols_are_passed_over(
    fake: Running, protocol: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    headers = {"Connection": "Upgrade, close", "Upgrade": protocol, "HTTP2-Settings": "AAMAAABkAAQCAAAAAAIAAAAA"}
    assert get(fake, "/livez", headers).status == 200
    assert post(fake, "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers).status == 200
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]
    assert capfd.readouterr().err == ""


def test_compressed_bodies(fake: Running) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    for coding, status in (("gzip", 415), ("br", 415), ("identity, gzip", 415), ("identity", 200)):
        response = post(fake, "/v1/completions", body, {"Content-Encoding": coding})
        assert response.status == status, coding
    response = post(fake, "/v1/completions", gzip.compress(body), {"Content-Encoding": "gzip"})
    assert "Content-Encoding" in response.error["message"]


def test_slow_headers(impatient: Running) -> None:
    started = time.monotonic()
    with connect(impatient) as silent, connect(impatient) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\nHost:")
        assert read_response(slow).status == 408
        assert _closed(silent) == b""
    assert time.monotonic() - started < WAIT_S / 2


def test_headers_byte_by_byte(impatient: Running) -> None:
    """The time is for all headers: a byte now and then does not prolong it."""
    with connect(impatient) as sock:
        data = b""
        sock.settimeout(SHORT / 10)
        for byte in b"GET /livez HTTP/1.1\r\nX-Long: " + b"a" * 200:
            try:
                sock.sendall(bytes((byte,)))
                data += sock.recv(65536)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                pass
            break
        assert data.startswith(b"HTTP/1.1 408 ")


def test_slow_second_request(impatient: Running) -> None:
    with connect(impatient) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_response(sock).status == 200
        sock.sendall(b"GET /livez HT")
        assert read_response(sock).status == 408


def test_idle_connection(impatient: Running) -> None:
    with connect(impatient) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_response(sock).status == 200
        assert _closed(sock) == b""


def test_slow_body(impatient: Running) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n"
    )
    with connect(impatient) as sock:
        sock.sendall(head + b"Content-Length: 90\r\n\r\n{")
        response = read_response(sock)
        assert (response.status, response.headers["connection"]) == (408, "close")
        assert _closed(sock) == b""
    # A route that reads no body answers at once, and the connection does not outlive it by much.
    with connect(impatient) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n")
        assert read_response(sock).status == 200
        _closed(sock)


def test_slow_body_where_the_server_is_late(impatient: Running) -> None:
    """The answer's time begins when the body's is seen to be over, however long the event loop was held."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(impatient) as sock:
        sock.sendall(head + b"Content-Length: 90\r\n\r\n{")
        hold = functools.partial(impatient.loop.call_later, SHORT / 2, time.sleep, SHORT + 1)
        impatient.loop.call_soon_threadsafe(hold)
        assert read_response(sock).status == 408


def _asking(running: Running, body: dict[str, Any], *, receive_bytes: int | None = None) -> socket.socket:
    sock = connect(running, receive_bytes=receive_bytes)
    data = json.dumps(body).encode()
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
    )
    return sock


def _streaming(running: Running, max_tokens: int, *, receive_bytes: int | None = None) -> socket.socket:
    body = {"prompt": "abc", "max_tokens": max_tokens, "stream": True, "seed": 4}
    return _asking(running, body, receive_bytes=receive_bytes)


def _read_until(sock: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        part = sock.recv(65536)
        assert part, data[-1000:]
        data += part
    return data


def test_reader_that_does_not_drain(impatient: Running) -> None:
    # Large chunks fill what the kernel keeps for the reader soon.
    body = {"prompt": "abc", "max_tokens": 1 << 19, "stream": True, "logprobs": 20}
    with _asking(impatient, body, receive_bytes=2048) as sock:
        # It reads nothing: first its request is ended, then its connection.
        impatient.eventually(lambda: impatient.server.app.context.admission.num_active == 1)
        impatient.eventually(lambda: impatient.server.app.context.admission.num_active == 0)
        assert b"[DONE]" not in _closed(sock)
    impatient.check_canary()


def _occupying(running: Running, max_tokens: int = 1 << 19) -> socket.socket:
    """Return the connection of a request that has the only row, and needs nobody to read its answer."""
    sock = _asking(running, {"prompt": "abc", "max_tokens": max_tokens, "seed": 4})
    admission = running.server.app.context.admission
    running.eventually(lambda: admission.num_active == 1 and admission.num_waiting == 0)
    return sock


@pytest.mark.parametrize("stream", [False, True])
def test_queue_wait(impatient: Running, stream: bool) -> None:
    with _occupying(impatient):
        with pytest.raises(openai.InternalServerError) as refused:
            impatient.client.completions.create(model="fake", prompt="late", stream=stream)  # type: ignore[call-overload]
        assert refused.value.status_code == 503
        assert refused.value.code == "queue_timeout"
        assert refused.value.response.headers["retry-after"] == "1"
    impatient.check_canary()


@pytest.mark.parametrize(
    ("limits", "second", "words"),
    [
        (Limits(queue_requests=4), {"prompt": ["a", "b"], "n": 2}, "1 sequences wait"),
        (Limits(queue_tokens=50), {"prompt": [0] * 48}, "3 prompt tokens wait"),
    ],
)
def test_full_queue(limits: Limits, second: dict[str, Any], words: str) -> None:
    engine = {"max_num_seqs": 1, "max_model_len": 1 << 16, "kv_cache_tokens": 1 << 16}
    with serving(ServerSettings(port=0, limits=limits), engine) as running:
        admission = running.server.app.context.admission
        with _occupying(running, 60_000) as first, _streaming(running, 5) as waiting:
            running.eventually(lambda: admission.num_waiting == 1)
            with pytest.raises(openai.RateLimitError) as refused:
                running.client.completions.create(model="fake", max_tokens=1, **second)
            assert words in str(refused.value)
            assert (refused.value.code, refused.value.response.headers["retry-after"]) == ("queue_full", "1")
            first.close()
            text = _read_until(waiting, b"[DONE]").decode()
        pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == fake_text("abc", 5, seed=4)
        running.check_canary()


def test_what_can_never_fit(fake: Running) -> None:
    longest = fake.llm.info.max_model_len
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"prompt": [0] * longest}, "prompt"),
        ({"prompt": "a", "max_tokens": longest}, "max_tokens"),
        ({"prompt": ["a"] * 100, "n": 128, "max_tokens": 1}, "n"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": "a" * 100_000}, "prompt"),
    ]
    for ask, param in refusals:
        with pytest.raises(openai.BadRequestError) as refused:
            fake.client.completions.create(model="fake", **ask)
        assert refused.value.param == param
    # This one is refused by its length, before it is tokenised.
    assert "100000 characters" in str(refused.value)
    for options in ({}, {"add_special_tokens": False}):
        response = post(fake, "/tokenize", {"prompt": "a" * 100_000} | options)
        assert (response.status, response.error["param"]) == (400, "prompt")
    limited = ServerSettings(port=0, limits=Limits(output_tokens=100))
    with serving(limited) as running, pytest.raises(openai.BadRequestError) as refused:
        running.client.completions.create(model="fake", prompt=["a", "b"], n=3, max_tokens=17)
    assert refused.value.param == "n"


def test_request_takes_too_long() -> None:
    limits = Limits(request_s=SHORT, keep_alive_s=SHORT)
    engine = {"max_num_seqs": 2, "max_model_len": 1 << 20, "kv_cache_tokens": 1 << 20}
    with serving(ServerSettings(port=0, limits=limits), engine) as running:
        with pytest.raises(openai.InternalServerError) as refused:
            running.client.completions.create(model="fake", prompt="a", max_tokens=1 << 19)
        assert refused.value.status_code == 504
        with _streaming(running, 1 << 19) as sock:
            text = _closed(sock).decode()
        assert '"code":"timeout"' in text
        assert "[DONE]" not in text
        running.check_canary()


def test_ping() -> None:
    """A stream that has nothing to say says so, but not before its work has begun: until then it may be refused."""

    async def run() -> None:
        sent: list[Any] = []
        has_begun, has_pinged = [False], asyncio.Event()

        async def send(message: Any) -> None:
            sent.append(message)
            if message.get("body", b"").startswith(b":"):
                has_pinged.set()

        stream = EventStream({"http_version": "1.1", "method": "POST"}, send, 0.01, lambda: has_begun[0])
        await asyncio.sleep(0.05)
        assert sent == []
        has_begun[0] = True
        async with asyncio.timeout(WAIT_S):
            await has_pinged.wait()
        await stream.write(b"data: 1\n\n")
        await stream.end()
        stream.close()
        assert [message["type"] for message in sent].count("http.response.start") == 1
        assert sent[0]["type"] == "http.response.start"
        assert sent[-1] == {"type": "http.response.body", "body": b""}

    asyncio.run(run())


@pytest.fixture(scope="module")
def endless() -> Iterator[Running]:
    """Serve a fake model whose requests take minutes."""
    with serving(engine={"max_model_len": 1 << 18, "kv_cache_tokens": 1 << 20, "max_num_seqs": 4}) as running:
        yield running


@pytest.mark.parametrize("after", [b"", b"data:"])
def test_disconnect_frees_blocks(endless: Running, count: Callable[[int, int], int], after: bytes) -> None:
    admission = endless.server.app.context.admission
    for _ in range(count(3, 50)):
        with _streaming(endless, 200_000) as sock:
            _read_until(sock, after)
            endless.eventually(lambda: admission.num_active == 1)
        endless.eventually(lambda: admission.num_active == 0)
    endless.check_canary()


def test_whole_answers_end_with_their_client(endless: Running) -> None:
    with _asking(endless, {"prompt": ["abc", "de"], "n": 2, "max_tokens": 200_000}):
        endless.eventually(lambda: endless.server.app.context.admission.num_active == 1)
    endless.check_canary()


def test_who_closes_the_sending_half_has_left(endless: Running) -> None:
    with _asking(endless, {"prompt": "abc", "max_tokens": 200_000}) as sock:
        endless.eventually(lambda: endless.server.app.context.admission.num_active == 1)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1000) == b""
        endless.check_canary()
