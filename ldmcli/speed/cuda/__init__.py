"""What makes an NVIDIA GPU fast."""
