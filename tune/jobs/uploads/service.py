"""Uploads without HTTP. Methods block.

A part's bytes lie under ``parts/<upload id>/`` until the upload ends, whichever way; completing copies them into one
file, which passes every check of ``POST /v1/files`` before anybody sees it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from registry.errors import ConflictError, InvalidRequestError, NotFoundError, TooLargeError
from tune.jobs.files import FileService, Upload, check_filename, check_purpose
from tune.jobs.idempotency import Idempotency
from tune.jobs.records import FileRecord
from tune.jobs.rows import new_id
from tune.jobs.uploads.records import PartRecord, UploadRecord
from tune.jobs.uploads.store import UploadStore

MIME_TYPES = frozenset(
    {
        "application/json",
        "application/jsonl",
        "application/jsonlines",
        "application/octet-stream",
        "application/x-jsonlines",
        "application/x-ndjson",
        "text/jsonl",
        "text/plain",
    }
)
"""What clients call JSON Lines; OpenAI's is ``text/jsonl``."""
_COPIED_BYTES = 1024 * 1024
_MD5 = re.compile(r"[0-9a-fA-F]{32}")


class UploadService:
    """Uploads of one tenant, or everybody's, for tidying up."""

    def __init__(self, store: UploadStore, files: FileService) -> None:
        self.storage = files.storage
        self._store = store
        self._files = files

    def seen_by(self, tenant: str) -> UploadService:
        """The same service as one tenant sees it."""
        return UploadService(self._store.seen_by(tenant), self._files.seen_by(tenant))

    def create(
        self,
        *,
        filename: str,
        purpose: str,
        mime_type: str,
        size_bytes: int,
        file_expires_after_seconds: int | None = None,
        asked: Idempotency | None = None,
    ) -> UploadRecord:
        """A new pending upload; a repeated request gets the one it made.

        Raises:
            InvalidRequestError: a purpose, name or kind that cannot be.
            TooLargeError: the file is larger than uploads may be.
            RateLimitedError: too many are pending.
        """
        check_purpose(purpose)
        check_filename(filename, param="filename")
        if mime_type.partition(";")[0].strip().lower() not in MIME_TYPES:
            raise InvalidRequestError(
                f"mime_type {mime_type[:80]!r} is not one of training rows; allowed: {', '.join(sorted(MIME_TYPES))}",
                code="invalid_mime_type",
                param="mime_type",
            )
        if size_bytes > self.storage.max_upload_bytes:
            raise TooLargeError(
                f"bytes={size_bytes} is more than {self.storage.max_upload_bytes}, the largest upload; split the file",
                code="file_too_large",
                param="bytes",
            )
        self.remove_expired()
        return self._store.create(
            filename=filename,
            purpose=purpose,
            size_bytes=size_bytes,
            file_expires_after_seconds=file_expires_after_seconds,
            asked=asked,
        )

    def begin_part(self, upload_id: str) -> Upload:
        """Where the bytes of a new part go. Raises :class:`NotFoundError`, :class:`ConflictError` before any came."""
        self._store.pending(upload_id)
        return self.storage.receive_part(upload_id)

    def finish_part(self, upload_id: str, part: Upload, *, idempotency_key: str | None = None) -> PartRecord:
        """Keep a part that has been received; a repeated request gets the part it made.

        Raises:
            ConflictError: the upload has ended meanwhile.
            InvalidRequestError: it is empty, or more than the upload can need.
        """
        if part.size_bytes == 0:
            raise InvalidRequestError("the part is empty", code="empty_part", param="data")
        asked = None
        if idempotency_key is not None:
            asked = Idempotency.of(idempotency_key, f"{upload_id} {part.sha256}".encode(), making="upload.part")
            if (made := self._store.made_part(asked)) is not None:
                return made
        part_id = new_id("part_")
        path = self.storage.part_path(upload_id, part_id)
        part.keep(part_id)
        try:
            kept = self._store.add_part(upload_id, part_id, part.size_bytes, asked)
        except Exception:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # of an upload that ended meanwhile; another part's is not empty
                path.parent.rmdir()
            raise
        if kept.id != part_id:
            path.unlink(missing_ok=True)
        return kept

    def complete(
        self, upload_id: str, part_ids: Sequence[str], md5: str | None = None
    ) -> tuple[UploadRecord, FileRecord | None]:
        """Make the file of these parts, in this order. The same request again gets the same answer.

        Raises:
            InvalidRequestError: parts that are unknown, given twice, or not as many bytes as announced; another md5.
            InvalidDataError: a row is wrong, as for ``POST /v1/files``. The upload stays pending.
            ConflictError: the upload has ended otherwise.
        """
        record = self._store.get(upload_id)
        if record.status == "completed" and list(part_ids) == list(record.part_ids or ()):
            return record, self._file_of(record)
        self._store.pending(upload_id)
        self._check_parts(record, part_ids)
        if md5 is not None and _MD5.fullmatch(md5) is None:
            raise InvalidRequestError("md5 must be 32 hex digits", code="invalid_md5", param="md5")
        with self.storage.assemble() as whole:
            found = self._join([self.storage.part_path(upload_id, part_id) for part_id in part_ids], whole, upload_id)
            if md5 is not None and found != md5.lower():
                raise InvalidRequestError(
                    f"md5 {md5.lower()} was given and the parts in this order have {found}; send them again",
                    code="md5_mismatch",
                    param="md5",
                )
            file = self._files.checked(
                whole,
                filename=record.filename,
                purpose=record.purpose,
                expires_after_seconds=record.file_expires_after_seconds,
            )
            whole.keep(file.id)
            try:
                completed = self._store.complete(upload_id, part_ids, file)
            except Exception:
                self.storage.remove(file.id)
                raise
        self.storage.remove_parts(upload_id)
        return completed, file

    def cancel(self, upload_id: str) -> UploadRecord:
        """End the upload and remove its parts. Raises :class:`ConflictError` if it is completed or expired."""
        cancelled = self._store.cancel(upload_id)
        self.storage.remove_parts(upload_id)
        return cancelled

    def remove_expired(self) -> None:
        """Free the space of uploads whose time is over."""
        for upload_id in self._store.take_expired():
            self.storage.remove_parts(upload_id)

    def sweep(self) -> list[str]:
        """Clean up after killed processes; for the start of a server. Returns the uploads whose parts went."""
        self.remove_expired()
        # Looked for in this order: an upload is entered before its directory is made.
        found = self.storage.uploads_with_parts()
        left = sorted(found - self._store.pending_ids())
        for upload_id in left:
            self.storage.remove_parts(upload_id)
        return left

    def _check_parts(self, record: UploadRecord, part_ids: Sequence[str]) -> None:
        sizes = self._store.part_sizes(record.id)
        unknown = [part_id for part_id in part_ids if part_id not in sizes]
        if unknown:
            self._store.pending(record.id)  # whoever ended it since it was read took its parts
        if unknown or len(set(part_ids)) != len(part_ids):
            reason = f"{unknown[0][:80]!r} is not a part of {record.id}" if unknown else "a part is given twice"
            raise InvalidRequestError(
                f"part_ids: {reason}; give each part once, in the order of the file",
                code="invalid_part",
                param="part_ids",
            )
        received = sum(sizes[part_id] for part_id in part_ids)
        if received != record.size_bytes:
            raise InvalidRequestError(
                f"these {len(part_ids)} parts have {received} bytes, and the upload was created for "
                f"{record.size_bytes}; give all parts, or cancel the upload and create another",
                code="size_mismatch",
                param="part_ids",
            )

    def _join(self, paths: Sequence[Path], whole: Upload, upload_id: str) -> str:
        """Copy the parts one after another; the md5 (hex) of the whole."""
        digest = hashlib.md5(usedforsecurity=False)
        try:
            for path in paths:
                with path.open("rb") as part:
                    while chunk := part.read(_COPIED_BYTES):
                        digest.update(chunk)
                        whole.write(chunk)
        except FileNotFoundError as error:
            raise ConflictError(
                f"{upload_id} was completed or cancelled at the same moment", code="upload_not_pending"
            ) from error
        return digest.hexdigest()

    def _file_of(self, record: UploadRecord) -> FileRecord | None:
        """``None`` once the file was deleted."""
        assert record.file_id is not None, record
        try:
            return self._files.file(record.file_id)
        except NotFoundError:
            return None
