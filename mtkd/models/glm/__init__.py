"""GLM of 2022 (Du et al., arXiv 2103.10360): model, converter of the published checkpoints, tokenizers, prompts.

Importing this package registers the type `glm_blocklm` with transformers' Auto classes; no remote code is needed.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from mtkd.data.glm_tokens import bert_tokenizer, gpt2_tokenizer
from mtkd.models.glm.classifier import GLMForSequenceClassification
from mtkd.models.glm.configuration import GLMConfig
from mtkd.models.glm.convert import convert_checkpoint, convert_state_dict
from mtkd.models.glm.heads import GLMForConditionalGeneration
from mtkd.models.glm.model import GLMModel
from mtkd.models.glm.prompts import blank_prompts, pieces
from mtkd.models.info import GLM

AutoConfig.register(GLM, GLMConfig)
AutoModel.register(GLMConfig, GLMModel)
AutoModelForCausalLM.register(GLMConfig, GLMForConditionalGeneration)
AutoModelForSeq2SeqLM.register(GLMConfig, GLMForConditionalGeneration)  # the name that the hub port goes by
AutoModelForSequenceClassification.register(GLMConfig, GLMForSequenceClassification)

__all__ = [
    "GLMConfig",
    "GLMForConditionalGeneration",
    "GLMForSequenceClassification",
    "GLMModel",
    "bert_tokenizer",
    "blank_prompts",
    "convert_checkpoint",
    "convert_state_dict",
    "gpt2_tokenizer",
    "pieces",
]
