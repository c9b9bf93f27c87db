"""The run configuration: schema, loading, and its projection to a DeepSpeed JSON. No torch, no deepspeed."""

from progtuning_ds.config.deepspeed_json import project
from progtuning_ds.config.loading import load_run_config, run_config, save_run_config
from progtuning_ds.config.reference import reference
from progtuning_ds.config.schema import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LoggingConfig,
    MemoryConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from progtuning_ds.config.settings import Hardware, Settings, settle, settle_warmup
from progtuning_ds.config.source import DeepSpeedSource, load_deepspeed
from progtuning_ds.config.tasks import (
    CausalConfig,
    ClassificationConfig,
    GlueConfig,
    SquadConfig,
    TaskConfig,
    TokensConfig,
)

__all__ = [
    "CausalConfig",
    "CheckpointConfig",
    "ClassificationConfig",
    "DataConfig",
    "DeepSpeedSource",
    "GlueConfig",
    "GuardConfig",
    "Hardware",
    "LoggingConfig",
    "MemoryConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "Settings",
    "SquadConfig",
    "TaskConfig",
    "TokensConfig",
    "TrainConfig",
    "load_deepspeed",
    "load_run_config",
    "project",
    "reference",
    "run_config",
    "save_run_config",
    "settle",
    "settle_warmup",
]
