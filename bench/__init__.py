"""Load commands that answer one question each: `python -m bench COMMAND`.

Each starts the servers that it needs on free ports of 127.0.0.1 and prints its progress, a table
and the targets; numbers, samples and a picture go to `bench/results/`.
"""
