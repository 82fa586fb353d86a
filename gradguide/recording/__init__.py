"""What a run leaves behind: figures of recorded metrics. Start at ``plotting.py``."""
