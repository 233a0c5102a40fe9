"""Requests that nobody would write: thousands for each endpoint and each call of gRPC, on the real engine."""
