"""State dicts: ``state_dict`` puts GradGuide's tensors into the base's and takes them out again, ``validation`` checks
them before anything is loaded. Start at ``state_dict``.
"""
