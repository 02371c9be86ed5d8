"""Command lines of the original systems in the words of this registry. Which flag became what stands in tables."""
