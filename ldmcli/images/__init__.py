"""Pictures on disk: PNG encoding, metadata in both directions, and writes that are whole or absent."""
