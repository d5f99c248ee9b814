"""What other programs' pictures say of their making, as fields of a request: a file a form. None of it is run."""
