"""What conditions the U-Net beside the latents: prompts, and how they become numbers."""
