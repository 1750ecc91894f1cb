"""The systems of the papers, each a file of options."""
