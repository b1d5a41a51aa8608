"""Text to batches: sources, tokenizers, tasks, padded batches, and the order they are trained in.

From a file to a batch, in this order:

1. `sources`: a source of the registry opens files, the hub or the standard library as a `Raw`: columns of text per
   split, a fingerprint of the content, and where each row comes from. `everyrow` and `choice` hold out and limit rows.
2. `labels` decides what the label column holds: classes, or the numbers of a regression.
3. `load.load_data` hands each split to the task as a `PrepareRequest`: rows, origin, tokenizer, classes.
4. The task (`tasks`) tokenises it (`encode`) and makes a `Split` of `Examples`, cut from `Documents`: `examples` has
   the plain tasks, `prompts` and `chat` questions with answers, `pairs` two segments, `blanks` GLM's own.
   `transfer` replaces tokens here, once. `masking` and `infilling` draw later, with each epoch.
5. The task also chooses how examples become rows: `collate.collate_tokens`, `collate_pairs` or `collate_laid`.
6. `sampler.Order` says which examples make which optimizer step; `sampler.TrainStream` deals them over ranks and
   micro-batches, and `Split.collate` reads and pads them: a `Batch`.
7. The stage's `transforms` may write other text, targets or views into a step's batches. Then positions are counted.
"""
