"""What every other folder uses: ``checks`` of option values, ``names`` of parameters, ``atomic`` file writes."""
