"""Device code of the rules: the same decisions as in ``gradguide.rules``, one program per scope, all in float64.

``decision`` has the kernels. ``algebra`` and ``projection`` are the device forms of ``rules.span`` and
``rules.projection``.
"""
