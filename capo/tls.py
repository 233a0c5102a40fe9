"""TLS for both faces, from one set of files: the service's certificate, and whose certificates clients must show."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from capo.settings import Settings
from registry import errors


@dataclass(frozen=True, slots=True)
class Tls:
    certificate: Path
    """The chain, in PEM; the service's own first."""
    key: Path
    client_ca: Path | None
    """Clients must show a certificate that one of these signed; ``None``: they need none."""

    @classmethod
    def of(cls, settings: Settings) -> Tls | None:
        """What the settings ask for; ``None``: plain text.

        Raises:
            InvalidRequestError: a file cannot be used.
        """
        if settings.tls_certificate is None or settings.tls_key is None:
            return None
        tls = cls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        tls._check()
        return tls

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise errors.InvalidRequestError(
                f"The TLS files cannot be used: {error.strerror or error}. tls_certificate={self.certificate} and "
                f"tls_key={self.key} must be a pair in PEM, and tls_client_ca={self.client_ca} certificates in PEM.",
                code="invalid_tls",
                param="tls_certificate",
            ) from error

    def uvicorn_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        if self.client_ca is not None:
            options |= {"ssl_ca_certs": str(self.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return options

    def grpc_credentials(self) -> grpc.ServerCredentials:
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        if self.client_ca is None:
            return grpc.ssl_server_credentials([pair])
        return grpc.ssl_server_credentials([pair], self.client_ca.read_bytes(), require_client_auth=True)
