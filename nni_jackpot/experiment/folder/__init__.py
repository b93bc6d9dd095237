"""The folder of a run: owner, files and replacement."""
