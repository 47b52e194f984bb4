"""How any program of the suite runs: command line, messages, files, processes, this machine."""
