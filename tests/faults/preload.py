"""What every launched rank needs, imported once by the process they are all forked from."""

import gc

import bitsandbytes  # noqa: F401 - peft looks at it
import torch._dynamo  # noqa: F401 - DeepSpeed compiles its helpers
import transformers

import progtuning_ds.train.program  # noqa: F401

for name in ("AutoModelForSequenceClassification", "BertForSequenceClassification", "BertTokenizerFast"):
    getattr(transformers, name)
gc.freeze()  # collections then see what a run makes
