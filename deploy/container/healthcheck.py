"""Exit code 0 while the process in this container runs its event loop. For engines without probes of their own.

A port and a path may be given instead: those of the Ray node that the target ray of the Dockerfile runs.
"""

import os
import sys
import urllib.request

# A port of its own, which is plain text also where the API speaks TLS.
own = (os.environ.get("CAPO_HEALTH_PORT", "9401"), "/livez")
port, path = sys.argv[1:] or own
url = f"http://127.0.0.1:{port}{path}"
try:
    with urllib.request.urlopen(url, timeout=4) as answer:
        sys.exit(answer.status != 200)
except OSError as error:
    sys.exit(f"{url}: {error}")
