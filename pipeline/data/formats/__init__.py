"""One file per format: its records, each with the place it came from and with what is wrong with it.

Every reader holds a record at a time, so that neither a line without an end nor a large file fills the memory.
"""
