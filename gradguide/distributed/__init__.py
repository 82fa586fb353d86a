"""Parameters over ranks.

``layouts`` reads how DTensors are placed and sums over their shards, ``agreement`` compares options between ranks,
``resharded`` finds the DTensors that replaced named parameters, ``deepspeed`` recognises ZeRO. Start at ``layouts``.
"""
