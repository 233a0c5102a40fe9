"""Tuning's gRPC face: the same jobs, checks and errors as over HTTP.

The server that mounts :class:`~tune.grpc.servicer.TuningServicer` turns errors into status codes, gives every call its
request id, and refuses fields that the proto lacks.
"""

from tune.grpc.servicer import SERVICE_NAME, TuningServicer

__all__ = ["SERVICE_NAME", "TuningServicer"]
