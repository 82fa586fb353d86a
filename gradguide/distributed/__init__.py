"""Support parameters that are sharded or replicated over ranks.

What a step communicates:

- The Gram matrix of each pass, if parameters are DTensors: one all-reduce per set of process groups for the gradient,
  and another one for the update if it is measured. Replicated parameters (DDP) need none.
- A digest of the options: one all-reduce per process group in the first step, and again after the options, the sources
  or the meshes change.
- ``ReplaySource``: the mean of its gradient, when it evaluates a batch. ``StructuredSource``: a gather of each DTensor
  that changes a layer. Captures sum their statistics once.

Modules:

- ``layouts``: placements of DTensors, and sums over their shards. Start here.
- ``ranks``: layouts and process groups of the parameters of one optimizer.
- ``agreement``: compares options between ranks.
- ``failures``: raises on every rank if one rank fails in a capture.
- ``resharded``: finds the DTensors that replaced named parameters.
- ``deepspeed``: detects ZeRO.
"""
