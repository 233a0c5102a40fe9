"""Exit code 0 while the process in this container runs its event loop. For engines without probes of their own."""

import os
import sys
import urllib.request

url = f"http://127.0.0.1:{os.environ.get('CAPO_PORT', '8000')}/livez"
try:
    with urllib.request.urlopen(url, timeout=4) as answer:
        sys.exit(answer.status != 200)
except OSError as error:
    sys.exit(f"{url}: {error}")
