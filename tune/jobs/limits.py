"""How large uploaded files and jobs may be. Imports nothing, because the settings name these bounds."""

from __future__ import annotations

MAX_FILE_BYTES = 512 * 1024 * 1024
"""OpenAI's limit for one file (openai/resources/files.py, ``create``)."""
MAX_UPLOAD_BYTES = 8 * 1024 * 1024 * 1024
"""OpenAI's limit for a file that comes in parts (openai/resources/uploads/uploads.py, ``create``)."""
MAX_PART_BYTES = 64 * 1024 * 1024
"""OpenAI's limit for one of them (openai/resources/uploads/parts.py, ``create``)."""
MAX_FILE_ROWS = 10_000_000
"""Of a training file. About 90 bytes of a row stay in a training process's memory (tests/tune/test_data_streaming.py),
which makes 0.9 GB; an epoch over more than that is weeks of one GPU."""
MAX_GPUS = 64
"""Of one job, and so of one worker."""
