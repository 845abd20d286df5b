"""llama.cpp's files: an adapter, and the model that it is merged into."""
