"""Larger pictures by networks that were trained for it: their files, tiles, sizes and what pictures then say of it."""
