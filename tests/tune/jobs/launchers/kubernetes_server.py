"""A small API server of Kubernetes on a real TLS socket: Jobs and pods of one namespace, with the answers, codes and
Status objects that https://kubernetes.io/docs/reference/using-api/api-concepts/ describes.

It runs nothing: a test says what became of a pod (:meth:`ApiServer.pod_waits`, :meth:`ApiServer.pod_ended`), or runs
it (:func:`tests.tune.jobs.launchers.kubelet.run_pod`).
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NAMESPACE = "capo"
TOKEN = "a-service-accounts-token"
_JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"

JsonObject = dict[str, Any]


@dataclass
class ApiServer:
    """What the server holds, and what it is to refuse."""

    port: int = 0
    jobs: dict[str, JsonObject] = field(default_factory=dict)
    pods: dict[str, JsonObject] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    """Verb and path of every request."""
    refuse_next: list[tuple[int, str, str, dict[str, str]]] = field(default_factory=list)
    """Code, reason, message and headers of the next answers."""
    token: str = TOKEN

    def refuse(self, code: int, reason: str, message: str, **headers: str) -> None:
        self.refuse_next.append((code, reason, message, headers))

    def runs(self, name: str) -> None:
        self.jobs[name]["status"] = {"active": 1, "ready": 1}

    def succeeded(self, name: str) -> None:
        self.jobs[name]["status"] = {"succeeded": 1, "conditions": [_condition("Complete", "CompletionsReached")]}

    def pod_waits(self, name: str, status: JsonObject) -> None:
        self.jobs[name]["status"] = {"active": 1, "ready": 0}
        self._pod(name, {"phase": "Pending", **status})

    def pod_ended(self, name: str, *, reason: str, exit_code: int) -> None:
        self.jobs[name]["status"] = {"failed": 1, "conditions": [_condition("Failed", "BackoffLimitExceeded")]}
        terminated = {"exitCode": exit_code, "reason": reason}
        self._pod(
            name, {"phase": "Failed", "containerStatuses": [{"name": "worker", "state": {"terminated": terminated}}]}
        )

    def vanish(self, name: str) -> None:
        del self.jobs[name]
        self.pods.pop(name, None)

    def _pod(self, name: str, status: JsonObject) -> None:
        labels = {**self.jobs[name]["spec"]["template"]["metadata"]["labels"], "batch.kubernetes.io/job-name": name}
        self.pods[name] = {"metadata": {"name": f"{name}-x7k2p", "labels": labels}, "status": status}

    def answer(
        self, verb: str, url: str, token: str, body: JsonObject | None
    ) -> tuple[int, JsonObject, dict[str, str]]:
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        self.seen.append(f"{verb} {path}")
        if token != f"Bearer {self.token}":
            return 401, _status(401, "Unauthorized", "Unauthorized"), {}
        if self.refuse_next:
            code, reason, message, headers = self.refuse_next.pop(0)
            return code, _status(code, reason, message), headers
        if path == _JOBS and verb == "POST":
            assert body is not None
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, _status(409, "AlreadyExists", f'jobs.batch "{name}" already exists'), {}
            self.jobs[name] = {**body, "metadata": {**body["metadata"], "namespace": NAMESPACE}, "status": {}}
            return 201, self.jobs[name], {}
        if path.startswith(f"{_JOBS}/") and verb == "DELETE":
            name = path.removeprefix(f"{_JOBS}/")
            assert query["propagationPolicy"] == ["Background"], "else its pods would stay"
            if name not in self.jobs:
                return 404, _status(404, "NotFound", f'jobs.batch "{name}" not found'), {}
            self.vanish(name)
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}, {}
        if verb == "GET" and path in (_JOBS, _PODS):
            return 200, self._page(list((self.jobs if path == _JOBS else self.pods).values()), query), {}
        return 403, _status(403, "Forbidden", f"{verb} {path} is forbidden"), {}

    def _page(self, items: list[JsonObject], query: dict[str, list[str]]) -> JsonObject:
        """Two items on a page, however many were asked for: a server may always give fewer."""
        wanted = dict(pair.split("=") for pair in query["labelSelector"][0].split(","))
        chosen = [item for item in items if wanted.items() <= item["metadata"]["labels"].items()]
        start = int(query.get("continue", ["0"])[0])
        metadata = {"resourceVersion": "1"} | ({"continue": str(start + 2)} if len(chosen) > start + 2 else {})
        return {"metadata": metadata, "items": chosen[start : start + 2]}


def _condition(kind: str, reason: str) -> JsonObject:
    return {"type": kind, "status": "True", "reason": reason}


def _status(code: int, reason: str, message: str) -> JsonObject:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


@contextlib.contextmanager
def running_api_server(directory: Path) -> Iterator[ApiServer]:
    """``directory`` becomes what a pod finds of its service account: token, namespace, the authority's certificate."""
    directory.mkdir(exist_ok=True)
    certificate, key = _certificate()
    (directory / "ca.crt").write_bytes(certificate)
    (directory / "server.pem").write_bytes(certificate + key)
    (directory / "token").write_text(TOKEN + "\n")
    (directory / "namespace").write_text(NAMESPACE)
    state = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            token = self.headers.get("authorization", "")
            code, answer, headers = state.answer(self.command, self.path, token, body)
            data = json.dumps(answer).encode()
            self.send_response(code)
            for name, value in {
                "content-length": str(len(data)),
                "content-type": "application/json",
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _certificate() -> tuple[bytes, bytes]:
    """Of 127.0.0.1, vouched for by itself; certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private
