"""The formats of stored files, and the rules that are checked before a file is believed."""
