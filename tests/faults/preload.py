"""What every launched rank needs, imported once by the process they are all forked from."""

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import transformers

from tests.engine.problem import import_transformers  # noqa: F401

for name in ("AutoModelForSequenceClassification", "BertForSequenceClassification", "BertTokenizerFast"):
    getattr(transformers, name)
