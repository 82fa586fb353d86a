"""The command line, ``gradguide demo | inspect | plot``.

``main`` parses and dispatches, ``inspect`` reads source files as plain data, ``tables`` prints that. Start at ``main``.
"""
