"""The model of memory: closed formulas for what a rank holds in every stage, and the search under a budget.

Standard library only. Tests compare it with live engines (to the byte for model states) and with what autograd saves.
"""

from progtuning_ds.memory.activations import Kept, TokenCosts, token_costs
from progtuning_ds.memory.architecture import ATTENTIONS, Architecture
from progtuning_ds.memory.costs import CostModel
from progtuning_ds.memory.footprint import CATEGORIES, MOMENTS, Footprint, Workload
from progtuning_ds.memory.from_deepspeed import deepspeed_zero, setup_from_deepspeed
from progtuning_ds.memory.parameters import Group, Param, ParamTable
from progtuning_ds.memory.search import Budget, Choice, Failure, Outcome, Proposal, Remedy, Request, remedies, search
from progtuning_ds.memory.setup import KERNELS, Batch, EngineSetup
from progtuning_ds.memory.state import Flavour, gradient_bytes, owned_numel, state_bytes
from progtuning_ds.memory.units import format_bytes, parse_bytes

__all__ = [
    "ATTENTIONS",
    "CATEGORIES",
    "KERNELS",
    "MOMENTS",
    "Architecture",
    "Batch",
    "Budget",
    "Choice",
    "CostModel",
    "EngineSetup",
    "Failure",
    "Flavour",
    "Footprint",
    "Group",
    "Kept",
    "Outcome",
    "Param",
    "ParamTable",
    "Proposal",
    "Remedy",
    "Request",
    "TokenCosts",
    "Workload",
    "deepspeed_zero",
    "format_bytes",
    "gradient_bytes",
    "owned_numel",
    "parse_bytes",
    "remedies",
    "search",
    "setup_from_deepspeed",
    "state_bytes",
    "token_costs",
]
