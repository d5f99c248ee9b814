"""Latent diffusion from the terminal. Importing the package loads nothing heavy."""

__version__ = "0.1.0"
