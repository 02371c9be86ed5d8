"""The engine: slots, the training loop, and what they stand on. Imports neither recipes nor the registry."""
