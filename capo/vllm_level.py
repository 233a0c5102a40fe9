"""The level of vLLM's loggers, for the logging configurations beside this file: vLLM leaves its own variable alone
where it is given one. Imported when that is read, which is after the variable was set.
"""

from __future__ import annotations

import os

LEVEL = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
