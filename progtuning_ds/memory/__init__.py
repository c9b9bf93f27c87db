"""The model of memory: closed formulas for what a rank holds in every stage, and the search under a budget.

Standard library only. Tests compare it with live engines (to the byte for model states) and with what autograd saves.
"""

from progtuning_ds.memory.activations import Kept, TokenCosts, token_costs
from progtuning_ds.memory.architecture import ATTENTIONS, Architecture
from progtuning_ds.memory.choices import Choice, choices, divisors, fewest_waiting, leaving_parts, setup_of
from progtuning_ds.memory.costs import CostModel
from progtuning_ds.memory.footprint import CATEGORIES, MOMENTS, STATES, Footprint
from progtuning_ds.memory.from_deepspeed import deepspeed_zero, setup_from_deepspeed
from progtuning_ds.memory.parameters import Group, Param, ParamTable
from progtuning_ds.memory.remedies import Remedy, least_memory, remedies
from progtuning_ds.memory.request import Budget, Request
from progtuning_ds.memory.search import Failure, Outcome, Proposal, search, stage_cost
from progtuning_ds.memory.setup import KERNELS, Batch, EngineSetup
from progtuning_ds.memory.state import Flavour, gradient_bytes, owned_numel, state_bytes
from progtuning_ds.memory.units import format_bytes, parse_bytes
from progtuning_ds.memory.workload import Workload

__all__ = [
    "ATTENTIONS",
    "CATEGORIES",
    "KERNELS",
    "MOMENTS",
    "STATES",
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
    "choices",
    "deepspeed_zero",
    "divisors",
    "fewest_waiting",
    "format_bytes",
    "gradient_bytes",
    "least_memory",
    "leaving_parts",
    "owned_numel",
    "parse_bytes",
    "remedies",
    "search",
    "setup_from_deepspeed",
    "setup_of",
    "stage_cost",
    "state_bytes",
    "token_costs",
]
