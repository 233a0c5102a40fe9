"""Serving's gRPC face: the same models, fields, limits and errors as over HTTP, without JSON in the token path."""

from serve.grpc.server import GrpcServer

__all__ = ["GrpcServer"]
