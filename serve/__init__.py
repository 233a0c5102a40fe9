"""Serving: one vLLM engine, many adapters by name, over HTTP and gRPC.

Rooms: :mod:`serve.engine` (with its parts the only one that imports vLLM's engine and serving classes, behind
:mod:`serve.engine_api`), :mod:`serve.catalog` (what the registry holds, by every name), :mod:`serve.pool` (what
is resident in the engine and who uses it), :mod:`serve.gate` (what may become resident), :mod:`serve.routes`.
"""
