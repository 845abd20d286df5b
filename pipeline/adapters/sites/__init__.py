"""Where the base model's own activations are dropped: attention and feed-forward networks, family by family."""
