"""The routes that show what the engine does, and what failures leave of a request and its neighbours."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from octavo.engine.observe.recording import loads
from octavo.engine.runner.fake_runner import FakeRunner
from octavo.engine.server.errors import printable

from .asgi import ask
from .raw import connect, get
from .serving import KEPT_ENGINE, Running, fake_text, kept_engines, serving, started_llm


def _json(running: Running, path: str) -> Any:
    response = get(running, path)
    assert response.status == 200, response.body
    return json.loads(response.body)


def test_explanation(fake: Running) -> None:
    headers = {"X-Request-Id": "explain-me"}
    fake.client.completions.create(model="fake", prompt=[3] * 40, max_tokens=7, extra_headers=headers)
    for name in ("explain-me", "cmpl-explain-me"):
        found = _json(fake, f"/v1/requests/{name}")
        assert found["request_id"] == "cmpl-explain-me"
        assert found["choices"][0]["prompt_tokens"] == 40
        assert found["choices"][0]["output_tokens"] == 7
        assert found["choices"][0]["sentences"]
    assert _json(fake, "/v1/requests")["requests"][0]["request_id"] == "cmpl-explain-me"


def test_explanation_of_several_prompts(fake: Running) -> None:
    fake.client.completions.create(
        model="fake", prompt=[[3] * 40, [4] * 50], n=2, max_tokens=7, extra_headers={"X-Request-Id": "of-two"}
    )
    for name in ("of-two", "cmpl-of-two"):
        found = _json(fake, f"/v1/requests/{name}")
        assert found["request_id"] == "cmpl-of-two"
        choices = [(each["choice"], each["prompt_tokens"]) for each in found["choices"]]
        assert choices == [(0, 40), (1, 40), (2, 50), (3, 50)]
    found = _json(fake, "/v1/requests/of-two-1")
    assert [(each["choice"], each["prompt_tokens"]) for each in found["choices"]] == [(0, 50), (1, 50)]
    assert get(fake, "/v1/requests/of").status == 404


def test_recording_and_trace(fake: Running) -> None:
    fake.client.completions.create(model="fake", prompt="abc", max_tokens=7)
    response = get(fake, "/recording")
    recording = loads(response.body)
    assert recording.facts["model"] == "fake"
    assert recording.ring.num_steps > 0
    assert "attachment" in response.headers["content-disposition"]
    assert _json(fake, "/trace")["traceEvents"]


def test_metrics_count_what_was_asked() -> None:
    with serving() as running:
        for _ in range(3):
            running.client.completions.create(model="fake", prompt="abcd", max_tokens=5)
        with pytest.raises(openai.BadRequestError):
            running.client.completions.create(model="fake", prompt="abcd", max_tokens=-5)
        get(running, "/no/such/path")
        response = get(running, "/metrics")
        text = response.body.decode()
        assert response.headers["content-type"].startswith("text/plain")
    values = {}
    for line in text.splitlines():
        name, value = line.rsplit(" ", 1)
        # Labels in the order of their names, whatever order they are written in.
        values[name.partition("{")[0], *sorted(re.findall(r'\w+="[^"]*"', name))] = value
    model, handler, post = 'model_name="fake"', 'handler="/v1/completions"', 'method="POST"'
    assert values["octavo:generation_tokens_total", model] == "15.0"
    assert values["octavo:prompt_tokens_total", model] == "12.0"
    assert values["octavo:request_success_total", 'finished_reason="length"', model] == "3.0"
    assert values["http_requests_total", handler, post, 'status="200"'] == "3.0"
    assert values["http_requests_total", handler, post, 'status="400"'] == "1.0"
    assert values["http_requests_total", 'handler="other"', 'method="GET"', 'status="404"'] == "1.0"


def test_live(fake: Running) -> None:
    with connect(fake) as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = b""
        while data.count(b"data: ") < 3:
            part = sock.recv(65536)
            assert part, "the live view has ended"
            data += part
    first = json.loads(data.split(b"data: ")[1].partition(b"\n\n")[0])
    assert {"steps", "requests", "kv", "rates"} <= first.keys()


def test_health(fake: Running) -> None:
    health = _json(fake, "/health")
    assert (health["status"], health["reason"]) == ("ok", "")


def test_docs(fake: Running) -> None:
    document = _json(fake, "/openapi.json")
    assert document["openapi"].startswith("3.1")
    assert "/v1/chat/completions" in document["paths"]


@pytest.mark.parametrize("stream", [False, True])
def test_rows_that_are_no_numbers_fail_alone(stream: bool) -> None:
    """The second row's logits are NaN: its request says so, and its neighbour's tokens are what they always are."""
    with serving(factory=KEPT_ENGINE) as running:
        runner = kept_engines[-1].core.runner
        assert isinstance(runner, FakeRunner)
        good: Any = {"model": "fake", "prompt": "abd", "max_tokens": 1500, "seed": 3}
        neighbour = iter(running.client.completions.create(**good, stream=True))
        text = next(neighbour).choices[0].text
        runner.nan_rows = {1}
        with pytest.raises(openai.APIError) as failed:
            # Streamed, it may fail before the status is sent or after.
            list(running.client.completions.create(model="fake", prompt="abc", max_tokens=50, stream=stream))
        assert failed.value.code == "generation_failed"
        assert runner.nan_rows == set()
        assert text + "".join(chunk.choices[0].text for chunk in neighbour) == fake_text("abd", 1500, seed=3)
        running.check_canary()


def test_a_dead_engine_is_said_everywhere() -> None:
    with serving() as running:
        app = running.server.app

        async def run() -> None:
            async with started_llm() as llm:
                from octavo.engine.server.app import create_app

                other = create_app(llm)
                assert (await ask(other, "/health")).status == 200
                await llm.shutdown(0.0)
                assert llm.is_dead
                assert (await ask(other, "/health")).status == 503
                for path in ("/v1/completions", "/v1/chat/completions"):
                    body = {"prompt": "a"} if "chat" not in path else {"messages": [{"role": "user", "content": "a"}]}
                    answer = await ask(other, path, json.dumps(body).encode())
                    assert answer.status == 503
                    assert answer.error is not None
                    assert (answer.error["code"], answer.error["message"]) == (
                        "engine_dead",
                        "the engine was shut down",
                    )
                assert (await ask(other, "/livez")).status == 200
                assert (await ask(other, "/metrics")).status == 200

        running.run(run())
        assert app is running.server.app


def test_nothing_of_a_request_is_logged(fake: Running, caplog: pytest.LogCaptureFixture) -> None:
    secret = "the-secret-words"
    with caplog.at_level("DEBUG", logger="octavo"):
        answer = fake.client.completions.create(model="fake", prompt=secret, max_tokens=9, seed=1, user=secret)
        with pytest.raises(openai.BadRequestError):
            fake.client.completions.create(model="fake", prompt=secret, stop=[secret] * 20)
        get(fake, "/v1/models", {"Authorization": f"Bearer {secret}"})
        get(fake, "/%0a%1b[31mred")
        # A request's line follows its answer.
        fake.eventually(lambda: "[31mred" in caplog.text)
    logged = caplog.text
    assert "POST /v1/completions 200, 16 + 9 tokens" in logged
    assert secret not in logged
    assert answer.choices[0].text not in logged
    assert "\x1b" not in logged
    assert printable("\n\x1b") in logged
