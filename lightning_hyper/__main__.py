"""`python -m lightning_hyper` is the command `lightning-hyper`."""

import sys

from lightning_hyper.cli import main

if __name__ == "__main__":
    sys.exit(main())
