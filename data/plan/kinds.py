"""Images and videos, by the ending of a path."""

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def suffix_of(path: str) -> str:
    """The ending in lower case, with its dot."""
    return path[path.rfind(".") :].lower() if "." in path else ""
