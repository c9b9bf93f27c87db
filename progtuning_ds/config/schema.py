"""The run configuration: one frozen dataclass per section, one docstring per field. No torch, no deepspeed.

The docstrings are the reference that `--help` prints, so they say what a value means, its unit and its default.
`None` always means "not set": the DeepSpeed JSON's value, or else the default named in the docstring, is used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from progtuning_ds.config.tasks import ClassificationConfig, TaskConfig

_RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True)

# Strict, because a YAML `true` is no number and a quoted number is a mistake worth telling.
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
OpenShare = Annotated[float, Field(gt=0, lt=1, strict=True)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=_RULES)
class ModelConfig:
    """The pretrained model."""

    path: Text = "demo"
    """Model folder or hub id; `demo` is the embedded default, a pretrained BERT of 6 blocks."""
    num_labels: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Number of classes; by default the number of labels in the training split."""
    attn_implementation: Text | None = None
    """Attention of transformers: `eager`, `sdpa`, `flash_attention_2`, ...; by default what the model prefers."""
    gradient_checkpointing: Flag = False
    """Recompute activations in backward instead of keeping them (non-reentrant)."""
    liger: Flag = False
    """Liger's Triton kernels for rotary embedding, norms and feed-forward layers; needs a GPU and `liger-kernel`."""
    blocks: Text | None = None
    """Path of the module list that holds the Transformer blocks; by default it is found by structure."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class DataConfig:
    """Where the rows come from: a data set by name, or files (csv, tsv, json, jsonl, parquet)."""

    source: Text | None = None
    """Hub id, folder of `save_to_disk`, or `demo` (movie reviews); the default where no `train_file` is given."""
    config_name: Text | None = None
    """Configuration of the hub data set, such as `mrpc` of `glue`; of `demo`: `small` (default) or `full`."""
    train_file: Text | None = None
    """File to train on, in place of `source`."""
    validation_file: Text | None = None
    """File to evaluate on."""
    test_file: Text | None = None
    """File to evaluate on once, at the end."""
    train_split: Text = "train"
    """Split of `source` to train on."""
    validation_split: Text | None = None
    """Split of `source` to evaluate on; by default `validation`, else `test`."""
    test_split: Text | None = None
    """Split of `source` to evaluate on once, at the end; by default none."""
    validation_fraction: OpenShare | None = None
    """Share of the training rows to hold out for evaluation, where there is no other split for it."""
    max_train_samples: Count | None = None
    """Train on this many rows, drawn with `train.seed`."""
    max_eval_samples: Count | None = None
    """Evaluate on this many rows, drawn with `train.seed`."""
    num_workers: CountOrZero = 0
    """Processes per rank that collate batches; 0 collates in the training process."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class ScheduleConfig:
    """Which blocks train when. Stage 1 trains everything; each further stage freezes one more part of the blocks."""

    enabled: Flag = True
    """`false` freezes nothing: plain full fine-tuning, or the method alone."""
    num_stages: Count | None = None
    """Number of stages; by default one per epoch."""
    embeddings: Literal["always", "first_stage", "never"] = "always"
    """When the embeddings train; `always` is the paper's choice, the others let backward stop early."""
    on_freeze: Literal["keep", "int8", "nf4"] = "keep"
    """What becomes of the linear layers of a block that has frozen for good; quantized, they give back memory."""
    stage_lengths: list[Positive] | None = None
    """Length of each stage in `length_unit`; by default all stages are equally long."""
    length_unit: Literal["steps", "epochs", "fractions"] = "epochs"
    """Unit of `stage_lengths`."""
    always_train: list[Text] = Field(default_factory=list)
    """Patterns of parameter names that train in every stage, such as `*LayerNorm*`."""
    stages: list[dict[str, Any]] | None = None
    """The stages written out: a list of {blocks: 4-11, steps: 100, embeddings: true}; replaces all of the above."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TrainConfig:
    """Optimization: batches, learning rate, precision. AdamW where the DeepSpeed JSON names no optimizer."""

    epochs: Count = 3
    """Passes over the training rows."""
    global_batch_size: Count | None = None
    """Rows per optimizer step over all ranks = micro_batch_size x gradient_accumulation_steps x ranks; 32."""
    micro_batch_size: Count | None = None
    """Rows per rank and forward pass; by default global_batch_size / ranks / gradient_accumulation_steps."""
    gradient_accumulation_steps: Count | None = None
    """Forward passes per optimizer step; by default what the two sizes above leave."""
    eval_batch_size: Count | None = None
    """Rows per rank and forward pass in evaluation; by default twice micro_batch_size."""
    learning_rate: Positive | None = None
    """Peak learning rate; 5e-5."""
    weight_decay: NotNegative | None = None
    """Weight decay of weight matrices (biases and norms have none); 0.01."""
    adam_beta1: Share | None = None
    """Decay of AdamW's first moment; 0.9."""
    adam_beta2: Share | None = None
    """Decay of AdamW's second moment; 0.999."""
    adam_epsilon: Positive | None = None
    """AdamW's epsilon; 1e-8."""
    lr_scheduler_type: (
        Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] | None
    ) = None
    """Learning rate after warm-up; by default the DeepSpeed JSON's scheduler, else `linear`."""
    warmup_steps: CountOrZero | None = None
    """Steps of linear warm-up; replaces warmup_ratio."""
    warmup_ratio: Share | None = None
    """Share of all steps spent in linear warm-up; 0.1."""
    early_stopping: Count | None = None
    """End the run when the main metric on the validation rows has not risen for this many epochs; by default never."""
    boundary_warmup_steps: CountOrZero = 0
    """Steps of linear warm-up again after each stage boundary, against instability; 0 for none."""
    stage_lr_factor: Positive = 1.0
    """The learning rate is multiplied by this at each stage boundary; 1 leaves the schedule as it is."""
    max_grad_norm: NotNegative | None = None
    """Gradients are clipped to this global norm; 0 turns clipping off; 1.0."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Weights and activations; `auto`: the DeepSpeed JSON's choice, else bf16 on GPUs that have it, else fp32."""
    group_by_length: Flag = True
    """Put rows of similar length into the same step, which saves padding. The order stays a function of the seed."""
    compile: Flag = False
    """Run the model by torch.compile, under ZeRO stages 0, 1 and 2; each stage compiles anew."""
    compile_backend: Text = "inductor"
    """Backend of torch.compile."""
    seed: CountOrZero = 0
    """Seed of the new head, dropout, and the order of rows."""

    @property
    def changes_rate_at_boundaries(self) -> bool:
        """Whether the learning rate does more at a stage boundary than its schedule says."""
        return self.boundary_warmup_steps > 0 or self.stage_lr_factor != 1.0


