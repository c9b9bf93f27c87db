"""Owns `python -m progtuning_ds.cli`; imports the command only."""

import sys

from progtuning_ds.cli.app import main

sys.exit(main())
