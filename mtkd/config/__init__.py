"""The whole configuration of a run: frozen, unknown keys forbidden, a description and a unit for every field.

Read by `mtkd.configfile.load_config`, printed as JSON Schema by `mtkd schema`. No torch is imported here.
"""

from mtkd.config.base import STAGE_PREFIX, Config, Name, Named, Positive, Share, check_name
from mtkd.config.data import RANDOM_TOKENS, DataConfig, TokenizerConfig, TransferConfig
from mtkd.config.model import ModelConfig, SliceConfig, TeacherConfig, VocabularyConfig
from mtkd.config.run import Comparison, EngineConfig, EvaluateConfig, RunConfig
from mtkd.config.stage import BatchConfig, EqualTime, OptimizerConfig, StageConfig

__all__ = [
    "RANDOM_TOKENS",
    "STAGE_PREFIX",
    "BatchConfig",
    "Comparison",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EqualTime",
    "EvaluateConfig",
    "ModelConfig",
    "Name",
    "Named",
    "OptimizerConfig",
    "Positive",
    "RunConfig",
    "Share",
    "SliceConfig",
    "StageConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "TransferConfig",
    "VocabularyConfig",
    "check_name",
]
