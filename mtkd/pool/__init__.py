"""The teacher pool: teachers of any backend, one file each, behind one call."""

from mtkd.pool.backend import BACKENDS, Asked, Backend, Gives, Site
from mtkd.pool.base import ElsewhereModel, LiveModel, Teacher
from mtkd.pool.cached import CachedTeacher
from mtkd.pool.calibrated import CalibratedTeacher
from mtkd.pool.live import LiveTeacher
from mtkd.pool.offload import OffloadedModel, offload, stream
from mtkd.pool.pool import TeacherPool
from mtkd.pool.sharded import ShardedModel, shard

__all__ = [
    "BACKENDS",
    "Asked",
    "Backend",
    "Gives",
    "CachedTeacher",
    "CalibratedTeacher",
    "ElsewhereModel",
    "LiveModel",
    "LiveTeacher",
    "OffloadedModel",
    "ShardedModel",
    "Site",
    "Teacher",
    "TeacherPool",
    "offload",
    "shard",
    "stream",
]
