"""Support parameters that are sharded or replicated over ranks.

- ``layouts``: placements of DTensors, and sums over their shards. Start here.
- ``ranks``: layouts and process groups of the parameters of one optimizer.
- ``agreement``: compares options between ranks.
- ``resharded``: finds the DTensors that replaced named parameters.
- ``deepspeed``: detects ZeRO.
"""
