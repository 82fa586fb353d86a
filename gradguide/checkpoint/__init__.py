"""Save and load state dicts.

- ``state_dict``: adds GradGuide's tensors to the base's state dict and extracts them again. Start here.
- ``validation``: checks a state dict before anything is loaded.
"""
