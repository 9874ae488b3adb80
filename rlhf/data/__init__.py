"""From rows of any source to batches of token ids with masks."""
