"""The command line, ``gradguide demo | capture | inspect | plot``.

``main`` runs a command, ``arguments`` parses its arguments. Start there. ``capture`` makes the file of a structured
source. ``inspect_stored`` and ``inspect_structured`` read source files into JSON types, ``read_adapter`` reads
adapters. ``text_tables`` prints the result, ``picture`` draws it.
"""
