"""Compare two sets of weights: `megapsft convert verify`."""

import sys

from megapsft.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "verify", *sys.argv[1:]]))
