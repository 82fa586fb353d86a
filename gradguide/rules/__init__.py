"""The rules: options, and pure functions on Gram matrices ``[scopes, rows, rows]``.

``direction``, ``alignment`` and ``magnitude`` each hold one rule. ``decide`` applies them in order. ``span`` has the
algebra on coordinates, ``projection`` the quadratic program of several sources, ``triton`` the same rules on the
device. Start at ``decide``.
"""
