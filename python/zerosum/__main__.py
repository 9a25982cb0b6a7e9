"""``python -m zerosum``: the command line without its script."""

import sys

from zerosum.cli import main

if __name__ == "__main__":
    sys.exit(main())
