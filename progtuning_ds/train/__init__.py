"""The training program: `deepspeed launch/train.py` or `deepspeed --module progtuning_ds.train`.

Nothing is imported here, so that settings are checked before torch is loaded.
"""
