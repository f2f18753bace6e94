"""What stands before every route: who may call, from where, and how much they may send."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
LOCAL = "local"  # the owner of what is ordered where no key is asked
OPEN = ("/healthz", "/openapi.json", "/v1/files/")  # file addresses are secrets themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """`keys`: who has one may call the API; None asks for none, () lets nobody in. `hosts`: names that this server
    answers to (None: any), so that no web page can reach it under a name of its own. Sizes are in bytes."""

    keys: Sequence[str] | None = None
    hosts: Collection[str] | None = LOOPBACK
    body: int = 64 * 2**20
    upload: int = 2 * 2**30 + 2**20


def owner_of(key: str) -> str:
    """How jobs name the holder of a key, which they do not store."""
    return "key-" + hashlib.sha256(key.encode()).hexdigest()[:16]


class Protect:
    """ASGI middleware. Refuses in OpenAI's form of an error; puts the caller's `owner` into the request's state."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] != "websocket" or self._host_is_ours(Headers(scope=scope)):
                await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        refusal = self._refusal(headers, path)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        scope.setdefault("state", {})["owner"] = self._owner(headers) or LOCAL
        if path.startswith("/v1"):
            receive = _Counted(receive, self._most(path))
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> tuple[int, str] | None:
        if not self._host_is_ours(headers):
            return 421, "this server does not answer to that host name"
        if not self._origin_is_ours(headers):
            return 403, "calls from other web pages are refused"
        asked = path.startswith(("/v1", "/metrics")) and not path.startswith(OPEN)
        if asked and self.rules.keys is not None and self._owner(headers) is None:
            return 401, "give a valid API key as 'Authorization: Bearer KEY'"
        if path.startswith("/v1") and _length(headers) > self._most(path):
            return 413, f"the request has more than {self._most(path):,} bytes"
        return None

    def _host_is_ours(self, headers: Headers) -> bool:
        return self.rules.hosts is None or _hostname(headers.get("host", "")) in self.rules.hosts

    def _origin_is_ours(self, headers: Headers) -> bool:
        """Browsers say which page calls; programs say nothing."""
        origin = headers.get("origin")
        return origin is None or origin.partition("://")[2] == headers.get("host")

    def _owner(self, headers: Headers) -> str | None:
        given = headers.get("authorization", "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() != "bearer":
            return None
        for known in self.rules.keys or ():
            if hmac.compare_digest(known.encode(), key.strip().encode()):
                return owner_of(known)
        return None

    def _most(self, path: str) -> int:
        return self.rules.upload if path == "/v1/adapters" else self.rules.body


class _Counted:
    """A request's body, refused as soon as it has more than `most` bytes, whatever its header says."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.most, self.seen = receive, most, 0

    async def __call__(self) -> Message:
        message = await self.receive()
        self.seen += len(message.get("body", b""))
        if self.seen > self.most:
            raise HTTPException(413, f"the request has more than {self.most:,} bytes")
        return message


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] or host


def _length(headers: Headers) -> int:
    length = headers.get("content-length", "0")
    return int(length) if length.isdigit() and len(length) < 20 else 0


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(
        {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": str(status)}}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
