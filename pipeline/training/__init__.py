"""A run that is trained: its batches, its engine, what it saves, and what guards it."""
