"""The rules: options, and pure functions on Gram matrices ``[scopes, rows, rows]``.

- ``decide``: applies the rules in order. Start here.
- ``direction``, ``alignment``, ``magnitude``: one rule each. ``projection``: the quadratic program of ``alignment``.
- ``span``: the algebra on coordinates.
- ``triton``: the same decisions as device kernels.
"""
