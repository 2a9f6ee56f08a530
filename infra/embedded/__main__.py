"""`python -m infra.embedded`: fetch and prepare all that the services need, before a first start.

`make` calls it during set-up, so that later starts need no network and are fast.
"""

import sys

from infra.embedded import aot
from infra.embedded.stack import DEFAULT_CACHE_DIR
from infra.errors import DpdlError

if __name__ == "__main__":
    try:
        aot.record(DEFAULT_CACHE_DIR, print)
    except (DpdlError, OSError) as error:
        sys.exit(f"dpdl: {error}")
