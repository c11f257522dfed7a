"""`python -m idalloc_tcp` is `idalloc-tcp`."""

import sys

from idalloc_tcp.cli import main

if __name__ == "__main__":
    sys.exit(main())
