"""The last module that the fork server of the tests imports: it prepares what every fork would do again."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("gpt2")  # builds a table that every save and load reads
# A collection of garbage then looks at a fork's own objects, not at a million of imported ones. DeepSpeed and mtkd
# collect several times per stage, half a second each without this.
gc.freeze()
