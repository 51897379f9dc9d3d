"""Train a GPT on your own text, and know that its learning rate is right."""

__version__ = "0.1.0"
