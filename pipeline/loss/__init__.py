"""What a pass is trained on: the supervised loss of each kind of model, and the consistency term."""
