"""Data: files -> rows -> splits -> tokens -> batches. Checking a data file imports neither torch nor transformers."""
