"""`python -m prefopt`."""

import sys

if not sys.flags.safe_path:
    # The working folder, which Python puts first: a file there named like a module shall not run.
    del sys.path[0]

from prefopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
