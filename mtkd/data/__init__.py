"""Text to batches: sources, tokenizers, tasks, padded batches, and the order they are trained in."""
