"""Requests that agree to latents and pixels: what starts, steers, denoises, enlarges and decodes them."""
