"""Somebody who receives webhooks on a real loopback port, and answers as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Message:
    path: str
    headers: dict[str, str]
    body: str


@dataclass
class Receiver:
    url: str = ""
    messages: list[Message] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    """The next statuses; 200 once they are used up."""
    location: str = ""
    """Of a redirect."""
    holds: threading.Event = field(default_factory=threading.Event)
    """Set: answer. Cleared: keep the sender waiting."""


@contextmanager
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    found.holds.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.messages.append(Message(self.path, headers, body))
            found.holds.wait(20)
            self.send_response(found.answers.pop(0) if found.answers else 200)
            if found.location:
                self.send_header("location", found.location)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield found
    finally:
        found.holds.set()
        server.shutdown()
        thread.join()
        server.server_close()
