"""The run folder: the interface between stages. What lies where in it, and how it is read and written."""
