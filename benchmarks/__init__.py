"""Benchmarks of Escort on whole networks and single layers; nothing here is imported by the package."""
