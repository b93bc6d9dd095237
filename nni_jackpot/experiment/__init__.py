"""Experiments: one run, described by one YAML file, from pre-training to the figures that compare it."""
