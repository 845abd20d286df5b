"""The ensemble of a run or an export behind HTTP: one process, one device, one thread that owns the model."""
