"""The picture set: emoji artwork in ten styles, split by concept, composed into captioned scenes."""
