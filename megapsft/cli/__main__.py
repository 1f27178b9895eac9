"""python -m megapsft.cli, as torchrun and srun start ranks."""

import sys

from megapsft.cli import main

if __name__ == "__main__":
    sys.exit(main())
