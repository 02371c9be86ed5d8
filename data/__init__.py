"""Where samples come from: one file a format, all of them map-style and pure functions of (seed, epoch, id)."""
