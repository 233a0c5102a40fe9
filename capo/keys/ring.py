"""The keys as this process knows them, and whether one that a request shows is among them.

A copy, so that a request costs no query; it is read again every second beside the event loop, so a key that is revoked
anywhere is refused here within :data:`REFRESH_SECONDS` and the length of one query. While the database is away the last
copy counts: who had a valid key goes on, nobody else comes in, and a revocation that cannot be written cannot be read
either. A process that could never read the keys does not start.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Callable, Mapping

from capo.keys.records import KeyRecord
from capo.keys.secret import digest_of, read_secret
from capo.keys.store import KeyStore
from registry import errors
from registry.threads import Threads

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
_REFUSED = "The API key is not valid here: it is unknown, was revoked or has expired. `capo keys create` makes one."
_NOBODY = digest_of("no key has this text")


class KeyRing:
    """``clock`` is Unix time, which expiry is told in."""

    def __init__(self, store: KeyStore, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._keys: Mapping[str, KeyRecord] = {}
        self._was_filled = False
        self._one_at_a_time = threading.Lock()  # else an older picture could replace a newer one
        self.read_at = 0.0
        """``time.monotonic()`` of the last time that the database answered."""

    @property
    def is_empty(self) -> bool:
        """Whether no key was ever made. A store that is suddenly empty, or another one, does not open the door."""
        return not self._was_filled

    def read(self) -> None:
        """Read the keys now. Blocks.

        Raises:
            UnavailableError, StorageError: the database does not answer.
        """
        with self._one_at_a_time:
            self._keys = {key.id: key for key in self._store.all()}
            self._was_filled |= bool(self._keys)
            self.read_at = time.monotonic()

    async def follow(self) -> None:
        """Read the keys for ever; run as a task."""
        thread = Threads("keys", 1)  # of its own: nothing that others wait for may put off a revocation
        is_readable = True
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await thread.run(self.read)
                if not is_readable:
                    logger.info("the keys can be read again")
                is_readable = True
            except Exception as error:  # also a bug: without this task revoked keys would be good until a restart
                if is_readable:
                    bug = None if isinstance(error, errors.CapoError) else error
                    logger.warning("the keys cannot be read, those known go on to count: %s", error, exc_info=bug)
                is_readable = False

    def find(self, text: str) -> KeyRecord:
        """The key that ``text`` is.

        Takes the same time for a wrong secret and an unknown id: each is one digest and one comparison of digests.

        Raises:
            AuthenticationError: it is none that is good now; which of the reasons, is not said.
        """
        now = self._clock()
        secret = read_secret(text)
        key = None if secret is None else self._keys.get(secret.key_id)
        shown = digest_of(text)
        known = [_NOBODY] if key is None else key.digests(now)
        is_right = False
        for digest in known:
            is_right |= hmac.compare_digest(digest, shown)
        if key is None or not is_right or key.refusal(now) is not None:
            raise errors.AuthenticationError(_REFUSED)
        return key
