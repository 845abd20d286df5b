"""Seeded hostile cases for the command line: every one is refused in a sentence or accepted, and leaves no trace.

A case is data (`case.Case`): files to lay out, and a command. Its number and the seed make it, so that `--case N`
shows it again. It runs in a forked child (`sandbox`) that has already imported everything; `kinds` says what is made.
Cases are hostile but fair: valid material (`material`), of which a part is replaced by something from `values`.
"""
