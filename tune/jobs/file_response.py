"""The content of a file that somebody may delete while it is sent."""

from __future__ import annotations

import os
from typing import BinaryIO

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send


class OpenFileResponse(FileResponse):
    """Sends an open file and closes it; ranges and all else as the class above does it.

    That one opens a path, when the status may be on its way already. Here the path is the descriptor's own
    (proc_pid_fd(5)), which leads to the bytes also when their name is gone.
    """

    def __init__(self, file: BinaryIO, *, media_type: str) -> None:
        number = file.fileno()
        super().__init__(f"/proc/self/fd/{number}", media_type=media_type, stat_result=os.fstat(number))
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)
