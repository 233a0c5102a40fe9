"""Benchmarks. ``python -m bench`` (``make bench``) compares serving with bare vLLM on the same machine and settings."""
