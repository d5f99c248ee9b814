"""What the U-Net is told beside the latents: prompts, and how they become numbers."""
