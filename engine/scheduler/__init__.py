"""This package holds the scheduler, its KV block pool and its prefix cache. It does not know tensors or text."""

from __future__ import annotations

from .block_pool import BlockPool
from .kv_cache_manager import KVCacheManager
from .limits import SchedulerLimits, SchedulerStats
from .scheduler import Scheduler

__all__ = ["BlockPool", "KVCacheManager", "Scheduler", "SchedulerLimits", "SchedulerStats"]
