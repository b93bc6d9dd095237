"""Bytes on disk, from outside and back: tickets and sparse checkpoints."""
