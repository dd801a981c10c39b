"""Train, quantize, export and verify by a recipe: the same as `qat train`."""

import sys

from qat.entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
