"""Prompts to context: tokenising and text encoders."""
