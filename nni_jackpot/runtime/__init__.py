"""Processes, files, random states and the terminal, independent of networks."""
