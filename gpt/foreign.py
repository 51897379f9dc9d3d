"""Logs that other programs wrote, read into a History."""
