"""`python -m tokenformer` is the `tokenformer` command."""

import sys

from tokenformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
