"""The rules: options, and pure functions on Gram matrices ``[scopes, rows, rows]``.

``direction``, ``alignment`` and ``magnitude`` each hold one rule. ``decide`` applies them in order. ``span`` has the
algebra on coordinates, and ``projection`` the quadratic program of several sources. ``triton`` has the same rules as
device kernels. Start at ``decide``.
"""
