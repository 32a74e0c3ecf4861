"""Whole models: checked, traced, rewritten by passes, planned, swapped, and compared with what they were."""
