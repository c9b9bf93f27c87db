"""The DeepSpeed flavours under test: configuration, the optimizer DeepSpeed picks for it, where it rounds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.engine import problem
from tests.engine.reference import Numerics


@dataclass(frozen=True)
class Flavour:
    """One way to configure DeepSpeed, with what is known about it beforehand."""

    name: str
    zero: dict[str, Any]
    wrapper: str  # class name of engine.optimizer
    numerics: Numerics = field(default_factory=Numerics)
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=lambda: TORCH_ADAM)

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self.zero["stage"]

    @property
    def mixed(self) -> bool:
        """Whether weights are bit16 and masters fp32."""
        return self.numerics.weights != torch.float32

    @property
    def offload(self) -> bool:
        """Whether optimizer state lives on the CPU, with DeepSpeed's own Adam."""
        return "offload_optimizer" in self.zero

    def deepspeed_config(self, kind: str) -> dict[str, Any]:
        """The dictionary for ``deepspeed.initialize``."""
        adam = {"lr": problem.BASE_LR, "betas": problem.BETAS, "eps": problem.EPS, "weight_decay": 0.0}
        half = self.numerics.weights == torch.float16
        return {
            "train_micro_batch_size_per_gpu": problem.MICRO_BATCH,
            "gradient_accumulation_steps": problem.ACCUMULATION,
            "gradient_clipping": problem.clip(kind),
            "optimizer": {"type": "AdamW", "params": adam | self.optimizer},
            "zero_optimization": dict(self.zero),
            "bf16": {"enabled": self.numerics.weights == torch.bfloat16},
            "fp16": {"enabled": half, "loss_scale": self.numerics.loss_scale if half else 0},
            **self.config,
        }


TORCH_ADAM = {"torch_adam": True}
BF16, FP16 = torch.bfloat16, torch.float16
ONCE = Numerics(BF16, accumulate=BF16, reduce=BF16)
EVERY = replace(ONCE, reduce_every_micro_batch=True)
EVERY_3 = replace(EVERY, wraps_modules=True)
SINGLE_EVERY = Numerics(reduce_every_micro_batch=True)
SINGLE_3 = replace(SINGLE_EVERY, wraps_modules=True)
PHANTOM = replace(ONCE, phantom_step=True)

ZERO_1_2, ZERO_3 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# Vectors stay whole on every rank and matrices are sharded, as in a model of real size.
THREE = {"stage": 3, "stage3_param_persistence_threshold": 100}
# ZeRO-3 replaces torch's linear layer by its own, whose backward rounds differently in bf16. Without it, the oracle
# agrees to the bit for steps on end; the offloading flavour keeps it.
PLAIN_LINEAR = {"memory_efficient_linear": False}
DEEPSPEED_ADAM: dict[str, Any] = {}  # FusedAdam, or DeepSpeedCPUAdam under offload; both compile on first use


def _by_name(*flavours: Flavour) -> dict[str, Flavour]:
    return {flavour.name: flavour for flavour in flavours}


FLAVOURS = _by_name(
    Flavour("zero0-fp32", {"stage": 0}, "AdamW"),
    Flavour("zero0-bf16", {"stage": 0}, "FP16_UnfusedOptimizer", PHANTOM),
    Flavour("zero0-bf16-fused", {"stage": 0}, "FP16_Optimizer", PHANTOM, optimizer=DEEPSPEED_ADAM),
    Flavour("zero1-fp32", {"stage": 1}, ZERO_1_2),
    Flavour("zero1-bf16", {"stage": 1}, ZERO_1_2, ONCE),
    Flavour(
        "bf16-optimizer",
        {"stage": 1},
        "BF16_Optimizer",
        Numerics(BF16, reduce=BF16),
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ),
    Flavour("zero2-fp32", {"stage": 2}, ZERO_1_2, SINGLE_EVERY),
    Flavour("zero2-bf16", {"stage": 2}, ZERO_1_2, EVERY),
    Flavour("zero2-fp32-fused", {"stage": 2}, ZERO_1_2, SINGLE_EVERY, optimizer=DEEPSPEED_ADAM),
    Flavour("zero2-offload-fp32", {"stage": 2} | OFFLOAD, ZERO_1_2, SINGLE_EVERY, optimizer=DEEPSPEED_ADAM),
    Flavour("zero2-offload-bf16", {"stage": 2} | OFFLOAD, ZERO_1_2, EVERY, optimizer=DEEPSPEED_ADAM),
    Flavour("zero3-fp32", THREE, ZERO_3, SINGLE_3),
    Flavour("zero3-bf16", THREE | PLAIN_LINEAR, ZERO_3, EVERY_3),
    Flavour("zero3-subgroups-fp32", THREE | {"sub_group_size": 3000}, ZERO_3, SINGLE_3),
    Flavour("zero3-offload-fp32", THREE | OFFLOAD, ZERO_3, SINGLE_3, optimizer=DEEPSPEED_ADAM),
    Flavour("zero3-offload-bf16", THREE | OFFLOAD, ZERO_3, EVERY_3, optimizer=DEEPSPEED_ADAM),
)

