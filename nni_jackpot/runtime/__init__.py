"""Processes, files, random states and the terminal: nothing of this knows what a network is."""
