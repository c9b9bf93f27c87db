"""Multi-rank tests: pools of live DeepSpeed ranks; a test asks the ``ranks`` fixture for them."""

from tests.ranks.pool import RankFailure, RankPool, RankPools, has_gpu_each

__all__ = ["RankFailure", "RankPool", "RankPools", "has_gpu_each"]
