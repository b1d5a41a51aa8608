"""The teacher cache: what a teacher says about a data set, on disk, read by example number instead of run again."""

from __future__ import annotations

from mtkd.pool.cache.content import CacheContent, CacheOrigin
from mtkd.pool.cache.reader import CacheReader, VerifyResult, verify
from mtkd.pool.cache.records import Record, Records, make_records
from mtkd.pool.cache.writer import CacheWriter

__all__ = [
    "CacheContent",
    "CacheOrigin",
    "CacheReader",
    "CacheWriter",
    "Record",
    "Records",
    "VerifyResult",
    "make_records",
    "verify",
]
