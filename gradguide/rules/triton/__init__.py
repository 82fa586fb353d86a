"""The rules as Triton kernels: one launch per decision, instead of dozens of small operations on Gram matrices.

``decide`` launches the kernels, with the functions of ``gradguide.rules.decide``. ``kernels`` is the device code.
"""
