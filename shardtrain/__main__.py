"""`python -m shardtrain`."""

import sys

from shardtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