# One for each way of holding state: the others differ from one of these in precision or in DeepSpeed's code alone.
CORE = ("zero0-bf16", "zero1-fp32", "bf16-optimizer", "zero2-bf16", "zero2-offload-fp32", "zero3-fp32", "zero3-bf16")

# Options of ZeRO that change which of its code paths run.
VARIANTS = _by_name(
    Flavour("zero1-overlap", {"stage": 1, "overlap_comm": True}, ZERO_1_2),
    Flavour("zero2-scattered-gradients", {"stage": 2, "contiguous_gradients": False}, ZERO_1_2, SINGLE_EVERY),
    Flavour("zero2-all-reduce", {"stage": 2, "reduce_scatter": False}, ZERO_1_2, SINGLE_EVERY),
    Flavour("zero2-round-robin", {"stage": 2, "round_robin_gradients": True}, ZERO_1_2, SINGLE_EVERY),
    Flavour("zero2-small-buckets", {"stage": 2, "reduce_bucket_size": 5000}, ZERO_1_2, SINGLE_EVERY),
    Flavour(
        "zero2-bf16-fp32-accumulation",
        {"stage": 2},
        ZERO_1_2,
        Numerics(BF16, reduce=BF16, reduce_every_micro_batch=True),
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ),
    Flavour("zero3-all-sharded", {"stage": 3, "stage3_param_persistence_threshold": 0}, ZERO_3, SINGLE_3),
    Flavour("zero3-all-persistent", {"stage": 3}, ZERO_3, SINGLE_3),
    Flavour(
        "zero3-small-buckets",
        THREE | {"reduce_bucket_size": 5000, "stage3_prefetch_bucket_size": 3000, "stage3_max_live_parameters": 9000},
        ZERO_3,
        SINGLE_3,
    ),
    Flavour("zero3-fp32-fused", THREE, ZERO_3, SINGLE_3, optimizer=DEEPSPEED_ADAM),
    Flavour(
        "zero3-offload-everything",
        THREE | OFFLOAD | {"offload_param": {"device": "cpu"}},
        ZERO_3,
        SINGLE_3,
        optimizer=DEEPSPEED_ADAM,
    ),
    Flavour("zero3-no-overlap", THREE | {"overlap_comm": False}, ZERO_3, SINGLE_3),
)

HALF = Numerics(FP16, accumulate=FP16, reduce=FP16, loss_scale=128.0)
HALF_PRECISION = _by_name(
    Flavour("zero0-fp16", {"stage": 0}, "FP16_UnfusedOptimizer", replace(HALF, phantom_step=True)),
    Flavour("zero1-fp16", {"stage": 1}, ZERO_1_2, HALF),
    Flavour("zero2-fp16", {"stage": 2}, ZERO_1_2, replace(HALF, reduce_every_micro_batch=True)),
    Flavour(
        "zero3-fp16", THREE | PLAIN_LINEAR, ZERO_3, replace(HALF, reduce_every_micro_batch=True, wraps_modules=True)
    ),
)

# DeepSpeed's options that keep masters, gradients and moments in bf16 beside the bf16 weights.
BF16_STATES = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
LOW = replace(ONCE, masters=BF16)
LOW_EVERY = replace(LOW, reduce_every_micro_batch=True)
LOW_PRECISION_STATES = _by_name(
    Flavour("zero1-bf16-states", {"stage": 1}, ZERO_1_2, LOW, BF16_STATES),
    Flavour("zero2-bf16-states", {"stage": 2}, ZERO_1_2, LOW_EVERY, BF16_STATES),
    Flavour("zero3-bf16-states", THREE | PLAIN_LINEAR, ZERO_3, replace(LOW_EVERY, wraps_modules=True), BF16_STATES),
)

ALL = FLAVOURS | VARIANTS | HALF_PRECISION | LOW_PRECISION_STATES
