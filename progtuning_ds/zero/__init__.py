"""The only room that touches DeepSpeed's private attributes: one file per ZeRO flavour behind one small interface.

``build_adapter(engine)`` looks at a live engine, refuses by name what is not supported, and returns the adapter that
reads and changes which parameters that engine trains.
"""

from progtuning_ds.zero.adapter import Adapter
from progtuning_ds.zero.factory import build_adapter

__all__ = ["Adapter", "build_adapter"]
