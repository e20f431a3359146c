"""`python -m shardadam`: see `cli`."""

import sys

from shardadam.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
