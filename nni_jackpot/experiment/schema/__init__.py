"""How a YAML file is read and checked."""
