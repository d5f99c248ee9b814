"""Files that others named: opened safely, written whole, locked."""
