"""The exact objective: terms on the gradient, added to the loss.

``options`` defines :class:`gradguide.Regularizer` and the derivative of its terms. Start there. ``evaluation`` adds the
terms in ``GradGuide.step(closure)``. ``loss`` is the plain function :func:`gradguide.guided_loss`.
"""
