"""Noise schedules, guidance and samplers: torch only, knowing no model class."""
