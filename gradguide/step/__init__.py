"""One guided step.

``plan`` finds the parameters that have gradients and groups them in ``buckets``; ``engine`` measures, decides and
combines, then corrects the base's update. ``scope_state`` holds statistics between steps, ``snapshot`` the parameters
before the base's step, ``momentum`` the base's own running average. ``fused_adam`` makes Adam's step in the combining
pass, ``nonfinite`` skips a step, ``metrics`` turns the last one into numbers. Start at ``engine``.
"""
