"""Every request for inference is counted once, by how it ended: what availability is computed from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from registry import errors
from serve.faces import ClientGoneError
from serve.metrics import Metrics


@contextlib.contextmanager
def counted(metrics: Metrics, protocol: str) -> Iterator[None]:
    """Put round all that a face does for one request, so that a bug of ours counts wherever it is: in what is checked
    before anything runs, and in what an answer is turned into."""
    outcome = "cancelled"  # also for GeneratorExit: the client left
    try:
        yield
        outcome = "ok"
    except ClientGoneError:
        raise
    except Exception as error:
        outcome = "client_error" if errors.wire_kind(error).http_status < 500 else "server_error"
        if isinstance(error, errors.CapoError) and error.code == "draining":
            outcome = "draining"
        raise
    finally:
        metrics.requests.labels(protocol, outcome).inc()
