"""The command line, ``gradguide demo | inspect | plot``.

``main`` parses arguments and runs a command. Start there. ``inspect`` reads source files into JSON types, ``tables``
prints them.
"""
