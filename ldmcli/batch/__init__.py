"""Prompt files to folders of pictures: rows, plan, workers, ledger."""
