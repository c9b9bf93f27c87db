"""Tasks: data, collation, loss and metrics of one kind of learning. Imports torch and transformers; no deepspeed."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from progtuning_ds.config import RunConfig
from progtuning_ds.tasks.base import Batch, CountsItems, EncodedRows, Submits, Task
from progtuning_ds.tasks.causal import CausalTask
from progtuning_ds.tasks.classification import ClassificationTask
from progtuning_ds.tasks.glue import GlueTask
from progtuning_ds.tasks.squad import SquadTask
from progtuning_ds.tasks.tokens import TokenTask

# A new kind of task is one more entry here, and its section in config/tasks.py.
_BUILDERS: dict[str, Callable[[RunConfig, PreTrainedTokenizerBase, int | None], Task]] = {
    "classification": ClassificationTask.build,
    "glue": GlueTask.build,
    "squad": SquadTask.build,
    "token_classification": TokenTask.build,
    "causal_lm": CausalTask.build,
}


def build_task(config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> Task:
    """Load and encode the data of the task that `config.task.kind` names.

    Args:
        config: the run configuration.
        tokenizer: the model's tokenizer, with a padding token.
        max_positions: the longest sequence the model can read, in tokens, if it has a limit.

    Raises:
        ConfigError: one line on what is wrong with the data.
    """
    return _BUILDERS[config.task.kind](config, tokenizer, max_positions)


__all__ = [
    "Batch",
    "CausalTask",
    "ClassificationTask",
    "CountsItems",
    "EncodedRows",
    "GlueTask",
    "SquadTask",
    "Submits",
    "Task",
    "TokenTask",
    "build_task",
]
