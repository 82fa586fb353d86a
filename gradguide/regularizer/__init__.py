"""The exact objective: terms on the gradient, added to the loss.

``options`` has :class:`gradguide.Regularizer` and the derivative of its terms, ``evaluation`` adds them in
``GradGuide.step(closure)``, ``loss`` is the plain function :func:`gradguide.guided_loss`. Start at ``options``.
"""
