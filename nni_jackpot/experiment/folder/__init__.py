"""The folder of a run: who owns it, what lies in it, and how it is replaced."""
