"""The whole configuration of a run: frozen, unknown keys forbidden, a description and a unit for every field.

Read by `mtkd.config.read.load_config`, printed as JSON Schema by `mtkd schema`. No torch is imported here.
"""

from mtkd.config.answers import AnswersConfig, Extract
from mtkd.config.base import Config, Name, Named, Positive, Share, check_name
from mtkd.config.cache import CacheConfig
from mtkd.config.calibrate import CalibrateConfig
from mtkd.config.chain import ChainConfig, Rung, Training
from mtkd.config.composed import TEXTS
from mtkd.config.data import (
    BLANK,
    DataConfig,
    TransferConfig,
    prompt_parts,
)
from mtkd.config.engine import EngineConfig
from mtkd.config.evaluate import Comparison, EvaluateConfig
from mtkd.config.generate import GenerateConfig, KeepConfig
from mtkd.config.infill import InfillConfig
from mtkd.config.model import ModelConfig, SliceConfig, VocabularyConfig
from mtkd.config.refs import ENSEMBLE_PREFIX, StageRef, ensemble_of
from mtkd.config.rollout import RolloutConfig, SamplingConfig
from mtkd.config.run import RunConfig
from mtkd.config.source import MIX, RANDOM_TOKENS, STAGE
from mtkd.config.stage import BatchConfig, EarlyStop, EqualTime, OptimizerConfig, ScoringBatchConfig, StageConfig
from mtkd.config.teacher import OwnTeacher, ShardedConfig, TeacherConfig, teacher_config
from mtkd.config.tokenizer import TokenizerConfig

__all__ = [
    "BLANK",
    "MIX",
    "RANDOM_TOKENS",
    "STAGE",
    "TEXTS",
    "ENSEMBLE_PREFIX",
    "AnswersConfig",
    "BatchConfig",
    "CacheConfig",
    "CalibrateConfig",
    "ChainConfig",
    "Comparison",
    "Config",
    "DataConfig",
    "EarlyStop",
    "EngineConfig",
    "EqualTime",
    "EvaluateConfig",
    "Extract",
    "GenerateConfig",
    "InfillConfig",
    "KeepConfig",
    "ModelConfig",
    "Name",
    "Named",
    "OptimizerConfig",
    "OwnTeacher",
    "Positive",
    "RolloutConfig",
    "RunConfig",
    "Rung",
    "SamplingConfig",
    "ScoringBatchConfig",
    "ShardedConfig",
    "Share",
    "SliceConfig",
    "StageConfig",
    "StageRef",
    "TeacherConfig",
    "TokenizerConfig",
    "Training",
    "TransferConfig",
    "VocabularyConfig",
    "check_name",
    "ensemble_of",
    "prompt_parts",
    "teacher_config",
]
