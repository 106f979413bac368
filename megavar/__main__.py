"""`python -m megavar`."""

import sys

from megavar.cli import main

if __name__ == "__main__":
    sys.exit(main())
