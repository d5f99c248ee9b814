"""Names of the Hugging Face hub to files on disk."""
