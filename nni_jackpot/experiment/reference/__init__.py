"""The reference of all keys of a YAML file, generated from the schema."""
