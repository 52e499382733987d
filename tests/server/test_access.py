"""Who may ask: keys, hosts, origins, content types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from octavo.engine.errors import ConfigError
from octavo.engine.server.routes import ROUTES
from octavo.engine.server.settings import ServerSettings, read_api_keys
from octavo.engine.server.static import StaticFiles

from .raw import get, post
from .serving import Running, fake_text, serving

KEYS = ("first-key-1234", "second-key-5678")


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(ServerSettings(port=0, api_keys=KEYS)) as running:
        yield running


def _with(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_other_hosts_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="no API key"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_keys=KEYS).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    assert ServerSettings(host=host).api_keys == ()


def test_keys_are_not_shown() -> None:
    assert KEYS[0] not in repr(ServerSettings(api_keys=KEYS))
    with pytest.raises(ConfigError) as refused:
        ServerSettings(api_keys=("sp ace in it",))
    assert "sp ace" not in str(refused.value)


def test_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{KEYS[0]}\n\n  {KEYS[1]}  \n{KEYS[0]}\n")
    assert read_api_keys(file, None) == KEYS
    assert read_api_keys(None, f"{KEYS[1]}, {KEYS[0]},") == (KEYS[1], KEYS[0])
    assert read_api_keys(None, None) == ()
    file.write_text("# nothing\n")
    for broken in (file, tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="api-key-file"):
            read_api_keys(broken, None)


def test_every_route_needs_the_key(locked: Running) -> None:
    # What a browser opens before it can send a key; none of it holds data.
    open_paths = {"/livez", "/openapi.json", *StaticFiles().paths}
    assert {"/", "/docs"} < open_paths
    for route in ROUTES:
        path = re.sub(r"{\w+}", "some", route.path)
        for headers in ({}, _with("wrong-key-0000"), {"Authorization": KEYS[0]}, {"Authorization": f"Basic {KEYS[0]}"}):
            status = get(locked, path, headers, route.method).status
            assert (status == 200) == (path in open_paths), path
            assert status in (200, 401)
    for path in ("/no/such", "//livez", "/livez/", "/%6civez/../v1/models", "/v1/models?/livez"):
        assert get(locked, path).status == 401, path
    for path in open_paths:
        assert get(locked, path).status == 200, path


def test_no_spelling_of_a_path_goes_past_the_key(locked: Running) -> None:
    for path in ("/v1/models", "//v1/models", "/./v1/models", "/livez/../v1/models", "/%761/models", "/livez%2f..%2f"):
        for target in (path, f"http://localhost{path}", f"http://localhost/livez/..{path}"):
            assert get(locked, target).status == 401, target


def test_either_key_opens(locked: Running) -> None:
    for key in KEYS:
        assert get(locked, "/v1/models", _with(key)).status == 200
        assert get(locked, "/v1/models", {"Authorization": f"bearer  {key}"}).status == 200
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS[1], max_retries=0)
    assert client.completions.create(model="fake", prompt="a", seed=1, max_tokens=3).choices[0].text == fake_text(
        "a", 3, seed=1
    )
    client.close()
    with pytest.raises(openai.AuthenticationError) as refused:
        locked.client.models.list()
    assert refused.value.code == "invalid_api_key"


def test_keys_do_not_share_prefixes(locked: Running) -> None:
    def cached(key: str) -> int:
        client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0)
        usage = client.completions.create(model="fake", prompt=[5] * 100, max_tokens=1).usage
        client.close()
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert [cached(KEYS[0]), cached(KEYS[1]), cached(KEYS[0])] == [0, 0, 96]


def test_any_key_where_there_is_none(fake: Running) -> None:
    for value in ("Bearer anything", "Basic abc", "nonsense"):
        assert get(fake, "/v1/models", {"Authorization": value}).status == 200


def test_foreign_host(fake: Running, locked: Running) -> None:
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:80"):
        assert get(fake, "/v1/models", {"Host": host}).status == 200, host
    for host in ("example.com", "localhost.example.com", "127.0.0.1.example.com", "192.168.0.1:80", "", "[::2]"):
        assert get(fake, "/v1/models", {"Host": host}).status == 403, host
        assert get(locked, "/v1/models", {"Host": host, **_with(KEYS[0])}).status == 200, host


def test_foreign_origin(fake: Running) -> None:
    host = "{}:{}".format(*fake.address)
    assert get(fake, "/v1/models", {"Origin": f"http://{host}"}).status == 200
    for origin in ("null", "http://example.com", f"http://{host}.example.com", "http://127.0.0.1:1", "http://[", ""):
        response = post(fake, "/v1/completions", {"prompt": "a"}, {"Origin": origin})
        assert response.status == 403, origin
        assert not any(name.startswith("access-control-") for name in response.headers)
    assert get(fake, "/v1/completions", {"Origin": "http://example.com"}, "OPTIONS").status == 403


def test_forms_are_refused(fake: Running) -> None:
    """What a page may send to another origin without asking first is no JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "", "json"):
        response = post(fake, "/v1/completions", {"prompt": "a"}, {"Content-Type": kind})
        assert response.status == 415, kind
        assert response.error["type"] == "invalid_request_error"
    for kind in ("application/json", "Application/JSON; charset=UTF-8", "application/json;"):
        assert post(fake, "/v1/completions", {"prompt": "a", "max_tokens": 1}, {"Content-Type": kind}).status == 200
    assert (
        post(fake, "/v1/completions", {"prompt": "a"}, {"Content-Type": "application/json; charset=utf-16"}).status
        == 415
    )


def test_errors_have_one_body(fake: Running) -> None:
    for path, method, status in (
        ("/no/such", "GET", 404),
        ("/", "POST", 405),
        ("/v1/completions", "GET", 405),
        ("/v1/models/", "GET", 404),
        ("/v1/models/other", "GET", 404),
        ("/page/../settings.py", "GET", 404),
        ("/..%2fsettings.py", "GET", 404),
        ("/v1/requests/none", "GET", 404),
    ):
        response = get(fake, path, method=method)
        assert response.status == status, path
        assert response.error["message"]
        assert response.headers["content-type"] == "application/json"
        assert "x-request-id" in response.headers
        assert ("allow" in response.headers) == (status == 405)


def test_page_headers(fake: Running) -> None:
    for path in ("/", "/docs"):
        headers = get(fake, path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    page = get(fake, "/docs").body.decode()
    assert not re.search(r"https?://|<script|style=", page)
    for route in ROUTES:
        assert f"{route.method} {route.path}" in page