@dataclass(frozen=True, kw_only=True, config=_RULES)
class MethodConfig:
    """What trains in the blocks that the schedule names: all of it, or a parameter-efficient part or addition."""

    kind: Literal["full", "lora", "dora", "rslora", "ia3", "adapter", "bitfit", "layernorm"] = "full"
    """LoRA and its kin and IA3 by PEFT, bottleneck adapters, biases (BitFit), normalization layers, or everything."""
    rank: Count = 8
    """Rank of LoRA's matrices."""
    alpha: Positive = 16.0
    """LoRA's scale: updates count alpha / rank times."""
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Dropout on the input of LoRA's matrices."""
    targets: list[Text] = Field(default_factory=list)
    """Layers that get a method's parameters; by default the usual ones, `all-linear` for every linear layer."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """Adapters after attention and feed-forward, or after feed-forward alone."""
    reduction: Count = 16
    """Width of the model over width of an adapter's bottleneck."""
    train_head: Flag = True
    """Train the head of the task too."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """How the frozen base is stored, by bitsandbytes; `nf4` with LoRA is QLoRA."""
    double_quant: Flag = True
    """Quantize the scales of nf4 as well."""
    merge: Flag = False
    """Save LoRA's or IA3's result merged into the model as well, in `merged`."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class OptimizerConfig:
    """Who does the optimizer step. Its numbers are in `train`, or in the DeepSpeed JSON."""

    kernel: Literal["auto", "triton", "reference", "deepspeed"] = "deepspeed"
    """DeepSpeed's own step, or one fused pass: Triton's, plain PyTorch's, or `auto` for the best there is."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class MemoryConfig:
    """What a rank may use, and what is done with the memory that stages give back."""

    budget: Text | Count | None = None
    """Bytes of a rank's device, such as 24GB or 22GiB; a stage predicted to need more stops the run before it does."""
    reserve: Text | CountOrZero | None = None
    """Of the budget, for what is no tensor; by default 1GiB + 5% on GPUs, what the process has at start on CPUs."""
    micro_batch_sizes: list[Count] | None = None
    """Rows per rank and forward pass of each stage, as `progtuning plan` writes them; steps keep their rows."""
    reinvest: Literal["none", "micro_batch", "unoffload"] = "none"
    """What freed memory is for: a larger `micro_batch`, or to `unoffload` optimizer state; needs `budget`."""
    host_state: Literal["none", "lowest_part", "all"] = "none"
    """Moments that wait in host memory between steps: of the blocks that freeze first, or of everything."""
    snapshot: Flag = False
    """Let `progtuning profile --output` write a PyTorch memory snapshot of each stage (CUDA)."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class LoggingConfig:
    """What is shown and drawn. Records are always written."""

    steps: Count = 10
    """Steps between two progress reports (and between two waits for the losses of all ranks)."""
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    """Progress on rank 0; `auto` is a bar on a terminal and lines elsewhere."""
    plot: Flag = True
    """Draw training.png at the end."""
    deepspeed: Literal["debug", "info", "warning", "error"] = "error"
    """Level of DeepSpeed's own messages."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class CheckpointConfig:
    """When the state of the run is saved, so that it can go on after an end that was not its own (`--resume`)."""

    every_steps: Count | None = None
    """Optimizer steps between two checkpoints; by default only the two below count."""
    every_epochs: CountOrZero = 1
    """Epochs between two checkpoints; 0 for none."""
    at_stage_end: Flag = True
    """Save when a stage is over."""
    on_signal: Flag = True
    """On SIGTERM and SIGUSR1 finish the optimizer step, save, and exit with code 75."""
    asynchronous: Flag = False
    """Write files while training goes on; host memory then holds a copy of what changes (weights, optimizer state)."""
    keep_last: Count = 2
    """Newest checkpoints to keep."""
    keep_best: CountOrZero = 0
    """Checkpoints to keep beside them for the best main metric on the validation rows."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class ExportConfig:
    """What the trained model that a run leaves in `final` holds."""

    frozen: Literal["dequantized", "exact"] = "dequantized"
    """Of blocks quantized by `schedule.on_freeze`: what later stages saw, or the exact weights at the freeze."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class GuardConfig:
    """What ends a run that has gone wrong, instead of wasting its hours."""

    action: Literal["stop", "rollback", "off"] = "stop"
    """`stop` the run, or `rollback` to the last checkpoint with a lower learning rate; the last checkpoint is good."""
    loss_factor: Positive | None = 4.0
    """The loss has diverged when its mean over `window` steps is this many times what it was at first; null: never."""
    window: Count = 20
    """Steps in that mean."""
    max_overflows: Count = 40
    """Steps in a row that fp16 may skip because its gradients overflow."""
    max_rollbacks: Count = 3
    """Rollbacks in a run before it stops after all."""
    rollback_factor: OpenShare = 0.5
    """The learning rate of all further steps is multiplied by this at each rollback."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class RunConfig:
    """A whole run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    task: TaskConfig = Field(default_factory=ClassificationConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    deepspeed: Annotated[str, Field(min_length=1, strict=True)] | dict[str, Any] = "zero2"
    """A preset's name, the path of a DeepSpeed JSON, or a DeepSpeed configuration written out."""
    output_dir: Text = "runs/run"
    """Run directory: config, records, plot, and the trained model in `final`."""
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
