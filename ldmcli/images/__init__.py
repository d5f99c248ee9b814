"""Pictures as PNG, JPEG and WebP files: encoding, and metadata in both directions."""
