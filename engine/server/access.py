"""This module holds who may ask: API keys, and without any, this machine's own programs. It does not know routes."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from hashlib import sha256
from urllib.parse import urlsplit

from .errors import HTTPError
from .settings import ServerSettings, is_loopback

__all__ = ["Access"]


class Access:
    """Checks the headers of requests.

    A server without a key trusts every program on its machine, but not what a web page makes a browser on that machine
    do: such a request names a foreign host (DNS rebinding) or a foreign origin, or is no JSON (a form).
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._digests = [_digest(key) for key in settings.api_keys]

    def check(self, headers: Mapping[bytes, bytes]) -> str:
        """Check a request to a route that is not open to everybody.

        Args:
            headers: lower-case name -> value.

        Returns:
            Whose prefix cache the request uses: "" where there is at most one key.

        Raises:
            HTTPError: 401 or 403.
        """
        if not self._digests:
            _check_local(headers)
            return ""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = sha256(given.strip()).digest() if scheme.lower() == b"bearer" else b""
        # Every key is compared, so that the time taken tells nothing about which one is near.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise HTTPError(
                401,
                "the API key is missing or wrong; allowed: a header Authorization: Bearer <key>",
                code="invalid_api_key",
                headers=[("www-authenticate", "Bearer")],
            )
        return f"key {matches.index(True)}" if len(self._digests) > 1 else ""


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def _check_local(headers: Mapping[bytes, bytes]) -> None:
    host = headers.get(b"host", b"").decode("latin-1")
    if not is_loopback(_host_name(host)):
        raise HTTPError(403, "the Host header names another machine; allowed without an API key: localhost, 127.0.0.1")
    origin = headers.get(b"origin")
    if origin is not None and _netloc(origin.decode("latin-1")) != host.lower():
        raise HTTPError(403, "the request comes from a page of another origin; allowed without an API key: none")


def _netloc(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
