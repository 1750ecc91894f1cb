"""The systems of the papers, each a file of options under its name, with what it does and where that is from."""

from fastpo.loop.recipes.reading import ABOUT, TEXTS, example_of, names, options_of, read, text_of

__all__ = ["ABOUT", "TEXTS", "example_of", "names", "options_of", "read", "text_of"]
