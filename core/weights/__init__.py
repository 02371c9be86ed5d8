"""Importers of the weights that others published, under the names they used."""
