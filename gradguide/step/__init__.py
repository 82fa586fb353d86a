"""One guided step.

``engine`` measures, decides and combines, then corrects the base's update. Start there.

- ``planner`` makes a ``plan``: the parameters that have gradients, grouped in ``buckets``. ``signature`` detects stale
  plans. ``naming`` resolves names and scopes. ``gradients`` rejects gradients that cannot be guided.
- ``scope_state`` stores statistics between steps. ``momentum`` reads the base's running average.
- ``adam_bound`` proves that an update of Adam is within its bound, so that it need not be measured.
- ``correction`` writes an update that rules changed. ``fused_adam`` runs Adam's step inside the combining pass.
- ``nonfinite`` skips steps. ``progress`` counts them. ``metrics`` converts the last step to floats.
"""
