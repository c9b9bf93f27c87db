"""Fine-tune a model in stages: `deepspeed launch/train.py --config demo`; `--help` lists every setting."""

import sys

from progtuning_ds.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
