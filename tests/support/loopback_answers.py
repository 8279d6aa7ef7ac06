"""How the loopback Hub reads a request and sends an answer, and what goes wrong on the way where a test wants it."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit


if TYPE_CHECKING:
    from tests.support.loopback_hub import LoopbackHub, User


@dataclass
class Seen:
    """A request that was answered, and how many bytes of body went out."""

    method: str
    path: str
    user: str | None
    status: int
    sent: int
    range: str | None
    authorized: bool


class Refused(Exception):
    """An answer that is an error of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Answering(BaseHTTPRequestHandler):
    """Answers requests by the methods that `routes` names; each calls `_send` or `_json`, or raises Refused."""

    hub: LoopbackHub
    # HTTP methods, the pattern of a path, and the name of the method here that gets its groups.
    routes: tuple[tuple[str, str, str], ...]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for the client to acknowledge its headers
    user: User | None

    def log_message(self, *_: Any) -> None:
        """Requests are in `LoopbackHub.seen`."""

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

    def _answer(self) -> None:
        url = urlsplit(self.path)
        fault = self.fault = self.hub.take_fault(self.command, unquote(url.path))
        self.cut_after: int | None = None
        if fault is not None:
            time.sleep(fault.delay)
            self.cut_after = fault.cut_after
        try:
            if self.command in ("PUT", "POST") and self.cut_after is not None:
                self.rfile.read(self.cut_after)
                self._cut(0)
                return
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault is not None and not fault.carried_out:
                if fault.body is not None:
                    self._send(200, b"", {})
                    return
                if fault.status is not None:
                    raise Refused(fault.status, "this is a fault", **{"Retry-After": "0"})
            self.query = parse_qs(url.query)
            self.user = self._user(url.path)
            for method, pattern, name in self.routes:
                found = re.fullmatch(pattern, url.path)
                if found and self.command in method.split():
                    parts = found.groupdict(default="").items()
                    getattr(self, name)(**{key: unquote(value) for key, value in parts})
                    return
            raise Refused(404, f"the loopback Hub has no {self.command} {url.path}")
        except Refused as refused:
            body = json.dumps({"error": refused.message}).encode()
            self._send(refused.status, body, {"Content-Type": "application/json", **refused.headers})

    def _user(self, path: str) -> User | None:
        header = self.headers.get("Authorization")
        if header is None or path.startswith("/cdn/"):
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        fault = self.fault
        if fault is not None and fault.body is not None:
            status, body, headers = fault.status or 200, fault.body, {"Content-Type": "text/html"}
        elif fault is not None and fault.carried_out:
            self._cut(0)
            return
        if fault is not None:
            headers = {**headers, **fault.headers}
            if fault.endless:
                self._send_without_end(status, body, headers)
                return
        # Written down first: when the client has its answer, a test may look.
        out = b"" if self.command == "HEAD" else body if self.cut_after is None else body[: self.cut_after]
        name = self.user.name if getattr(self, "user", None) else None
        authorized = "Authorization" in self.headers
        self._see(Seen(self.command, self.path, name, status, len(out), self.headers.get("Range"), authorized))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value.replace("\n", " "))
        self.end_headers()
        self.wfile.write(out)
        if self.cut_after is not None:
            self.close_connection = True

    def _send_without_end(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send up to 256 MB, until the client hangs up."""
        self.close_connection = True
        self.send_response(status)
        for key, value in {**headers, "Connection": "close"}.items():
            self.send_header(key, value)
        self.end_headers()
        seen = Seen(self.command, self.path, None, status, 0, None, False)
        self._see(seen)
        try:
            self.wfile.write(body)
            for _ in range(256):
                self.wfile.write(bytes(1 << 20))
                seen.sent += 1 << 20
        except OSError:
            return  # the client hung up

    def _cut(self, status: int) -> None:
        self._see(Seen(self.command, self.path, None, status, 0, None, False))
        self.close_connection = True

    def _see(self, seen: Seen) -> None:
        with self.hub.lock:
            self.hub.seen.append(seen)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})
