"""Device code of the rules: the same decisions as in ``gradguide.rules``, one program per scope, all in float64."""
