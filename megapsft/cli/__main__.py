"""python -m megapsft.cli, as torchrun and srun start ranks."""

import sys

from megapsft.cli import main

# What multiprocessing spawns imports the file of `__main__`, but not where it is known as that of a package: without this nothing
# there would import megapsft, whose first deed is that such a process ends with its parent
__spec__ = None

if __name__ == "__main__":
    sys.exit(main())
