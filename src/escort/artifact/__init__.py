"""Converted models in one file; docs/format.md describes it byte by byte."""
