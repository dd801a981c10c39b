"""`python -m qat`: the same as the console script `qat`."""

import sys

from qat.cli import main

if __name__ == "__main__":
    sys.exit(main())
