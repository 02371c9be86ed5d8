"""Scores of generated sets: features, distances, captions, and the table and plot over guidance. The verb is `eval`."""
