"""LoRA in every dialect, its relatives, and embeddings: opened, matched to a model's modules, merged."""
