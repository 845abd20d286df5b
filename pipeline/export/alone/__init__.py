"""What lets a folder of an export stand alone: how it is read, a script that reproduces a row, a model card."""
