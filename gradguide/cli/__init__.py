"""The command line, ``gradguide demo | capture | inspect | plot``.

``main`` runs a command, ``arguments`` parses its arguments. Start there. ``capture`` makes the file of a structured
source. ``inspect`` and ``structured`` read source files into JSON types, ``adapter`` reads adapters. ``tables`` prints
the result, ``picture`` draws it.
"""
