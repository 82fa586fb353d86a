"""Save and load state dicts.

- ``state_dict``: adds GradGuide's tensors to the base's state dict and extracts them again. Start here.
- ``entries``: keys of these tensors, and the format of the counters.
- ``validation``: checks a state dict before anything is loaded.
"""
