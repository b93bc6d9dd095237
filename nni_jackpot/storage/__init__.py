"""Tickets and sparse checkpoints: files that are safe to read from untrusted sources."""
