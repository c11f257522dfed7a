"""`idalloc-tcp top`: samples of a server, and a live view of them.

Only `live` and `screen` import rich.
"""
