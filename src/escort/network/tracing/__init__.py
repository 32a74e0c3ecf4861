"""A model as graphs: what can be traced of it, and how."""
