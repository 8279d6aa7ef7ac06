"""Merging in whole models: attach and detach, Auto classes, plans, calibration."""
