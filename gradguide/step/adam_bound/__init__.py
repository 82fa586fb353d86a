"""Prove before a step of Adam that its update is within ``Magnitude.max_update``, so that no pass measures it.

- ``ratio``: the proof, from the settings of the groups and the ratio of the moments. Start here.
- ``host``: ``AdamBound``, for a step of the base on a CPU, where the host reads the state.
- ``device``: ``DeviceAdamBound``, for a fused step on a device, without a host synchronization.

Call ``update_is_bounded`` before the step and ``after_step`` after it.
"""
