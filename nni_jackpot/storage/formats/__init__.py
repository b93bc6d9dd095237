"""File formats, and the rules that are checked before any content is used."""
