"""Entry point of `deepspeed --module progtuning_ds.train`."""

import sys

from progtuning_ds.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
