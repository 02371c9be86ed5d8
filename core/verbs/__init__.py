"""One module a verb. They are handed recipes, flags and lookups, and import no registry."""
