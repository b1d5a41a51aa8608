"""The whole configuration of a run: frozen, unknown keys forbidden, a description and a unit for every field.

Read by `mtkd.config.read.load_config`, printed as JSON Schema by `mtkd schema`. No torch is imported here.
"""

from mtkd.config.base import STAGE_PREFIX, Config, Name, Named, Positive, Share, check_name
from mtkd.config.cache import CacheConfig
from mtkd.config.chain import ChainConfig, Rung, Training
from mtkd.config.data import (
    BLANK,
    RANDOM_TOKENS,
    DataConfig,
    InfillConfig,
    TokenizerConfig,
    TransferConfig,
    prompt_parts,
)
from mtkd.config.model import ModelConfig, ShardedConfig, SliceConfig, TeacherConfig, VocabularyConfig
from mtkd.config.run import Comparison, EngineConfig, EvaluateConfig, RunConfig
from mtkd.config.stage import BatchConfig, EarlyStop, EqualTime, OptimizerConfig, ScoringBatchConfig, StageConfig

__all__ = [
    "BLANK",
    "RANDOM_TOKENS",
    "STAGE_PREFIX",
    "BatchConfig",
    "CacheConfig",
    "ChainConfig",
    "Comparison",
    "Config",
    "DataConfig",
    "EarlyStop",
    "EngineConfig",
    "EqualTime",
    "EvaluateConfig",
    "InfillConfig",
    "ModelConfig",
    "Name",
    "Named",
    "OptimizerConfig",
    "Positive",
    "RunConfig",
    "Rung",
    "ScoringBatchConfig",
    "ShardedConfig",
    "Share",
    "SliceConfig",
    "StageConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "Training",
    "TransferConfig",
    "VocabularyConfig",
    "check_name",
    "prompt_parts",
]
