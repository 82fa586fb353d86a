"""Device code. Kernels take tables of addresses instead of tensors, and are specialised on the layout of the rows.

- ``measure``: products of rows, summed per chunk and then per scope. Start here.
- ``combine``: linear combinations of rows.
- ``adam``: combines rows and steps Adam or AdamW in one pass. ``adam_preview`` computes products of that update first.
- ``columns``: shared by all. Locates a chunk, reads and writes columns, and computes rows from them.
"""
