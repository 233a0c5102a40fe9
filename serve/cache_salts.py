"""Prefix caches apart for each tenant.

vLLM shares the KV cache of equal beginnings among all requests, and a shared one answers sooner; with a salt in the
hash of the first block only requests with the same salt share (vLLM 0.32, v1/core/kv_cache_utils.py). The salt is a
secret of this process, so that nobody can ask for another tenant's.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


class CacheSalts:
    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def of(self, tenant: str) -> str:
        """256 bits in hex, the same for the tenant as long as this process lives."""
        return hmac.new(self._secret, tenant.encode(), hashlib.sha256).hexdigest()
